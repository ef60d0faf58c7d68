"""The comparison with other queues (scripts/bench --peers): its arithmetic, chart and table of peers, and how it ends workers.

No peer is installed here: what runs in their virtual environments is read, not imported.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import click
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "scripts/bench_app"
sys.path.append(str(APP))

import chart  # noqa: E402  (scripts are no package of ours)
import compare  # noqa: E402
import comparing  # noqa: E402
import peer_worker  # noqa: E402
import versus  # noqa: E402
from kqueued import Failure  # noqa: E402
from peers.table import PEERS, WORKERS  # noqa: E402

SAMPLES: dict[tuple[str, str], list[float]] = {
    ("inline", "noop"): [30_000, 1, 24_000],
    ("inline", "memory"): [14, 15, 13],
    ("pool", "noop"): [9_000],
    ("huey-processes", "noop"): [4_000, 3_000, 5_000],
    ("huey-processes", "memory"): [76],
    ("taskiq", "noop"): [2_000],
    ("inline", "late_p50"): [0.5],
    ("taskiq", "late_p50"): [2.0],
    ("inline", "single"): [3_000],
    ("huey-threads", "single"): [6_000],
}
CONDITIONS = {"machine": "a slow one"}
SVG = "{http://www.w3.org/2000/svg}"


def test_a_ratio_says_how_many_times_better_we_are() -> None:
    assert versus.times_better(30, 10, more=True) == 3
    assert versus.times_better(0.5, 2, more=False) == 4
    assert versus.times_better(10, 30, more=True) == pytest.approx(1 / 3)
    assert versus.times_better(None, 2, more=True) is None
    assert versus.times_better(2, None, more=True) is None


def test_a_row_has_the_median_its_range_and_the_ratio_to_either_kind() -> None:
    table = versus.TABLES[0]
    assert versus.rows(SAMPLES, table) == ["inline", "pool", "huey-processes", "taskiq"]
    huey = versus.cells(SAMPLES, table, "huey-processes")
    assert huey == ["Huey, 4 processes", "4,000 (3,000 to 5,000)", "76", "-", "6 x", "2.25 x"]
    assert versus.cells(SAMPLES, table, "inline")[-2:] == ["", ""]
    assert len(huey) == len(versus.headings(table))


def test_of_delays_the_smallest_is_first() -> None:
    table = next(table for table in versus.TABLES if table.figures[0].key == "late_p50")
    assert versus.rows(SAMPLES, table) == ["inline", "taskiq"]
    assert versus.cells(SAMPLES, table, "taskiq")[-2:] == ["4 x", "4 x"]


def test_a_target_is_judged_against_the_best_peer_and_skipped_when_unmeasured() -> None:
    judged = {claim.label: ratio for claim, ratio in versus.judged(SAMPLES)}
    assert judged["no-op inline jobs, against the best peer"] == 6
    assert judged["dispatch one at a time, against Huey"] == 0.5
    assert not any("RQ" in label for label in judged)
    text = versus.as_text(SAMPLES, ["RQ, round 1: only 3 of 200 marks"])
    assert "reached  no-op inline jobs" in text
    assert "MISSED   dispatch one at a time" in text
    assert "FAILED   RQ, round 1: only 3 of 200 marks" in text


def test_markdown_has_whole_tables_and_is_put_between_its_markers(tmp_path: Path) -> None:
    text = versus.as_markdown(CONDITIONS, [0.5], SAMPLES, ["RQ, round 1: it ended\n    log: no"], "p.svg")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert any("| Huey, 4 processes | 4,000 (3,000 to 5,000) |" in row for row in rows)
    for above, below in pairwise(text.splitlines()):
        if above.startswith("|") and below.startswith("|"):
            assert above.count("|") == below.count("|"), below
    assert "- RQ, round 1: it ended\n" in text
    assert "had to share" in text
    assert "had to share" not in versus.as_markdown(CONDITIONS, [0.1], SAMPLES, [], "p.svg")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{versus.BEGIN}\nold\n{versus.END}\nafter\n")
    for _ in range(2):
        versus.write_between_markers(page, "new")
        assert page.read_text() == f"before\n{versus.BEGIN}\n\nnew\n\n{versus.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="must have one line"):
        versus.write_between_markers(page, "new")
    assert page.read_text() == "no markers"


def test_json_says_everything() -> None:
    found = json.loads(json.dumps(versus.as_json(CONDITIONS, [0.5], SAMPLES, ["x"])))
    huey = next(each for each in found["figures"] if (each["contender"], each["figure"]) == ("huey-processes", "noop"))
    assert (huey["median"], huey["samples"]) == (4_000, [4_000, 3_000, 5_000])
    assert huey["times_better_is_kqueue"] == {"inline": 6, "pool": 2.25, "fork": None}
    assert len(found["figures"]) == len(SAMPLES)
    assert set(found["peers"]) == {peer.name for peer in PEERS}


def test_bars_are_as_long_as_their_figures_are_large_and_all_is_inside() -> None:
    bars = [chart.Bar("a <b> & c", 100, "100", True), chart.Bar("half", 50, "50", False), chart.Bar("none", 0, "0", False)]
    root = ElementTree.fromstring(chart.svg([chart.Panel("one", bars), chart.Panel("empty", [])]))
    long, half, none = (float(rect.get("width", "")) for rect in root.iter(f"{SVG}rect"))
    assert half == long / 2
    assert 0 < none <= 1
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    for rect in root.iter(f"{SVG}rect"):
        assert float(rect.get("x", "")) + float(rect.get("width", "")) <= width - chart.VALUES
        assert float(rect.get("y", "")) + float(rect.get("height", "")) <= height
    assert "a <b> & c" in [text.text for text in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("background", ["#ffffff", "#0d1117"])
@pytest.mark.parametrize(("colour", "least"), [(chart.TEXT, 4.0), (chart.OURS, 3.0), (chart.OTHERS, 3.0)])
def test_the_chart_is_readable_in_light_and_in_dark(colour: str, least: float, background: str) -> None:
    """Contrast as WCAG 2 defines it, which asks 3 of graphics and large text."""
    bright, dark = sorted(map(_luminance, (colour, background)), reverse=True)
    assert (bright + 0.05) / (dark + 0.05) >= least


def _luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_peer_has_its_module_with_the_interface_that_the_table_says() -> None:
    assert {peer.name for peer in PEERS} == {"rq", "celery", "dramatiq", "huey", "taskiq", "saq"}
    for peer in PEERS:
        tree = ast.parse((APP / f"peers/{peer.name}.py").read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert "one" in functions
        assert ("many" in functions) == bool(peer.bulk), f"{peer.name}: `many` and the table's `bulk` disagree"
        assert all("==" in requirement for requirement in peer.requirements), f"{peer.name} is not pinned"
        assert any(worker.peer == peer.name and "noop" in worker.jobs for worker in WORKERS)
    helpers = {"__init__", "ours", "send", "table", "work"}
    assert {path.stem for path in (APP / "peers").glob("*.py")} == helpers | {peer.name for peer in PEERS}
    assert any("httpx" in requirement for peer in PEERS for requirement in peer.requirements if peer.name == "taskiq")


def test_every_worker_is_of_a_peer_and_takes_part_in_known_works() -> None:
    assert {worker.peer for worker in WORKERS} == {peer.name for peer in PEERS}
    assert len({worker.key for worker in WORKERS} | set(versus.OURS)) == len(WORKERS) + len(compare.STARTS)
    for contender in (*WORKERS, *compare.STARTS):
        assert set(contender.jobs) <= set(compare.WORKS)
        assert contender.key in versus.LABELS
    assert {worker.kind for worker in WORKERS} == {start.key for start in compare.STARTS}
    for work in compare.WORKS:
        if work != "latency":  # which is taken of all that do noop
            assert any(work in worker.jobs for worker in WORKERS)


def test_what_is_chosen_must_exist() -> None:
    assert comparing.chosen("huey,rq") == ["rq", "huey"]
    assert len(comparing.chosen("all")) == len(PEERS)
    with pytest.raises(click.UsageError, match="no peer 'sidekiq'; there are rq, celery"):
        comparing.chosen("rq,sidekiq")
    with pytest.raises(click.UsageError, match="does not compare 'crowded'"):
        comparing.works(["crowded"])
    assert comparing.works(()) == list(compare.WORKS)


STUBBORN = """
import os, signal, sys, time
import marks
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for name in ("left", "moved out"):
    if os.fork() == 0:
        if name == "moved out":
            os.setsid()
        if os.fork() == 0:
            marks.write("pids", os.getpid())
            time.sleep(600)
        if name == "left":
            os._exit(0)
        time.sleep(600)
for _ in range(3):
    marks.write("noop", time.time())
print("I am stuck", file=sys.stderr, flush=True)
time.sleep(600)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[peer_worker.PeerRun]:
    monkeypatch.setattr(peer_worker, "STOP_S", 0.2)
    before = psutil.Process().children(recursive=True)  # servers of other tests
    yield peer_worker.PeerRun(Path(sys.executable).parent, tmp_path / "room", "redis://127.0.0.1:1/0")
    assert set(psutil.Process().children(recursive=True)) <= set(before)


def test_a_stuck_worker_is_reported_with_what_it_did_and_nothing_of_it_is_left(
    run: peer_worker.PeerRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_worker, "PATIENCE_S", 1.0)
    with run.worker(["python", "-c", STUBBORN]) as worker:
        worker.finished(pids=2, noop=3)
        pids = [worker.pid, *map(int, peer_worker.marks.read(run.marks, "pids"))]
        assert all(map(psutil.pid_exists, pids))
        with pytest.raises(Failure, match=r"(?s)only 3 of 5 marks 'noop' after .*log: I am stuck"):
            worker.finished(noop=5)
    assert not any(map(psutil.pid_exists, pids))


BENCHMARK = """
import sys, time
from pathlib import Path
import peer_worker
run = peer_worker.PeerRun(Path(sys.executable).parent, Path(sys.argv[1]), "redis://127.0.0.1:1/0")
with run.worker(["python", "-c", sys.argv[2]]) as worker:
    worker.finished(pids=2)
    print(worker.pid, *peer_worker.marks.read(run.marks, "pids"), flush=True)
    time.sleep(600)
"""


def test_a_benchmark_that_is_killed_leaves_nothing_of_a_worker_either(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{APP}:{ROOT}"}
    command = [sys.executable, "-c", BENCHMARK, str(tmp_path / "room"), STUBBORN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as benchmark:
        assert benchmark.stdout is not None
        found = [psutil.Process(int(float(word))) for word in benchmark.stdout.readline().split()]
        assert len(found) == 3
        benchmark.kill()
    _, alive = psutil.wait_procs(found, timeout=60)
    assert not alive


def test_a_worker_that_ends_by_itself_and_one_that_runs_twice_are_failures(run: peer_worker.PeerRun) -> None:
    ends = ["python", "-c", "raise SystemExit('no such queue')"]
    with run.worker(ends) as worker, pytest.raises(Failure, match=r"(?s)ended with 0 of 1 marks 'noop'.*no such queue"):
        worker.finished(noop=1)
    twice = "import marks, time\nfor _ in range(2): marks.write('noop', 1.0)\ntime.sleep(600)"
    with run.worker(["python", "-c", twice]) as worker:
        worker.finished(noop=2)
        with pytest.raises(Failure, match="2 marks 'noop' for 1 jobs: some ran twice"):
            worker.finished(noop=1)


def test_a_client_that_fails_is_a_failure_with_its_last_words(run: peer_worker.PeerRun) -> None:
    with pytest.raises(Failure, match=r"(?s)its client failed.*No module named 'peers.sidekiq'"):
        run.send("sidekiq", "noop", 1, 1)
