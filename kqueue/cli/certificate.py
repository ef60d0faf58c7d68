"""Death certificates for people: one in full, or why a job is dead in a line. What somebody else wrote shows as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..codec import from_json
from ..errors import EnvelopeError
from .text import block, duration, json_text, moment

if TYPE_CHECKING:
    from ..brokers.base import Row

LONGEST: Final = 160  # characters of a reason in a list
FAR: Final = 1e11  # seconds since 1970: the year 5138
_STRANGE: Final = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


class Death(NamedTuple):
    """What the last certificate of a dead job says. None: it does not."""

    died_at: float | None = None  # seconds since 1970
    cause: str | None = None
    error: str | None = None  # class and message, or the signal or status that ended its process


def death(row: Row) -> Death:
    """Of a dead job."""
    for certificate in row.certificates[-1:]:
        try:
            return _death(from_json(certificate))
        except (EnvelopeError, *_STRANGE):
            pass
    return Death()


def _death(certificate: Mapping[str, Any]) -> Death:
    error, code = certificate["error"], certificate["exit_code"]
    if error:
        text = f"{error['class']}: {error['message']}"
    else:
        text = certificate["signal"] or ("" if code is None else f"status {code}")
    if not 0 <= certificate["ended_at"] < FAR:
        raise ValueError("no time of this world")
    return Death(round(float(certificate["ended_at"]), 3), str(certificate["cause"]), text or None)


def reason(death: Death) -> str | None:
    """Its error in a line of a list."""
    line = (death.error or "").strip().split("\n", 1)[0]
    return (line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…") or None


def told(certificate: Any) -> str:
    """All that a certificate says, in lines; the first is empty."""
    try:
        return _told(certificate)
    except _STRANGE:
        return f"\nanother    {json_text(certificate)}"  # not of this version, or not of KQueue at all


def _told(certificate: Mapping[str, Any]) -> str:
    code, run = certificate["exit_code"], certificate["attempt"]
    exit = f" ({certificate['signal'] or f'status {code}'})" if certificate["signal"] or code is not None else ""
    head = f"attempt {run}" if run else "no attempt"  # 0: it was not run, or nobody knows what happened to it
    lines = [
        f"\n{head}  {certificate['cause']}{exit}, ended by {certificate['ended_by']}",
        f"           {moment(certificate['ended_at'])}{_where(certificate)}",
        *_used(certificate),
    ]
    if certificate["limits"]:
        lines.append("limits     " + ", ".join(f"{name} {value:g}" for name, value in certificate["limits"].items()))
    if certificate.get("why"):
        lines.append(f"then       {certificate['then']}: {certificate['why']}")
    if certificate["error"]:
        error = certificate["error"]
        lines.append(block(error.get("traceback") or f"{error['class']}: {error['message']}", "  | "))
    if certificate.get("stack"):
        lines += ["stood at", block(certificate["stack"], "  | ")]
    if certificate["output"]:
        lines += ["output", block(certificate["output"], "  > ")]
    return "\n".join(lines)


def _where(certificate: Mapping[str, Any]) -> str:
    strategy, pid = certificate["strategy"], certificate["pid"]
    return (f", {strategy}" if strategy not in ("", "none") else "") + (f", pid {pid}" if pid else "")


def _used(certificate: Mapping[str, Any]) -> list[str]:
    """Nothing where nothing was measured: of a run whose supervisor was lost, or one that never began."""
    seconds, cpu_s = certificate["duration_s"], certificate["cpu_user_s"] + certificate["cpu_system_s"]
    mib = certificate["max_memory_mib"]
    return [f"used       {duration(seconds)}, {cpu_s:.3g} s of CPU, {mib:.0f} MiB"] if seconds or cpu_s or mib else []
