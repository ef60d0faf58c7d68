"""The checker: from what was done (marks) and what was inflicted (faults) to a verdict. Pure; tests feed it forged histories.

What a job is owed: whose dispatch returned is run to its end ("done"), or, when it was made to fail, stands among the dead
("dead"); never nowhere. It may run again only for a reason. The reasons, and nothing else:

    asked       the run failed as it was told to, or was a poison that killed its own process
    killed      the run's process, template or daemon was killed before the run's end was settled
    poisoned    the same, by an inline job that killed the daemon of all of them
    ended       the daemon was told to stop, and the run was cut off
    gone        the run's daemon was stopped, or alone without its broker, for longer than its lease allows
    stale       the second run's was, between its reservation and its start, and what ran meanwhile is the newer reservation
    redispatch  a dispatcher that did not hear that it was dispatched did it again, and each of the two arrived when it did

A run that was over cannot be excused by what came later: its end counts as settled SETTLE_S after it, or after the end of a
trouble in which nothing could be settled. Each run excuses one run after it at most.

    lost          dispatched, never finished, and not in the broker
    late          still in the broker when it had to be empty
    buried        among the dead though it was owed to run, and not killed so often that this is right
    undead        owed to end among the dead, and does not stand there
    unexpected    run, though nobody tried to dispatch it; a follow-up of a run that failed, or a second one of a job
    duplicated    run again after a run that had finished
    unexplained   run again for none of the reasons above
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from .book import (
    ATTEMPTED,
    CANCELLED,
    DYING,
    FAILED,
    FINISHED,
    PROMISED,
    RETURNED,
    STARTED,
    UNKNOWN,
    Mark,
)

SETTLE_S: Final = 1.0  # from a job's last mark until its end is settled, on a machine that is busy
ORPHAN_S: Final = 0.5  # in which what a dead daemon had forked may still begin to run, before it is ended
STALE_S: Final = 0.5  # after an absence, until a daemon knows that its lease is lost
ALONE: Final = 2 / 3  # of a lease without a renewal may be its end
ADJACENT: Final = 0.1  # of a lease between two troubles is too little to get over the first
SILENT: Final = 0.95  # of a lease between two renewals, as seen on their way: the broker may have got them later
NEAR_S: Final = 5.0  # what was inflicted so long before and after is evidence, too
CRASHES: Final = 3  # that a job may have before it is dead

KILL, STOP, GONE, TROUBLE = "kill", "stop", "gone", "trouble"
_RANKS: Final = (GONE, STOP, KILL)  # which explains better why a run came to no end


class Fault(NamedTuple):
    """Something inflicted on `daemon` ("a.3"; "": on every one), or on its process `pid` alone."""

    how: str  # KILL, STOP (told to stop), TROUBLE (it cannot settle or renew), or what follows from that: GONE, its lease is lost
    nemesis: str
    began: float
    ended: float
    daemon: str = ""
    pid: int = 0


class Run(NamedTuple):
    """One run of a job. `ended` and `how` None: its process told no more."""

    job: str
    id: str
    daemon: str
    pid: int
    parent: int
    attempt: str  # as the job was told
    started: float
    ended: float | None
    how: str | None  # FINISHED, FAILED, CANCELLED, DYING


class Again(NamedTuple):
    """A run that came after another one of the same job, and why."""

    run: Run
    before: Run
    reason: str  # "" when there is none
    fault: Fault | None


class Verdict(NamedTuple):
    dispatched: int
    unknown: int  # dispatches that raised and never returned
    unknown_ran: int  # of these, jobs that were run all the same
    runs: int
    done: int
    dead: int  # that were to be
    lost: Sequence[str]
    late: Sequence[str]
    buried: Sequence[str]
    undead: Sequence[str]
    unexpected: Sequence[str]
    asked: int  # runs again because the job asked for it
    duplicated: Mapping[str, int]  # by cause
    recovered: Mapping[str, int]  # runs cut off that were followed by another, by cause
    unexplained: Sequence[Again]
    evidence: Sequence[str]  # on the jobs above: the book, what was inflicted around them, the renewals seen; line by line
    at_once: int  # runs that began before an earlier one of the same job had ended
    settle_lag_s: float  # the longest from a finish to a kill that undid it
    since_fault_s: Sequence[float]  # from a kill to the next start of the job, sorted
    since_restart_s: Sequence[float]  # from the restart of what was killed, sorted

    @property
    def guilty(self) -> bool:
        return any((self.lost, self.late, self.buried, self.undead, self.unexpected, self.unexplained))


class History:
    """Marks as they come, so that a run in progress can be watched."""

    def __init__(self) -> None:
        self.owed: dict[str, str] = {}  # of all that were attempted
        self.attempts: dict[str, list[float]] = defaultdict(list)
        self.returned: set[str] = set()
        self.unknown: set[str] = set()
        self.finished: set[str] = set()
        self.failures: Counter[str] = Counter()
        self.deaths: Counter[str] = Counter()
        self.promises: dict[str, tuple[str, str]] = {}  # id of a follow-up -> job and run that promised it
        self.killed_by_jobs: dict[str, float] = {}  # daemon -> when an inline job began to kill it
        self.started = 0
        self._marks: dict[str, list[Mark]] = defaultdict(list)
        self._starts: dict[tuple[str, str], Mark] = {}
        self._ends: dict[tuple[str, str], Mark] = {}

    def add(self, marks: Iterable[Mark]) -> None:
        for mark in marks:
            key = (mark.job, mark.run)
            self._marks[mark.job].append(mark)
            if mark.kind == ATTEMPTED:
                self.owed[mark.job] = mark.word
                self.attempts[mark.job].append(mark.at)
            elif mark.kind == RETURNED:
                self.returned.add(mark.job)
            elif mark.kind == UNKNOWN:
                self.unknown.add(mark.job)
            elif mark.kind == STARTED:
                self.started += 1
                self._starts[key] = mark
            elif mark.kind == PROMISED:
                self.promises[mark.word] = key
            else:
                self._ends[key] = mark
                if mark.kind == FINISHED:
                    self.finished.add(mark.job)
                elif mark.kind == FAILED:
                    self.failures[mark.job] += 1
                elif mark.kind == DYING:
                    self.deaths[mark.job] += 1
                    if mark.word == "daemon":
                        self.killed_by_jobs[mark.daemon] = mark.at

    def waiting(self) -> int:
        """Jobs whose dispatch returned and that have not ended, as far as marks tell."""
        return sum(
            1 for job in self.returned
            if job not in self.finished and not (self.owed[job] == "dead" and self.failures[job] + self.deaths[job] >= 2)
        )  # fmt: skip

    def times(self, jobs: Iterable[str]) -> list[float]:
        return [mark.at for job in jobs for mark in self._marks.get(job, [])]

    def told(self, jobs: Iterable[str]) -> list[str]:
        """Every mark of `jobs`, and of those that promised one of them, a line each."""
        lines = []
        for id in dict.fromkeys(id for job in jobs for id in (self.promises.get(job, (job,))[0], job)):
            for mark in self._marks.get(id, []):
                who = f"run {mark.run} on {mark.daemon} ({mark.pid} of {mark.parent})"
                lines.append(f"{id} {mark.kind} at {mark.at:.3f}, {who}: {mark.word}")
        return lines

    def runs(self) -> dict[str, list[Run]]:
        """By job, in the order of their starts."""
        found: dict[str, list[Run]] = defaultdict(list)
        for key, start in self._starts.items():
            end = self._ends.get(key)
            ended, how = (None, None) if end is None else (end.at, end.kind)
            found[start.job].append(Run(*key, start.daemon, start.pid, start.parent, start.word, start.at, ended, how))
        for runs in found.values():
            runs.sort(key=lambda run: run.started)
        return found


def absences(faults: Sequence[Fault], lease_s: float) -> list[Fault]:
    """A daemon's troubles of its own that last so long, or add up to it with others, that its lease may have come to an end.

    A lease is renewed every third of it, so two thirds without a renewal may be its end. What hits every daemon is no reason to
    expire anything (sweepers know that the broker was away), so such troubles alone add up to nothing.
    """
    found = []
    for daemon in sorted({fault.daemon for fault in faults if fault.daemon and fault.how == TROUBLE}):
        row: list[Fault] = []
        mine = [fault for fault in faults if fault.how == TROUBLE and fault.daemon in ("", daemon)]
        for fault in [*sorted(mine, key=lambda fault: fault.began), None]:
            if row and (fault is None or fault.began > max(each.ended for each in row) + lease_s * ADJACENT):
                found += _absence(row, daemon, row[0].began, max(each.ended for each in row), lease_s * ALONE)
                row = []
            if fault is not None:
                row.append(fault)
    return found


def silences(renewals: Mapping[str, Sequence[float]], faults: Sequence[Fault], lease_s: float) -> list[Fault]:
    """The same where it is known when each daemon's renewals went to the broker, and so when its lease did come to an end.

    `renewals`: by daemon, the time of its start first, that of its end last, which is the end of the run for one that lived so
    long: it may have fallen silent for good.
    """
    found = []
    for daemon, times in renewals.items():
        for last, following in pairwise(times):
            if following - last > lease_s * SILENT:
                mine = [fault for fault in faults if fault.how == TROUBLE and fault.daemon in ("", daemon)]
                row = [fault for fault in mine if fault.began < following and fault.ended > last]
                found += _absence(row, daemon, last, following, 0.0)
    return found


def _absence(row: Sequence[Fault], daemon: str, began: float, ended: float, least_s: float) -> list[Fault]:
    if ended - began < least_s or not any(fault.daemon for fault in row):
        return []
    return [Fault(GONE, "+".join(dict.fromkeys(fault.nemesis for fault in row)), began, ended, daemon)]


def judge(
    history: History, faults: Sequence[Fault], left: Mapping[str, str], restarts: Mapping[str, float], settle_s: float = SETTLE_S,
    renewals: Mapping[str, Sequence[float]] | None = None,
) -> Verdict:  # fmt: skip
    """The verdict. `left`: what stands in the broker at the end, id -> state. `restarts`: "a.3" -> when that process began.

    `renewals`, as `silences` has them, are told with a conviction and decide nothing.
    """
    court = _Court(history, faults, restarts, settle_s)
    runs = history.runs()
    again = [each for job in runs for each in court.again(runs[job])]
    dead = {id for id, state in left.items() if state == "dead"}
    unexpected = [job for job in runs if job not in history.owed and job not in history.promises]
    unexpected += court.false_follow_ups(runs)
    lost, buried = [], []
    follow_ups = court.missing_follow_ups(runs, left)
    for job in history.returned:
        if job not in history.finished and job not in left:
            lost.append(job)
    for job in dead:
        if history.owed.get(job, "done") == "done" and not court.was_killed_often(runs.get(job, [])):
            buried.append(job)
    undead = [job for job in history.returned if history.owed[job] == "dead" and job in left and job not in dead]
    undead += [job for job in history.returned if history.owed[job] == "dead" and job in history.finished]
    late = sorted(id for id, state in left.items() if state != "dead")
    unexplained = [each for each in again if not each.reason]
    never = history.unknown - history.returned
    duplicates = [each for each in again if each.before.how == FINISHED]
    cut = [each for each in again if each.before.how in (None, CANCELLED) and each.fault is not None]
    kills = [each for each in again if each.fault is not None and each.fault.how == KILL]
    accusing = [*lost, *late, *buried, *undead, *unexpected, *(each.run.job for each in unexplained)]
    accused = [run for job in dict.fromkeys(accusing) for run in runs.get(job, [])]
    return Verdict(
        dispatched=len(history.returned),
        unknown=len(never),
        unknown_ran=len(never & runs.keys()),
        runs=sum(map(len, runs.values())),
        done=len(history.finished),
        dead=sum(1 for job in dead if history.owed.get(job) == "dead"),
        lost=sorted(lost) + follow_ups,
        late=late,
        buried=sorted(buried),
        undead=sorted(set(undead)),
        unexpected=sorted(unexpected),
        asked=sum(1 for each in again if each.reason == "asked"),
        duplicated=Counter(each.reason or "unexplained" for each in duplicates),
        recovered=Counter(each.reason for each in cut),
        unexplained=unexplained,
        evidence=[*court.evidence(accusing), *renewals_told(accused, renewals or {})],
        at_once=sum(1 for each in again if each.before.ended is not None and each.before.ended > each.run.started),
        settle_lag_s=max((_lag(each) for each in duplicates if each.fault in {k.fault for k in kills}), default=0.0),
        since_fault_s=sorted(each.run.started - each.fault.ended for each in kills if each.fault is not None),
        since_restart_s=sorted(court.since_restart(kills)),
    )


def renewals_told(runs: Sequence[Run], renewals: Mapping[str, Sequence[float]]) -> list[str]:
    """When the daemons of `runs` renewed their leases around them, a line each."""
    spans = [(run.started - NEAR_S, (run.ended or run.started) + NEAR_S) for run in runs]
    lines = []
    for daemon in sorted({run.daemon for run in runs} & renewals.keys()):
        began, *times = renewals[daemon]
        seen = [f"{at:.3f}" for at in times if any(since <= at <= until for since, until in spans)]
        lines.append(f"{daemon} began at {began:.3f}, then renewed (or ended) at {', '.join(seen) or 'no time around'}")
    return lines


class _Court:
    def __init__(self, history: History, faults: Sequence[Fault], restarts: Mapping[str, float], settle_s: float) -> None:
        self._history = history
        self._settle_s = settle_s
        self._restarts = restarts
        poisons = [
            Fault(KILL, "poison", at, at, daemon) for daemon, at in history.killed_by_jobs.items()
        ]
        self._excuses = sorted(
            (fault for fault in [*faults, *poisons] if fault.how != TROUBLE), key=lambda fault: fault.began
        )
        self._troubles = sorted((fault for fault in faults if fault.how in (TROUBLE, GONE)), key=lambda fault: fault.began)

    def evidence(self, jobs: Sequence[str]) -> list[str]:
        """What the book says of `jobs`, and what was inflicted while they were there, or just before."""
        times = self._history.times(jobs)
        if not times:
            return []
        faults = sorted({*self._excuses, *self._troubles}, key=lambda fault: fault.began)
        near = [fault for fault in faults if fault.ended > min(times) - NEAR_S and fault.began < max(times) + NEAR_S]
        return [*self._history.told(jobs), *map(_told, near)]

    def again(self, runs: Sequence[Run]) -> list[Again]:
        """Every run but the first, with the reason for it: one of the runs before that excuses it, the latest first."""
        found: list[Again] = []
        unused: list[Run] = []
        redispatched = 0
        for before, run in pairwise(runs):
            unused.append(before)
            for candidate in reversed(unused):
                reason, fault = self._excuse(candidate, run)
                if reason:
                    unused.remove(candidate)
                    found.append(Again(run, candidate, reason, fault))
                    break
            else:
                by_dispatch = self._dispatches(run) - 1 > redispatched
                redispatched += by_dispatch
                found.append(Again(run, before, "redispatch" if by_dispatch else "", None))
        return found

    def _excuse(self, before: Run, run: Run) -> tuple[str, Fault | None]:
        if before.how in (FAILED, DYING):
            return "asked", None
        by = self._settled_by(before)
        hits = [fault for fault in self._excuses if fault.began <= run.started and self._hits(fault, before, by)]
        if hits:  # the closest: its own process' end before its daemon's, an end before an absence, and of these the latest
            fault = max(hits, key=lambda fault: (fault.pid != 0, _RANKS.index(fault.how), fault.began))
            words = {KILL: "killed", STOP: "ended", GONE: "gone"}
            return "poisoned" if fault.nemesis == "poison" else f"{words[fault.how]}: {fault.nemesis}", fault
        for fault in self._excuses:
            if fault.how == GONE and self._is_stale(run, before, fault):
                return f"stale: {fault.nemesis}", fault
        return "", None

    def _hits(self, fault: Fault, run: Run, by: float) -> bool:
        """Whether `run`, whose end was settled `by` then, was going on or not settled yet when `fault` came."""
        if fault.daemon and fault.daemon != run.daemon:
            return False
        if fault.pid and fault.pid not in (run.pid, run.parent):
            return False
        until = fault.ended + (ORPHAN_S if fault.how == KILL and not fault.pid else 0.0)
        return run.started <= until and fault.began <= by

    def _is_stale(self, run: Run, before: Run, fault: Fault) -> bool:
        """Whether `run` began by a reservation older than that of `before`, just after the absence in which it lost it."""
        in_time = fault.began <= run.started <= fault.ended + STALE_S
        return fault.daemon == run.daemon and in_time and _number(run.attempt) < _number(before.attempt)

    def _settled_by(self, run: Run) -> float:
        """When the end of `run` must have been settled at the latest."""
        if run.ended is None:
            return float("inf")
        by = run.ended + self._settle_s
        for trouble in self._troubles:
            if trouble.began <= by and trouble.ended > by - self._settle_s and trouble.daemon in ("", run.daemon):
                by = trouble.ended + self._settle_s
        return by

    def was_killed_often(self, runs: Sequence[Run]) -> bool:
        """Whether so much was done to a job that it may be dead."""
        cut = 0
        for run in runs:
            by = self._settled_by(run)
            cut += run.how != FINISHED and any(self._hits(fault, run, by) for fault in self._excuses)
        return cut >= CRASHES

    def false_follow_ups(self, runs: Mapping[str, Sequence[Run]]) -> list[str]:
        """Follow-ups of runs that did not finish, and all but one of those of each job.

        A job that was dispatched twice, since its dispatcher was killed before it heard of the first one, may be done and gone
        when the second arrives, and is a new job then, which may have a follow-up of its own.
        """
        false, kept = [], Counter[str]()
        for id, (job, run_id) in self._history.promises.items():
            if id not in runs:
                continue
            maker = next((run for run in runs.get(job, []) if run.id == run_id), None)
            if maker is None or maker.how != FINISHED or kept[job] >= max(1, self._dispatches(maker)):
                false.append(id)
            kept[job] += 1
        return false

    def _dispatches(self, run: Run) -> int:
        """How often its job was dispatched, or tried to be, before `run`."""
        return sum(1 for at in self._history.attempts.get(run.job, []) if at < run.started)

    def missing_follow_ups(self, runs: Mapping[str, Sequence[Run]], left: Mapping[str, str]) -> list[str]:
        """Jobs that finished after promising a follow-up, and none was run."""
        kept = {job for id, (job, _) in self._history.promises.items() if id in self._history.finished or id in left}
        finished = {
            job for job, run_id in self._history.promises.values()
            if job in self._history.finished and job not in left
        }  # fmt: skip
        return sorted(f"{job}'s follow-up" for job in finished - kept)

    def since_restart(self, kills: Iterable[Again]) -> list[float]:
        """Seconds from the start of the process that took the place of the one killed, or from the kill if there was none."""
        waits = []
        for each in kills:
            assert each.fault is not None
            name, _, number = each.before.daemon.partition(".")
            began = self._restarts.get(f"{name}.{int(number) + 1}") if number.isdigit() and not each.fault.pid else None
            since = each.fault.ended if began is None or began > each.run.started else began
            waits.append(max(0.0, each.run.started - since))
        return waits


def _told(fault: Fault) -> str:
    whose = f"{fault.daemon or 'all'} {fault.pid or ''}".strip()
    return f"{fault.how} by {fault.nemesis} of {whose} from {fault.began:.3f} to {fault.ended:.3f}"


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _lag(each: Again) -> float:
    if each.fault is None or each.before.ended is None:
        return 0.0
    return max(0.0, each.fault.began - each.before.ended)
