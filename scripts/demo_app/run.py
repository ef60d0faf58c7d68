"""Starts a kqueued on a new SQLite file, runs the five jobs and then the twenty of the original page, and says what came of it.

Only what the command line and the client give everybody is used here; the figures come from the death certificates of the jobs
and from `kqueue status`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click

import kqueue
from kqueue.codec import from_json, unpack

HERE = Path(__file__).resolve().parent
CONFIG = """\
instance: demo
state_dir: var
queue: {{url: sqlite:///var/demo.db}}
jobs:
  path: [{here}]
  modules: [jobs]
  isolated_modules: [heavy]
isolated: {{max_concurrent: 4}}
log: {{level: warning}}
control: {{socket: var/demo.sock}}
"""


class Ran(NamedTuple):
    """One job that ended."""

    name: str
    strategy: str
    started_s: float  # after the first dispatch
    duration_s: float
    result: str
    ok: bool


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="kqueue-demo-") as directory:
        config = Path(directory) / "kqueue.yaml"
        config.write_text(CONFIG.format(here=json.dumps(str(HERE))))
        daemon = subprocess.Popen([sys.executable, "-m", "kqueue.cli.kqueued", "-c", str(config)])
        try:
            wait_until_ready(daemon, config)
            sys.path.insert(0, str(HERE))
            kqueue.connect(str(config))
            ok = five_jobs(config) and twenty_jobs()
        finally:
            daemon.send_signal(signal.SIGTERM)
            status = daemon.wait()
    ending = f"kqueued ended with status {status}." if status else "kqueued ended cleanly. Next: `kqueue init`, and README.md."
    click.echo(f"\n{ending}")
    return 0 if ok and status == 0 else 1


def wait_until_ready(daemon: subprocess.Popen[bytes], config: Path) -> None:
    """Until `kqueue status --check` is content."""
    while not healthy(config):
        if daemon.poll() is not None:
            raise SystemExit(f"kqueued did not start: status {daemon.returncode}")


def healthy(config: Path) -> bool:
    return status_of(config, "--check").returncode == 0


def status_of(config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kqueue.cli.main", "-c", str(config), "status", "--json", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def five_jobs(config: Path) -> bool:
    from heavy import generate_report, process_video
    from jobs import ProcessData, SendEmail

    click.echo("\nFive jobs at once: three inside the daemon, two in children of it.\n")
    ran, total_s, dispatch_s = run(
        [
            SendEmail.job("ada@example.org"), ProcessData.job(50_000), SendEmail.job("grace@example.org"),
            process_video.job("/videos/talk.mp4"), generate_report.job("quarter"),
        ]
    )  # fmt: skip
    table(ran)
    status: dict[str, Any] = json.loads(status_of(config).stdout)
    serial_s = sum(each.duration_s for each in ran)
    click.echo(f"\n  total time         {total_s:5.2f} s, one after the other it would be {serial_s:.2f} s")
    click.echo(f"  dispatch overhead  {dispatch_s / len(ran) * 1000:5.2f} ms a job")
    click.echo(f"  memory             {status['memory_mib']:5.1f} MiB, the daemon alone")
    return all(each.ok for each in ran)


def twenty_jobs() -> bool:
    from heavy import process_video
    from jobs import SendEmail

    click.echo("\nTwenty jobs, one of them heavy (2.2 s): the fast ones do not wait for it.\n")
    jobs = [SendEmail.job(f"user{n}@example.org") for n in range(19)]
    jobs.insert(3, process_video.options().job("/videos/long.mp4", seconds=2.2))
    ran, total_s, dispatch_s = run(jobs)
    fast = [each for each in ran if each.strategy == "inline"]
    heavy = [each for each in ran if each.strategy == "isolated"]
    table([fast[0], *heavy, fast[-1]])
    last_fast_s = max(each.started_s + each.duration_s for each in fast)
    last_start_s = max(each.started_s for each in fast)
    click.echo(f"\n  fast jobs          all {len(fast)} started by {last_start_s:.2f} s, done by {last_fast_s:.2f} s")
    click.echo(f"  heavy job          done at {max(each.started_s + each.duration_s for each in heavy):.2f} s")
    click.echo(f"  total time         {total_s:5.2f} s, one after the other it would be {sum(e.duration_s for e in ran):.2f} s")
    click.echo(f"  dispatch overhead  {dispatch_s / len(ran) * 1000:5.2f} ms a job")
    return all(each.ok for each in ran) and last_fast_s < min(each.started_s + each.duration_s for each in heavy)


def run(jobs: list[kqueue.BoundJob]) -> tuple[list[Ran], float, float]:
    """Dispatch `jobs`, show how they come along; (what ran, total seconds, seconds that dispatching took)."""
    began, began_at = time.monotonic(), time.time()
    handles = kqueue.dispatch_many(jobs)
    dispatch_s = time.monotonic() - began
    waiting = list(zip(jobs, handles, strict=True))
    with click.progressbar(length=len(jobs), label="  jobs done", file=sys.stderr) as bar:
        while waiting:
            still = [pair for pair in waiting if not pair[1].wait(timeout=0.01)]
            bar.update(len(waiting) - len(still))
            if not sys.stderr.isatty():  # a bar would not show
                for job, _ in (pair for pair in waiting if pair not in still):
                    click.echo(f"  {time.monotonic() - began:5.2f} s  {job.name} is done", err=True)
            waiting = still
    total_s = time.monotonic() - began
    return [outcome(job, handle, began_at) for job, handle in zip(jobs, handles, strict=True)], total_s, dispatch_s


def outcome(job: kqueue.BoundJob, handle: kqueue.JobHandle, began_at: float) -> Ran:
    row = kqueue.client.default().store.show(handle.id)
    if row is None or not row.certificates:
        return Ran(job.name, "?", 0.0, 0.0, "no certificate", False)
    certificate = from_json(row.certificates[-1])
    started_s = certificate["ended_at"] - certificate["duration_s"] - began_at
    ok = row.state == "done"
    result = str(unpack(from_json(row.result))) if ok and row.result else str(certificate["cause"])
    return Ran(job.name, certificate["strategy"], max(0.0, started_s), certificate["duration_s"], result, ok)


def table(ran: list[Ran]) -> None:
    click.echo(f"  {'job':15} {'strategy':9} {'start':>8} {'duration':>9}  result")
    for each in ran:
        mark = "✓" if each.ok else "✗"
        click.echo(
            f"  {each.name:15} {each.strategy:9} {each.started_s:6.2f} s {each.duration_s:7.2f} s  {mark} {each.result}"
        )


if __name__ == "__main__":
    os.environ.pop("KQUEUE_URL", None)
    sys.exit(main())
