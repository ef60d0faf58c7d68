"""Ids sort in the order in which they were made, and nobody ever makes the same one twice."""

from __future__ import annotations

import os
import threading

import pytest

from kqueue import ids
from kqueue.codec import from_json, to_json
from kqueue.ids import PATTERN, new_id

CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The time in milliseconds, to be set."""
    at = [1_790_000_000_123]
    monkeypatch.setattr(ids.time, "time_ns", lambda: at[0] * 1_000_000)
    monkeypatch.setattr(ids, "_last", 0)
    return at


def decoded(id: str) -> int:
    number = 0
    for letter in id:
        number = number * 32 + CROCKFORD.index(letter)
    return number


def test_an_id_is_a_ulid() -> None:
    id = new_id()
    assert len(id) == 26
    assert set(id) <= set(CROCKFORD)
    assert id[0] <= "7", "128 bits, and no more"
    assert PATTERN.fullmatch(id)


def test_it_begins_with_the_time_in_milliseconds(clock: list[int]) -> None:
    assert decoded(new_id()) >> 80 == clock[0]


@pytest.mark.parametrize("tail", [b"\x00" * 10, b"\xff" * 10, bytes(range(0x17, 0xFF, 23))[:10], bytes(range(10))])
def test_it_says_every_bit(clock: list[int], monkeypatch: pytest.MonkeyPatch, tail: bytes) -> None:
    monkeypatch.setattr(ids.os, "urandom", lambda count: tail)
    for time_ms in (clock[0], 1, 0x5555_AAAA_5A5A, (1 << 48) - 1):
        clock[0] = time_ms
        monkeypatch.setattr(ids, "_last", 0)
        assert decoded(new_id()) == time_ms << 80 | int.from_bytes(tail, "big")


def test_it_agrees_with_the_example_of_the_specification(clock: list[int]) -> None:
    clock[0] = 1469918176385
    assert new_id().startswith("01ARYZ6S41")


def test_ids_made_in_order_sort_in_order(clock: list[int]) -> None:
    made = []
    for step in [0, 0, 0, 1, 0, 5, 0, 1000, 0]:
        clock[0] += step
        made += [new_id() for _ in range(100)]
    assert made == sorted(made)
    assert len(set(made)) == len(made)


def test_a_clock_that_goes_back_changes_nothing(clock: list[int]) -> None:
    before = new_id()
    clock[0] -= 3_600_000
    after = [new_id() for _ in range(100)]
    assert [before, *after] == sorted([before, *after])
    clock[0] += 7_200_000
    assert decoded(new_id()) >> 80 == clock[0], "and the time is right again as soon as it has passed"


def test_the_last_random_bits_overflow_into_the_time_and_order_is_kept(clock: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids.os, "urandom", lambda size: b"\xff" * size)
    made = [new_id() for _ in range(3)]
    assert made == sorted(set(made))


def test_real_time_gives_ordered_ids_too() -> None:
    made = [new_id() for _ in range(5000)]
    assert made == sorted(set(made))


def test_threads_share_one_order() -> None:
    made: list[list[str]] = [[] for _ in range(8)]
    start = threading.Barrier(8)

    def work(mine: list[str]) -> None:
        start.wait()
        mine.extend(new_id() for _ in range(2000))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == sorted(mine) for mine in made)
    assert len({id for mine in made for id in mine}) == 8 * 2000


def test_forked_children_make_ids_of_their_own(clock: list[int]) -> None:
    """All in one millisecond, where the parent would only count on."""
    new_id()
    pipes = []
    for _ in range(4):
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(write_fd, to_json([new_id() for _ in range(50)]))
            os._exit(0)
        os.close(write_fd)
        pipes.append((pid, read_fd))
    made = [new_id() for _ in range(50)]
    for pid, read_fd in pipes:
        with open(read_fd, "rb") as pipe:
            made += from_json(pipe.read())
        os.waitpid(pid, 0)
    assert len(set(made)) == 250


def test_a_fork_while_another_thread_makes_an_id_does_not_hang_the_child() -> None:
    with ids._lock:
        pid = os.fork()
        if pid == 0:
            new_id()
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("id", ["a", "order-7", "A_b-9", "x" * 64])
def test_what_a_caller_may_choose_for_an_id(id: str) -> None:
    assert PATTERN.fullmatch(id)


@pytest.mark.parametrize("id", ["", "x" * 65, "a b", "a\n", "ä", "a/b", "a:b", "a{b}", "a.b", "\u0661"])
def test_what_he_may_not(id: str) -> None:
    assert not PATTERN.fullmatch(id)
