"""`kqueue status`: the daemon now, by its own word; without one, at least what waits in the broker.

What all its processes take together is looked up here, for people: by psutil, which would cost the daemon 4 MB.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from .. import __version__
from .target import Target, json_option, pass_target
from .text import duration, json_text, printable, table

if TYPE_CHECKING:
    import psutil

MOST: Final = 20  # job classes in the table
HEALTHY: Final = ("running", "quiet")


@click.command()
@click.option("--check", is_flag=True, help="Exit with 1 unless the daemon answers, and runs or is quiet (for containers).")
@json_option
@pass_target
def status(target: Target, check: bool) -> int:
    """Show what the daemon does now.

    Its memory, what runs and how far it is, what waits in the queues. Without a daemon the queues are still shown.
    """
    found = target.ask("status") or _stopped(target)
    click.echo(json_text(found) if target.json else _page(found))
    return 1 if check and found["state"] not in HEALTHY else 0


def _stopped(target: Target) -> dict[str, Any]:
    """The document of a daemon that is not there. Without a configuration nobody can know whether one is."""
    config = target.config
    if config is None:
        click.echo("note: $KQUEUE_URL says where jobs are, but only a kqueue.yaml says where a daemon is", err=True)
    queues = {} if config is None else {spec.name: _NOTHING for spec in config.queue.names}
    if not target.is_unused():
        queues |= {name: counts._asdict() for name, counts in target.client.store.stats().items()}
    return {
        "pid": None, "version": __version__, "uptime_s": 0.0, "state": "unknown" if config is None else "stopped",
        "memory_mib": 0.0, "processed": 0, "failed": 0, "retried": 0, "killed": 0, "forgotten": 0, "running": [],
        "queues": dict(sorted(queues.items())), "loop": {"lag_ms_p50": 0.0, "lag_ms_p99": 0.0, "turns_per_s": 0.0},
        "memory_budget": None,
        "jobs": {},
    }  # fmt: skip


_NOTHING: Final = {"ready": 0, "delayed": 0, "leased": 0, "dead": 0}


def _page(found: Mapping[str, Any]) -> str:
    blocks = [_daemon(found), _queues(found["queues"])]
    if found.get("jobs"):
        blocks.append(_jobs(found["jobs"]))
    if found["running"]:
        blocks.append(_running(found["running"]))
    return "\n\n".join(blocks)


def _daemon(found: Mapping[str, Any]) -> str:
    if found["pid"] is None:
        return "kqueued is stopped" if found["state"] == "stopped" else "whether a kqueued runs is not known"
    loop = found["loop"]
    return (  # the daemon may be an earlier version, which has no budget
        f"kqueued {found['version']}, pid {found['pid']}, up {duration(found['uptime_s'])}, {found['state']}\n"
        f"memory {found['memory_mib']} MiB{_tree(found['pid'], found['memory_mib'])}{_budget(found.get('memory_budget'))}\n"
        f"processed {found['processed']}, failed {found['failed']}, retried {found['retried']}, killed {found['killed']}\n"
        f"loop: {loop['turns_per_s']} turns/s, lag {loop['lag_ms_p50']} ms (p50), {loop['lag_ms_p99']} ms (p99)"
    )


def _budget(found: Mapping[str, Any] | None) -> str:
    """What isolated jobs may use, and which job waits for memory. "": there is no budget."""
    if not found:
        return ""
    waiting = found["waiting"]
    waits = f"; {waiting['id']} of {waiting['queue']} waits for {waiting['max_memory']} MiB" if waiting else ""
    return f"\nisolated jobs: {found['used_mib']} of {found['total_mib']} MiB{waits}"


def _tree(pid: int, memory_mib: float) -> str:
    """ ", with its 3 children 60.1 MiB": all that the daemon has started, directly or not. "": nothing, or it cannot be seen.

    Memory that children share (the template's, in each of its forks) is divided among them, so that it counts once.
    """
    import psutil

    try:
        daemon = psutil.Process(pid)
        children = daemon.children(recursive=True)
        if not children or "kqueued" not in " ".join(daemon.cmdline()):  # a container's pid is somebody else's out here
            return ""
    except psutil.Error:
        return ""
    total_mib = memory_mib + sum(map(_share_mib, children))
    return f", with its {len(children)} child{'' if len(children) == 1 else 'ren'} {total_mib:.1f} MiB"


def _share_mib(child: psutil.Process) -> float:
    """Its proportional set size (Pss in proc_pid_smaps(5)); where that may not be read, what is resident; 0: it has ended."""
    import psutil

    try:
        try:
            size: int = child.memory_full_info().pss
        except psutil.AccessDenied:
            size = child.memory_info().rss
    except psutil.Error:
        return 0.0
    return size / 1048576


def _queues(queues: Mapping[str, Mapping[str, int]]) -> str:
    if not queues:
        return "no queues yet"
    headings = ("QUEUE", "READY", "DELAYED", "LEASED", "DEAD")
    rows = [(name, *(counts[heading.lower()] for heading in headings[1:])) for name, counts in queues.items()]
    return table(headings, rows, right=headings[1:])


def _jobs(jobs: Mapping[str, Mapping[str, Any]]) -> str:
    """The classes of which most jobs have ended, and what is to be said of any."""
    most = sorted(jobs.items(), key=lambda item: (-item[1]["ended"], item[0]))[:MOST]
    headings = ("JOB", "RUNS", "ENDED", "NOT OK", "P50", "P99", "CPU P99", "MIB P99")
    rows = [(name, lane(each), each["ended"], each["ended"] - each["causes"].get("ok", 0), *_sizes(each)) for name, each in most]
    lines = [table(headings, rows, right=headings[2:])]
    if len(jobs) > MOST:
        lines.append(f"and {len(jobs) - MOST} more: kqueue status --json")
    said = [f"{name}: {text}" for name, each in sorted(jobs.items()) for text in advice(name, each)]
    return "\n".join([*lines, *map(printable, said[:MOST])])


def lane(job: Mapping[str, Any]) -> str:
    """Where jobs of a class run, and why when that is not by their code."""
    why = {"pinned": ", pinned", "blocked": ", it blocked"}.get(job["why"], "")
    return f"{job['lane'] or 'unknown'}{why}"


def advice(name: str, job: Mapping[str, Any]) -> list[str]:
    """What there is to do about a class."""
    blocked = job["blocked"]
    if blocked is None or job["why"] != "blocked":
        return list(job["advice"])
    place = f" at {blocked['where']}" if blocked.get("where") else ""
    todo = f"{blocked.get('instead') or 'make it yield'}, then kqueue demote {shlex.quote(name)}"
    return [f"blocked the loop for {duration(blocked.get('seconds', 0))}{place}: {todo}", *job["advice"]]


def _sizes(job: Mapping[str, Any]) -> tuple[str | None, ...]:
    taken, cpu, memory = job["duration_s"], job["cpu_s"], job["memory_mib"]
    if not any(taken.values()):
        return (None,) * 4
    return (
        duration(taken["p50"]), duration(taken["p99"]), None if cpu is None else duration(cpu["p99"]),
        None if memory is None else f"{memory['p99']:.0f}",
    )  # fmt: skip


def _running(running: list[Mapping[str, Any]]) -> str:
    headings = ("RUNNING", "JOB", "STRATEGY", "PID", "ELAPSED", "MIB", "PROGRESS")
    rows = [
        (
            each["id"], each["job"], each["strategy"], each["pid"], duration(each["elapsed_s"]), each["memory_mib"],
            None if each["progress"] is None else f"{each['progress']:.0%}",
        )
        for each in running
    ]  # fmt: skip
    return table(headings, rows, right=("PID", "ELAPSED", "MIB", "PROGRESS"))
