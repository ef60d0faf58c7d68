"""Connecting to PostgreSQL without blocking: what the DSN says, whom that means, and why we are not let in.

libpq itself looks names up by a getaddrinfo that blocks, and waits for each address without a limit. So names are looked up here
(names.py), and libpq gets one address at a time, each with its share of the time.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Final, TypeVar

import psycopg
from psycopg import generators, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ...errors import UsageError
from ..errors import ConnectFailed, NameNotFound, TimedOut
from ..gate import gate
from ..names import addresses_of
from ..surroundings import left, now
from .errors import PostgresRefused, PostgresTryAgain
from .postgres_link import Driven, Link, drive_connecting, first_line

T = TypeVar("T")
Steps = Generator[Any, Any, T]

CONNECT_S: Final = 10.0  # for all addresses, unless connect_timeout= says otherwise
_PORT: Final = "5432"
_KEEPALIVE: Final = {  # so that a server that vanished is noticed within a minute; unless the DSN says otherwise
    "keepalives_idle": "15", "keepalives_interval": "5", "keepalives_count": "3", "tcp_user_timeout": "30000",
    "application_name": "kqueue",
}  # fmt: skip


class Spec:
    """Where to connect to, and how. Raises UsageError when nobody can read the DSN."""

    def __init__(self, dsn: str, prepare: bool) -> None:
        try:
            self.parameters = {name: str(value) for name, value in conninfo_to_dict(dsn).items() if value is not None}
        except psycopg.Error as error:
            raise UsageError(
                f"cannot read the DSN of io.postgres(): {_without(str(error), dsn)}; write postgresql://user:password@host/database"
            ) from None
        if "service" in self.parameters:
            raise UsageError("service= in the DSN of io.postgres() is not followed; write host=, dbname= and user= instead")
        self.prepare = prepare
        found = {item.keyword.decode(): item.val for item in pq.Conninfo.get_defaults()}
        known = {name: value.decode() for name, value in found.items() if value}
        self.settings = {**_KEEPALIVE, **known, **self.parameters}
        self.connect_s = float(self.parameters.get("connect_timeout") or CONNECT_S)

    @property
    def address(self) -> str:
        """For messages."""
        settings = self.settings
        host = settings.get("host") or settings.get("hostaddr") or "localhost"
        user = f"{settings['user']}@" if "user" in settings else ""
        return f"postgresql://{user}{host}:{settings.get('port') or _PORT}/{settings.get('dbname') or settings.get('user', '')}"

    def hosts(self) -> list[tuple[str, str, str]]:
        """Host, address ("": to be looked up) and port of each server that it names."""
        names = (self.settings.get("host") or "").split(",")
        addresses = (self.settings.get("hostaddr") or "").split(",")
        count = max(len(names), len(addresses))
        ports = (self.settings.get("port") or _PORT).split(",")
        names, addresses = names * (count if len(names) == 1 else 1), addresses * (count if len(addresses) == 1 else 1)
        ports = ports * count if len(ports) == 1 else ports
        return list(zip(names, addresses, ports, strict=False))


def open_link(spec: Spec, deadline: float | None) -> Steps[Link]:
    """A connection. ConnectFailed, PostgresRefused, PostgresTryAgain, NameNotFound, TimedOut."""
    until = now() + spec.connect_s
    limit = until if deadline is None else min(until, deadline)
    attempts: list[dict[str, str]] = []
    trouble: list[Exception] = []
    for host, address, port in spec.hosts():
        try:
            found = yield from _look_up(host, address, int(port or _PORT), limit)
        except NameNotFound as error:
            trouble.append(error)
            continue
        attempts += [{"host": host, "hostaddr": each, "port": port} if each else {"host": host, "port": port} for each in found]
    for place, attempt in enumerate(attempts):
        share = now() + max(0.0, limit - now()) / (len(attempts) - place)
        try:
            return (yield from _connect(spec, attempt, share))
        except (ConnectFailed, PostgresRefused, PostgresTryAgain, TimedOut) as error:
            if isinstance(error, TimedOut) and left(share):
                raise  # that of a scope around us
            trouble.append(error)
    raise trouble[-1]


def _look_up(host: str, address: str, port: int, deadline: float) -> Steps[Sequence[str]]:
    """The addresses of a host; [""]: libpq needs none."""
    if address or not host or host.startswith(("/", "@")):
        return [address]
    found = yield from addresses_of(host, port, deadline)
    return [str(at[0]) for _, at in found]


def _connect(spec: Spec, attempt: dict[str, str], deadline: float) -> Steps[Link]:
    places = gate()
    settings = {**_KEEPALIVE, **spec.parameters, **{name: value for name, value in attempt.items() if value}}
    yield from places.take(f"to connect to {spec.address}", deadline)
    try:
        pgconn = yield from drive_connecting(generators.connect(make_conninfo("", **settings)), deadline)
        connection = Driven(pgconn)
        connection.prepare_threshold = 5 if spec.prepare else None
        yield from connection.set_autocommit(True).__await__()  # asks the server nothing
        return Link(connection, places, spec.address, lambda deadline: open_link(spec, deadline))
    except BaseException as error:
        places.give()
        if isinstance(error, TimedOut):
            raise TimedOut(f"{spec.address} did not answer in time: no connection came about") from None
        if isinstance(error, psycopg.Error):
            raise _read_refusal(spec, attempt, error) from None
        raise


_NOT_NOW: Final = (
    "system is starting up", "system is shutting down", "system is in recovery mode", "not yet accepting connections",
    "not accepting connections", "too many clients", "too many connections", "remaining connection slots",
)  # fmt: skip


def _read_refusal(spec: Spec, attempt: dict[str, str], error: psycopg.Error) -> Exception:
    """Why there is no connection. libpq has only words for it, in the language of the server; FATAL is the server's own."""
    text = first_line(str(error).removeprefix("connection failed: ").removeprefix("connection is bad: "))
    if "FATAL" not in text and "no password supplied" not in text:
        return ConnectFailed(f"cannot connect to {spec.address}: {text}")
    said = text.partition("FATAL:")[2].strip() or text
    if any(words in said for words in _NOT_NOW):
        return PostgresTryAgain(f"{spec.address} takes no connection now: {said}", "57P03")
    return PostgresRefused(f"{spec.address} does not let us in: {said}; check the DSN, and the server's pg_hba.conf")


def _without(text: str, dsn: str) -> str:
    """What libpq says of a DSN, which may have it in it, and with it a password."""
    return "it has something in it that libpq does not know" if "@" in dsn or "password" in dsn else first_line(text)
