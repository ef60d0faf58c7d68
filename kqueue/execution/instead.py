"""What an inline job should have written: which call blocked the loop, or wanted asyncio, and what does the same here.

Two questions, asked only when something is wrong already:

    standing(frame)   of a job that blocks the loop just now: its line, and the call in it that blocks
    asyncio_call(…)   of an error that an asyncio library raised, since there is no asyncio loop: who was called

A call that is known by the module that is at work is named as that ("requests.api", whatever the job imported it as); one written
in C has no frame, and is found by the name that stands in the job's line. An import is one of the module that the job wants.
"""

from __future__ import annotations

import builtins
import os
import re
import types
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType, TracebackType
from typing import Any, Final, NamedTuple

_STDLIB: Final = os.path.dirname(os.__file__) + os.sep
_INSTALLED: Final = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))  # Debian has both
OURS: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

SLEEP: Final = "`yield kqueue.sleep(…)`"
HTTP: Final = "kqueue.io.http"
OFFLOAD: Final = "`yield kqueue.offload(function, …)`"
RUN: Final = "`yield kqueue.io.run([…])`"
MAIL: Final = "`yield kqueue.io.send_mail(…)`"
CONNECT: Final = "`yield kqueue.io.connect(…)`"
POSTGRES: Final = "kqueue.io.postgres"
REDIS: Final = "kqueue.io.redis"
ISOLATED: Final = "isolated=True"
IMPORT: Final = "import "  # and the module's name: a "call"

# What blocks -> what to use. The first whose name is a prefix, whole words only.
_BLOCKING: Final[Mapping[str, str]] = {
    "time.sleep": SLEEP,
    "requests": f"{HTTP}, or {OFFLOAD}",
    "urllib.request": f"{HTTP}, or {OFFLOAD}",
    "urllib3": f"{HTTP}, or {OFFLOAD}",
    "httpx": f"{HTTP}, or {OFFLOAD}",
    "httpcore": f"{HTTP}, or {OFFLOAD}",
    "http.client": f"{HTTP}, or {OFFLOAD}",
    "botocore": f"{OFFLOAD}, or {ISOLATED}",
    "boto3": f"{OFFLOAD}, or {ISOLATED}",
    "subprocess": RUN,
    "os.system": RUN,
    "os.popen": RUN,
    "smtplib": MAIL,
    "psycopg": POSTGRES,
    "psycopg2": POSTGRES,
    "pg8000": POSTGRES,
    "redis": REDIS,
    "pymysql": f"{OFFLOAD}, or {ISOLATED}",
    "MySQLdb": f"{OFFLOAD}, or {ISOLATED}",
    "sqlite3": OFFLOAD,
    "open": OFFLOAD,
    "io": OFFLOAD,
    "shutil": OFFLOAD,
    "asyncio": f"kqueue's own traps, such as kqueue.sleep and kqueue.io, or {ISOLATED}, under which asyncio works",
    "concurrent.futures": OFFLOAD,
    "threading": OFFLOAD,
    "queue": OFFLOAD,
    "socket": CONNECT,
    "ssl": CONNECT,
    "select": "`yield kqueue.wait_io(fd, …)`",
    "selectors": "`yield kqueue.wait_io(fd, …)`",
    "input": "an argument of the job",
}

# Of asyncio and what stands on it -> the same in an inline job.
_ASYNC: Final[Mapping[str, str]] = {
    "asyncio.sleep": "`await kqueue.sleep(…)`",
    "asyncio.gather": "kqueue.io.gather",
    "asyncio.wait": "kqueue.io.gather or kqueue.io.race",
    "asyncio.as_completed": "kqueue.io.gather or kqueue.io.race",
    "asyncio.create_task": "kqueue.io.gather",
    "asyncio.ensure_future": "kqueue.io.gather",
    "asyncio.TaskGroup": "kqueue.io.gather",
    "asyncio.wait_for": "`with kqueue.io.timeout(…)`",
    "asyncio.timeout": "`with kqueue.io.timeout(…)`",
    "asyncio.to_thread": "`await kqueue.offload(function, …)`",
    "asyncio.Queue": "kqueue.io.Queue",
    "asyncio.LifoQueue": "kqueue.io.Queue",
    "asyncio.PriorityQueue": "kqueue.io.Queue",
    "asyncio.Event": "kqueue.io.Queue, or kqueue.io.gather for the end of others",
    "asyncio.Condition": "kqueue.io.Queue",
    "asyncio.Lock": "`async with kqueue.io.Semaphore(1)`",
    "asyncio.Semaphore": "kqueue.io.Semaphore",
    "asyncio.BoundedSemaphore": "kqueue.io.Semaphore",
    "asyncio.open_connection": "`await kqueue.io.connect(…)`",
    "asyncio.open_unix_connection": "`await kqueue.io.connect(unix=…)`",
    "asyncio.start_server": "kqueue.io.listen",
    "asyncio.create_subprocess_exec": "`await kqueue.io.run([…])`",
    "asyncio.create_subprocess_shell": "`await kqueue.io.run([…])`",
    "asyncio": "kqueue.sleep, kqueue.io, kqueue.offload",
    "aiohttp": HTTP,
    "httpx": HTTP,
    "httpcore": HTTP,
    "asyncpg": POSTGRES,
    "psycopg": POSTGRES,
    "redis": REDIS,
    "aiosmtplib": "`await kqueue.io.send_mail(…)`",
    "aiofiles": "`await kqueue.offload(function, …)`",
    "anyio": "kqueue.sleep, kqueue.io, kqueue.offload",
    "sniffio": "kqueue.sleep, kqueue.io, kqueue.offload",
    "trio": "kqueue.sleep, kqueue.io, kqueue.offload",
}
_WRAPPERS: Final = ("asyncio", "anyio", "sniffio")  # libraries call them: theirs is the name that says something
_ERRORS: Final = (  # a class, and words of its message
    ("RuntimeError", "no running event loop"),
    ("RuntimeError", "no current event loop"),
    ("RuntimeError", "should be used inside a task"),
    ("AttributeError", "has no attribute 'create_future'"),
    ("AsyncLibraryNotFoundError", ""),
)

_CALL: Final = re.compile(r"([A-Za-z_][\w.]*)\s*\(")


class Standing(NamedTuple):
    """A job that blocks the loop: `line` as "file:line in function", and the `call` in it that blocks ("": it computes).

    `is_ours`: not the job blocks it, but KQueue, which loads a part of itself that was not used before.
    """

    line: str
    call: str = ""
    is_ours: bool = False

    def __str__(self) -> str:
        return f"{self.line} ({self.call})" if self.call else self.line

    @property
    def instead(self) -> str:
        """What to do about it."""
        if self.is_ours:
            return "KQueue loads that once in each process, and does not hold it against the job"
        if self.call.startswith(IMPORT):
            return "import it at the top of the job's module"
        found = _looked_up(_BLOCKING, self.call) or f"{SLEEP} or {OFFLOAD} there"
        return f"use {found}" if ISOLATED in found else f"use {found}, or declare the job {ISOLATED}"


def standing(frame: FrameType, until: CodeType) -> Standing:
    """Where the job whose innermost frame is `frame` stands. `until`: of the frame that called the job.

    The line is the innermost that is neither Python's nor an installed package's: of `subprocess.run`, who called it.
    """
    frames = list(_frames(frame, until))
    own = next((at for at, frame in enumerate(frames) if is_own(frame.f_code)), 0)
    line = line_of(frames[own])
    try:
        return Standing(line, _called(frames[:own], frames[own]))
    except Exception:  # this runs in the middle of a job, among objects of any kind: the line alone is good enough
        return Standing(line)


def is_own(code: CodeType) -> bool:
    """Whether `code` is the application's, as far as its file tells."""
    name = code.co_filename
    return not name.startswith((OURS, _STDLIB, "<frozen")) and not any(part in name for part in _INSTALLED)


def imported(frame: FrameType) -> str:
    """The module that `frame` is importing, if it is of Python's machinery for that; "": it is not, or nobody knows."""
    code = frame.f_code
    if code.co_filename != "<frozen importlib._bootstrap>" or code.co_name not in ("_find_and_load", "_gcd_import"):
        return ""
    return str(frame.f_locals.get("name", ""))


def line_of(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"


def asyncio_advice(error: BaseException, message: str) -> str:
    """What to write instead of what wanted asyncio; "": that is not what is wrong. `message`: of `error`."""
    if not any(type(error).__name__ == kind and words in message for kind, words in _ERRORS):
        return ""
    call = _async_call(error.__traceback__)
    other = _looked_up(_ASYNC, call) or "kqueue.sleep, kqueue.io, kqueue.offload"
    what = f"{call} needs asyncio" if call else "this needs asyncio"
    return f"{what}, and an inline job does not run under that: use {other}, or declare it {ISOLATED}, where asyncio works"


def _frames(frame: FrameType | None, until: CodeType) -> Iterator[FrameType]:
    while frame is not None and frame.f_code is not until:
        yield frame
        frame = frame.f_back


def _called(inner: list[FrameType], own: FrameType) -> str:
    """What the job's own frame waits for: the outermost of the frames within it, else what its line says of a function in C."""
    if inner:
        frame = inner[-1]
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] == "importlib":
            wanted = next((name for name in map(imported, reversed(inner)) if name), "")
            if wanted:
                return IMPORT + wanted
        module, name = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        return _shown(module, name)
    for name in _names_in_line(own):
        resolved = _resolved(name, own)
        if resolved and _looked_up(_BLOCKING, resolved):
            return resolved
    return ""


def _shown(module: str, name: str) -> str:
    """`subprocess.run`, `requests.get` (of requests.api.get); a private function by its module alone."""
    known = next((key for key in _BLOCKING if module == key or module.startswith(key + ".")), module)
    return known if name.startswith("_") else f"{known}.{name}"


def _looked_up(table: Mapping[str, str], name: str) -> str:
    return next((text for key, text in table.items() if name == key or name.startswith(key + ".")), "")


def _names_in_line(frame: FrameType) -> list[str]:
    """The calls in its line, that which is being made first where Python tells it (3.11)."""
    code, number = frame.f_code, frame.f_lineno
    line = _line(code.co_filename, number)
    names: list[str] = []
    positions = getattr(code, "co_positions", None)
    if positions is not None:
        from itertools import islice

        start, end, left, right = next(islice(positions(), frame.f_lasti // 2, None), (None, None, None, None))
        if start == number and left is not None:
            piece = line.encode()[left : right if end == start else None].decode("utf-8", "replace")
            names += _CALL.findall(piece)[:1]
    return names + _CALL.findall(line)


def _line(file: str, number: int) -> str:
    """Line `number` of `file`; "": it cannot be read."""
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            return next((line for at, line in enumerate(lines, 1) if at == number), "")
    except OSError:
        return ""


def _resolved(name: str, frame: FrameType) -> str:
    """What `name` stands for in `frame`: "time.sleep", or the module of whose kind the object is. No code of the job is run."""
    first, *rest = name.split(".")
    thing: Any = frame.f_locals.get(first, frame.f_globals.get(first, vars(builtins).get(first)))
    if thing is None:
        return ""
    for part in rest:
        inner = vars(thing).get(part) if isinstance(thing, types.ModuleType) else _attribute(thing, part)
        if inner is None:
            return _module_of(type(thing))
        thing = inner
    if isinstance(thing, (types.BuiltinFunctionType, types.FunctionType, type)):
        module = _module_of(thing)
        return thing.__name__ if module == "builtins" or thing is open else f"{module}.{thing.__name__}"
    return _module_of(type(thing))


def _attribute(thing: Any, name: str) -> Any:
    """Of an object's own attributes; None: it has none of that name, or would have to be asked."""
    try:
        return object.__getattribute__(thing, "__dict__").get(name)
    except AttributeError:
        return None


def _module_of(thing: Any) -> str:
    """Where people know it from: `socket`, not `_socket`; `os`, not `posix`."""
    name = str(getattr(thing, "__module__", "") or "").lstrip("_")
    return "os" if name == "posix" else name


def _async_call(trace: TracebackType | None) -> str:
    """The asyncio library that was called: the first frame after the application's own, that of a library before asyncio's."""
    last_own = -1
    frames: list[FrameType] = []
    while trace is not None:
        if is_own(trace.tb_frame.f_code):
            last_own = len(frames)
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    inner = frames[last_own + 1 :]
    for frame in inner:
        module, name = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        if (top := module.partition(".")[0]) in _WRAPPERS or _looked_up(_ASYNC, top):
            return _public(top, name, module, frame)
    if last_own < 0:
        return ""
    return next((name for name in _names_in(frames[last_own]) if _looked_up(_ASYNC, name)), "")


def _public(top: str, name: str, module: str, frame: FrameType) -> str:
    """`asyncio.sleep` of asyncio.tasks.sleep; for a method its class, where that is what one writes."""
    if top != "asyncio":
        return top
    owner = frame.f_locals.get("self")
    if owner is not None and type(owner).__module__ == module:
        name = type(owner).__name__
    return f"{top}.{name.lower() if name == 'Timeout' else name}"


def _names_in(frame: FrameType) -> list[str]:
    resolved = [_resolved(name, frame) for name in _names_in_line(frame)]
    return [f"asyncio.{name.rpartition('.')[2]}" if name.startswith("asyncio.") else name for name in resolved]
