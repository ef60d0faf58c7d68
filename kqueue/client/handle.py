"""A handle: a job that was dispatched, seen from outside."""

from __future__ import annotations

import time
from typing import Any, Final

from ..brokers.base import Row, Store
from ..codec import from_json, to_json, unpack
from ..errors import EnvelopeError, JobFailed, ResultNotKept
from ..outcome import Outcome
from ..redact import redacted
from ..states import JobState

POLL_S: Final = (0.002, 0.25)  # first and longest pause between two looks; each is half as long again as the one before


class Handle:
    """`id` is the job's; the rest asks the broker each time."""

    def __init__(self, store: Store, id: str, queue: str | None) -> None:
        self.id = id
        self._store = store
        self._queue = queue

    def __repr__(self) -> str:
        return f"<job {self.id}>"

    def state(self) -> JobState:
        """Where it stands now. A job that is gone reads as DONE: what is acked is not kept, unless with its result."""
        row = self._row()
        return JobState.DONE if row is None else JobState(row.state)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (None: without end) until it is done or dead; whether it is.

        It looks again and again, seldom enough to cost the broker nothing, since the ends of all jobs are not announced.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pause_s = POLL_S[0]
        while self.state() not in (JobState.DONE, JobState.DEAD):
            left_s = POLL_S[1] if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 1.5, POLL_S[1])
        return True

    def result(self, timeout: float | None = None) -> Any:
        """Wait for its end, then its result.

        Raises JobFailed when it is dead, ResultNotKept when it is done and its result was not kept, TimeoutError when it still
        runs after `timeout` seconds.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"job {self.id} has not ended within {timeout:g} s")
        row = self._row()
        if row is None or (row.state == "done" and row.result is None):
            raise ResultNotKept(f"job {self.id} is done, and its result was not kept: declare it with keep_result=SECONDS")
        if row.state == "dead":
            raise JobFailed(f"job {self.id} is dead: {last_error(row)}")
        return unpack(from_json(row.result or b"null"))

    def cancel(self) -> bool:
        """Bury it if it still waits; whether it did. A running job is not touched."""
        certificate = Outcome("cancelled", "operator").certificate(attempt=0, strategy="none", ended_at=time.time())
        return self._store.cancel(self.id, to_json(certificate), self._queue)

    def _row(self) -> Row | None:
        return self._store.show(self.id, self._queue)


def last_error(row: Row) -> str:
    """Class and message only, and no paths or secrets in it: the full record is for the operator.

    Whatever stands in the store, it says something.
    """
    if not row.certificates:
        return "it has no certificate"
    try:
        certificate = from_json(row.certificates[-1])
        error = certificate.get("error")
        if not error:
            return str(certificate["cause"])
        return f"{error['class']}: {redacted(str(error['message']))}"
    except (EnvelopeError, AttributeError, KeyError, TypeError):
        return "its last certificate cannot be read, since something else than KQueue wrote it"
