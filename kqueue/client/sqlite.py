"""The SQLite broker for clients and operators: blocking, for any number of threads, and across forks (see sqlite_file.py)."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

from ..brokers.base import Finding, Mark, NewJob, QueueStats, Row
from ..brokers.commands import sqlite as commands
from ..brokers.commands.host_clock import HOST, HostClock
from ..brokers.commands.sqlite_file import LOCKED_PAUSE_S, SQLiteFile, is_locked, is_passing, jittered, ring
from ..brokers.commands.sqlite_transaction import Transaction
from ..errors import BrokerUnavailable
from .sqlite_health import sqlite_health

T = TypeVar("T")

PATIENCE_S: Final = 30.0  # with a file that somebody else holds locked


class SQLiteClient:
    """A SQLiteFile behind the blocking protocol (`brokers.base.Store`). Only `enqueue` creates a file that is not there.

    Raises BrokerRefused for a file that will not do, and BrokerUnavailable for one that is missing, on a full disk, or locked for
    longer than `patience_s`.
    """

    def __init__(
        self, path: str, *, mode: int = 0o600, clock: HostClock = HOST, patience_s: float = PATIENCE_S
    ) -> None:
        self.address = f"sqlite:///{path}"
        self._file = SQLiteFile(path, mode=mode, clock=clock)
        self._patience_s = patience_s

    def enqueue(self, jobs: Sequence[NewJob], max_depth: int = 0) -> list[bool]:
        return self._write(lambda tx: commands.enqueue(tx, jobs, max_depth), create=True)

    def show(self, id: str, queue: str | None = None) -> Row | None:
        return self._read(lambda tx: commands.show(tx, id)) if _is_text(id) else None

    def list(self, state: str | None, queue: str | None, limit: int) -> list[Row]:
        return self._read(lambda tx: commands.list_jobs(tx, state, queue, limit))

    def stats(self) -> dict[str, QueueStats]:
        return self._read(commands.stats)

    def cancel(self, id: str, certificate: bytes, queue: str | None = None) -> bool:
        return self._write(lambda tx: commands.cancel(tx, id, certificate), create=False)

    def retry(self, ids: Sequence[str], queue: str | None = None) -> Sequence[bool]:
        return self._of_dead(commands.retry, ids)

    def forget(self, ids: Sequence[str], queue: str | None = None) -> Sequence[bool]:
        return self._of_dead(commands.forget, ids)

    def dead(self, queue: str, after: Mark | None, until: Mark, limit: int) -> Sequence[Mark]:
        return self._read(lambda tx: commands.walk(tx, queue, after, until, limit))

    def last_dead(self, queue: str) -> Mark | None:
        return self._read(lambda tx: commands.last_dead(tx, queue))

    def documents(self, prefix: str) -> dict[str, bytes]:
        if not os.path.exists(self._file.path):
            return {}  # nobody has published anything; the first dispatch asks, before it creates the file
        return self._read(lambda tx: commands.documents(tx, prefix))

    def publish(self, documents: Mapping[str, bytes]) -> None:
        self._write(lambda tx: commands.publish(tx, documents), create=False)

    def health(self) -> Sequence[Finding]:
        return sqlite_health(self._file.path)

    def version(self) -> str:
        return self._read(commands.version)

    def close(self) -> None:
        """Close the connection. A client that is used again opens another."""
        self._file.close()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _of_dead(self, command: Callable[..., Sequence[bool]], ids: Sequence[str]) -> Sequence[bool]:
        able = [id for id in ids if _is_text(id)]
        answers = self._write(lambda tx: command(tx, able), create=False)
        done = dict(zip(able, answers, strict=True))
        return [done.get(id, False) for id in ids]

    def _write(self, work: Callable[[Transaction], T], *, create: bool) -> T:
        value, rings = self._patiently(lambda: self._file.write(work, create=create))
        if rings:
            ring(self._file.bells)
        return value

    def _read(self, work: Callable[[Transaction], T]) -> T:
        return self._patiently(lambda: self._file.read(work))

    def _patiently(self, transact: Callable[[], T]) -> T:
        # Not SQLite's own busy handler: it sleeps up to 100 ms at a time, in which a busy daemon commits a hundred times,
        # and it would hold our lock meanwhile, so that no other thread could fork.
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return transact()
            except sqlite3.Error as error:
                if is_locked(error) and time.monotonic() < deadline:
                    time.sleep(jittered(LOCKED_PAUSE_S))
                    continue
                raise self._explain(error) from error

    def _explain(self, error: sqlite3.Error) -> Exception:
        if is_locked(error):
            return BrokerUnavailable(
                f"{self.address}: {error} for {self._patience_s:g} s; end the process that holds it (fuser {self._file.path})"
            )
        if is_passing(error):
            return BrokerUnavailable(f"{self.address}: {error}; nothing was changed: {self._file.remedy(error)}, then try again")
        return self._file.explain(error)


def _is_text(id: str) -> bool:
    """Whether `id` can stand in a database at all; what somebody typed may hold bytes that are no UTF-8."""
    try:
        id.encode()
    except UnicodeEncodeError:
        return False
    return True
