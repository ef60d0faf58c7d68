"""`kqueue doctor`: what is wrong, or soon will be, and what to do about it. It looks, changes nothing, and needs no daemon.

A check is a generator of notes, one of CHECKS. One that cannot go on says so in a note and stops; the others are made all the
same.
"""

from __future__ import annotations

import os
import platform
import shlex
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import click

from .. import __version__
from ..errors import KQueueError
from .target import Target, json_option, pass_target
from .text import json_text, printable

if TYPE_CHECKING:
    from ..brokers.base import Store
    from ..config import Config

LEVELS: Final = ("ok", "warn", "error")  # and the exit codes that the worst of them means
MIB: Final = 1048576
LEAST_FREE: Final = 16 * MIB  # bytes for what cannot be settled


class Note(NamedTuple):
    level: str  # one of LEVELS
    about: str  # "configuration", "broker", …
    what: str
    do: str = ""  # "": nothing, or `what` says it


Notes = Iterator[Note]


@click.command()
@json_option
@pass_target
def doctor(target: Target) -> int:
    """Say what is wrong, or will be, and what to do.

    It looks at the configuration, the broker and what stands in it, and ends with 0 when all is well, with 1 when there is a
    warning, and with 2 when there is an error.
    """
    notes: list[Note] = []
    for check in CHECKS:
        said = {note.what for note in notes}  # what keeps several checks from going on is said once
        notes += [note for note in _made(check, target) if note.what not in said]
    if target.json:
        click.echo(json_text([note._asdict() for note in notes]))
    else:
        click.echo("\n".join(map(_line, notes)))
    return max(LEVELS.index(note.level) for note in notes)


def _made(check: Check, target: Target) -> Notes:
    try:
        yield from check(target)
    except KQueueError as error:
        yield Note("error", check.__name__.strip("_"), str(error))


def _line(note: Note) -> str:
    lines = [f"{note.level:5}  {note.about:13}  {printable(note.what)}"]
    return "\n".join([*lines, f"{'':20}  → {printable(note.do)}"] if note.do else lines)


# -- what is checked --------------------------------------------------------------------------------------------------------

Check = Callable[[Target], Notes]


def _versions(target: Target) -> Notes:
    yield Note("ok", "versions", f"kqueue {__version__}, Python {platform.python_version()}, Linux {platform.release()}")


def _configuration(target: Target) -> Notes:
    config = target.config
    if config is None:
        yield Note(
            "warn", "configuration", "there is only $KQUEUE_URL: what a daemon is told cannot be checked", "name its file with -c"
        )
    else:
        yield Note("ok", "configuration", f"{config.shown_file} is valid")


def _daemon(target: Target) -> Notes:
    config = target.config
    if config is None:
        return
    name = f"instance {config.instance!r} on {socket.gethostname()}"
    found = target.ask("status")
    if found is None:
        yield Note("ok", "daemon", f"none runs as {name}")
        return
    if found["state"] == "starting":
        what = f"pid {found['pid']} runs as {name}, and has been starting for {found['uptime_s']:.0f} s: it runs no jobs yet"
        yield Note("warn", "daemon", what, "if that does not end, its log says what it waits for, the broker most likely")
    else:
        yield Note("ok", "daemon", f"pid {found['pid']} runs as {name}, and is {found['state']}")
    if found["version"] != __version__:
        yield Note("warn", "daemon", f"it is kqueue {found['version']}, and this is {__version__}", "start it again")


def _memory(target: Target) -> Notes:
    from ..hostmemory import budget

    config = target.config
    if config is None or not config.isolated.max_concurrent:
        return
    memory, about = budget(config.isolated.memory_budget), "memory"
    basis = f" ({memory.basis})" if memory.basis.endswith(("available", "allows")) else ""
    yield Note("ok", about, f"isolated jobs may use {memory.total_mib} MiB together{basis}")
    most = config.limits.memory_mib
    if most > memory.total_mib:
        what = f"limits.memory is {most} MiB, and isolated.memory_budget, {memory.total_mib} MiB, has never so much for a job"
        yield Note("warn", about, what, "lower limits.memory, or raise isolated.memory_budget; such a job is buried")


def _isolation(target: Target) -> Notes:
    from ..execution.cgroup import guarantees

    config = target.config
    if config is not None and config.isolated.max_concurrent:
        yield Note("ok", "isolation", f"isolated jobs are {guarantees(config.isolated.cgroups)} (as seen from here)")


def _state_dir(target: Target) -> Notes:
    from ..disk import FLEETING, REMOTE, file_system, free, nearest_directory

    config = target.config
    if config is None:
        return
    path, about = config.state_dir, "state_dir"
    there = nearest_directory(path)
    kind = file_system(path)
    if os.path.exists(path) and there != path:
        yield Note("error", about, f"{path} is no directory", "move it away, or set state_dir to another path")
        return
    if not os.access(there, os.W_OK | os.X_OK):
        yield Note("error", about, f"this user may not write to {there}", "let the daemon's user write there, and run this as it")
        return
    if kind in REMOTE:
        what = f"{path} is on {kind}, which other hosts may use as well, and whose locks prove nothing"
        yield Note("error", about, what, "put state_dir on a local disk")
    elif kind in FLEETING:
        what = f"{path} is on {kind}: what could not be settled before a reboot is forgotten, and those jobs run again"
        yield Note("warn", about, what, "put state_dir on a disk")
    else:
        where = f", on {kind}" if kind else ""
        yield Note("ok", about, f"{path} {'is' if there == path else 'can be made, and will be'} writable{where}")
    left, _ = free(path)
    if left < LEAST_FREE:
        yield Note("error", about, f"{left // MIB} MiB are free on the disk of {path}", "make room")


def _broker(target: Target) -> Notes:
    store = target.client.store
    if target.is_unused():
        yield Note("ok", "broker", f"{store.address} is not there yet; the first who dispatches, or the daemon, makes it")
    else:
        store.stats()  # so that what cannot be used says why
        yield Note("ok", "broker", f"{store.address} answers: {store.version()}")
    for finding in store.health():
        yield Note("error" if finding.failing else "warn" if finding.serious else "ok", "broker", finding.text)
    if not target.is_unused():
        yield from _queues(store, target.config)


def _queues(store: Store, config: Config | None) -> Notes:
    stats = store.stats()
    read = {key.partition(":")[2] for key in store.documents("manifest:")}
    read |= set() if config is None else {spec.name for spec in config.queue.names}
    for name, counts in sorted(stats.items()):
        waiting = counts.ready + counts.delayed
        if waiting and name not in read:
            what = f"{waiting} jobs wait in {name!r}, which no daemon has ever read"
            yield Note("warn", "queues", what, "add it to queue.names of a daemon, or dispatch to another queue")
        if counts.dead:
            what = f"{counts.dead} dead letters are in {name!r}"
            where = f" --queue {shlex.quote(name)}" if name else ""  # no name: the queue was no text
            yield Note("warn", "queues", what, f"kqueue jobs --state dead{where}, then kqueue retry, or kqueue forget")
    if not any(counts.dead for counts in stats.values()):
        yield Note("ok", "queues", "no dead letters")


def _promotions(target: Target) -> Notes:
    from ..promotion import PREFIX, read_promotion

    documents = {} if target.is_unused() else target.client.store.documents(PREFIX)
    pins = {} if target.config is None else target.config.jobs.pin
    for key, document in sorted(documents.items()):
        found, name = read_promotion(document), key.removeprefix(PREFIX)
        if found is not None and name not in pins:
            what = f"{name} runs isolated since it blocked the loop of {found.get('by')} for {found.get('seconds')} s"
            what += f" at {found['where']}" if found.get("where") else ""
            todo = found.get("instead") or "make it yield, or declare it isolated=True"
            do = f"{todo}; then kqueue demote {shlex.quote(name)}"
            yield Note("warn", "jobs", what, do)


def _signing(target: Target) -> Notes:
    from ..signing import ENVIRONMENT, load

    config = target.config
    path = os.environ.get(ENVIRONMENT) or (config.security.signing_key_file if config is not None else None)
    if not path:
        yield Note("ok", "signing", "jobs are not signed: who can write to the broker can have any of them run")
        return
    keys = load(path)
    signs, *others = keys.ids
    yield Note("ok", "signing", f"{path}: the key {signs} signs{f'; {len(others)} more are accepted' if others else ''}")
    if keys.warning:
        yield Note("warn", "signing", keys.warning)


CHECKS: Final[tuple[Check, ...]] = (
    _versions, _configuration, _memory, _isolation, _state_dir, _daemon, _broker, _promotions, _signing,
)  # fmt: skip
