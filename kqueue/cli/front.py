"""The front of `kqueued`: reads the command line and the configuration, in a child of the supervisor that ends right after."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from .. import __version__
from ..codec import to_json
from ..config import Config
from ..config_file import load_config
from ..errors import ConfigError, UsageError
from ..settings import parse_duration


def _duration(context: click.Context, parameter: click.Parameter, value: str | None) -> float:
    """Seconds of "90", "90s" or "5m"; 0.0 when it is not given."""
    if value is None:
        return 0.0
    try:
        return float(value) if value.replace(".", "", 1).isdigit() else parse_duration(value)
    except (UsageError, ConfigError) as error:
        raise click.BadParameter(str(error)) from None


def _tried(config: Config) -> list[str]:
    """What to say of the privileges of jobs, tried here, in a process that ends soon. Raises ConfigError."""
    from ..execution.privileges import Privileges
    from ..execution.trial import NotPermitted, try_out

    try:
        return try_out(Privileges.from_config(config.isolated, config.security), config.jobs.path)
    except NotPermitted as error:
        raise config.error(error.key, f"{error.key}: {error}") from None


def front(arguments: Sequence[str], write_fd: int) -> int:
    """Parse `arguments`, load the configuration, write both to `write_fd` as JSON. Returns the exit code.

    0 with nothing written: all there was to do was to print (--help).
    """

    @click.command(name="kqueued", context_settings={"help_option_names": ["-h", "--help"]})
    @click.option("-c", "--config", "path", envvar="KQUEUE_CONFIG", default="kqueue.yaml", show_default=True, help="What to run.")
    @click.option("--check", is_flag=True, help="Print what would run, and exit: 0, or 2 with what is wrong.")
    @click.option("--burst", is_flag=True, help="End when nothing is ready and nothing runs.")
    @click.option("--max-jobs", type=click.IntRange(min=1), default=None, metavar="N", help="Take N jobs, finish them, and end.")
    @click.option("--max-time", callback=_duration, metavar="S", help="Stop after S seconds (or 5m, 1h).")
    @click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Instead of log.level.")
    @click.version_option(__version__, prog_name="kqueued")
    def kqueued(
        path: str, check: bool, burst: bool, max_jobs: int | None, max_time: float, log_level: str | None
    ) -> None:
        """Run jobs: light ones inside this process, heavy ones in limited children."""
        config = load_config(path)
        options = {
            "check": check, "burst": burst, "max_jobs": max_jobs or 0, "max_time": max_time, "log_level": log_level,
        }  # fmt: skip
        with os.fdopen(write_fd, "wb") as pipe:
            pipe.write(to_json({"config": config.to_plain(), "options": options, "warnings": _tried(config)}))

    try:
        kqueued.main(args=list(arguments), prog_name="kqueued", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return 2
    except click.Abort:
        return 130
    except ConfigError as error:
        print(error, file=sys.stderr)
        if not os.path.exists("kqueue.yaml") and "kqueue.yaml" in str(error) and "-c" not in arguments:
            print("`kqueue init` writes one", file=sys.stderr)
        return error.exit_code
    return 0
