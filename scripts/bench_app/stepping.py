"""A program whose stages are timed: kqueued, or a client that enqueues no-ops. In a process of its own, since it wraps functions.

    python -c PROGRAM FILE daemon -m kqueue.cli.kqueued ARGUMENTS…
    python -c PROGRAM FILE client URL JOBS AT_ONCE

At its end it writes to FILE what stages.py found. Below is what each stage is made of: a function that is renamed must be renamed
here, which tests/test_bench.py sees to. The time of the daemon begins with its first job.
"""

from __future__ import annotations

import atexit
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import stages

WAITING = "waiting for something to do"
REPLY = "send it, wait for the reply, parse that"
KERNEL = "kernel: turns of the loop, tasks, timers"
BUILD = "handle of the job, and whatever is not below"

DAEMON: Mapping[str, Sequence[str]] = {  # in the order of a job's life
    WAITING: ["kqueue.kernel.clock:Clock.select"],
    "ask for jobs, pick out the reply": [
        "kqueue.feeding:Feeding.run", "kqueue.brokers.redis:RedisBroker.reserve",
        "kqueue.brokers.commands.redis:reserve",
    ],
    "send (what was asked for, in batches)": ["kqueue.brokers.redis_wire:Wire.put", "kqueue.brokers.redis_wire:Wire.flush"],
    "read: from the socket, parse": ["kqueue.brokers.redis_wire:Wire.read"],
    "read: leases from the reply": ["kqueue.brokers.commands.redis:read_leases"],
    "start: a task, the books": ["kqueue.runtime:KQueueRuntime.begin"],
    "decode the envelope": ["kqueue.runtime:KQueueRuntime._unsigned", "kqueue.runtime:KQueueRuntime._decode"],
    "admit: name, options, limits": ["kqueue.runtime:KQueueRuntime._registration", "kqueue.runtime:admit"],
    "make what it runs in": ["kqueue.runtime:KQueueRuntime._work"],
    "life: what leads from one to the next": ["kqueue.runtime:KQueueRuntime._life"],
    "run: call, time-out, outcome": ["kqueue.execution.inline:InlineExecutionStrategy.execute"],
    "the job itself: 8 bytes to a file": ["marks:write"],
    "judge": ["kqueue.runtime:judge"],
    "end: the slot is given back": ["kqueue.runtime:KQueueRuntime._ended"],
    "settle": [
        "kqueue.settling:Settling.run", "kqueue.settling:Settling.add", "kqueue.brokers.redis:RedisBroker.settle",
        "kqueue.brokers.commands.redis:settle", "kqueue.brokers.commands.redis:settle_parts",
    ],
    "account": ["kqueue.runtime:KQueueRuntime._settled", "kqueue.runtime:KQueueRuntime._account"],
    "account: statistics of its class": ["kqueue.observe.classes:JobClasses._count", "kqueue.observe.status:Status._count_job"],
    "log": ["kqueue.observe.logs:Logs._job_ended"],
    "tell whoever subscribed": ["kqueue.events:Events.emit"],
}  # fmt: skip
CLIENT: Mapping[str, Sequence[str]] = {
    "build: options, limits, what stands in the queue": ["kqueue.client:Client._prepare"],
    "build: do the arguments fit": ["kqueue.dispatch:_check_arguments"],
    "build: its id": ["kqueue.dispatch:new_id"],
    "encode the envelope": ["kqueue.dispatch:encode"],
    "call: the script and its arguments": ["kqueue.client.redis:RedisClient.enqueue"],
    "pack it": ["kqueue.client.redis_wire:pack"],
    REPLY: ["kqueue.client.redis_wire:_Line.exchange"],
}
PROGRAM = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import stepping; stepping.main(*sys.argv[1:])"
STARTS_WITH = "kqueue.runtime:KQueueRuntime.begin"


def main(file: str, kind: str, *arguments: str) -> None:
    watched = stages.Stages(KERNEL if kind == "daemon" else BUILD)
    for stage, targets in (DAEMON if kind == "daemon" else CLIENT).items():
        watched.watch(stage, targets)
    atexit.register(lambda: Path(file).write_text(json.dumps(stages.as_json(watched))))
    if kind == "daemon":
        _clear_at_first(watched)
        sys.argv = ["kqueued", *arguments[2:]]
        from kqueue.cli.kqueued import main as kqueued

        sys.exit(kqueued())
    url, jobs, at_once = arguments
    _dispatch(watched, url, int(jobs), int(at_once))


def _clear_at_first(watched: stages.Stages) -> None:
    """Forget the start, once the first job is there."""
    owner, name, function = stages.find(STARTS_WITH)

    def first(*args: Any) -> None:
        watched.clear()
        setattr(owner, name, function)
        function(*args)

    setattr(owner, name, first)


def _dispatch(watched: stages.Stages, url: str, jobs: int, at_once: int) -> None:
    from kqueued import connect
    from light import noop

    from kqueue import dispatch_many

    connect(url)
    noop.dispatch()  # it is connected, and imported what it imports when it is first needed
    watched.clear()
    for _ in range(0, jobs, at_once):
        if at_once == 1:
            noop.dispatch()
        else:
            dispatch_many([noop.job() for _ in range(at_once)])
