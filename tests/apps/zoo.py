"""Isolated jobs that behave, and isolated jobs that do not. Imported by the template only."""

from __future__ import annotations

import asyncio
import builtins
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import kqueue
from kqueue import KQueueJob, current, enqueue, job, offload, progress, sleep
from kqueue.codec import Envelope, encode
from kqueue.execution import wire

PIDS = "KQUEUE_TEST_PIDS"  # a file to which a job appends the pids of what it started


@job(isolated=True, keep_result=60)
def add(a: int, b: int = 0) -> int:
    return a + b


@job(isolated=True, keep_result=60)
def naps(seconds: float) -> list[float]:
    """When it began and ended."""
    began = time.monotonic()
    time.sleep(seconds)
    return [began, time.monotonic()]


@job(isolated=True, keep_result=60)
def about_me() -> dict[str, Any]:
    context = current()
    return {
        "id": context.id, "name": context.name, "attempt": context.attempt, "pid": os.getpid(), "sid": os.getsid(0),
        "core": resource.getrlimit(resource.RLIMIT_CORE), "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "env_id": os.environ["KQUEUE_JOB_ID"], "secrets": [name for name in os.environ if name.startswith("KQUEUE_URL")],
        "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd")), "stdin": os.readlink("/proc/self/fd/0"),
        "title": open("/proc/self/cmdline").read(), "no_new_privs": "NoNewPrivs:\t1" in open("/proc/self/status").read(),
        "modules": "tests.apps.inline" in sys.modules,
    }  # fmt: skip


@job(isolated=True)
def fails(message: str = "boom") -> None:
    raise LookupError(message)


@job(isolated=True)
def raises(name: str) -> None:
    raise getattr(builtins, name, None) or getattr(kqueue, name)


@job(isolated=True)
def exits(status: int) -> None:
    sys.exit(status)


@job(isolated=True)
def exits_hard(status: int) -> None:
    os._exit(status)


@job(isolated=True)
def segfaults() -> None:
    ctypes.string_at(0)


@job(isolated=True)
def kills_itself(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)
    signal.pause()


@job(isolated=True, timeout=0.3)
def hangs() -> None:
    signal.pause()


@job(isolated=True, timeout=0.3)
def ignores_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        signal.pause()


@job(isolated=True, timeout=0.3)
def cleans_up() -> None:
    try:
        signal.pause()
    finally:
        print("cleaned up")


@job(isolated=True, timeout=0.3)
def leaves_children() -> None:
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        with open(os.environ[PIDS], "a") as file:
            file.write(f"{process.pid}\n")
    signal.pause()


@job(isolated=True, max_memory=32)
def eats_memory() -> int:
    return len(b"x" * 400_000_000)


@job(isolated=True, max_cpu=1)
def burns_cpu() -> None:
    while True:
        pass


@job(isolated=True)
def talks(lines: int, text: str = "hello") -> None:
    for number in range(lines):
        print(text, number)
    print("and on stderr", file=sys.stderr)


@job(isolated=True)
def logs() -> None:
    current().logger.info("for the record")


@job(isolated=True)
def talks_garbage() -> None:
    os.write(1, b"\xff\xfe\x00 not text\n" + b"x" * 20_000 + b"\nno newline at the end")


@job(isolated=True)
def floods() -> None:
    piece = b"spam " * 13_000 + b"\n"
    for _ in range(1600):  # 100 MB
        os.write(1, piece)


@job(isolated=True, keep_result=60)
def returns(kind: str) -> Any:
    return {"set": {1}, "object": object(), "huge": "x" * 2_000_000, "nan": float("nan"), "bytes": b"\x00\xff"}[kind]


@job(isolated=True)
def forges_frames(data: str) -> None:
    os.write(3, bytes.fromhex(data))
    time.sleep(0.05)


@job(isolated=True, keep_result=60)
def closes_everything() -> str:
    os.closerange(0, 3)
    return "still here"


@job(isolated=True)
def closes_its_socket() -> None:
    os.close(3)


@job(isolated=True, keep_result=60)
def dispatches(count: int) -> list[str]:
    return [add.options(delay=1000).dispatch(n).id for n in range(count)]


@job(isolated=True)
def dispatches_twice_at_once() -> None:
    """As two threads would that share the socket without a lock."""
    frame = wire.frame(wire.ENQUEUE, b"[]\n")
    os.write(3, frame * 50)
    time.sleep(5)


@job(isolated=True)
def dispatches_beyond_limits() -> None:
    add.options(timeout=7200).dispatch(1)


@job(isolated=True)
def dispatches_nonsense() -> None:
    add.dispatch(1, 2, 3, 4)


@job(isolated=True, keep_result=60)
def then_plain() -> list[str]:
    return [current().then(add.options(queue="mail", delay=2.5).job(1)), current().then(add.job(2))]


@job(isolated=True, keep_result=60)
def then_generator() -> Any:
    first = current().then(add.options(queue="mail", delay=2.5).job(1))
    yield sleep(0.01)
    return [first, current().then(add.job(2))]


@job(isolated=True, keep_result=60)
async def then_async() -> Any:
    first = current().then(add.options(queue="mail", delay=2.5).job(1))
    await asyncio.sleep(0.01)
    return [first, current().then(add.job(2))]


class ThenAsAClass(KQueueJob):
    isolated = True
    keep_result = 60

    def handle(self) -> Any:
        return then_plain()


@job(isolated=True, timeout=1)
def then_fails(how: str) -> None:
    current().then(add.job(1))
    if how == "raises":
        raise LookupError
    if how == "exits":
        sys.exit(0)
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


@job(isolated=True, keep_result=60)
def then_refused() -> list[str]:
    wrong: list[Any] = [add.job(1, 2, 3, 4), add.job(object()), add.options(timeout=7200).job(1), add]  # type: ignore[call-arg, arg-type]
    said = []
    for bound in wrong:
        try:
            current().then(bound)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    current().then(add.job(1))
    return said


@job(isolated=True, keep_result=60)
def then_many(count: int, size: int) -> list[Any]:
    for done in range(count):
        try:
            current().then(fails.job("x" * size))
        except kqueue.KQueueError as error:
            return [done, str(error)]
    return [count, ""]


@job(isolated=True, keep_result=60)
def then_forged(count: int) -> dict[str, int]:
    """Follow-ups by hand, so that only the supervisor counts them."""
    said: dict[str, int] = {}
    with socket.socket(fileno=os.dup(3)) as supervisor:
        for number in range(count):
            supervisor.sendall(wire.frame(wire.THEN, _forged(number)))
            _, reply = wire.read_frame(supervisor, (wire.REPLY,))
            key = "refused" if b"already" in reply else reply.decode()
            said[key] = said.get(key, 0) + 1
    return said


@job(isolated=True)
def then_without_listening() -> None:
    os.write(3, wire.frame(wire.THEN, _forged(1)) * 50)
    time.sleep(5)


@job(keep_result=60)
def then_offloaded() -> Any:
    return (yield offload(_forges_as_a_call))


def _forges_as_a_call() -> Any:
    with socket.socket(fileno=os.dup(3)) as supervisor:
        supervisor.sendall(wire.frame(wire.THEN, _forged(1)))
        return json.loads(wire.read_frame(supervisor, (wire.REPLY,))[1]).get("error")


@job(isolated=True)
def floods_with_progress(count: int) -> None:
    frames = [wire.frame(wire.PROGRESS, b'[0.5,"%d"]' % number) for number in range(count)]
    with socket.socket(fileno=os.dup(3)) as supervisor:
        supervisor.sendall(b"".join(frames))


def _forged(number: int) -> bytes:
    envelope = encode(Envelope(id=f"forged-{number}", job="add", args=[number], kwargs={}))
    return b"[[0,null,%d]]\n%b" % (len(envelope), envelope)


def _backoff(attempt: int, error: BaseException) -> Any:
    what = str(error)
    if what == "raises":
        raise LookupError("no backoff today")
    if what == "blocks":
        print("blocking", flush=True)
        signal.pause()
    if what == "dies":
        os._exit(9)
    if what == "segfaults":
        ctypes.string_at(0)
    if what == "nonsense":
        return "soon"
    print(f"asked by {os.getpid()} about {type(error).__name__}")
    return attempt * 100


@job(isolated=True, backoff=_backoff)
def has_a_backoff(how: str) -> None:
    if how == "exits":
        sys.exit("as it is")
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "runs out":
        raise MemoryError
    if how == "retry":
        raise kqueue.Retry
    if how == "retry in 5":
        raise kqueue.Retry(delay=5)
    if how == "discard":
        raise kqueue.Discard("for good")
    raise LookupError(how)


@job(isolated=True, backoff=_backoff, timeout=0.3)
def has_a_backoff_and_no_time() -> Any:
    while True:
        yield sleep(60)


@job(isolated=True, backoff=0, max_attempts=4, max_memory=100, causes={"memory": {"grow": 2, "max_attempts": 9}})
def grows() -> Any:
    """Needs more than the first two runs have: 100 and 200 MiB, and 128 of headroom."""
    return len(b"x" * (350 << 20))


@job(isolated=True, keep_result=60)
def reports() -> str:
    for step in range(4):
        progress((step + 1) / 4, f"step {step + 1}")
    return "reported"


@job(isolated=True, keep_result=60)
def waits_as_a_generator() -> Any:
    yield sleep(0.01)
    id = yield enqueue(add.options(delay=1000).job(1, b=2))
    quotient = yield offload(divmod, 17, 5)
    return [len(id), quotient]


@job(isolated=True, timeout=0.3)
def generator_that_never_ends() -> Any:
    try:
        while True:
            yield sleep(60)
    finally:
        yield sleep(0.01)
        print("cleaned up by traps")


@job(isolated=True, keep_result=60)
async def runs_under_asyncio() -> list[Any]:
    await asyncio.sleep(0.01)
    await sleep(0.01)
    quotient = await offload(divmod, 17, 5)
    return [asyncio.get_running_loop() is not None, quotient]


@job(isolated=True)
def kills_the_template() -> None:
    if current().attempt == 1:
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()


@job(isolated=True, keep_result=60)
def sees() -> dict[str, Any]:
    """What a child was given of its own envelope, as it stands in its memory, and of secrets."""
    frame = sys._getframe()
    while frame is not None and "data" not in frame.f_locals:
        frame = frame.f_back  # type: ignore[assignment]
    secrets = [name for name in os.environ if name in ("KQUEUE_URL", "KQUEUE_SIGNING_KEY_FILE")]
    return {"envelope": frame.f_locals["data"].decode(), "secrets": secrets}
