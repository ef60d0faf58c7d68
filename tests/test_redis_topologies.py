"""The daemon on Sentinels and on a Redis Cluster, from outside: jobs flow while masters are killed and slots move."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kqueue.errors import BrokerUnavailable
from tests.apps import inline
from tests.daemon import Daemon
from tests.servers import Cluster, RedisServer, Sentinel


class Flow:
    """Dispatches jobs from a thread of its own, each until it is told that the job is there, by one id."""

    def __init__(self, daemon: Daemon, queues: list[str], prefix: str) -> None:
        self.daemon, self.queues, self.prefix = daemon, queues, prefix
        self.returned: list[str] = []
        self.refused: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            word = f"{self.prefix}{len(self.returned)}"
            queue = self.queues[len(self.returned) % len(self.queues)]
            job = inline.note.options(id=word, queue=queue).job(word)
            while True:
                try:
                    self.daemon.dispatch(job)
                except BrokerUnavailable as error:
                    self.refused.append(str(error))
                else:
                    self.returned.append(word)
                    break

    def more(self, count: int = 30) -> None:
        """Wait for so many more jobs to have been dispatched and to have run."""
        wanted = len(self.returned) + count
        self.daemon.marks.wait_for(lambda lines: len(set(self.words(lines))) >= wanted)

    def words(self, lines: list[str]) -> list[str]:
        return [line.split()[1] for line in lines if line.startswith(f"note {self.prefix}")]

    def end(self) -> Counter[str]:
        """Stop, and wait until all that was dispatched has run. How often each has."""
        self._stop.set()
        self._thread.join()
        lines = self.daemon.marks.wait_for(lambda lines: set(self.words(lines)) >= set(self.returned))
        return Counter(self.words(lines))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str, list[str]], Daemon]]:
    daemons: list[Daemon] = []

    def make(url: str, queues: list[str]) -> Daemon:
        (tmp_path / "daemon").mkdir()
        daemons.append(Daemon(tmp_path / "daemon", url, names=f"[{', '.join(queues)}]"))
        return daemons[-1].start()

    yield make
    for daemon in daemons:
        daemon.close()


def test_a_cluster_s_slots_move_and_its_nodes_die_while_jobs_flow(
    tmp_path: Path, start: Callable[[str, list[str]], Daemon]
) -> None:
    (tmp_path / "cluster").mkdir()
    cluster = Cluster(tmp_path / "cluster", "--appendfsync", "always")
    try:
        cluster.start()
        queues = [cluster.queue_at(node) for node in cluster.nodes]
        daemon = start(cluster.url, queues)
        flow = Flow(daemon, queues, "job-")
        flow.more()
        key, to = f"kq:{{{queues[0]}}}:", cluster.nodes[1]
        source = cluster.begin_move(key, to)
        while cluster.move_keys(key, source, to, count=10):
            pass
        cluster.end_move(key, to)
        flow.more()
        for node in cluster.nodes[1:]:
            node.kill()
            node.start()
            flow.more()
        ran = flow.end()
        assert set(ran) == set(flow.returned)
        assert set(ran.values()) == {1}, "and each once"
        assert daemon.stop() == 0
        assert not [line for line in daemon.log if "level=error" in line]
    finally:
        cluster.stop()


def test_the_master_that_sentinels_watch_is_killed_while_jobs_flow(
    tmp_path: Path, start: Callable[[str, list[str]], Daemon]
) -> None:
    for name in ("one", "two", "sentinel"):
        (tmp_path / name).mkdir()
    master, replica = RedisServer(tmp_path / "one"), RedisServer(tmp_path / "two")
    sentinel = Sentinel(tmp_path / "sentinel", master)
    try:
        master.start()
        replica.start().replicate(master)
        sentinel.start().until_it_knows(replicas=1)
        daemon = start(f"redis+sentinel://127.0.0.1:{sentinel.port}/main", ["default"])
        before = Flow(daemon, ["default"], "before-")
        before.more()
        before.end()
        replica.until_it_has_what(master)
        master.kill()
        after = Flow(daemon, ["default"], "after-")
        after.more()
        ran = after.end()
        assert set(ran) == set(after.returned)
        assert set(ran.values()) == {1}
        daemon.wait_log("broker back")
        assert daemon.stop() == 0
    finally:
        for server in (sentinel, replica, master):
            server.stop()
