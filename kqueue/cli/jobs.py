"""`kqueue jobs` and `kqueue show`: what stands in the broker. They read it themselves, so they need no daemon.

What stands there may be anything: an envelope that cannot be read shows as just that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from ..codec import Envelope, decode, from_json
from ..errors import EnvelopeError, JobNotFound, KQueueError
from ..signing import signed_by, unsigned
from ..states import JobState
from .certificate import death, reason, told
from .status import advice, lane
from .target import Target, json_option, pass_target
from .text import ago, duration, json_text, moment, printable, table

if TYPE_CHECKING:
    from ..brokers.base import Row

UNREADABLE: Final = "(unreadable)"
ANY_SIZE: Final = 1 << 30  # bytes; what is too large to run is still shown


@click.command()
@click.option("--state", type=click.Choice([state.value for state in JobState]), help="Only these; done ones show only so.")
@click.option("--queue", metavar="Q", help="Only of this queue.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="At most so many.")
@json_option
@pass_target
def jobs(target: Target, state: str | None, queue: str | None, limit: int) -> None:
    """List jobs: waiting, running, dead.

    Those that are done are listed by --state done, while their results are kept. The next to run come first; of the dead, the
    last to die, with what they died of.
    """
    store = target.client.store
    rows = [] if target.is_unused() else store.list(state, queue, limit)
    if target.json:
        click.echo(json_text([_fields(row) for row in rows]))
        return
    if not rows:
        click.echo(f"no such jobs in {store.address}", err=True)
        return
    headings, cells = (_DEAD_HEADINGS, _dead_cells) if state == JobState.DEAD.value else (_HEADINGS, _cells)
    click.echo(table(headings, [cells(row) for row in rows], right=("PRIORITY", "ATTEMPTS")))
    if len(rows) == limit:
        click.echo(f"the first {limit}; more with --limit", err=True)


@click.command()
@click.argument("id")
@json_option
@pass_target
def show(target: Target, id: str) -> None:
    """Show all there is to know of one job.

    Its death certificates, one for each attempt, come last.
    """
    row = None if target.is_unused() else target.client.store.show(id)
    if row is None:
        where = target.client.store.address
        raise JobNotFound(f"no job {id!r:.80} is in {where}: it is done, or never was; `kqueue jobs` lists those that are")
    fields = {**_all_fields(row), "class": _class(target, row)}
    click.echo(json_text(fields) if target.json else _page(row, fields))


def _class(target: Target, row: Row) -> Mapping[str, Any] | None:
    """What the daemon here knows of jobs of this name; None: there is none, or it knows nothing."""
    try:
        found = target.ask("status")
    except KQueueError:  # what stands in the broker is shown all the same
        return None
    known: Mapping[str, Any] | None = ((found or {}).get("jobs") or {}).get(_name(row))
    return known


def _fields(row: Row) -> dict[str, Any]:
    fields = {
        "id": row.id, "job": _name(row), "state": row.state, "queue": row.queue, "lane": row.lane, "priority": row.priority,
        "attempts": row.counters.attempts, "available_at": round(row.available_at, 3),
    }  # fmt: skip
    return fields | death(row)._asdict() if row.state == JobState.DEAD.value else fields


def _all_fields(row: Row) -> dict[str, Any]:
    envelope = _envelope(row)
    read = envelope if isinstance(envelope, Envelope) else None
    return {
        **_fields(row),
        "crashes": row.counters.crashes,
        "recoveries": row.counters.recoveries,
        "args": None if read is None else read.args,
        "kwargs": None if read is None else read.kwargs,
        "enqueued_at": None if read is None else read.enqueued_at,
        "result": None if row.result is None else _json(row.result),
        "certificates": [_json(certificate) for certificate in row.certificates],
    }


def _envelope(row: Row) -> Envelope | str:
    """The envelope, or what is wrong with it."""
    if row.envelope is None:
        return "there is none"
    try:
        return decode(unsigned(row.envelope), ANY_SIZE)
    except EnvelopeError as error:
        return str(error)


def _name(row: Row) -> str | None:
    envelope = _envelope(row)
    return envelope.job if isinstance(envelope, Envelope) else None


def _json(data: bytes) -> Any:
    """What KQueue wrote, unless somebody else did."""
    try:
        return from_json(data)
    except EnvelopeError:
        return {"unreadable": data.decode("utf-8", "replace")}


# -- for people -------------------------------------------------------------------------------------------------------------


def _class_lines(row: Row, known: Mapping[str, Any]) -> list[str]:
    ends = ", ".join(f"{number} {cause}" for cause, number in known["causes"].items()) or "none has ended"
    taken, memory = known["duration_s"], known["memory_mib"]
    sizes = f"; p99 {duration(taken['p99'])}" if any(taken.values()) else ""
    sizes += f", {memory['p99']:.0f} MiB" if memory is not None else ""
    lines = [f"class      runs {lane(known)}; of this daemon's: {ends}{sizes}"]
    return [*lines, *(f"           {printable(text)}" for text in advice(_name(row) or "", known))]


_HEADINGS: Final = ("ID", "JOB", "STATE", "QUEUE", "LANE", "PRIORITY", "ATTEMPTS", "AVAILABLE")
_DEAD_HEADINGS: Final = ("ID", "JOB", "QUEUE", "ATTEMPTS", "DIED", "CAUSE", "ERROR")


def _dead_cells(row: Row) -> tuple[Any, ...]:
    name, how = _name(row) or UNREADABLE, death(row)
    died = None if how.died_at is None else ago(how.died_at)
    return (row.id, name, row.queue, row.counters.attempts, died, how.cause, reason(how))


def _cells(row: Row) -> tuple[Any, ...]:
    name = _name(row) or UNREADABLE
    return (row.id, name, row.state, row.queue, row.lane, row.priority, row.counters.attempts, ago(row.available_at))


def _page(row: Row, fields: dict[str, Any]) -> str:
    envelope = _envelope(row)
    counters = row.counters
    lines = [
        f"job        {printable(fields['job'] or UNREADABLE)}",
        f"id         {printable(row.id)}",
        f"state      {row.state}{f', due {moment(row.available_at)}' if row.state in ('ready', 'delayed') else ''}",
        f"queue      {printable(row.queue) or UNREADABLE}, lane {row.lane}, priority {row.priority}",
        f"failed     {counters.attempts} attempts, {counters.crashes} crashes, {counters.recoveries} recoveries",
    ]
    if isinstance(envelope, Envelope):
        lines.append(f"enqueued   {moment(envelope.enqueued_at)}")
        arguments = (("args", envelope.args), ("kwargs", envelope.kwargs))
        lines += [f"{label:10} {json_text(value)}" for label, value in arguments if value]
    else:
        lines.append(f"envelope   {printable(envelope)}")
        if row.envelope is not None:
            lines.append(f"           {printable(row.envelope[:200].decode('utf-8', 'replace'))}")
    if fields["class"] is not None:
        lines += _class_lines(row, fields["class"])
    key = None if row.envelope is None else signed_by(row.envelope)
    if key is not None:
        lines.append(f"signed     with the key {key}; the daemon checks that, not this command")
    if row.result is not None:
        lines.append(f"result     {json_text(fields['result'])}")
    return "\n".join([*lines, *map(told, fields["certificates"])])
