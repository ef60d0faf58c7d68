"""The protocol of delivery as a state machine: what the world is, and every step that may come next. Imports nothing of KQueue.

A World is immutable and holds all there is: the broker, the daemons, and what is under way between them. `steps` yields every step
that is possible in it, each with the world that follows; explore.py walks through all of them. What only the checks may look at,
and no rule of the protocol, is marked as a ghost.

RULES are the protocol, a sentence each. A Model can leave rules out, and tests/test_model.py holds that each of them is missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, TypeVar

T = TypeVar("T")

RULES: Final = {
    "fence": "a token settles only the reservation that it is of",
    "keep token": "a job that is recovered keeps its token, which settles until the job is reserved again",
    "take back": "a hold leases a job again that was recovered and not yet reserved",
    "remember reserve": "a reservation that is asked for again is answered as it was the first time",
    "remember settle": "a settlement that is asked for again is answered as it was the first time",
    "abort": "a connection that its daemon gives up takes with it what was sent on it: nothing of it arrives later",
    "revive": "a reservation or a hold registers its epoch where that has expired or is gone",
    "hush": "who finds that nobody renewed or swept for half a lease gives everybody a lease before anybody is expired",
    "steady": "who has not been connected for a whole lease expires nobody",
    "doubt": "who renews more than a lease after its last renewal holds all that it has before it reserves anything",
    "tell of lapses": "a renewal is told when its epoch had lapsed since its owner last heard, and then all is held, too",
    "count from asking": "that lease counts from when the renewal was sent, not from when its answer was heard",
    "cancel": "a run whose hold is stale is cancelled",
    "identity": "open recovers the epochs of its own identity alone (its lock, its boot, its lock file)",
    "replay first": "outcomes kept over an exit are settled before anything is recovered",
    "keep outcomes": "outcomes that cannot be settled are kept over the exit",
    "settle before close": "an epoch is given up only when nothing of it is unsettled",
    "ack after work": "a job is acked when its run has ended",
    "follow with ack": "follow-ups are enqueued, or put into the outbox, in the ack's own step",
    "mark": "who hands a follow-up over leaves a mark beside it, and hands nothing over that is marked",
    "lasting mark": "the mark outlives the outbox's entry, as long as somebody may have read that",
}

ABSENT, READY, LEASED, DONE, DEAD = "absent", "ready", "leased", "done", "dead"
DOWN, OPENING, UP, STOPPING = "down", "opening", "up", "stopping"
RUNS: Final = "runs"  # the state of a run; afterwards the verb of its outcome: "ack", "release", "bury"
NEW, ASKED, ANSWERED, LOST = "new", "asked", "answered", "lost"
BEGUN: Final = "begun"
KILLED, PAUSED, CUT, GONE = "killed", "paused", "cut off", "gone"  # why a job may be run a second time: the promise
GIVEN_UP: Final = -1
FAULTS: Final = ("kill", "pause", "cut", "stop", "away", "jump")

Epoch = tuple[int, int]  # daemon, boot
Run = tuple[int, int, str]  # job, number of its reservation, state


class Bounds(NamedTuple):
    """What is explored: at most `faults` of the `kinds`, in any order, at any moment."""

    jobs: int = 1
    faults: int = 2
    kinds: tuple[str, ...] = FAULTS
    failures: int = 0  # how often a run may fail and be released; then it may be buried, too
    follow: str = ""  # the last job follows the first one's ack, in the "same" queue or in "another"
    lease: int = 3  # ticks; a tick is the time between two renewals


class Model(NamedTuple):
    bounds: Bounds = Bounds()
    without: str = ""  # a rule

    def has(self, rule: str) -> bool:
        assert rule in RULES, rule
        return rule != self.without


class Job(NamedTuple):
    place: str = READY
    owner: Epoch | None = None  # of its last reservation; recovery keeps it, a settlement does not
    number: int = 0  # of its last reservation
    ran: str = ""  # ghost: "" nothing that counts; BEGUN; or why it may be run again
    ended: bool = False  # ghost: a run came to its end


class Request(NamedTuple):
    verb: str
    number: int = 0
    items: tuple[tuple[Epoch, Run], ...] = ()  # settle, hold: tokens and verbs
    doubtful: bool = False  # renew: its sender was in doubt
    age: int = 0  # ticks since it was first sent
    state: str = ASKED
    answer: Any = None


class Daemon(NamedTuple):
    phase: str = UP
    boot: int = 1
    paused: bool = False
    linked: bool = True
    age: int = 0  # ticks since its last renewal that counts was sent, by the host's own clock
    renewed: bool = True  # since the last tick
    steady: int = 0  # ticks since it was connected, at most a lease
    must_hold: int = -1  # ticks since the renewal was sent after which all must be held; -1: nothing must
    wire: Request | None = None
    number: int = 0  # of its last reservation or settlement
    runs: tuple[Run, ...] = ()
    file: tuple[tuple[Epoch, Run], ...] = ()  # outcomes kept over an exit
    handing: int = 0  # a follow-up: 1: it read the outbox's entry; 2: it handed it over
    why: str = ""  # ghost: why it did not renew, since its last renewal; "": the broker's fault, or none


class Memory(NamedTuple):
    number: int
    answer: Any


class World(NamedTuple):
    jobs: tuple[Job, ...]
    daemons: tuple[Daemon, ...]
    epochs: tuple[tuple[Epoch, int], ...]  # ticks until expiry
    memory: tuple[tuple[tuple[Epoch, str], Memory], ...] = ()  # (sender, verb): its last request
    lapsed: tuple[Epoch, ...] = ()  # epochs that were found expired, and whose owners have not heard of it
    beat: int = 0  # ticks since anybody renewed or swept
    hush: int = 0  # ticks for which nobody is expired
    up: bool = True
    stray: tuple[Epoch, Request] | None = None
    entry: bool = False  # of the outbox
    mark: bool = False
    faults: int = 0  # so far
    failed: int = 0
    born: int = 0  # ghost: how often the follow-up was enqueued
    wrong: str = ""  # ghost: what should never have happened in the last step


class Step(NamedTuple):
    what: str
    world: World
    again: str = ""  # ghost: a job that had begun before begins again, for this reason
    fault: bool = False


def first(model: Model) -> World:
    """Jobs are there and two daemons are up."""
    jobs = [Job() for _ in range(model.bounds.jobs)]
    if model.bounds.follow:
        jobs[-1] = Job(ABSENT)
    lease = model.bounds.lease
    daemon = Daemon(steady=lease)
    return World(tuple(jobs), (daemon, daemon), (((0, 1), lease), ((1, 1), lease)))


def put(items: tuple[T, ...], at: int, item: T) -> tuple[T, ...]:
    return (*items[:at], item, *items[at + 1 :])


def with_job(w: World, j: int, **fields: Any) -> World:
    return w._replace(jobs=put(w.jobs, j, w.jobs[j]._replace(**fields)))


def with_daemon(w: World, s: int, **fields: Any) -> World:
    return w._replace(daemons=put(w.daemons, s, w.daemons[s]._replace(**fields)))


def with_epoch(w: World, epoch: Epoch, ttl: int) -> World:
    return w._replace(epochs=tuple(sorted({**dict(w.epochs), epoch: ttl}.items())))


def with_memory(w: World, key: tuple[Epoch, str], memory: Memory) -> World:
    return w._replace(memory=tuple(sorted({**dict(w.memory), key: memory}.items())))


def normal(w: World) -> World:
    """`w` without what nothing can come of any more, so that states that behave alike are equal."""
    astray = w.stray[0] if w.stray else None
    memory = [item for item in w.memory if item[0][0] == astray]
    for s, d in enumerate(w.daemons):
        if astray != (s, d.boot):  # its numbers are compared with that of its request under way, if at all
            mine = d.wire.number if d.wire else 0
            memory += [(key, last._replace(number=1)) for key, last in w.memory if key[0] == (s, d.boot) and last.number == mine]
            if mine > 1 or d.number > mine:
                w = with_daemon(w, s, number=min(mine, 1), wire=d.wire and d.wire._replace(number=min(mine, 1)))
    held = {job.owner for job in w.jobs if job.place == LEASED} | {astray}
    held |= {(s, d.boot) for s, d in enumerate(w.daemons) if d.phase != DOWN}
    return w._replace(memory=tuple(memory), epochs=tuple(item for item in w.epochs if item[0] in held))


# -- the broker: each function is one script ------------------------------------------------------------------------------


def answer(m: Model, w: World, sender: Epoch, request: Request) -> tuple[World, Any]:
    if request.verb == "reserve":
        return reserve(m, w, sender, request.number)
    if request.verb in ("settle", "hold"):
        return settle(m, w, sender, request)
    if request.verb == "open":
        return open_(m, w, sender), None
    if request.verb == "renew":
        return renew(m, revive(m, w, sender, always=True), sender), sender in w.lapsed or not alive(w, sender)
    return with_epoch(w, sender, GIVEN_UP), None  # close


def reserve(m: Model, w: World, epoch: Epoch, number: int) -> tuple[World, tuple[Run, ...]]:
    key = (epoch, "reserve")
    last = dict(w.memory).get(key)
    if last and last.number == number and m.has("remember reserve"):
        return w, tuple(run for run in last.answer if leased(w, epoch, run))
    taken: tuple[Run, ...] = ()
    for j, job in enumerate(w.jobs):
        if job.place == READY and not taken:
            taken = ((j, job.number + 1, RUNS),)
            w = with_job(w, j, place=LEASED, owner=epoch, number=job.number + 1)
            w = revive(m, w, epoch)
    return (with_memory(w, key, Memory(number, taken)) if taken else w), taken


def leased(w: World, epoch: Epoch, run: Run) -> bool:
    job = w.jobs[run[0]]
    return (job.place, job.owner, job.number) == (LEASED, epoch, run[1])


def alive(w: World, epoch: Epoch) -> bool:
    return dict(w.epochs).get(epoch, 0) > 0


def revive(m: Model, w: World, epoch: Epoch, always: bool = False) -> World:
    if alive(w, epoch) or not (always or m.has("revive")):
        return w
    return with_epoch(w, epoch, m.bounds.lease)._replace(lapsed=tuple(sorted({*w.lapsed, epoch})))


def settle(m: Model, w: World, sender: Epoch, request: Request) -> tuple[World, tuple[bool, ...]]:
    key = (sender, "settle")
    last = dict(w.memory).get(key)
    if last and last.number == request.number and m.has("remember settle"):
        return w, last.answer
    answers = []
    for epoch, (j, number, verb) in request.items:
        job = w.jobs[j]
        good = job.place in (READY, LEASED) and job.owner == epoch and (job.number == number or not m.has("fence"))
        answers.append(good)
        if good and job.number != number:
            w = w._replace(wrong="a stale token changed a job")
        if good and verb == "hold" and job.place == READY and m.has("take back"):
            w = revive(m, with_job(w, j, place=LEASED, ran=BEGUN if job.ran else ""), epoch)
        elif good and verb != "hold":
            place = {"ack": DONE, "release": READY, "bury": DEAD}[verb]
            w = with_job(w, j, place=place, owner=None, ran="" if verb == "release" else job.ran)
            if verb == "ack" and j == 0 and m.has("follow with ack"):
                w = follow(m, w)
    return (with_memory(w, key, Memory(request.number, tuple(answers))) if any(answers) else w), tuple(answers)


def follow(m: Model, w: World) -> World:
    if m.bounds.follow == "another":
        return w._replace(entry=True)
    return bear(w) if m.bounds.follow else w


def bear(w: World) -> World:
    return with_job(w, len(w.jobs) - 1, place=READY)._replace(born=w.born + 1)


def renew(m: Model, w: World, epoch: Epoch) -> World:
    w = with_epoch(look_at_beat(m, w), epoch, m.bounds.lease)
    return with_daemon(w, epoch[0], why="") if w.daemons[epoch[0]].boot == epoch[1] else w


def look_at_beat(m: Model, w: World) -> World:
    hush = m.bounds.lease if 2 * w.beat > m.bounds.lease and m.has("hush") else w.hush
    return w._replace(beat=0, hush=hush)


def open_(m: Model, w: World, epoch: Epoch) -> World:
    w = renew(m, w, epoch)
    for other, _ in w.epochs:
        if other != epoch and (other[0] == epoch[0] or not m.has("identity")):
            w = recover(m, w, other)
    return w


def recover(m: Model, w: World, epoch: Epoch) -> World:
    """What `epoch` holds is ready again. Ghost: whether its runs may be run again."""
    why = w.daemons[epoch[0]].why
    for j, job in enumerate(w.jobs):
        if job.place == LEASED and job.owner == epoch:
            ran = why if why and job.ran == BEGUN else job.ran
            w = with_job(w, j, place=READY, owner=epoch if m.has("keep token") else None, ran=ran)
    epochs = tuple(item for item in w.epochs if item[0] != epoch)
    return w._replace(epochs=epochs, memory=tuple(item for item in w.memory if item[0] != (epoch, "reserve")))


# -- a daemon --------------------------------------------------------------------------------------------------------------


def sound(w: World, d: Daemon) -> bool:
    """It runs, and has the broker."""
    return d.phase != DOWN and not d.paused and d.linked and w.up


def in_doubt(m: Model, d: Daemon) -> bool:
    """Its lease may have run out."""
    return d.age >= m.bounds.lease


def ended(d: Daemon) -> tuple[Run, ...]:
    return tuple(run for run in d.runs if run[2] != RUNS)


def wants(m: Model, w: World, s: int) -> Iterator[Request]:
    """What it may ask for next."""
    d = w.daemons[s]
    epoch, number = (s, d.boot), d.number + 1
    if d.file and (d.phase == UP or m.has("replay first")):
        yield Request("settle", number, d.file)
    elif d.phase == OPENING:
        yield Request("open")
    else:
        if d.must_hold >= 0:
            yield Request("hold", number, tuple((epoch, (j, n, "hold")) for j, n, _ in d.runs))
        elif not d.renewed or in_doubt(m, d):
            yield Request("renew", doubtful=in_doubt(m, d))
        if d.phase == UP and d.must_hold < 0 and not in_doubt(m, d) and any(job.place == READY for job in w.jobs):
            yield Request("reserve", number)
        outcomes = ended(d) if m.has("ack after work") else tuple((j, n, "ack") for j, n, _ in d.runs if w.jobs[j].place == LEASED)
        if outcomes:
            yield Request("settle", number, tuple((epoch, run) for run in outcomes))
        if d.phase == STOPPING and not (d.runs if m.has("settle before close") else len(d.runs) > len(ended(d))):
            yield Request("close")


def hear(m: Model, w: World, s: int, request: Request) -> tuple[World, str]:
    """The world after `s` heard the answer, and why a job was run again ("": none was)."""
    w, d = with_daemon(w, s, wire=None), w.daemons[s]
    if request.verb == "open":
        return with_daemon(w, s, phase=UP, age=request.age, renewed=request.age == 0), ""
    if request.verb == "renew":
        age = request.age if m.has("count from asking") else 0
        doubtful = (request.doubtful and m.has("doubt")) or (request.answer and m.has("tell of lapses"))
        fields = {"must_hold": age} if doubtful and d.runs else {"age": age}
        w = w._replace(lapsed=tuple(epoch for epoch in w.lapsed if epoch != (s, d.boot)))
        return with_daemon(w, s, renewed=request.age == 0, **fields), ""
    if request.verb == "close":
        return leave(m, w, s), ""
    if request.verb == "reserve":
        return start(m, w, s, request.answer)
    for (epoch, (j, n, verb)), good in zip(request.items, request.answer, strict=True):
        if verb != "hold":
            d = d._replace(runs=tuple(run for run in d.runs if run != (j, n, verb) or epoch != (s, d.boot)))
            if not good and d.phase != OPENING and w.jobs[j].number == n:
                w = w._replace(wrong="its outcome was refused, though nobody had reserved the job again")
        elif not good and m.has("cancel"):
            d = d._replace(runs=tuple(run for run in d.runs if run != (j, n, RUNS)))
    if request.verb == "hold":
        d = d._replace(age=d.must_hold, must_hold=-1)
    return with_daemon(w, s, runs=d.runs, age=d.age, must_hold=d.must_hold, file=() if request.items == d.file else d.file), ""


def start(m: Model, w: World, s: int, leases: tuple[Run, ...]) -> tuple[World, str]:
    d, again = w.daemons[s], ""
    for j, n, _ in leases:
        job = w.jobs[j]
        if d.phase != UP:  # it came late: given back
            w = with_daemon(w, s, runs=tuple(sorted((*d.runs, (j, n, "release")))))
            continue
        if leased(w, (s, d.boot), (j, n, RUNS)):
            again = job.ran
            w = with_job(w, j, ran=BEGUN)
        elif job.ran or job.place == DONE:
            again = d.why or PAUSED if in_doubt(m, d) else BEGUN
        if again == BEGUN:
            w = w._replace(wrong="a job is run again, and nothing had happened to its first run")
        w = with_daemon(w, s, runs=tuple(sorted((*(run for run in d.runs if run[0] != j or run[2] != RUNS), (j, n, RUNS)))))
    return w, again


def leave(m: Model, w: World, s: int) -> World:
    d = w.daemons[s]
    file = tuple(((s, d.boot), run) for run in d.runs) if m.has("keep outcomes") else ()
    return with_daemon(w, s, **Daemon(DOWN, d.boot, renewed=False, file=file, why=d.why)._asdict())


# -- what may happen next ---------------------------------------------------------------------------------------------------


def steps(m: Model, w: World) -> Iterator[Step]:
    """While a sound daemon has a request under way, only faults come between: what others do commutes with it."""
    busy = [s for s, d in enumerate(w.daemons) if d.wire and sound(w, d)]
    for s in busy or range(len(w.daemons)):
        yield from daemon_steps(m, w, s, w.daemons[s], "AB"[s])
    if w.faults < m.bounds.faults:
        yield from faults(m, w)
    if not busy:
        yield from nature(m, w)


def daemon_steps(m: Model, w: World, s: int, d: Daemon, name: str) -> Iterator[Step]:
    if d.phase == DOWN:
        yield Step(f"{name} is started again", with_daemon(w, s, **Daemon(OPENING, d.boot + 1, renewed=False, steady=0, file=d.file, why=d.why)._asdict()))
        return
    if d.paused:
        return
    for j, n, state in d.runs:
        if state == RUNS:
            yield from finish(m, w, s, (j, n), name)
    if d.phase == STOPPING and not (w.up and d.linked) and len(ended(d)) == len(d.runs):
        yield Step(f"{name} exits without the broker", leave(m, w, s))
    if d.wire and d.wire.state == ANSWERED:
        yield heard(m, w, s, d.wire, f"{name} hears the answer to its {told(d.wire)}")
    elif d.wire and sound(w, d):
        yield asked(m, w, s, d.wire, name)
    elif sound(w, d):
        for wish in wants(m, w, s):
            yield asked(m, with_daemon(w, s, number=wish.number or d.number), s, wish._replace(state=NEW), name)
        if d.phase in (UP, STOPPING) and d.renewed and not in_doubt(m, d):
            yield from sweep(m, w, d, name)
            yield from hand_over(m, w, s, d, name)


def asked(m: Model, w: World, s: int, request: Request, name: str) -> Step:
    """It asks, or asks again, or is served. Without further faults nothing can come between that and the answer."""
    what = told(request)
    at_once = w.faults == m.bounds.faults
    if request.state != ASKED and not at_once:
        verb = "asks:" if request.state == NEW else "repeats its"
        return Step(f"{name} {verb} {what}", with_daemon(w, s, wire=request._replace(state=ASKED)))
    after, reply = answer(m, w, (s, w.daemons[s].boot), request)
    request = request._replace(state=ANSWERED, answer=reply)
    if at_once:
        return heard(m, after, s, request, f"{name}'s {what} is served and answered")
    return Step(f"the broker serves {name}'s {what}", with_daemon(after, s, wire=request))


def heard(m: Model, w: World, s: int, request: Request, what: str) -> Step:
    after, again = hear(m, w, s, request)
    return Step(what + (f": a job runs again, its daemon was {again}" if again else ""), after, again)


def told(request: Request) -> str:
    """For people."""
    number = f" #{request.number}" if request.number else ""
    return f"{request.verb}{number}" + "".join(f" {verb} of job {j}/{n}" for _, (j, n, verb) in request.items)


def finish(m: Model, w: World, s: int, run: tuple[int, int], name: str) -> Iterator[Step]:
    """A run ends: well, or badly, or because its daemon stops."""
    j, n = run
    verbs = ["ack"]
    if m.bounds.failures:
        verbs.append("release" if w.failed < m.bounds.failures else "bury")
    elif w.daemons[s].phase == STOPPING:
        verbs.append("release")
    for verb in verbs:
        runs = tuple((j, n, verb) if r == (j, n, RUNS) else r for r in w.daemons[s].runs)
        after = with_job(with_daemon(w, s, runs=runs), j, ended=True)
        after = after._replace(failed=w.failed + (verb == "release" and m.bounds.failures > 0))
        if verb == "ack" and j == 0 and not m.has("follow with ack"):
            after = follow(m, after)
        yield Step(f"{name}'s run of job {j}/{n} ends: {verb}", after)


def sweep(m: Model, w: World, d: Daemon, name: str) -> Iterator[Step]:
    after = look_at_beat(m, w)
    unsure = after.hush or (d.steady < m.bounds.lease and m.has("steady"))
    dead = [epoch for epoch, ttl in w.epochs if ttl <= (GIVEN_UP if unsure else 0)]
    for epoch in dead:
        after = recover(m, after, epoch)
    if dead:
        yield Step(f"{name} sweeps: what {', '.join('AB'[s] + str(boot) for s, boot in dead)} held is ready", after)


def hand_over(m: Model, w: World, s: int, d: Daemon, name: str) -> Iterator[Step]:
    if d.handing == 0 and w.entry:
        yield Step(f"{name} reads the outbox", with_daemon(w, s, handing=1))
    elif d.handing == 1:
        after = with_daemon(w, s, handing=2)._replace(mark=m.has("mark"))
        if not w.mark and w.jobs[-1].place in (ABSENT, DONE):  # an id that is there is not added again
            after = bear(after)
        yield Step(f"{name} hands the follow-up over", after)
    elif d.handing == 2:
        after = with_daemon(w, s, handing=0)._replace(entry=False, mark=w.mark and m.has("lasting mark"))
        yield Step(f"{name} takes the follow-up out of the outbox", after)


def nature(m: Model, w: World) -> Iterator[Step]:
    """What comes of itself, sooner or later."""
    for s, d in enumerate(w.daemons):
        if d.paused:
            yield Step(f"{'AB'[s]} gets SIGCONT", with_daemon(w, s, paused=False))
        if not d.linked:
            yield Step(f"{'AB'[s]} is connected again", with_daemon(w, s, linked=True))
    if not w.up:
        yield Step("the broker is back", w._replace(up=True))
    if w.stray and w.up:
        sender, request = w.stray
        yield Step(f"what {'AB'[sender[0]]}{sender[1]} had sent arrives: {told(request)}", answer(m, w, sender, request)[0]._replace(stray=None))
    if w.mark and not w.entry and not any(d.handing for d in w.daemons):
        yield Step("the mark expires", w._replace(mark=False))
    if all(d.renewed or not sound(w, d) for d in w.daemons):
        yield Step("a third of a lease passes", tick(m, w))


def tick(m: Model, w: World) -> World:
    lease = m.bounds.lease
    daemons = []
    for d in w.daemons:
        why = GONE if d.phase == DOWN else PAUSED if d.paused else CUT if not d.linked else d.why
        if d.phase == DOWN:
            daemons.append(d._replace(why=why))
            continue
        wire = d.wire and d.wire._replace(age=min(lease, d.wire.age + (d.wire.verb in ("renew", "open"))))
        must_hold = min(lease, d.must_hold + 1) if d.must_hold >= 0 else -1
        steady = min(lease, d.steady + 1) if d.linked and w.up else 0
        daemons.append(
            d._replace(age=min(lease, d.age + 1), renewed=False, steady=steady, wire=wire, must_hold=must_hold, why=why)
        )
    epochs = tuple((epoch, max(ttl - 1, min(ttl, 0))) for epoch, ttl in w.epochs)
    return w._replace(daemons=tuple(daemons), epochs=epochs, beat=min(lease, w.beat + 1), hush=max(0, w.hush - 1))


def faults(m: Model, w: World) -> Iterator[Step]:
    w = w._replace(faults=w.faults + 1)
    kinds = m.bounds.kinds
    for s, d in enumerate(w.daemons):
        name = "AB"[s]
        if d.phase == DOWN or (w.faults == 1 and s > 0):  # the first one may as well hit A, for they are alike
            continue
        if "kill" in kinds:
            for after, astray in dropped(m, w, s):
                yield Step(f"{name} gets SIGKILL{astray}", killed(after, s), fault=True)
        if "pause" in kinds and not d.paused:
            yield Step(f"{name} gets SIGSTOP", with_daemon(w, s, paused=True), fault=True)
        if "cut" in kinds and d.linked:
            for after, astray in dropped(m, w, s):
                yield Step(f"{name} is cut off{astray}", with_daemon(after, s, linked=False), fault=True)
        if "stop" in kinds and d.phase == UP and not d.paused:
            yield Step(f"{name} gets SIGTERM", with_daemon(w, s, phase=STOPPING), fault=True)
    if "away" in kinds and w.up:
        after = w
        for s in range(len(w.daemons)):
            after, _ = next(dropped(m, after, s))
        yield Step("the broker goes away", after._replace(up=False), fault=True)
    if "jump" in kinds:
        epochs = tuple((epoch, min(ttl, 0)) for epoch, ttl in w.epochs)
        yield Step("the broker's clock is put forward by hours", w._replace(epochs=epochs, beat=m.bounds.lease, hush=0), fault=True)


def dropped(m: Model, w: World, s: int) -> Iterator[tuple[World, str]]:
    """The connection of `s` breaks; what was sent on it is lost, or arrives later."""
    d = w.daemons[s]
    lost = with_daemon(w, s, wire=d.wire and d.wire._replace(state=LOST, answer=None), steady=0, handing=0)
    yield lost, ""
    if not m.has("abort") and d.wire and d.wire.state == ASKED and w.stray is None:
        yield lost._replace(stray=((s, d.boot), d.wire)), f" ({told(d.wire)} is still on its way)"


def killed(w: World, s: int) -> World:
    d = w.daemons[s]
    for j, n, _ in d.runs:
        if w.jobs[j].number == n and w.jobs[j].ran == BEGUN:
            w = with_job(w, j, ran=KILLED)
    return with_daemon(w, s, **Daemon(DOWN, d.boot, renewed=False, file=d.file, why=d.why)._asdict())
