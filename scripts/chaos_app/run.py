"""The command line: `./scripts/chaos --help`."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import sys
from pathlib import Path

import click

from . import nemeses, report
from .report import Result
from .scenarios import CUT_EVERY_BYTE, SCENARIOS, Wishes
from .world import Trouble

BROKERS = ("sqlite", "redis")
JOBS_A_SECOND = 100  # by default


def listed(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    names = [name.strip() for name in (value or "").split(",") if name.strip()]
    unknown = [name for name in names if name not in nemeses.NEMESES and name != CUT_EVERY_BYTE]
    if unknown:
        raise click.BadParameter(f"no nemesis {', '.join(unknown)}; there are {', '.join([*nemeses.NEMESES, CUT_EVERY_BYTE])}")
    return names


def tell(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        for name, nemesis in nemeses.NEMESES.items():
            click.echo(f"{name:16} {nemesis.does} ({', '.join(nemesis.brokers.split())})")
        click.echo(f"{CUT_EVERY_BYTE:16} a run of its own: each kind of reply, cut after every byte (redis)")
        context.exit()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--broker", type=click.Choice([*BROKERS, "both"]), default="both", show_default=True)
@click.option("--scenario", type=click.Choice(list(SCENARIOS)), default="chaos", show_default=True, help="See the end.")
@click.option("--minutes", type=click.FloatRange(min=0.05), help="How long it strikes.  [default: 1; cut-every-byte: at most 10]")
@click.option("--jobs", type=click.IntRange(min=1), help=f"How many.  [default: {JOBS_A_SECOND} a second; scenarios: 6000]")
@click.option("--seed", type=int, help="Of jobs and strikes.  [default: a new one, which is printed]")
@click.option("--nemesis", "chosen", callback=listed, metavar="LIST", help="Only these, separated by commas.  [default: all]")
@click.option("--nemeses", is_flag=True, is_eager=True, expose_value=False, callback=tell, help="List them and exit.")
@click.option("--lease", type=click.FloatRange(min=3), help="queue.lease, in seconds.  [default: 3; survivor: 15]")
@click.option("--every", type=click.FloatRange(min=0.05), default=1.0, show_default=True, help="Seconds between strikes.")
@click.option("--bound", type=float, help="Seconds from the last strike to the last job's end.  [default: by what is left]")
@click.option("--slots", type=click.IntRange(min=1), help="inline.max_concurrent of kills, survivor.  [default: 100]")
@click.option("--heavy", type=click.FloatRange(0, 100), default=2, show_default=True, help="kills, survivor: % run in children.")
@click.option("--inline-poison/--no-inline-poison", default=True, show_default=True, help="Inline jobs that kill their daemon.")
@click.option("--stride", type=click.IntRange(min=1), default=1, show_default=True, help="cut-every-byte: every so many bytes.")
@click.option("--keep", is_flag=True, help="Keep the directory of the run: configurations, logs, the book.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the verdicts there, too.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--verbose", "-v", is_flag=True, help="Print the schedule, and each strike as it falls.")
def main(
    broker: str, scenario: str, minutes: float | None, jobs: int | None, seed: int | None, chosen: list[str],
    lease: float | None, every: float, bound: float | None, slots: int | None, heavy: float, inline_poison: bool, stride: int,
    keep: bool, json_file: Path | None, markdown: bool, verbose: bool,
) -> None:  # fmt: skip
    """Jobs under fire: starts a broker, daemons and dispatchers of its own, kills, stops and cuts what it can.

    It counts what was lost, and what ran twice without a reason.

    Exits with 1 on any of that, with 2 when it could not be tried, and with 0 otherwise. The seed replays jobs and strikes.

    \b
    --scenario chaos            every kind of job and nemesis, by the seed
    --scenario kills            jobs of 100 ms, the daemon killed at five points
    --scenario survivor         two daemons, one killed for good
    --scenario cut-every-byte   each kind of reply, cut after every byte (also --nemesis cut-every-byte)
    """
    if CUT_EVERY_BYTE in chosen:
        scenario = CUT_EVERY_BYTE
    if scenario == CUT_EVERY_BYTE:
        broker = "redis"
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    results: list[Result] = []
    for name in BROKERS if broker == "both" else (broker,):
        seconds = (minutes or (10 if scenario == CUT_EVERY_BYTE else 1)) * 60
        wishes = Wishes(
            broker=name,
            seed=seed,
            seconds=seconds,
            jobs=jobs or (int(seconds * JOBS_A_SECOND) if scenario == "chaos" else 6000),
            lease_s=lease or (15 if scenario == "survivor" else 3),
            nemeses=nemeses.available(name, chosen),
            without=_lacking(inline_poison),
            pause_s=every,
            bound_s=bound,
            keep=keep,
            verbose=verbose,
            slots=slots or 0,
            heavy_share=heavy / 100,
            stride=stride,
            command=_command(name, seed),
            say=_say,
        )
        results.append(SCENARIOS[scenario](wishes))
        if not markdown:
            click.echo(report.table(results[-1]) + "\n")
    if markdown:
        click.echo(report.markdown(results))
    if json_file is not None:
        json_file.write_text(json.dumps([report.as_json(result) for result in results], indent=1) + "\n")
    if any(result.guilty for result in results):
        if markdown:
            click.echo("\n".join(report.table(result) for result in results if result.guilty), err=True)
        sys.exit(1)


def _lacking(inline_poison: bool) -> list[str]:
    from kqueue import JobContext

    without = [] if inline_poison else ["inline poison"]
    return without if hasattr(JobContext, "then") else [*without, "then"]


def _command(broker: str, seed: int) -> str:
    """The command line of now, for one broker and this seed."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word.split("=")[0] not in ("--broker", "--seed"):
            words.append(word)
        skip = not skip and word in ("--broker", "--seed")
    return shlex.join(["./scripts/chaos", "--broker", broker, "--seed", str(seed), *words])


def _say(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    click.echo(text, err=True)


def _terminated(number: int, frame: object) -> None:
    sys.exit(128 + number)  # so that everything is ended on the way out


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    for variable in [name for name in os.environ if name.startswith("KQUEUE_")]:
        del os.environ[variable]  # where jobs go is ours to say
    try:
        main(prog_name="./scripts/chaos")
    except Trouble as trouble:
        _say(f"chaos: {trouble}")
        sys.exit(2)
