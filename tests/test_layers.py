"""The floors of the house: imports go down only, and rooms of one floor do not know each other (see docs/architecture.md).

An import inside a function is an arrow like any other. One under TYPE_CHECKING costs nothing at run time, but it is knowledge all
the same, so the floors hold for it too; only cycles within a room are free to it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "kqueue"

# (floor, room, the modules in it; "brokers" stands for everything under it that no longer name claims)
ROOMS = [
    (0, "ground", ["errors", "ids", "job", "codec", "context", "dispatch", "outcome", "events", "config", "security", "loading"]),
    (0, "ground", ["states", "options", "registry", "retries", "signing", "process", "disk", "instance", "settings"]),
    (0, "ground", ["config_file", "commands", "environment", "program"]),
    (0, "ground", ["redact", "hostmemory"]),
    (1, "kernel", ["kernel"]),
    (1, "stores", ["brokers.base", "brokers.commands"]),  # the protocol and plain commands, which clients and daemon share
    (2, "brokers", ["brokers"]),
    (2, "execution", ["execution"]),
    (2, "client", ["client"]),
    (3, "runtime", ["intake", "budget", "verdict", "services", "settling", "outbox", "upkeep", "slices", "promotion", "feeding"]),
    (3, "runtime", ["quarantine", "runtime", "ahead"]),
    (3, "io", ["io"]),
    (4, "front", [""]),  # kqueue/__init__.py, which users import; everything above may read its __version__
    (4, "testing", ["testing"]),
    (5, "observe", ["observe"]),
    (5, "control", ["control"]),
    (6, "cli", ["cli"]),
]

# Where the client may go. All others may go to every lower floor.
CLIENT_ON = ("ground", "stores")

# Each with the reason why it is right. One that is no longer needed has to go.
EXCEPTIONS: dict[tuple[str, str], str] = {}

# What is installed besides Python, and the modules that may import it.
THIRD_PARTY = {
    "yaml": ["config_file"],
    "redis": ["client"],
    "psycopg": ["io.data.postgres", "io.data.postgres_link", "io.data.postgres_dialing", "io.data.postgres_copy"],
    "hiredis": ["brokers.redis_wire", "brokers.redis_transport", "brokers.commands.redis_asking", "io.data.redis_wire",
                "io.data.redis", "client.redis_wire"],
    "click": ["cli"],
    "setproctitle": ["observe.titles", "execution.settling_in"],
    "psutil": ["cli"],
    "h11": ["io.http"],
}


class Import(NamedTuple):
    """`importer` (a module of kqueue, without that name) imports `imported`."""

    importer: str
    imported: str
    line: int
    typing_only: bool
    in_function: bool


def modules() -> dict[str, Path]:
    """Every module of the package by its name: "", "job", "kernel", "kernel.loop", …"""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def statements(node: ast.AST, typing_only: bool, in_function: bool) -> Iterator[tuple[ast.stmt, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, typing_only, in_function
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in child.body:
                yield from statements(ast.Module([statement], []), True, in_function)
            yield from statements(ast.Module(child.orelse, []), typing_only, in_function)
        else:
            inside = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from statements(child, typing_only, inside)


def imports_of(module: str, source: str, is_package: bool) -> Iterator[Import]:
    """What `module` imports of kqueue, and of others (those begin with "!")."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    package = [part for part in package if part]
    for node, typing_only, in_function in statements(ast.parse(source), False, False):
        if isinstance(node, ast.Import):
            names = ["!" + alias.name for alias in node.names]
        else:
            assert isinstance(node, ast.ImportFrom)
            if node.level == 0:
                names = ["!" + str(node.module)]
            else:
                base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
                names = [".".join([*base, alias.name]) for alias in node.names]
                names = [name if name in MODULES else ".".join(base) for name in names]
        for name in names:
            yield Import(module, name, node.lineno, typing_only, in_function)


IMPORTS = [
    arrow
    for module, path in MODULES.items()
    for arrow in imports_of(module, path.read_text(), is_package=path.name == "__init__.py")
]
INSIDE = [arrow for arrow in IMPORTS if not arrow.imported.startswith("!")]


def place(module: str) -> tuple[int, str]:
    """Floor and room of `module`."""
    claims = [
        (len(name), floor, room)
        for floor, room, names in ROOMS
        for name in names
        if module == name or (name and module.startswith(name + "."))
    ]
    assert claims, f"kqueue.{module} stands on no floor: give it a room in tests/test_layers.py and docs/architecture.md"
    return max(claims)[1:]


def wrong(arrow: Import) -> str | None:
    """Why `arrow` must not be; None: it may."""
    (floor, room), (its_floor, its_room) = place(arrow.importer), place(arrow.imported)
    if room == its_room:
        return None
    if its_floor > floor:
        return "goes up"
    if its_floor == floor:
        return "goes sideways"
    if room == "client" and its_room not in CLIENT_ON:
        return f"is of {its_room}, which a client does without"
    return None


def complaints(arrows: list[Import]) -> list[str]:
    found = [(arrow, wrong(arrow)) for arrow in arrows]
    return [f"kqueue/{a.importer}:{a.line} imports {a.imported}: {why}" for a, why in found if why]


def excepted(arrow: Import) -> bool:
    return any(place(arrow.importer)[1] == room and arrow.imported == module for room, module in EXCEPTIONS)


# -- the arrows -------------------------------------------------------------------------------------------------------------


def test_every_module_has_a_floor() -> None:
    assert {place(module)[1] for module in MODULES} == {room for _, room, _ in ROOMS}


def test_imports_go_down_only() -> None:
    assert complaints([arrow for arrow in INSIDE if not arrow.typing_only and not excepted(arrow)]) == []


def test_types_are_known_downwards_only_as_well() -> None:
    assert complaints([arrow for arrow in INSIDE if arrow.typing_only and not excepted(arrow)]) == []


def test_every_exception_is_still_needed() -> None:
    used = {(place(a.importer)[1], a.imported) for a in INSIDE if excepted(a) and wrong(a)}
    assert used == set(EXCEPTIONS)


def test_no_module_imports_itself_by_a_detour() -> None:
    """Cycles among imports that run when a module is loaded depend on who is loaded first."""
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for arrow in INSIDE:
        if not arrow.typing_only and not arrow.in_function and arrow.imported:
            graph[arrow.importer].add(arrow.imported)

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a cycle: {' -> '.join([*trail, module])}"
        for imported in graph[module]:
            walk(imported, (*trail, module))

    for module in graph:
        walk(module, ())


def test_the_kernel_imports_nothing_of_kqueue() -> None:
    outside = [a for a in INSIDE if place(a.importer)[1] == "kernel" and not a.imported.startswith("kernel")]
    assert outside == []


def test_a_brokers_commands_do_no_input_or_output_of_the_kernel() -> None:
    assert not [a for a in INSIDE if a.importer.startswith("brokers.commands") and a.imported.startswith(("kernel", "execution"))]


def test_the_package_imports_itself_relatively() -> None:
    absolute = [(a.importer, a.imported) for a in IMPORTS if a.imported == "!kqueue" or a.imported.startswith("!kqueue.")]
    assert absolute == [("execution.template", "!kqueue.execution.template")], "run as __main__, it must be imported by its name"


@pytest.mark.parametrize("distribution", THIRD_PARTY)
def test_what_is_installed_besides_python_is_imported_in_its_place(distribution: str) -> None:
    importers = {a.importer for a in IMPORTS if a.imported.split(".")[0] == f"!{distribution}"}
    allowed = THIRD_PARTY[distribution]
    assert {i for i in importers if not any(i == name or i.startswith(name + ".") for name in allowed)} == set()


def test_nothing_else_is_needed_besides_python() -> None:
    foreign = {a.imported[1:].split(".")[0] for a in IMPORTS if a.imported.startswith("!")}
    assert foreign - set(sys.stdlib_module_names) - set(THIRD_PARTY) == {"kqueue"}


# -- the checker itself -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "why"),
    [
        ("job", "from .kernel import Kernel", "goes up"),
        ("job", "def f():\n    from .brokers import base", "goes up"),
        ("codec", "if TYPE_CHECKING:\n    from .runtime import KQueueRuntime", "goes up"),
        ("kernel.loop", "from ..runtime import KQueueRuntime", "goes up"),
        ("brokers.memory", "from ..execution import inline", "goes sideways"),
        ("brokers.base", "from ..kernel.traps import sleep", "goes sideways"),
        ("observe.logs", "from ..control import Control", "goes sideways"),
        ("client.redis", "from ..kernel import Kernel", "is of kernel, which a client does without"),
        ("client.redis", "try:\n    from ..brokers.redis import RedisBroker\nexcept ImportError:\n    pass", "goes sideways"),
        ("runtime", "from .cli import main", "goes up"),
        ("runtime", "from . import __version__", "goes up"),
        ("runtime", "from . import events", None),
        ("brokers.memory", "from ..kernel.traps import wait_io", None),
        ("client.memory", "from ..brokers.commands.memory import MemoryStore", None),
    ],
)
def test_the_checker_finds(module: str, source: str, why: str | None) -> None:
    (arrow,) = imports_of(module, source, is_package=False)
    assert wrong(arrow) == why


# -- what is loaded at run time -----------------------------------------------------------------------------------------------


def loaded_after(code: str, *, site: bool = False) -> set[str]:
    """The modules of a fresh interpreter after `code`. Without `site`, so that no .pth file of the machine loads any."""
    program = f"import sys\nsys.path.insert(0, {str(PACKAGE.parent)!r})\n{code}\nprint(*sys.modules)"
    flags = ["-I"] if site else ["-I", "-S"]
    done = subprocess.run([sys.executable, *flags, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


HEAVY = {
    "yaml", "click", "ssl", "hashlib", "sqlite3", "inspect", "dataclasses", "asyncio", "redis", "psutil", "random", "subprocess",
    "hmac", "email", "http", "logging", "pickle", "uuid", "decimal", "datetime", "tempfile", "difflib",
}  # fmt: skip


def test_the_runtime_is_light() -> None:
    loaded = loaded_after("import kqueue.runtime")
    assert "kqueue.runtime" in loaded
    assert loaded & HEAVY == set()


def test_running_an_inline_job_stays_light() -> None:
    code = """
import kqueue, kqueue.runtime
from kqueue.brokers.commands.memory import MemoryStore
from kqueue.dispatch import prepare
@kqueue.job(keep_result=60)
def answer():
    yield kqueue.sleep(0)
    return 42
runtime = kqueue.runtime.KQueueRuntime("memory://")
runtime.broker.store.enqueue([prepare(answer.job(), answer.registration, arguments_too=False)])
assert runtime.run(burst=True) == 0 and runtime.processed == 1 and not runtime.failed
"""
    assert loaded_after(code) & HEAVY == set()


def test_what_a_job_does_not_use_of_io_is_not_loaded() -> None:
    assert not [name for name in loaded_after("import kqueue.runtime") if name.startswith("kqueue.io")]
    loaded = loaded_after("import kqueue.runtime\nfrom kqueue import io\nio.connect, io.listen, io.gather, io.timeout, io.Queue")
    assert {"kqueue.io.streams", "kqueue.io.names"} <= loaded
    assert loaded & HEAVY == set(), "TLS and the helper's modules least of all"
    assert "kqueue.io.tls" not in loaded
    assert loaded_after(f"exec(open({str(PACKAGE / 'io/names_helper.py')!r}).read(), {{'__name__': 'helper'}})") & HEAVY == set()


def test_an_application_that_declares_jobs_loads_no_daemon() -> None:
    loaded = {name for name in loaded_after("import kqueue\n@kqueue.job\ndef f(): pass") if name.startswith("kqueue")}
    ground = ("job", "context", "errors", "ids", "options", "registry", "retries", "states")
    assert loaded == {"kqueue", *(f"kqueue.{name}" for name in ground)}


def test_an_application_that_dispatches_loads_no_kernel(tmp_path: Path) -> None:
    code = f"""
import kqueue
@kqueue.job
def f(): pass
kqueue.connect("sqlite:///{tmp_path}/kqueue.db")
assert f.dispatch().state().value == "ready"
"""
    loaded = {name for name in loaded_after(code, site=True) if name.startswith("kqueue.")}
    assert "kqueue.client.sqlite" in loaded
    assert {name for name in loaded if name.startswith(("kqueue.kernel", "kqueue.execution", "kqueue.runtime"))} == set()
