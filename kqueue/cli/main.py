"""`kqueue`: the operator's command. Here is what its commands have in common: options, and how they end when something is wrong.

An error is one line on stderr, with the next step in it, and an exit code that its class carries; never a traceback.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import ConfigError, KQueueError
from .dead import forget, retry
from .demote import demote
from .dispatch import dispatch
from .doctor import doctor
from .init import init
from .jobs import jobs, show
from .status import status
from .target import Target
from .text import printable

EXIT_INTERNAL, EXIT_INTERRUPTED = 70, 130


class _Command(click.Group):
    """A group of commands whose errors are one line each. What a command returns is its exit code."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        try:
            code = super().main(*args, **{"prog_name": "kqueue", **extra, "standalone_mode": False})
            sys.stdout.flush()
        except click.ClickException as error:
            code = _fail(_usage(error), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            code = EXIT_INTERRUPTED
        except KQueueError as error:
            code = _fail(str(error) if isinstance(error, ConfigError) else f"kqueue: {error}", error.exit_code)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's own flush would complain
            code = 0
        except OSError as error:
            code = _fail(f"kqueue: {error}", 1)
        except Exception as error:
            code = _fail(f"kqueue: internal error: {error!r} at {_place(error)}; please report it", EXIT_INTERNAL)
        sys.exit(code or 0)


def _fail(message: str, code: int) -> int:
    click.echo(printable(message), err=True)
    return code


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "kqueue"
    return f"kqueue: {error.format_message().rstrip('.')}; see {command} --help"


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


@click.group(cls=_Command, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-c", "--config", "path", metavar="FILE", help="Instead of $KQUEUE_CONFIG, or ./kqueue.yaml.")
@click.option("--json", is_flag=True, help="Print JSON; may stand after the command, too.")
@click.version_option(__version__, prog_name="kqueue")
@click.pass_context
def main(context: click.Context, path: str | None, json: bool) -> None:
    """Dispatch jobs and look at them, and at the daemon that runs them."""
    context.obj = target = Target(path, json)
    context.call_on_close(target.close)
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (init, dispatch, status, jobs, show, retry, forget, demote, doctor):
    main.add_command(command)


if __name__ == "__main__":
    main()
