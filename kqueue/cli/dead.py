"""`kqueue retry` and `kqueue forget`: what becomes of dead letters. They need no daemon; one that runs hears of it at once.

Work goes in batches, each of them one step of the broker, and can be ended between any two: what is done is done, and the same
command does the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from ..brokers.base import MAX_BATCH
from ..errors import UsageError
from .progress import Interruption, progress_bar
from .target import Target, json_option, pass_target
from .text import json_text, printable

if TYPE_CHECKING:
    from ..brokers.base import Store

NAMED: Final = 10  # of the ids that are no dead letters; more are counted only
EXIT_MISSING: Final = 2

_ids = click.argument("ids", metavar="ID…", nargs=-1)
_queue = click.option("--queue", metavar="Q", help="Only of this queue.")


@click.command()
@_ids
@click.option("--all", "everything", is_flag=True, help="Every dead letter that there is now.")
@_queue
@json_option
@pass_target
def retry(target: Target, ids: Sequence[str], everything: bool, queue: str | None) -> int:
    """Make dead letters ready again.

    They run as if they had never run before, but keep their death certificates. It may be interrupted and repeated.
    """
    _check(ids, everything)
    return _Work(target, "retry", "retried", queue).do(ids, everything)


@click.command()
@_ids
@click.option("--all", "everything", is_flag=True, help="Every dead letter that there is now.")
@_queue
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@pass_target
def forget(target: Target, ids: Sequence[str], everything: bool, queue: str | None, yes: bool) -> int:
    """Delete dead letters, and what is known of them.

    It may be interrupted and repeated.
    """
    _check(ids, everything)
    work = _Work(target, "forget", "forgotten", queue)
    if everything and not yes and work.total and not _agreed(work):
        click.echo("nothing was forgotten", err=True)
        return 1
    return work.do(ids, everything)


def _check(ids: Sequence[str], everything: bool) -> None:
    if bool(ids) == everything:
        raise UsageError("give the ids of dead letters, or --all; `kqueue jobs --state dead` lists them")


def _agreed(work: _Work) -> bool:
    what = f"{work.total} dead letters of {', '.join(map(printable, work.counts))} in {work.store.address}"
    if not sys.stdin.isatty():
        raise UsageError(f"forget --all would delete {what}, and nobody can be asked here: say --yes")
    return click.confirm(f"delete {what}, for good?", err=True)


class _Work:
    """One command: `verb` done to dead letters of `queue` (None: of all)."""

    def __init__(self, target: Target, verb: str, participle: str, queue: str | None) -> None:
        self.store: Store = target.client.store
        self._target = target
        self._participle = participle
        self._queue = queue
        self._unused = target.is_unused()
        self._apply: Callable[[Sequence[str], str | None], Sequence[bool]] = getattr(self.store, verb)
        self._label = {"retry": "retrying", "forget": "forgetting"}[verb]
        self._done = 0
        self._missing: list[str] = []
        stats = {} if self._unused else self.store.stats()
        self.counts = {name: found.dead for name, found in sorted(stats.items()) if found.dead and queue in (None, name)}
        self.total = sum(self.counts.values())  # of dead letters, now

    def do(self, ids: Sequence[str], everything: bool) -> int:
        """The exit code."""
        given = list(dict.fromkeys(ids))
        total = self.total if everything else len(given)
        batches = self._walk() if everything else ((self._queue, given[at : at + MAX_BATCH]) for at in range(0, total, MAX_BATCH))
        code = self._run(batches, total, named=not everything)
        if self._target.json:
            click.echo(json_text({self._participle: self._done, "missing": self._missing}))
        elif not code:
            click.echo(f"{self._done} {self._participle}")
        if self._missing:
            click.echo(self._about_missing(len(given)), err=True)
        return code or (EXIT_MISSING if self._missing else 0)

    def _run(self, batches: Iterable[tuple[str | None, Sequence[str]]], total: int, named: bool) -> int:
        """0, or the exit code of who was interrupted."""
        interruption = Interruption()
        try:
            with interruption, progress_bar(self._label, total, hidden=total <= MAX_BATCH) as bar:
                for queue, batch in batches:
                    if interruption.exit_code:
                        break
                    answers = [False] * len(batch) if self._unused else self._apply(batch, queue)
                    self._done += sum(answers)
                    if named:
                        self._missing += [id for id, done in zip(batch, answers, strict=True) if not done]
                    bar.update(len(batch))
                else:
                    return 0
        except BaseException:  # and the batch that was under way may be done, or not
            click.echo(f"at least {self._progress(total)}", err=True)
            raise
        click.echo(f"interrupted: {self._progress(total)}", err=True)
        return interruption.exit_code

    def _progress(self, total: int) -> str:
        return f"{self._done} of {total} {self._participle}; the same command does the rest"

    def _walk(self) -> Iterator[tuple[str, Sequence[str]]]:
        """Every dead letter that there is now, by its queue. Those that die meanwhile are not met, so it ends."""
        ends = {name: self.store.last_dead(name) for name in self.counts}
        for name, until in ends.items():
            after = None
            while until is not None and (page := self.store.dead(name, after, until, MAX_BATCH)):
                yield name, [mark.id for mark in page]
                after = page[-1]

    def _about_missing(self, given: int) -> str:
        which = "; ".join(f"{printable(id) if id else repr(id)} {self._what_is(id)}" for id in self._missing[:NAMED])
        more = f"; and {len(self._missing) - NAMED} more" if len(self._missing) > NAMED else ""
        where = "" if self._queue is None else f" of queue {printable(self._queue)}"
        return f"kqueue: {len(self._missing)} of {given} are no dead letters{where}: {which}{more}"

    def _what_is(self, id: str) -> str:
        row: Any = None if self._unused else self.store.show(id, self._queue)
        return "is not there" if row is None else f"is {row.state}" if row.state != "dead" else f"is dead in queue {row.queue}"
