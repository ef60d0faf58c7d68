"""What the SQLite broker promises among others: strangers who write into its file, more daemons, forks, and kills."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kqueue.brokers.base import SETTLED, Counters, Owner, Settlement
from kqueue.brokers.sqlite import SQLiteBroker
from kqueue.client.sqlite import SQLiteClient
from kqueue.ids import new_id
from kqueue.kernel import Kernel, join

from .conftest import SQLiteRig, new_job


@pytest.fixture
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SQLiteRig]:
    rig = SQLiteRig(tmp_path, request)
    yield rig
    rig.close()


def reserve(rig: SQLiteRig, broker: Any) -> dict[str, Any]:
    return {lease.token.id: lease for lease in rig.do(broker.reserve("q", {"inline": 100, "isolated": 100})).leases}


# -- strangers ----------------------------------------------------------------------------------------------------------

ANYTHING = [None, "", "garbage", 7, -1.5, 2**63 - 1, 9e999, b"", b"\xff\x00", "caf\u00e9"]
COLUMNS = [
    "queue", "lane", "state", "priority", "place", "available_at", "attempts", "crashes", "recoveries", "deferrals", "number",
    "epoch", "expires_at", "envelope", "result",
]  # fmt: skip


@pytest.mark.parametrize("state", ["ready", "delayed", "leased", "done", "dead"])
@pytest.mark.parametrize("column", COLUMNS)
def test_garbage_in_any_column_hides_no_neighbour_and_breaks_no_verb(rig: SQLiteRig, column: str, state: str) -> None:
    broker, client = rig.broker(), rig.make_client()
    rig.sql("UPDATE kq_meta SET value = 1")
    for n, garbage in enumerate(ANYTHING):
        rig.sql(f"INSERT INTO kq_job (id, queue, state, {column}) VALUES (?, 'q', '{state}', ?)".replace(
            "queue, state, queue)", "state, queue)").replace("(?, 'q',", "(?," if column == "queue" else "(?, 'q',").replace(
            "queue, state, state)", "queue, state)").replace(f"'{state}', ?", "?" if column == "state" else f"'{state}', ?"), f"bad{n}", garbage)  # fmt: skip
    rig.do(broker.enqueue([new_job("good"), new_job("later", delay_s=50)]))
    leases = reserve(rig, broker)
    assert "good" in leases
    rig.do(broker.sweep())
    leases |= reserve(rig, broker)
    assert rig.do(broker.stats()) == client.stats()
    rows = {row.id: row for row in client.list(None, None, 100)}
    assert set(rows) >= {f"bad{n}" for n in range(len(ANYTHING))}, "whatever it is, it can be seen"
    for id in rows:
        shown = client.show(id)
        assert shown is not None
        json.dumps(shown._replace(envelope=None, result=None, certificates=()))
    for lease in leases.values():
        rig.do(broker.settle([Settlement(lease.token, "q", "release", lease.counters, certificate=b"{}")]))
    for lease in reserve(rig, broker).values():
        (answer,) = rig.do(broker.settle([Settlement(lease.token, "q", "bury", lease.counters, certificate=b"{}")]))
        assert answer == SETTLED
    assert client.cancel("later", b"{}")
