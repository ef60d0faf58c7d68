"""The light jobs of the demonstration: they wait, as a mail server or a web service makes a job wait, and run inside kqueued."""

from __future__ import annotations

from typing import Any

from kqueue import KQueueJob, progress, sleep


class SendEmail(KQueueJob):
    timeout = 10
    keep_result = 60

    def __init__(self, to: str) -> None:
        self.to = to

    def handle(self) -> Any:
        yield sleep(0.5)
        return f"sent to {self.to}"


class ProcessData(KQueueJob):
    timeout = 10
    keep_result = 60

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def handle(self) -> Any:
        for step in range(10):
            yield sleep(0.1)
            yield progress((step + 1) / 10, f"{self.rows * (step + 1) // 10} rows")
        return f"{self.rows} rows"
