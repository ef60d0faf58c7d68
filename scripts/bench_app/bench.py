"""What each measurement is given: an empty queue, a directory for its daemon, and how long it may take."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import TypeVar

from redis_server import RedisServer

T = TypeVar("T")


class Bench:
    """One broker's measurements. `redis` None: the broker is SQLite, a new file for each measurement."""

    def __init__(self, directory: Path, redis: RedisServer | None, quick: bool) -> None:
        self._directory = directory
        self.redis = redis
        self._quick = quick
        self._number = count(1)

    @property
    def quick(self) -> bool:
        return self._quick

    def beside(self, redis: RedisServer | None) -> Bench:
        """The same on another Redis, or on SQLite. Its rooms are in a directory of their own."""
        directory = self._directory / f"beside-{next(self._number)}"
        directory.mkdir()
        return Bench(directory, redis, self._quick)

    @property
    def broker(self) -> str:
        return "sqlite" if self.redis is None else "redis"

    def pick(self, full: T, quick: T) -> T:
        """A size: the first one, or with --quick the second."""
        return quick if self._quick else full

    def empty_queue(self) -> tuple[Path, str]:
        """A directory that does not exist yet, for a Kqueued, and the URL of a queue with nothing in it."""
        room = self._directory / f"{self.broker}-{next(self._number)}"
        if self.redis is not None:
            self.redis.flush()
            return room, self.redis.url
        return room, f"sqlite:///{self._directory}/{room.name}.db"
