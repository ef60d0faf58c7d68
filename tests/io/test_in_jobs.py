"""kqueue.io in a real daemon: in an inline job, in a child's own kernel, in a pooled child, and under asyncio."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue.errors import JobFailed
from tests.apps import io_jobs
from tests.daemon import Daemon, alive, tree
from tests.io.conftest import Server
from tests.io.test_streams import echo

Serve = Callable[..., Server]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(
        tmp_path, f"sqlite:///{tmp_path}/kqueue.db", modules="[tests.apps.io_jobs]", isolated_modules="[tests.apps.io_jobs]"
    )
    yield daemon
    daemon.close()


def sockets(pid: int) -> int:
    return sum(os.readlink(fd).startswith("socket:") for fd in Path(f"/proc/{pid}/fd").iterdir() if os.path.lexists(fd))


@pytest.mark.parametrize("kind", ["io_inline", "io_isolated", "io_pooled", "io_asyncio"])
def test_all_of_it_works_wherever_a_job_runs(daemon: Daemon, serve: Serve, kind: str) -> None:
    server = serve(echo)
    daemon.start()
    job: Any = getattr(io_jobs, kind)
    (first,) = daemon.dispatch(job.job(server.port))
    results = [first.result(20)]
    before, children = sockets(daemon.pid), len(tree(daemon.pid))
    for handle in daemon.dispatch(*[job.job(server.port)] * 5):
        results.append(handle.result(20))
    assert [result[:5] for result in results] == [
        ["hello\n", [f"{n}\n" for n in range(5)], "0.01 in time, twice", ["0", "1", "2"], "clean"]
    ] * 6
    helpers, workers = {result[5] for result in results}, {result[6] for result in results}
    if kind == "io_inline":
        assert workers == {daemon.pid}
        assert len(helpers) == 1, "one helper for all jobs"
        assert sockets(daemon.pid) == before, "what a job left open was closed"
        assert len(tree(daemon.pid)) == children
    else:
        assert daemon.pid not in workers
        assert [pid for pid in helpers if alive(pid)] == [], "no helper outlives its loop"
    assert not [line for line in daemon.log if "left" in line or "changed" in line or "orphan" in line], daemon.log
    assert daemon.stop() == 0
    assert [pid for pid in helpers if os.path.exists(f"/proc/{pid}")] == []


def test_more_jobs_than_fds(daemon: Daemon, serve: Serve) -> None:
    """With 128 fds jobs may have 96. 200 jobs hold a connection each for a while: all get through, some later."""
    server = serve(echo)
    daemon.start()
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (128, 128))
    handles = daemon.dispatch(*[io_jobs.io_hold.job(server.port, 0.2)] * 200)
    assert [handle.result(20) for handle in handles] == ["held"] * 200
    # And where there is no place until their time is up, they are told why; the daemon goes on.
    holders = daemon.dispatch(*[io_jobs.io_hold.job(server.port, 2.5)] * 96)
    server.wait_accepted(200 + 96)
    late = daemon.dispatch(io_jobs.io_hold.options(timeout=1).job(server.port, 0), io_jobs.io_hold.job(server.port, 0, 0.5))
    for handle, words in zip(late, ("ran longer than its timeout of 1 s", "NoDescriptor"), strict=True):
        with pytest.raises(JobFailed, match=rf"{words}.*no file descriptor was free .*jobs have 96 open, and may have 96"):
            handle.result(20)
    assert [handle.result(20) for handle in holders] == ["held"] * 96
    assert daemon.stop() == 0
