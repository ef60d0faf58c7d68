"""`kqueue dispatch`: enqueue a job by its name, once or many times, and wait for what comes of it if told to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from ..brokers.base import MAX_BATCH
from ..errors import EnvelopeError, UsageError
from ..job import BoundJob, JobHandle
from ..options import dispatch_options
from ..states import JobState
from .progress import progress_bar
from .target import Target, json_option, pass_target
from .text import json_text, printable


def _duration(context: click.Context, parameter: click.Parameter, value: str | None) -> float:
    from ..settings import parse_duration

    try:
        return 0.0 if value is None else parse_duration(value)
    except UsageError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.argument("job")
@click.option("--args", "arguments", metavar="JSON", default="[]", help="A list of arguments, or an object of keyword arguments.")
@click.option("--delay", callback=_duration, metavar="S", help="Not before so many seconds (or 5m, 1h).")
@click.option("--priority", type=int, metavar="N", help="-100 to 100; each point is a head start of an hour.")
@click.option("--queue", metavar="Q", help="Instead of the job's own.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="So many times.")
@click.option("--wait", is_flag=True, help="Wait for the end; print the result, or exit with 1.")
@json_option
@pass_target
def dispatch(
    target: Target, job: str, arguments: str, delay: float, priority: int | None, queue: str | None, count: int | None, wait: bool
) -> int:
    """Enqueue JOB, by its registered name, and print its id."""
    args, kwargs = _arguments(arguments)
    overrides: dict[str, Any] = {name: value for name, value in (("priority", priority), ("queue", queue)) if value is not None}
    client = target.client
    bound = client.named(job, args, kwargs, dispatch_options(delay=delay, **overrides))
    on_trust = not client.manifest()
    handles = _dispatch(target, bound, count or 1)
    if on_trust:
        note = f"note: no kqueued has published its jobs to {client.store.address} yet, so the name {job!r} could not be checked"
        click.echo(printable(note), err=True)
    if wait:
        return _wait(target, handles, many=count is not None)
    ids = [handle.id for handle in handles]
    if target.json:
        click.echo(json_text({"id": ids[0]} if count is None else {"ids": ids}))
    else:
        click.echo(ids[0] if count is None else f"{count} jobs dispatched")
    return 0


def _arguments(text: str) -> tuple[Sequence[Any], Mapping[str, Any]]:
    from ..codec import from_json

    try:
        value = from_json(text.encode("utf-8", "surrogateescape"))
    except EnvelopeError as error:
        raise UsageError(f"--args is {error}; write a list or an object, in quotes of the shell: --args '[\"a\", 1]'") from None
    if isinstance(value, list):
        return value, {}
    if isinstance(value, dict):
        return (), value
    raise UsageError(f"--args must be a list or an object, not {text:.40}; for one argument write '[{text:.40}]'")


def _dispatch(target: Target, bound: BoundJob, count: int) -> list[JobHandle]:
    handles: list[JobHandle] = []
    with progress_bar("dispatching", count, hidden=count <= MAX_BATCH) as bar:
        for start in range(0, count, MAX_BATCH):
            batch = [bound] * min(MAX_BATCH, count - start)
            handles += target.client.dispatch(batch)
            bar.update(len(batch))
    return handles


def _wait(target: Target, handles: Sequence[JobHandle], many: bool) -> int:
    ended = []
    with progress_bar("waiting", len(handles), hidden=not many) as bar:
        for handle in handles:
            handle.wait()
            ended.append(_ended(target, handle))
            bar.update(1)
    dead = sum(each["state"] == JobState.DEAD.value for each in ended)
    if target.json:
        click.echo(json_text(ended if many else ended[0]))
    elif many:
        click.echo(f"{len(ended) - dead} done, {dead} dead")
    else:
        click.echo(_sentence(ended[0]))
    return 1 if dead else 0


def _ended(target: Target, handle: JobHandle) -> dict[str, Any]:
    """What came of a job that has ended. A result that was not kept reads as null."""
    from ..client.handle import last_error
    from ..codec import from_json

    row = target.client.store.show(handle.id)
    if row is None or row.state != JobState.DEAD.value:
        result = None if row is None or row.result is None else from_json(row.result)
        return {"id": handle.id, "state": JobState.DONE.value, "result": result}
    return {"id": handle.id, "state": row.state, "error": last_error(row)}


def _sentence(ended: Mapping[str, Any]) -> str:
    if "error" in ended:
        return f"{ended['id']} dead: {printable(ended['error'])}; more: kqueue show {ended['id']}"
    return f"{ended['id']} done: {json_text(ended['result'])}"
