"""What the tests of io.redis and io.postgres share: a loop whose pools are looked at when all is over, cutting at every trap."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from kqueue.context import enter
from kqueue.errors import JobCancelled
from kqueue.io.data.pool import Pool, _Pools
from kqueue.io.gate import Gate
from kqueue.kernel import Kernel, Task
from tests.io.conftest import a_job, open_fds

PATIENCE_S = 20.0


def pools(kernel: Kernel) -> list[Pool[Any]]:
    found = kernel.locals.get(_Pools)
    return [] if found is None else list(found.of.values())


def settle(kernel: Kernel) -> None:
    """Turn until nothing is lent any more: connections that jobs left in the middle of something are being mended."""
    deadline = time.monotonic() + PATIENCE_S
    while any(pool.lent for pool in pools(kernel)):
        assert time.monotonic() < deadline, [(pool.what, pool.lent) for pool in pools(kernel)]
        kernel.clock.select(kernel.poller, 0.01)
        kernel.turn()
    assert not any(pool.waiting for pool in pools(kernel))


def watched_kernel() -> Iterator[Kernel]:
    """A kernel at whose end no connection is lent, no fd is left, and no place of the gate is taken."""
    before = open_fds()
    kernel = Kernel()
    crashed: list[Task] = []
    kernel.on_crash = crashed.append
    yield kernel
    enter(None)
    assert crashed == []
    settle(kernel)
    gate = kernel.locals.get(Gate)
    kernel.close()
    assert gate is None or (gate.taken, gate.waiting) == (0, 0)
    assert open_fds() == before


def cut_everywhere(kernel: Kernel, job: Callable[[], Any], after: Callable[[int], None], cuts: int = 200) -> int:
    """Cancel `job` before its first turn, at its first wait, at its second … until it gets through. How many cuts there were.

    `after(cut)` is called when all that it left has settled.
    """
    for cut in range(cuts):
        context = a_job()
        enter(context)
        task = kernel.spawn(job())
        waits, seen = 0, -1
        while not task.ended and waits < cut:
            kernel.turn()
            if task.parked and task.wait_number != seen:
                waits, seen = waits + 1, task.wait_number
        if task.ended:
            context.close_all()
            enter(None)
            if task.error is not None:
                raise task.error
            return cut
        kernel.cancel(task, JobCancelled("stop"))
        while not task.ended:
            kernel.turn()
        assert isinstance(task.error, JobCancelled), task.error
        context.close_all()
        enter(None)
        settle(kernel)
        after(cut)
    raise AssertionError(f"it never got through in {cuts} cuts")
