"""Jobs that run programs, offload calls and send mail; each of them works inline, and the isolated ones in a child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from kqueue import JobTimedOut, io, offload, sleep
from kqueue import job as any_job
from kqueue.errors import UsageError
from kqueue.io.process import Completed, ProgramError

from .inline import mark

PYTHON = sys.executable


def job(**options: Any) -> Callable[[Any], Any]:
    """As @job; names of jobs are one space for all apps of the tests."""
    given = {"keep_result": 60, "max_attempts": 1, **options}
    return lambda function: any_job(name=f"proc_{function.__name__}", **given)(function)


# -- programs -------------------------------------------------------------------------------------------------------------


def told(end: Completed | ProgramError) -> dict[str, Any]:
    kind = "" if isinstance(end, Completed) else type(end).__name__
    return {"kind": kind, "code": end.returncode, "out": end.stdout, "err": end.stderr, "message": "" if kind == "" else str(end)}


def _runs(argv: list[str], options: dict[str, Any]) -> Any:
    try:
        end = yield io.run(argv, **options)
    except ProgramError as error:
        return told(error)
    return told(end)


@job()
def runs(argv: list[str], options: dict[str, Any]) -> Any:
    return (yield from _runs(argv, options))


@job(isolated=True)
def runs_in_a_child(argv: list[str], options: dict[str, Any]) -> Any:
    return (yield from _runs(argv, options))


@job(isolated=True)
async def runs_under_asyncio(argv: list[str], options: dict[str, Any]) -> Any:
    try:
        return told(await io.run(argv, **options))
    except ProgramError as error:
        return told(error)


@job()
async def runs_inline_async(argv: list[str], options: dict[str, Any]) -> Any:
    try:
        return told(await io.run(argv, **options))
    except ProgramError as error:
        return told(error)


@job()
def digests(size: int) -> Any:
    """`size` bytes through a program and back."""
    data = os.urandom(size)
    end = yield io.run(["cat"], input=data, max_output=size)
    return end.stdout == data


@job()
def waits(name: str) -> Any:
    """A program with a child in a session of its own, both of which ignore SIGTERM."""
    yield from _waits(name)


@job(isolated=True)
def waits_in_a_child(name: str) -> Any:
    yield from _waits(name)


@job(timeout=1)
def waits_too_long(name: str) -> Any:
    yield from _waits(name)


@job(timeout=1, isolated=True)
def waits_too_long_in_a_child(name: str) -> Any:
    yield from _waits(name)


STUBBORN = """
import os, signal, socket, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def tell(what):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(f"{what} {os.getpid()}".encode(), os.environ["KQUEUE_TEST_MARKS"])
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        tell("grandchild")
        time.sleep(600)
    os._exit(0)
os.wait()
tell("program")
time.sleep(600)
"""


def _waits(name: str) -> Any:
    yield io.run([PYTHON, "-c", STUBBORN, name])


SCATTERS = """
setsid sh -c 'echo $$ > "$0"; exec sleep 600' "$1/child" >/dev/null 2>&1 &
(setsid sh -c 'echo $$ > "$0"; exec sleep 600' "$1/orphan" >/dev/null 2>&1 &)
while [ ! -s "$1/child" ] || [ ! -s "$1/orphan" ]; do sleep 0.02; done
> "$1/ready"
[ "$2" = ends ] || sleep 600
"""


def _looks_after(how: str, directory: str) -> Any:
    """A program with a child and an orphan in sessions of their own; how it came to its end, and what of that there still is."""
    ended = ""
    argv = ["sh", "-c", SCATTERS, "scatters", directory, how]
    try:
        if how == "cut":
            yield io.race(io.run(argv), _exists(f"{directory}/ready"))
        else:
            yield io.run(argv, timeout=2 if how == "late" else None)
    except ProgramError as error:
        ended = type(error).__name__
    pids = [int(Path(directory, name).read_text()) for name in ("child", "orphan")]
    children = [child for task in Path("/proc/self/task").glob("*/children") for child in task.read_text().split()]
    return {"ended": ended, "alive": [pid for pid in pids if Path(f"/proc/{pid}").exists()], "children": children}


def _exists(path: str) -> Any:
    while not os.path.exists(path):
        yield sleep(0.02)


@job()
def looks_after(how: str, directory: str) -> Any:
    return (yield from _looks_after(how, directory))


@job(isolated=True)
def looks_after_in_a_child(how: str, directory: str) -> Any:
    return (yield from _looks_after(how, directory))


@job(isolated=True, start="pool")
def looks_after_in_the_pool(how: str, directory: str) -> Any:
    return (yield from _looks_after(how, directory))


@job(isolated=True)
def keeps_its_own(directory: str) -> Any:
    """What the job started itself outlives its programs, orphans and others."""
    own = [subprocess.Popen(["sleep", "600"]).pid]
    orphan = subprocess.run(["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo $!"], stdout=subprocess.PIPE, check=True)
    own.append(int(orphan.stdout))
    other = io.run(["sh", "-c", 'echo $$ > "$0/other"; (setsid sleep 600 &) >/dev/null 2>&1; sleep 600', directory])
    return (yield io.race(other, _looks_beside(own, directory)))


def _looks_beside(own: list[int], directory: str) -> Any:
    yield from _exists(f"{directory}/other")
    seen = yield from _looks_after("ends", directory)
    own.append(int(Path(directory, "other").read_text()))
    return {"alive": seen["alive"], "own": [os.path.exists(f"/proc/{pid}") for pid in own]}


# -- offloaded calls ------------------------------------------------------------------------------------------------------


def pid_of_process() -> int:
    return os.getpid()


def user_of_process() -> int:
    return os.getuid()


def is_stubborn() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    mark("stubborn", os.getpid())
    time.sleep(600)


def cleans_up() -> None:
    try:
        mark("begun", os.getpid())
        time.sleep(600)
    except JobTimedOut:
        mark("timed-out")
        raise
    except BaseException as error:
        mark("ended", type(error).__name__)
        raise


def eats(mib: int) -> int:
    return len(bytearray(mib * 1048576))


def raises(kind: str) -> None:
    if kind == "exit":
        os._exit(3)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {"KeyError": KeyError, "OSError": OSError}[kind]("of the call")


class NamedLikeABuiltIn(Exception):
    """A library's own, such as redis.ConnectionError."""


NamedLikeABuiltIn.__name__ = "ConnectionError"


def raises_with_arguments(which: str) -> None:
    if which == "file":
        open("/no/such/file").close()
    if which == "rename":
        os.rename(b"/no/such/a", Path("/no/such/b"))
    if which == "files":
        kept = [os.open("/dev/null", os.O_RDONLY) for _ in range(100_000)]
        assert not kept
    if which == "decode":
        b"a\xff".decode()
    if which == "key":
        raise KeyError("k", 3)
    if which == "no values":
        raise ValueError(object)
    if which == "large":
        raise ValueError("x" * 100_000, 1)
    if which == "stop":
        next(iter(()))
    raise NamedLikeABuiltIn("of a library")


def measures(data: bytes) -> int:
    return len(data)


def dispatches() -> str:
    return str(any_note.dispatch().id)


@job()
def any_note() -> Any:
    yield
    return "noted"


CALLS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        pid_of_process, user_of_process, is_stubborn, cleans_up, eats, raises, raises_with_arguments, measures, dispatches,
    )
}


@job()
def offloads_to(name: str, *args: Any) -> Any:
    try:
        return (yield offload(CALLS[name], *args))
    except Exception as error:
        return [type(error).__name__, str(error)]


@job()
def offloads_what_fails(which: str) -> Any:
    try:
        return (yield offload(raises_with_arguments, which))
    except Exception as error:
        of_os = [error.errno, error.strerror, error.filename, error.filename2] if isinstance(error, OSError) else None
        return {"class": f"{type(error).__module__}.{type(error).__name__}", "of_os": of_os, "args": list(error.args)}


@job(timeout=1)
def offloads_too_long(name: str, *args: Any) -> Any:
    return (yield offload(CALLS[name], *args))


@job()
def offloads_much(size: int) -> Any:
    try:
        return (yield offload(measures, b"x" * size))
    except TypeError as error:
        return str(error)


@job(isolated=True)
def offloads_in_a_child() -> Any:
    return [os.getpid(), (yield offload(pid_of_process))]


@job(isolated=True, start="pool")
def pooled_for_long(seconds: float) -> int:
    mark("pooled", os.getpid())
    time.sleep(seconds)
    return os.getpid()


# -- mail -----------------------------------------------------------------------------------------------------------------


@job()
def mails(subject: str, body: str, to: list[str], options: dict[str, Any]) -> Any:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "App <app@example.org>", ", ".join(to), subject
    message.set_content(body)
    return (yield from _mails(message, options))


@job()
def mails_bytes(data: bytes, options: dict[str, Any]) -> Any:
    return (yield from _mails(data, options))


def _mails(message: Any, options: dict[str, Any]) -> Any:
    try:
        return (yield io.send_mail(message, **options))
    except (OSError, UsageError) as error:
        return {
            "kind": type(error).__name__, "message": str(error), "code": getattr(error, "code", None),
            "refused": getattr(error, "refused", None),
        }  # fmt: skip
