"""What scripts/bench measures with: its proxy, its timers of stages, and that what it names in KQueue is there."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from kqueue.registry import registry

APP = Path(__file__).resolve().parent.parent / "scripts/bench_app"
sys.path.append(str(APP))

_ours = dict(registry._jobs)
registry._jobs.clear()  # its jobs are for its own daemons, and some have the names of ours
import costs  # noqa: E402  (scripts are no package of ours)
import distant  # noqa: E402
import pages  # noqa: E402
import run  # noqa: E402
import spending  # noqa: E402
import stages  # noqa: E402
import stepping  # noqa: E402
from bench import Bench  # noqa: E402
from light import noop  # noqa: E402

registry._jobs.clear()
registry._jobs.update(_ours)


@pytest.mark.parametrize("delay_s", [0.0, 0.02])
def test_the_proxy_delays_and_changes_nothing(delay_s: float) -> None:
    data = bytes(range(256)) * 40_000  # more than sockets hold
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo() -> None:
            connection, _ = server.accept()
            with connection:
                while part := connection.recv(1 << 16):
                    connection.sendall(part)

        thread = threading.Thread(target=echo)
        thread.start()
        with distant.Delaying(server.getsockname()[1], delay_s) as proxy:
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as client:
                began = time.monotonic()
                client.sendall(b"x")
                assert client.recv(1) == b"x"
                assert time.monotonic() - began >= 2 * delay_s
                sender = threading.Thread(target=client.sendall, args=(data,))
                sender.start()
                found = bytearray()
                while len(found) < len(data):
                    found += client.recv(1 << 16)
                sender.join()
            thread.join()  # that the client has left was passed on
        assert found == data


def test_time_goes_to_the_stage_that_is_under_way_and_not_to_its_callers() -> None:
    watched = stages.Stages("root")
    watched.watch("inner", [])
    watched.watch("outer", [])

    def burn(seconds: float) -> None:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    inner = watched.timed("inner", burn)

    def generator() -> Generator[str, int, str]:
        burn(0.02)
        got = yield "trap"
        inner(0.05)
        return f"end {got}"

    outer = watched.timed("outer", generator)()
    watched.clear()
    assert next(outer) == "trap"
    burn(0.01)
    with pytest.raises(StopIteration) as end:
        outer.send(7)
    assert end.value.value == "end 7"
    taken = watched.taken()
    assert taken["inner"].seconds == pytest.approx(0.05, abs=0.005)
    assert taken["outer"].seconds == pytest.approx(0.02, abs=0.005)
    assert (taken["inner"].entered, taken["outer"].entered) == (1, 2)


def test_what_is_thrown_into_a_timed_generator_arrives_there() -> None:
    watched = stages.Stages("root")
    watched.watch("stage", [])

    def generator() -> Generator[int, None, str]:
        try:
            yield 1
        except KeyError:
            return "caught"
        return "not"

    steps: Any = watched.timed("stage", generator)()
    next(steps)
    with pytest.raises(StopIteration) as end:
        steps.throw(KeyError())
    assert end.value.value == "caught"


def test_every_stage_is_made_of_functions_that_there_are() -> None:
    targets = [target for each in (stepping.DAEMON, stepping.CLIENT) for found in each.values() for target in found]
    assert [target for target in targets if stages.find(target)[2] is None] == []
    assert stages.find("kqueue.runtime:nothing.at.all")[2] is None


def test_what_is_spent_on_a_job_is_counted_for_two_daemons_that_were_stopped_meanwhile(tmp_path: Path) -> None:
    bench = Bench(tmp_path, None, quick=True)
    spent = spending.spend(bench, noop, 300, daemons=2)
    assert spent.rate > 0
    assert spent.daemon_us > 0
    assert spent.client_us > 0
    assert spent.redis_us == 0


def test_the_model_of_a_redis_is_arithmetic() -> None:
    one = spending.Spent(20_000, 40.0, 0, 10.0, 5.0)
    spent = {("Daemons", "1 daemon"): one, ("Daemons", "2 daemons"): one._replace(rate=30_000)}
    by_size, by_job, check = costs.model(spent, [200.0, 50.0, 25.0, 20.0])
    assert by_size.rows[-1] == ["200 at once", "20", "50,000", "2"]
    assert by_job.rows[1] == ["100 µs", "7,143", "7"]
    assert check.rows[0][1:3] == ["50,000", "100,000"]
    assert check.rows[0][-1] == "30,000"


def test_a_page_that_is_written_has_its_markers_and_whole_tables() -> None:
    for name in run.PAGES:
        page = pages.DOCS / run.PAGE_FILES[name]
        assert page.read_text().count(f"<!-- begin: ./scripts/bench --only {name} --markdown writes what follows -->\n") == 1
    table = pages.Table("Costs", ["a", "b"], [["x", "1", "2"]], "why")
    text = pages.as_markdown(pages.Page("p.md", "c", [table]), {"machine": "slow"}, [0.1])
    assert "| x | 1 | 2 |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
