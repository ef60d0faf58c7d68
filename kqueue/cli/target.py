"""Where a command of `kqueue` goes: the configuration that -c or the environment names, its broker, its daemon.

Each is looked for when a command first needs it, and imported then: `kqueue --help` reads no YAML and opens nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from ..errors import KQueueError, UsageError

if TYPE_CHECKING:
    from ..client import Client
    from ..config import Config

DAEMON_PATIENCE_S: Final = 5.0  # for an answer; a loop that does not answer within is blocked

F = TypeVar("F", bound=Callable[..., Any])


class DaemonSilent(KQueueError):
    """A daemon is there, and does not answer as it should."""


class Target:
    """What `-c` and the environment name. `json`: print JSON."""

    def __init__(self, path: str | None, json: bool = False) -> None:
        self.json = json
        self._path = path
        self._config: Config | None = None
        self._client: Client | None = None

    @property
    def config(self) -> Config | None:
        """The configuration; None: there is only $KQUEUE_URL. Raises ConfigError."""
        from ..client import CONFIG_FILE
        from ..config_file import load_config

        path = self._path or os.environ.get("KQUEUE_CONFIG") or CONFIG_FILE
        if self._config is None and (path != CONFIG_FILE or os.path.exists(path) or not os.environ.get("KQUEUE_URL")):
            self._config = load_config(path)
        return self._config

    @property
    def client(self) -> Client:
        """The client. Without -c it is found as an application finds it: $KQUEUE_URL first. Raises ConfigError, UsageError."""
        from ..client import from_config, where

        if self._client is None:
            by_url = self._path is None and os.environ.get("KQUEUE_URL")
            config = None if by_url else self.config
            client = where() if config is None else from_config(config)
            if client.store.address.startswith("memory://"):
                raise UsageError("a memory:// queue is in its daemon's memory, and no other process can reach it; use sqlite:///")
            self._client = client
        return self._client

    def close(self) -> None:
        """Close what was opened."""
        if self._client is not None:
            self._client.store.close()

    def is_unused(self) -> bool:
        """Whether nobody has ever used the queue: an SQLite file that is not there, which reading does not create."""
        address = self.client.store.address
        return address.startswith("sqlite:///") and not os.path.exists(address.removeprefix("sqlite:///"))

    def ask(self, command: str) -> Mapping[str, Any] | None:
        """What the daemon answers to `command`; None: there is none. Raises DaemonSilent, and KQueueError with its refusal."""
        config = self.config
        if config is None:
            return None
        answer = _ask(config.control.socket, {"command": command})
        if answer is not None and answer.pop("ok", None) is not True:
            raise KQueueError(f"kqueued refuses: {answer.get('error', 'it does not say why')}")
        return answer


def _ask(path: str, request: Mapping[str, Any]) -> dict[str, Any] | None:
    from ..codec import from_json, to_json
    from ..control import address_of
    from ..errors import EnvelopeError

    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as daemon, address_of(path) as address:
            daemon.settimeout(DAEMON_PATIENCE_S)
            daemon.connect(address)
            daemon.sendall(to_json(request) + b"\n")
            with daemon.makefile("rb") as stream:
                line = stream.readline()
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except TimeoutError:
        raise DaemonSilent(
            f"kqueued does not answer on {path} within {DAEMON_PATIENCE_S:g} s; a job that blocks its loop is named in its log"
        ) from None
    except OSError as error:
        hint = "; run this as the user of the daemon, or as root" if isinstance(error, PermissionError) else ""
        raise DaemonSilent(f"cannot talk to kqueued on {path}: {error.strerror or error}{hint}") from None
    if not line:
        return None  # it ended just now
    try:
        answer: dict[str, Any] = from_json(line)
    except EnvelopeError as error:
        raise DaemonSilent(f"what listens on {path} is no kqueued: its answer is {error}") from None
    return answer


def _print_json(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    target = context.find_object(Target)
    if target is not None and value:
        target.json = True


pass_target = click.make_pass_decorator(Target)


def json_option(command: F) -> F:
    """--json after the command; before it, it is an option of `kqueue` itself."""
    option = click.option("--json", is_flag=True, expose_value=False, callback=_print_json, help="Print JSON.")
    return option(command)
