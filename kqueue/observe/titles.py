"""The supervisor's title in ps and top: what it is, and how it is doing, no older than a heartbeat."""

from __future__ import annotations

from setproctitle import setproctitle

from .. import events as facts
from ..runtime import KQueueRuntime


class Titles:
    """Keeps the title of this process up to date: "kqueued: main running, 3 jobs, 120 processed, 2 failed"."""

    def __init__(self, runtime: KQueueRuntime, instance: str) -> None:
        self._runtime = runtime
        self._instance = instance
        for kind in (facts.DaemonReady, facts.DaemonStopping, facts.Heartbeat):
            runtime.events.subscribe(kind, self._refresh)
        self._refresh(None)

    def _refresh(self, fact: object) -> None:
        runtime = self._runtime
        setproctitle(
            f"kqueued: {self._instance} {runtime.state}, {len(runtime.held)} jobs, "
            f"{runtime.processed} processed, {runtime.failed} failed"
        )
