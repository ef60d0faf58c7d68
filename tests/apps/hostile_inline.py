"""Hostile jobs for the daemon's own loop, and good ones that share it with them. See test_zoo."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from kqueue import job, sleep

MIB = 1 << 20


@job(name="good_inline", isolated=False, keep_result=600)
def good_inline(number: int) -> Any:
    yield sleep(0.001)
    return number


@job(name="hostile_inline", isolated=False, keep_result=600, max_attempts=1, causes={"signal": "bury", "exit": "bury"})
def hostile_inline(how: str) -> Any:
    yield
    return (yield from KINDS[how]())


def _raises() -> Any:
    yield
    raise LookupError("oh")


def _exits() -> Any:
    yield
    sys.exit(3)


def _spins() -> Any:
    yield
    while True:
        pass


def _sleeps() -> Any:
    yield
    time.sleep(1000)


def _grows() -> Any:
    """Bit by bit, and keeps it for a while."""
    data = []
    try:
        for _ in range(200):
            data.append(bytearray(b"x") * MIB)
            yield sleep(0.005)
    finally:
        data.clear()


def _never_ends() -> Any:
    while True:
        try:
            while True:
                yield sleep(60)
        except BaseException:  # whoever wants to end it
            continue


def _yields_nonsense() -> Any:
    yield 0.5


def _returns(value: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        yield
        return value()

    return run


KINDS: dict[str, Callable[[], Any]] = {
    "raises": _raises,
    "sys.exit(3)": _exits,
    "spins": _spins,
    "sleeps": _sleeps,
    "grows": _grows,
    "never ends": _never_ends,
    "yields nonsense": _yields_nonsense,
    "no JSON": _returns(object),
    "too large": _returns(lambda: "x" * (2 * MIB)),
}
