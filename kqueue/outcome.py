"""How one attempt of a job ended, and the death certificate that says so.

A strategy returns an `Outcome` and nothing else; what becomes of the job then is the runtime's to decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .errors import EnvelopeError

if TYPE_CHECKING:
    from .dispatch import NewJob

CAUSES: Final = ("ok", "exception", "timeout", "memory", "cpu", "signal", "exit", "lost", "cancelled", "refused")
ENDED_BY: Final = ("job", "supervisor", "kernel", "operator", "shutdown")


class Outcome(NamedTuple):
    """How one attempt ended: what a strategy returns, and what the death certificate says."""

    cause: str  # one of CAUSES
    ended_by: str = "job"  # one of ENDED_BY
    result: bytes | None = None  # JSON; None: there is none
    error: Mapping[str, Any] | None = None  # class, message, traceback, and `mro` by name
    exit_code: int | None = None
    signal: str | None = None
    pid: int | None = None  # of the child; None: it ran inline
    duration_s: float = 0.0
    cpu_user_s: float = 0.0
    cpu_system_s: float = 0.0
    max_memory_mib: float = 0.0  # peak resident memory of the child; inline: what it had grown by; 0: not measured
    limits: Mapping[str, float] = {}  # those that applied
    stack: str = ""  # where it stood when it had to be killed, or crashed: each thread's, the innermost line first
    output: str = ""  # the last 8 KiB of stdout and stderr
    follow_ups: tuple[NewJob, ...] = ()  # ok: to be enqueued with its ack; else empty
    asked: str = ""  # "retry" or "discard": it raised kqueue.Retry or kqueue.Discard; "": neither
    retry_in_s: float | None = None  # the delay of its Retry; None: it gave none
    backoff_s: float | None = None  # what its backoff function said; None: nothing of use, or there is none
    backoff_failed: str = ""  # why that said nothing of use
    error_args: list[Any] | None = None  # of the error of an offloaded call (execution/call_errors.py); None: there are none

    @property
    def ok(self) -> bool:
        return self.cause == "ok"

    def summary(self) -> str:
        """One line for a log: "timeout: SIGKILL", "ValueError: no such file", "signal: SIGKILL: sent by somebody else", …"""
        if self.error is not None:
            message = str(self.error.get("message", "")).split("\n", 1)[0]
            told = f"{self.error.get('class')}: {message}" if message else str(self.error.get("class"))
            return told if self.error.get("class") != self.signal else f"{self.cause}: {told}"
        if self.signal is not None:
            return f"{self.cause}: {self.signal}"
        return self.cause if self.exit_code is None else f"{self.cause}: status {self.exit_code}"

    def certificate(self, *, attempt: int, strategy: str, ended_at: float, then: str = "", why: str = "") -> dict[str, Any]:
        """The death certificate: all there is to say, as JSON values. `ended_at`: seconds since 1970.

        `then`, `why`: what became of the job, and by which rule; "": nobody decided that yet, or it needs no saying.
        """
        fields = self._asdict()
        for name in _NOT_TOLD:
            fields.pop(name)
        for name in ("duration_s", "cpu_user_s", "cpu_system_s", "max_memory_mib"):
            fields[name] = round(fields[name], 4)
        if self.error is not None:
            fields["error"] = {key: value for key, value in self.error.items() if key != "mro"}
        fields.update(limits=dict(self.limits), ended_at=round(ended_at, 3))
        return {"attempt": attempt, "strategy": strategy, **fields, "then": then, "why": why}


# Not in a certificate: the first two are kept elsewhere, and of the others `why` tells what came of them.
_NOT_TOLD: Final = ("result", "follow_ups", "asked", "retry_in_s", "backoff_s", "backoff_failed", "error_args")


def command_outcome(name: str, code: int, printed: bytes | bytearray | None, tail: str) -> Outcome:
    """Of a command that exited with `code`. `printed`: what is to be its result, as JSON; None: it has none."""
    if code:
        last = tail.rstrip().rpartition("\n")[2]
        return Outcome("exit", exit_code=code, error=_plain("CommandFailed", f"{name} exited with status {code}: {last[:400]}"))
    if printed is None:
        return Outcome("ok", exit_code=code, result=b"null")
    from .codec import MAX_BYTES, from_json

    try:
        if len(printed) > MAX_BYTES:
            raise EnvelopeError(f"more than {MAX_BYTES} bytes")
        from_json(bytes(printed))
    except EnvelopeError as error:
        return Outcome("exception", exit_code=code, error=_plain("ResultNotJSON", f"what {name} printed is no result: {error}"))
    return Outcome("ok", exit_code=code, result=bytes(printed))


def _plain(kind: str, message: str) -> dict[str, Any]:
    return {"class": kind, "message": message, "traceback": "", "mro": [kind]}


def describe_error(error: BaseException, *, whole: bool = False) -> dict[str, Any]:
    """Class, message, traceback and `mro` of `error`, as JSON values.

    The traceback begins where KQueue's own frames end; `whole`: with them, for an error that is KQueue's own.

    Locals never stand in it, and files by the names that they are imported by; the message is cut at 4 KiB and the traceback at
    16 KiB, since both can be huge.
    """
    from traceback import format_exception

    from .redact import shorten_paths

    trace = error.__traceback__
    while trace is not None and not whole and trace.tb_frame.f_code.co_filename.startswith(_OURS):
        trace = trace.tb_next
    try:
        message = str(error)
    except BaseException as broken:
        message = f"(its __str__ raised {type(broken).__name__})"
    lines = "".join(format_exception(type(error), error, trace))
    return {
        "class": type(error).__name__,
        "message": cut(message, 4096),
        "traceback": cut(shorten_paths(lines), 16384),
        "mro": [base.__name__ for base in type(error).__mro__ if base is not object],
    }


_OURS: Final = __file__.rpartition("/")[0] + "/"


def cut(text: str, size: int) -> str:
    """`text`, without its middle where it has more than `size` characters."""
    text = text.encode("utf-8", "replace").decode()
    if len(text) <= size:
        return text
    return f"{text[: size // 2]}\n… {len(text) - size} characters left out …\n{text[-size // 2 :]}"
