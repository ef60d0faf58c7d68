"""Who is compared, and how each is set: the one place to look when a figure seems unfair.

A peer is set for speed: with hiredis, with uvloop where it takes that by itself, with its quietest log, without results; and with
acknowledgement after the job wherever it has that. Each has a virtual environment of its own, since
their requirements contradict each other.

How many jobs there are is proportionate to speed: a second or two for each. Workers for jobs that wait have as many threads or
tasks as made them fastest here (Dramatiq 8, 64, 200; Celery 10, 100, 200; SAQ 100, 1,000; taskiq 100, 250, 500, 1,000). For web
requests taskiq was fastest with its default of 100 tasks a process: httpx goes through all its connections at each request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Peer(NamedTuple):
    """`name` is its module in this package."""

    name: str
    label: str
    requirements: Sequence[str]  # what of it is shown as its version comes first
    delivery: str  # what becomes of a job whose worker is killed
    bulk: str = ""  # how it enqueues in bulk; "": it has no way


class Worker(NamedTuple):
    """One worker of a peer in one set of settings. `jobs`: works in which it takes part, and how many jobs it is given."""

    key: str
    peer: str
    label: str
    kind: str  # the start of KQueue that isolates a job as much: inline, pool or fork
    command: Sequence[str]  # the program is looked for in the peer's virtual environment
    jobs: Mapping[str, int]


PEERS: Sequence[Peer] = (
    Peer("rq", "RQ", ("rq==3.0.0", "redis[hiredis]==8.1.0"), "fails as abandoned", "enqueue_many"),
    Peer("celery", "Celery", ("celery[redis]==5.7.0", "redis[hiredis]==7.4.1"), "comes again after an hour (visibility timeout)"),
    Peer("dramatiq", "Dramatiq", ("dramatiq==2.2.1", "redis[hiredis]==7.4.1"), "comes again after a minute (heartbeat)"),
    Peer("huey", "Huey", ("huey==3.5.4", "redis[hiredis]==7.4.1"), "is lost"),
    Peer(
        "taskiq", "taskiq", ("taskiq==0.13.0", "taskiq-redis==1.2.4", "redis[hiredis]==8.1.0", "uvloop==0.23.0", "httpx==0.28.1"),
        "comes again after ten minutes (idle timeout)", "10 at once by gather",
    ),
    Peer(
        "saq", "SAQ", ("saq==0.26.4", "redis[hiredis]==7.4.1", "typing_extensions==4.16.0"),
        "comes again within minutes (sweeper), if it has retries", "50 at once by gather",
    ),
)  # fmt: skip

_RQ = "rq worker-pool --quiet --config peers.rq --num-workers 2"
_CELERY = "celery --quiet --app peers.celery worker --loglevel WARNING --without-gossip --without-mingle --without-heartbeat"
_HUEY = "huey_consumer --quiet --disable-health-check --no-periodic peers.huey.app"
_DRAMATIQ = "dramatiq peers.dramatiq --processes 2"
_TASKIQ = "taskiq worker peers.taskiq:broker --log-level WARNING --ack-type when_executed --workers 2"

WORKERS: Sequence[Worker] = (
    Worker(
        "huey-processes", "huey", "4 processes", "pool",
        f"{_HUEY} --worker-type process --workers 4".split(), {"noop": 8_000},
    ),
    Worker("huey-threads", "huey", "4 threads", "inline", f"{_HUEY} --worker-type thread --workers 4".split(), {"noop": 4_000}),
    Worker(
        "dramatiq", "dramatiq", "2 processes of 8 threads", "pool",
        f"{_DRAMATIQ} --threads 8".split(), {"noop": 6_000},
    ),
    Worker(
        "dramatiq-many", "dramatiq", "2 processes of 200 threads", "pool",
        f"{_DRAMATIQ} --threads 200".split(), {"parked": 2_000},
    ),
    Worker("taskiq", "taskiq", "stream, 2 processes", "inline", _TASKIQ.split(), {"noop": 5_000, "http": 2_000}),
    Worker(
        "taskiq-many", "taskiq", "stream, 2 processes of 500 tasks", "inline",
        f"{_TASKIQ} --max-async-tasks 500 --max-prefetch 100".split(), {"parked": 2_000},
    ),
    Worker("saq", "saq", "concurrency 100", "inline", ["saq", "peers.saq.settings"], {"noop": 1_000}),
    Worker("saq-many", "saq", "concurrency 1,000", "inline", ["saq", "peers.saq.settings_many"], {"parked": 2_000}),
    Worker(
        "celery-prefork", "celery", "prefork 2, late acks, prefetch 64", "pool",
        f"{_CELERY} --pool prefork --concurrency 2 --prefetch-multiplier 32".split(), {"noop": 2_000},
    ),
    Worker(
        "celery-threads", "celery", "100 threads, late acks", "pool",
        f"{_CELERY} --pool threads --concurrency 100".split(), {"parked": 1_000},
    ),
    Worker("rq", "rq", "2 workers, a fork for each job", "fork", _RQ.split(), {"noop": 200}),
)  # fmt: skip
