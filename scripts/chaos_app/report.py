"""The verdict, for people (a table), for pages (Markdown) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from .checker import Again, Verdict

SHOWN: Final = 10  # examples of each kind of failure
EVIDENCE: Final = 100  # lines of the book


class Result(NamedTuple):
    """One run of the harness. Times in seconds."""

    scenario: str
    broker: str
    seed: int
    command: str  # that replays it
    verdict: Verdict
    strikes: Mapping[str, int]  # how often, by nemesis
    lacking: Mapping[str, str]  # nemesis -> why it was left out
    mishaps: Sequence[str]  # what died or outlived by itself, and bounds that were missed
    took_s: float
    healed_to_empty_s: float  # from the end of the last nemesis to the end of the last job
    bound_s: float
    more: Mapping[str, str]  # rows of this scenario alone

    @property
    def guilty(self) -> bool:
        return self.verdict.guilty or bool(self.mishaps)


def percentile(values: Sequence[float], share: float) -> float | None:
    """Of sorted `values`; None: there are none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else None


def rows(result: Result) -> list[tuple[str, str]]:
    verdict = result.verdict
    found = [
        ("jobs dispatched (dispatch returned)", str(verdict.dispatched)),
        ("dispatches that raised, of these run", f"{verdict.unknown}, {verdict.unknown_ran}"),
        ("runs", str(verdict.runs)),
        ("finished", str(verdict.done)),
        ("dead, as they were to be", str(verdict.dead)),
        ("run again because they asked for it", str(verdict.asked)),
        ("**lost**", str(len(verdict.lost))),
        ("**unexpected**", str(len(verdict.unexpected))),
        ("**late** (still queued at the end)", str(len(verdict.late))),
        ("**buried or undead**", str(len(verdict.buried) + len(verdict.undead))),
        ("**unexplained second runs**", str(len(verdict.unexplained))),
        ("cut off and recovered", _causes(verdict.recovered)),
        ("duplicated (run again after finishing)", _causes(verdict.duplicated)),
        ("longest from a finish to the kill that undid it", f"{verdict.settle_lag_s * 1000:.0f} ms"),
        ("runs that overlapped another of their job", str(verdict.at_once)),
        ("recovery from the kill, p50 / p99", _times(verdict.since_fault_s)),
        ("recovery from the restart, p50 / p99", _times(verdict.since_restart_s)),
        ("strikes", _causes(result.strikes)),
        *((f"left out: {name}", why) for name, why in result.lacking.items()),
        ("last nemesis to last finish", f"{result.healed_to_empty_s:.1f} s (bound {result.bound_s:.0f} s)"),
        *result.more.items(),
        ("took", f"{result.took_s:.0f} s"),
    ]
    return found


def table(result: Result) -> str:
    lines = [f"{result.scenario} on {result.broker}, seed {result.seed}", ""]
    lines += [f"  {name.replace('**', ''):50} {value}" for name, value in rows(result)]
    lines += ["", *(f"  {line}" for line in _failures(result))]
    lines += [f"  {'GUILTY' if result.guilty else 'nothing lost, nothing unexplained'}; again: {result.command}"]
    return "\n".join(lines)


def markdown(results: Sequence[Result]) -> str:
    """One table, a column a run."""
    every = [dict(rows(result)) for result in results]
    names = list(dict.fromkeys(name for column in every for name in column))
    lines = ["| | " + " | ".join(f"{result.scenario}, {result.broker}" for result in results) + " |"]
    lines += ["|---|" + "---|" * len(results)]
    lines += [f"| {name} | " + " | ".join(column.get(name, "—") for column in every) + " |" for name in names]
    return "\n".join([*lines, "", *(f"    {result.command}" for result in results)])


def as_json(result: Result) -> dict[str, Any]:
    verdict = result.verdict._asdict()
    verdict["unexplained"] = [_again(each) for each in result.verdict.unexplained]
    return {**result._asdict(), "verdict": verdict, "guilty": result.guilty}


def _failures(result: Result) -> list[str]:
    verdict = result.verdict
    lines = []
    for name in ("lost", "unexpected", "late", "buried", "undead"):
        ids = getattr(verdict, name)
        if ids:
            lines.append(f"{name}: {', '.join(ids[:SHOWN])}{' …' if len(ids) > SHOWN else ''}")
    lines += [f"unexplained: {_again(each)}" for each in verdict.unexplained[:SHOWN]]
    lines += [f"evidence: {line}" for line in verdict.evidence[:EVIDENCE]]
    return lines + [f"mishap: {mishap}" for mishap in result.mishaps]


def _again(each: Again) -> str:
    before, run = each.before, each.run
    ended = f"ended {before.how} at {before.ended:.3f}" if before.ended is not None else "told no end"
    first = f"{run.job}: run {before.attempt} on {before.daemon} from {before.started:.3f}, {ended}"
    return f"{first}; run {run.attempt} on {run.daemon} at {run.started:.3f}"


def _causes(causes: Mapping[str, int]) -> str:
    total = sum(causes.values())
    parts = ", ".join(f"{name} {count}" for name, count in sorted(causes.items(), key=lambda item: -item[1]))
    return f"{total} ({parts})" if parts else "0"


def _times(seconds: Sequence[float]) -> str:
    middle, late = percentile(seconds, 0.5), percentile(seconds, 0.99)
    return f"{middle:.2f} s / {late:.2f} s" if middle is not None and late is not None else "—"
