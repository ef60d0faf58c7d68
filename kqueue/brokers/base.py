"""What a broker must do for the daemon: eleven verbs, each a generator of traps, and the tuples they speak in.

    open     settle what an earlier life of ours could not; become an epoch of an owner; recover what our own dead epochs hold
    enqueue  add jobs, idempotent by id
    reserve  lease the best ready jobs of a queue, by lane
    withdraw want no more of a queue, until the next reserve
    settle   end leases: ack, release or bury, fenced by token; or hold: see that they are still ours
    renew    say that this epoch lives
    sweep    move what is due, recover what dead epochs hold, forward follow-ups, expire results and old dead letters
    wait     park until something may have become ready
    stats    how many jobs stand where
    publish  keep small documents where clients and other daemons can read them
    documents  read them
    close    give up the epoch

Rule 1. A token (epoch, id, reservation number) settles once, until its job is reserved again; a stale one changes nothing.
Rule 2. Every verb that changes something may be repeated after a lost reply, and then changes nothing more. The broker
        itself repeats it: BrokerUnavailable reaches the caller only where waiting for the connection is the caller's business.
Rule 3. Time is the broker's own; `delay_s` and friends are relative to it.
Rule 4. Anything may stand in the store. What is no job (no envelope, garbage) is leased like one with `envelope=None` or
        garbage in it, so that the runtime buries it with the reason; no verb raises because of it.

Rule 5. A job that is recovered keeps its token: until somebody reserves it, the run that was given up for lost may still settle
        it, or `hold` it, which takes it back. So expiry makes eligible, no more.

Who runs jobs, and why one is released, is the runtime's business and must not be known here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from ..codec import to_json
from ..dispatch import NewJob
from ..outcome import Outcome

__all__ = [
    "LEASE_S", "MAX_BATCH", "MAX_CERTIFICATES", "NO_RETENTION", "PRIORITY_STEP_S", "SETTLED", "STALE", "Broker",
    "Capabilities", "Counters", "Finding", "Lease", "Mark", "NewJob", "Opened", "Owner", "QueueStats", "Reserved", "Retention",
    "Row", "Settlement", "Store", "Swept", "Take", "Token", "Verb", "last_of_dead", "listed", "lost", "nobody", "numbered",
    "place",
]  # fmt: skip

T = TypeVar("T")
Verb = Generator[Any, Any, T]  # of traps; the clients, which share this file, know no kernel

MAX_BATCH: Final = 500  # jobs in one command (Lua's unpack fails near 8,000; a batch must not hold the broker long)
PRIORITY_STEP_S: Final = 3600.0  # the head start of one point of priority, seconds
MAX_CERTIFICATES: Final = 10  # kept with a job
LEASE_S: Final = 15.0  # of an epoch; renewed every third of it


class Owner(NamedTuple):
    """Who leases. `epoch` is one boot; `identity` is equal for two epochs only when the later may take the earlier for dead.

    `identity` is "" where nothing can prove that (no lock, a memory broker).
    """

    epoch: str
    identity: str


class Token(NamedTuple):
    """What proves a lease."""

    epoch: str
    id: str
    number: int  # of the reservation; rises with each one of this job


class Counters(NamedTuple):
    """How often a job's runs ended how. See DELIVERY for the limits."""

    attempts: int = 0  # by the job's own doing
    crashes: int = 0  # its process died
    recoveries: int = 0  # its supervisor died, through no fault of the job
    deferrals: int = 0  # nobody here knew the job, or could read its version
    memory: int = 0  # of the attempts, those that ran out of memory

    @property
    def runs(self) -> int:
        """How often it was run so far, as far as anybody can know."""
        return self.attempts + self.crashes + self.recoveries


class Lease(NamedTuple):
    """A reserved job."""

    token: Token
    queue: str
    lane: str
    envelope: bytes | None  # None: the store has no readable envelope
    counters: Counters
    available_at: float  # seconds since 1970 by the broker's clock


class Reserved(NamedTuple):
    """What `reserve` returns. `next_due_s`: seconds until the queue's earliest delayed job; None: there is none."""

    leases: list[Lease]
    next_due_s: float | None


Take = Callable[[Lease], bool]  # whether the job is begun


def nobody(lease: Lease) -> bool:
    """Takes no job."""
    return False


class Settlement(NamedTuple):
    """The end of one lease. `verb`: "ack" | "release" | "bury"; the other fields say how.

    "hold" ends nothing: it is SETTLED when the lease is still ours, or ours again, since the job was recovered and not yet
    reserved by anybody. Nothing else of the job changes.
    """

    token: Token
    queue: str
    verb: str
    counters: Counters = Counters()  # the new values (release, bury)
    delay_s: float = 0.0  # release: due then
    lane: str | None = None  # release: into that lane, at its old place; None: where it was
    certificate: bytes | None = None  # JSON of this attempt; appended to the job's own. None: nothing to add
    result: bytes | None = None  # ack: JSON kept for keep_s seconds
    keep_s: float = 0.0
    follow_ups: tuple[NewJob, ...] = ()  # ack: enqueued in the same step, so exactly when the ack settles


SETTLED: Final = "settled"
STALE: Final = "stale"  # the token is no longer good: settled before, reserved again, or gone


class Opened(NamedTuple):
    """What `open` did: jobs recovered, by queue, and the answers to `unsettled`, in order."""

    recovered: dict[str, int]
    answers: list[str]


class Swept(NamedTuple):
    """What `sweep` did: jobs of dead epochs that are ready again, and dead letters that retention dropped, by queue."""

    recovered: dict[str, int]
    forgotten: dict[str, int]


class Retention(NamedTuple):
    """How long dead letters of our queues are kept. 0: for ever, and any number."""

    max_age_s: float = 0.0
    max_count: int = 0  # a queue; the oldest go first


NO_RETENTION: Final = Retention()


class QueueStats(NamedTuple):
    ready: int = 0
    delayed: int = 0
    leased: int = 0
    dead: int = 0


class Capabilities(NamedTuple):
    """What a broker can promise. Whoever must know asks for these, never for a class."""

    durable: bool  # jobs survive the death of the daemon


class Broker(Protocol):
    """A queue's store, for the daemon."""

    address: str  # for people: the URL without secrets
    capabilities: Capabilities

    def open(
        self, owner: Owner, queues: Sequence[str], lease_s: float, *, unsettled: Sequence[Settlement] = (), culprit: str = "",
        retention: Retention = NO_RETENTION, take: Take = nobody,
    ) -> Verb[Opened]:  # fmt: skip
        """Connect, check the version, settle `unsettled`, register the epoch, recover what dead epochs of `owner.identity` hold.

        `unsettled`: what an earlier epoch of ours could not settle before it ended; fenced as ever by its tokens, and settled
        before anything is recovered, so that what was done is not done again. `culprit`: the id of the job whose slice ran when
        an earlier epoch died: where it is recovered it counts as a crash of the job. Every other recovery counts as one.
        `retention` holds for what `sweep` drops. `take` is offered each job that came without being asked for. Raises
        BrokerRefused; waits for a broker that is not there.
        """

    def enqueue(self, jobs: Sequence[NewJob], max_depth: int = 0) -> Verb[list[bool]]:
        """Add `jobs`; for each whether it is new (False: a job of that id exists).

        `max_depth` > 0: raises QueueFull, and adds none, when ready + delayed of a queue would exceed it.
        """

    def reserve(self, queue: str, wants: Mapping[str, int]) -> Verb[Reserved]:
        """Lease up to `wants[lane]` of the best ready jobs of each lane of `queue`; moves due jobs first. Never waits for jobs.

        It may return fewer than there are (batches are bounded), but never none. The runtime has one reserve and one settle under
        way at a time, and a broker may count on that. An epoch that expired meanwhile is registered again in the same step, so
        that no lease is ever without an owner.

        One that found nothing may be answered later by a job that is added then (decision 0023): it is offered to `take`. If
        that does not want it now, it rings, and the next reserve brings it.
        """

    def withdraw(self, queue: str) -> Verb[None]:
        """Take nothing of `queue` that no reserve has asked for: give it back, and let nobody hand us more."""

    def settle(self, batch: Sequence[Settlement]) -> Verb[list[str]]:
        """End leases; SETTLED or STALE for each, in order."""

    def renew(self) -> Verb[bool]:
        """Prolong the epoch's expiry to one lease from now, in every queue.

        False: it had lapsed in one of them, so somebody may have recovered what we hold; `hold` tells.
        """

    def sweep(self) -> Verb[Swept]:
        """Recover what expired epochs hold (recoveries + 1, and the certificate `lost`), drop old results and dead letters.

        What is left after a third of a lease is left to the next one. It may take place during any other verb.

        It expires nobody for one lease after the broker was away: when it has not itself been connected for a whole lease, or
        finds that nobody renewed or swept for half a lease.
        """

    def wait(self, timeout_s: float | None) -> Verb[bool]:
        """Park until a doorbell rings, or `timeout_s` seconds; whether it rang. A ring that came before counts.

        Rings may be lost; then `renew` or `sweep` finds that something is ready, and rings.
        """

    def stats(self) -> Verb[dict[str, QueueStats]]:
        """Counts by queue: of our own, and of every other one in the store where something stands (nobody may read it)."""

    def publish(self, documents: Mapping[str, bytes]) -> Verb[None]:
        """Keep small documents by key (`manifest:QUEUE`, `limits:QUEUE`) where clients can read them, in place of older ones."""

    def documents(self, prefix: str) -> Verb[dict[str, bytes]]:
        """What daemons published under keys that begin with `prefix`, by key."""

    def close(self, *, give_up: bool = True) -> Verb[None]:
        """Give up the epoch, so that what it still holds is recoverable at once, and the connection. Never raises.

        `give_up` False: the epoch goes on until it expires, since its outcomes are kept for the next start to settle.
        """


def lost(ended_at: float, culprit: bool = False) -> bytes:
    """The certificate of a run whose supervisor was lost, as JSON; `numbered` says which run of the job it was."""
    why = "while this job's own code ran in it" if culprit else "while the job ran or was about to"
    error = {"class": "SupervisorLost", "message": f"the supervisor died or was cut off {why}"}
    outcome = Outcome("lost", "kernel" if culprit else "supervisor", error=error)
    return to_json(outcome.certificate(attempt=0, strategy="", ended_at=ended_at))


def numbered(certificate: bytes, attempt: int) -> bytes:
    """`certificate`, made by `lost`, of the run number `attempt`."""
    return certificate.replace(b'"attempt":0', b'"attempt":%d' % attempt, 1)


def place(available_at: float, priority: int) -> float:
    """Where a ready job stands: lower is earlier. A point of priority is a head start of PRIORITY_STEP_S."""
    return available_at - priority * PRIORITY_STEP_S


def listed(state: str, wanted: str | None) -> bool:
    """Whether `Store.list` of the state `wanted` has jobs of `state`. None: what waits, runs or is dead, so all but done."""
    return state != "done" if wanted is None else state == wanted


def last_of_dead(row: Row) -> tuple[bytes, ...]:
    """The certificates with which `Store.list` has `row`: the last one of a dead job."""
    return row.certificates[-1:] if row.state == "dead" else ()


class Row(NamedTuple):
    """A job as clients and operators see it."""

    id: str
    queue: str
    state: str
    lane: str
    priority: int
    available_at: float
    counters: Counters
    envelope: bytes | None
    result: bytes | None = None
    certificates: tuple[bytes, ...] = ()


class Mark(NamedTuple):
    """Where a dead letter stands among those of its queue: by the time of its death, then by its id."""

    died_at: float  # seconds since 1970 by the broker's clock
    id: str


class Finding(NamedTuple):
    """Something about a store that people should know: what can be lost, when, and what to do."""

    serious: bool  # what KQueue promises does not hold there; else a remark
    text: str  # without the store's address
    failing: bool = False  # something is refused already


class Store(Protocol):
    """The blocking protocol, for clients and operators. Implementations live in kqueue.client. Thread- and fork-safe."""

    address: str

    def enqueue(self, jobs: Sequence[NewJob], max_depth: int = 0) -> list[bool]:
        """As Broker.enqueue. `max_depth` > 0: QueueFull when ready + delayed would exceed it."""

    def show(self, id: str, queue: str | None = None) -> Row | None:
        """One job with its certificates; None: there is none. `queue` saves a search where queues are stored apart."""

    def list(self, state: str | None, queue: str | None, limit: int) -> list[Row]:
        """Jobs, best place first; "dead": the last death first. `state` None: what waits, runs or is dead.

        Those that are done are listed only by "done": while results are kept, they would hide what still waits. Of certificates
        only the last one of a dead job comes with it.
        """

    def stats(self) -> dict[str, QueueStats]:
        """Counts by queue."""

    def cancel(self, id: str, certificate: bytes, queue: str | None = None) -> bool:
        """Bury a job that waits; whether it did."""

    def retry(self, ids: Sequence[str], queue: str | None = None) -> Sequence[bool]:
        """Make dead jobs ready now, as if they had never run, but for their certificates; for each whether it was dead.

        At most MAX_BATCH ids, each once. `queue` saves a search where queues are stored apart.
        """

    def forget(self, ids: Sequence[str], queue: str | None = None) -> Sequence[bool]:
        """Delete dead jobs, at most MAX_BATCH; for each whether it was dead."""

    def dead(self, queue: str, after: Mark | None, until: Mark, limit: int) -> Sequence[Mark]:
        """Where dead jobs of `queue` stand, the first deaths first: behind `after` (None: from the first), up to `until`.

        At most `limit` of them. Who walks them all takes `last_dead` for `until` before the first page, and so comes to an end
        though jobs that are retried meanwhile may die again.
        """

    def last_dead(self, queue: str) -> Mark | None:
        """Where the last death of `queue` stands; None: nothing is dead there."""

    def documents(self, prefix: str) -> dict[str, bytes]:
        """What daemons published under keys that begin with `prefix`, by key."""

    def publish(self, documents: Mapping[str, bytes]) -> None:
        """As Broker.publish: what an operator decides for all daemons."""

    def health(self) -> Sequence[Finding]:
        """What should be known of the store's own settings; empty when all is well, or nothing can be known."""

    def version(self) -> str:
        """What it is, for people: "Redis 7.0.15"; with what else says how it keeps jobs."""

    def close(self) -> None: ...
