"""The rules of the protocol, and the world that they are about: a broker, two daemons, and what is under way between them.

A World is immutable and holds all there is. What only the checks may look at, and no rule of the protocol, is marked as a ghost.
A Model can leave one rule out; tests/test_model.py holds that each of them is then missed.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, TypeVar

T = TypeVar("T")

RULES: Final = {
    "fence": "a token settles only the reservation that it is of",
    "keep token": "a job that is recovered keeps its token, which settles until the job is reserved again",
    "take back": "a hold leases a job again that was recovered and not yet reserved",
    "remember reserve": "a reservation that is asked for again is answered as it was the first time",
    "remember settle": "a settlement that is asked for again is answered as it was the first time",
    "abort": "a connection that is given up takes with it what was sent on it: nothing of it arrives later",
    "revive": "a reservation or a hold registers its epoch where that has expired or is gone",
    "hush": "who finds that nobody renewed or swept for half a lease gives everybody a lease before anybody is expired",
    "steady": "who has not been connected for a whole lease expires nobody",
    "tell of lapses": "a renewal says whether its epoch had lapsed since its owner last heard; then all is held that it has",
    "count from asking": "a daemon's own lease counts from when its renewal was sent, not from when the answer was heard",
    "cancel": "a run whose hold is stale is cancelled",
    "identity": "open recovers the epochs of its own identity alone (its lock, its boot, its lock file)",
    "replay first": "outcomes kept over an exit are settled before anything is recovered",
    "keep outcomes": "outcomes that cannot be settled are kept over the exit",
    "settle before close": "an epoch is given up only when nothing of it is unsettled",
    "ack after work": "a job is acked when its run has ended",
    "follow with ack": "follow-ups are enqueued, or put into the outbox, in the ack's own step",
    "mark": "who hands a follow-up over leaves a mark beside it, and hands nothing over that is marked",
    "lasting mark": "the mark outlives the outbox's entry, as long as somebody may have read that",
    "hand to the living": "a job is handed only to an epoch that lives",
    "hand once": "who reserves takes its own offer back or replaces it, so N is handed only when N - 1 took nothing",
    "look for the offer": "who made an offer, and may have missed what became of it, makes that reservation itself",
    "answer the next": "who asks for N - 1, and was handed a job as N, is answered N",
    "take the next": "a job that is handed is taken only while N is the reservation that comes next",
    "wait for the answer": "a job that is handed is not taken while a reservation is under way",
    "forget in doubt": "who doubts its lease, or is told of a lapse, forgets what it was handed and has not begun",
}
ECONOMIES: Final = {  # which save work, and on which no promise rests
    "doubt": "who has not renewed for a lease, by its own clock, holds all that it has before it reserves anything",
    "hand to a listener": "a job is handed only to who hears of it",
    "compare numbers": "a job is handed as N only when the number that is remembered is below N - 1",
    "look when connected": "who is connected again looks for its offer",
    "look when renewed": "who hears from a renewal that its offer is gone, and knows of no job, looks for it",
    "keep what was handed": "what comes while a reservation is under way is kept until that is answered",
    "withdraw": "who stops takes its offer back before it gives up its epoch",
}
HANDING: Final = frozenset((*list(RULES)[-7:], *list(ECONOMIES)[-6:]))  # nothing of it happens without Bounds.dispatched

ABSENT, READY, LEASED, DONE, DEAD = "absent", "ready", "leased", "done", "dead"
DOWN, OPENING, UP, STOPPING = "down", "opening", "up", "stopping"
RUNS: Final = "runs"  # the state of a run; afterwards its outcome: "ack", "release", "bury"; or "return" when it never began
NEW, ASKED, ANSWERED, LOST = "new", "asked", "answered", "lost"
BEGUN: Final = "begun"
KILLED, PAUSED, CUT, GONE = "killed", "paused", "cut off", "gone"  # why a job may be run a second time: the promise
GIVEN_UP: Final = -1
OFFERED, ASK = "offered", "ask"  # it has made an offer, and has not heard that it is gone; it has to ask what became of it
LAPSED, OFFER_GONE = 1, 2  # the answer to a renewal: their sum
NEXT: Final = 2  # what normal() makes of the number of a daemon's next reservation
FAULTS: Final = ("kill", "pause", "cut", "stop", "away", "jump")
NAMES: Final = "AB"

Epoch = tuple[int, int]  # daemon, boot
Run = tuple[int, int, str]  # job, number of its reservation, state
Token = tuple[Epoch, Run]  # with the verb of a settlement


class Bounds(NamedTuple):
    """What is explored: at most `faults` of the `kinds`, in any order, at any moment."""

    jobs: int = 1
    faults: int = 2
    kinds: tuple[str, ...] = FAULTS
    failures: int = 0  # how often a run may fail and be released; then it may be buried, too. 0: no run fails
    follow: str = ""  # the last job follows the first one's ack, in the "same" queue or in "another"
    lease: int = 3  # ticks; a tick is the time between two renewals
    dispatched: int = 0  # so many of the jobs come later, each from a client, or due then; then who is idle may be handed one


class Model(NamedTuple):
    bounds: Bounds = Bounds()
    without: str = ""  # a rule

    def has(self, rule: str) -> bool:
        assert rule in RULES or rule in ECONOMIES, rule
        return rule != self.without


class Job(NamedTuple):
    place: str = READY
    owner: Epoch | None = None  # of its last reservation; a recovery keeps it, a settlement does not
    number: int = 0  # of its last reservation
    ran: str = ""  # ghost: "" nothing that counts; BEGUN; or why it may be run again
    ended: bool = False  # ghost: a run came to its end


class Request(NamedTuple):
    verb: str
    number: int = 0  # of reservations and settlements
    tokens: tuple[Token, ...] = ()  # settle, hold
    doubtful: bool = False  # renew: its sender was in doubt
    age: int = 0  # renew, open: ticks since it was first sent
    state: str = NEW
    answer: Any = None


class Reserved(NamedTuple):
    number: int  # of the reservation that is answered; 0: nobody is handed anything, so it is the one that was asked for
    runs: tuple[Run, ...]
    offered: bool = False  # nothing was there, and who adds a job may hand it over

    def __bool__(self) -> bool:
        return bool(self.runs)


class Handed(NamedTuple):
    number: int  # of the reservation that this answers
    run: Run
    ahead: bool = False  # of the answer to the request that is under way, on the same connection


class Daemon(NamedTuple):
    phase: str = UP
    boot: int = 1
    paused: bool = False
    linked: bool = True
    steady: int = 0  # ticks since it was connected, at most a lease
    age: int = 0  # ticks since its last renewal that counts was sent, by the host's own clock, at most a lease
    renewed: bool = False  # since the last tick
    must_hold: int = -1  # ticks since the renewal was sent after which all must be held; -1: nothing must
    wire: Request | None = None  # one at a time
    number: int = 0  # of its last request that has one
    runs: tuple[Run, ...] = ()
    file: tuple[Token, ...] = ()  # outcomes kept over an exit
    handing: int = 0  # a follow-up: 1: it read the outbox's entry; 2: it handed it over
    next: int = 0  # number of its next reservation; 0: nobody is handed anything
    offer: str = ""  # OFFERED, or ASK, or none
    mail: Handed | None = None  # is under way to it
    kept: Handed | None = None  # it heard of that, and has neither taken nor dropped it
    why: str = ""  # ghost: why it did not renew, since its last renewal; "": for no reason of its own


class Memory(NamedTuple):
    """The last request of a sender, and what it was answered."""

    number: int
    answer: Any


class World(NamedTuple):
    jobs: tuple[Job, ...]
    daemons: tuple[Daemon, ...]
    epochs: tuple[tuple[Epoch, int], ...]  # ticks until expiry
    memory: tuple[tuple[tuple[Epoch, str], Memory], ...] = ()  # by sender and verb
    lapsed: tuple[Epoch, ...] = ()  # were found expired, and their owners have not heard of it
    beat: int = 0  # ticks since anybody renewed or swept, at most a lease
    hush: int = 0  # ticks for which nobody is expired
    up: bool = True
    stray: tuple[Epoch, Request] | None = None  # was sent on a connection that broke, and is still on its way
    entry: bool = False  # of the outbox
    mark: bool = False
    offer: tuple[Epoch, int] | None = None  # whose, and the reservation that a job would answer
    faults: int = 0  # so far
    failed: int = 0
    born: int = 0  # ghost: how often the follow-up was enqueued
    wrong: str = ""  # ghost: what the last step should never have done


def first(m: Model) -> World:
    """Jobs are there, and two daemons are up."""
    jobs = [Job() for _ in range(m.bounds.jobs)]
    if m.bounds.follow:
        jobs[-1] = Job(ABSENT)
    jobs = jobs[: len(jobs) - m.bounds.dispatched] + [Job(ABSENT)] * m.bounds.dispatched
    daemon = Daemon(steady=m.bounds.lease, renewed=True, next=NEXT if m.bounds.dispatched else 0)
    return World(tuple(jobs), (daemon, daemon), tuple(((s, 1), m.bounds.lease) for s in (0, 1)))


def normal(w: World) -> World:
    """`w` without what nothing can come of any more, so that states that behave alike are equal."""
    astray = w.stray[0] if w.stray else None
    memory = [item for item in w.memory if item[0][0] == astray]
    living = {astray}
    for s, d in enumerate(w.daemons):
        epoch, mine = (s, d.boot), d.wire.number if d.wire and not by_next(d, d.wire.verb) else 0
        if astray != epoch:  # its numbers are compared with that of its request under way, if with any
            remembered = [item for item in w.memory if item[0][0] == epoch and not by_next(d, item[0][1])]
            memory += [(key, last._replace(number=1)) for key, last in remembered if last.number == mine]
            if mine > 1 or d.number > mine:
                wire = d.wire._replace(number=min(mine, 1)) if d.wire and not by_next(d, d.wire.verb) else d.wire
                w = with_daemon(w, s, number=min(mine, 1), wire=wire)
        if d.next:
            w, last = renumbered(w, s)
            memory += last
        if d.phase != DOWN:
            living.add(epoch)
    lapsed = tuple(epoch for epoch in w.lapsed if epoch in living)
    living.update(job.owner for job in w.jobs if job.place == LEASED)
    epochs = tuple(item for item in w.epochs if item[0] in living)
    return w._replace(memory=tuple(memory), lapsed=lapsed, epochs=epochs)


def by_next(d: Daemon, verb: str) -> bool:
    """Reservations have numbers of their own, which nothing but them counts, where jobs are handed over."""
    return d.next > 0 and verb in ("reserve", "withdraw")


def renumbered(w: World, s: int) -> tuple[World, list[tuple[tuple[Epoch, str], Memory]]]:
    """Its next reservation gets the number NEXT. Of what is older than the last one, nobody asks how old it is."""
    d = w.daemons[s]
    epoch, less = (s, d.boot), d.next - NEXT
    memory = [(key, last._replace(number=last.number - less)) for key, last in w.memory if key == (epoch, "reserve")]
    memory = [item for item in memory if item[1].number > 0]
    if less:
        mail, kept = (it and it._replace(number=max(0, it.number - less)) for it in (d.mail, d.kept))
        wire = d.wire
        if wire and by_next(d, wire.verb):
            answer = wire.answer._replace(number=wire.answer.number - less) if wire.state == ANSWERED else None
            wire = wire._replace(number=wire.number - less, answer=answer)
        if w.offer and w.offer[0] == epoch:
            w = w._replace(offer=(epoch, max(0, w.offer[1] - less)))
        w = with_daemon(w, s, next=NEXT, mail=mail, kept=kept, wire=wire)
    return w, memory


def put(items: tuple[T, ...], at: int, item: T) -> tuple[T, ...]:
    return (*items[:at], item, *items[at + 1 :])


def with_job(w: World, j: int, **fields: Any) -> World:
    return w._replace(jobs=put(w.jobs, j, w.jobs[j]._replace(**fields)))


def with_daemon(w: World, s: int, **fields: Any) -> World:
    return w._replace(daemons=put(w.daemons, s, w.daemons[s]._replace(**fields)))


def sound(w: World, d: Daemon) -> bool:
    """It runs, and has the broker."""
    return d.phase != DOWN and not d.paused and d.linked and w.up


def in_doubt(m: Model, d: Daemon) -> bool:
    """Its lease may have run out, by its own clock."""
    return d.age >= m.bounds.lease


def leased(w: World, epoch: Epoch, run: Run) -> bool:
    """The run is of the job's last reservation, and nobody has settled or recovered that."""
    job = w.jobs[run[0]]
    return (job.place, job.owner, job.number) == (LEASED, epoch, run[1])
