"""`kqueue init`: a configuration and a first job module that work as they are."""

from __future__ import annotations

import os
from typing import Final

import click

from ..errors import UsageError
from .target import Target, json_option, pass_target
from .text import json_text

CONFIG: Final = """\
# kqueue.yaml: what kqueued runs. Whatever is not set here has its default; docs/settings.md lists all there is.
# Relative paths start from the directory of this file. `kqueued --check` says what is wrong, and what would run.

queue:
  url: sqlite:///var/kqueue.db      # or redis://host:6379/0; ${NAME} takes it from the environment
  names: {default: 1}               # the queues read here and their weights, such as {default: 1, mail: 3}

jobs:
  modules: [app.jobs]               # imported by the daemon, which runs light jobs itself
  # isolated_modules: [app.heavy]   # imported by its children only: for what needs numpy and the like

isolated:
  max_concurrent: 4                 # children at once

log:
  level: info                       # debug, info, warning or error
"""

JOBS: Final = '''\
"""Jobs. A generator runs inside the daemon and must not block; a plain function runs in a child of its own, within limits."""

from kqueue import job, progress, sleep


@job(timeout=10, keep_result=600)
def greet(name):
    """Light: while it waits, thousands of others run."""
    yield sleep(0.5)
    return f"Hello, {name}!"


@job(timeout=60, max_memory=128, keep_result=600)
def count_primes(below):
    """Heavy: it keeps a processor busy, in a child that may be killed without harm to anything else."""
    sieve = bytearray([1]) * below
    for number in range(2, int(below**0.5) + 1):
        if sieve[number]:
            sieve[number * number :: number] = bytes(len(range(number * number, below, number)))
        progress(number / below**0.5)
    return sum(sieve[2:])
'''


@click.command()
@click.argument("directory", default=".", type=click.Path(file_okay=False))
@json_option
@pass_target
def init(target: Target, directory: str) -> None:
    """Write a kqueue.yaml and a first job module.

    They go into DIRECTORY, the current one unless given, and work as they are. Nothing is overwritten.
    """
    texts = {"kqueue.yaml": CONFIG, "app/__init__.py": "", "app/jobs.py": JOBS}
    files = {os.path.normpath(os.path.join(directory, name)): text for name, text in texts.items()}
    there = [path for path, text in files.items() if text and os.path.lexists(path)]
    if there:
        raise UsageError(f"{there[0]} is there already, and nothing was written; remove it, or name another directory")
    written = [path for path, text in files.items() if _write(path, text)]
    if target.json:
        click.echo(json_text({"files": written}))
        return
    config = os.path.normpath(os.path.join(directory, "kqueue.yaml"))
    elsewhere = "" if config == "kqueue.yaml" else f" -c {config}"
    click.echo(f"wrote {', '.join(written)}\n\nNext, in one terminal:  kqueued{elsewhere}")
    click.echo(f"and in another:         kqueue{elsewhere} dispatch greet --args '[\"world\"]' --wait")


def _write(path: str, text: str) -> bool:
    """Write a new file; whether it was not there. An application's own (empty or not) __init__.py stays."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        if isinstance(error, FileExistsError) and os.path.isdir(os.path.dirname(path) or "."):
            return False
        reason = error.strerror or error
        raise UsageError(f"cannot write {path}: {reason}; make that directory writable, or name another") from None
    return True
