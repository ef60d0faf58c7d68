"""`kqueue demote`: take back that a job class runs isolated since it blocked the loop. Daemons hear of it within a lease."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ..errors import UsageError
from ..promotion import FORGOTTEN, PREFIX, read_promotion
from .target import Target, json_option, pass_target
from .text import json_text, printable


@click.command()
@click.argument("jobs", nargs=-1, metavar="[JOB]...")
@json_option
@pass_target
def demote(target: Target, jobs: tuple[str, ...]) -> None:
    """Let jobs run inline again that were found to block the loop.

    For when they do not any longer. Without a JOB, those are listed that run isolated for that.
    """
    store = target.client.store
    documents = {} if target.is_unused() else store.documents(PREFIX)
    promoted = {key.removeprefix(PREFIX): read_promotion(document) for key, document in documents.items()}
    found = {name: details for name, details in sorted(promoted.items()) if details is not None}
    for name in jobs:
        if name not in found:
            raise UsageError(f"{name!r:.80} does not run isolated for blocking the loop; that do {', '.join(found) or 'none'}")
    if jobs:
        store.publish({f"{PREFIX}{name}": FORGOTTEN for name in jobs})
        click.echo(json_text({"demoted": list(jobs)}) if target.json else f"daemons run it inline again: {', '.join(jobs)}")
    elif target.json:
        click.echo(json_text(found))
    else:
        lines = [f"{name}: {_how(how)}" for name, how in found.items()]
        click.echo("\n".join(map(printable, lines)) or "none")


def _how(found: Mapping[str, Any]) -> str:
    place = f" at {found['where']}" if found.get("where") else ""
    return f"blocked the loop of {found.get('by')} for {found.get('seconds')} s{place}"
