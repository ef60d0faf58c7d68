"""All that may happen next: to daemons, of itself, and the faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from . import broker
from .daemon import ended, hear, hear_handed, leave, looks, may_take, take, wants
from .world import (
    ABSENT,
    ANSWERED,
    ASK,
    ASKED,
    BEGUN,
    CUT,
    DONE,
    DOWN,
    GIVEN_UP,
    GONE,
    KILLED,
    LOST,
    NAMES,
    NEW,
    NEXT,
    OFFERED,
    OPENING,
    PAUSED,
    READY,
    RUNS,
    STOPPING,
    UP,
    Daemon,
    Model,
    Request,
    World,
    by_next,
    in_doubt,
    sound,
    with_daemon,
    with_job,
)


class Step(NamedTuple):
    what: str  # for people
    world: World  # that follows
    again: str = ""  # ghost: a job that had begun before begins again, for this reason
    fault: bool = False


def steps(m: Model, w: World) -> Iterator[Step]:
    """While a sound daemon has a request under way, only faults come between: what others do commutes with it.

    Not so what a client adds, for that may be handed to that daemon.
    """
    busy = [s for s, d in enumerate(w.daemons) if d.wire and sound(w, d)]
    for s in busy or range(len(w.daemons)):
        yield from of_daemon(m, w, s, w.daemons[s], NAMES[s])
    if w.up and m.bounds.dispatched:
        yield from dispatches(m, w)
    if w.faults < m.bounds.faults:
        yield from faults(m, w._replace(faults=w.faults + 1))
    if not busy:
        yield from of_itself(m, w)


# -- a daemon ---------------------------------------------------------------------------------------------------------


def of_daemon(m: Model, w: World, s: int, d: Daemon, name: str) -> Iterator[Step]:
    if d.phase == DOWN:
        yield Step(f"{name} is started again", with_daemon(w, s, phase=OPENING, boot=d.boot + 1))
        return
    if d.paused:
        return
    yield from finish(m, w, s, d, name)
    if d.phase == STOPPING and not (w.up and d.linked) and len(ended(d)) == len(d.runs):
        yield Step(f"{name} exits without the broker", leave(m, w, s))
    if d.mail:
        after, again = hear_handed(m, w, s, d.mail)
        yield Step(f"{name} hears that it is handed job {d.mail.run[0]}/{d.mail.run[1]} as #{d.mail.number}", after, again)
    if d.kept and may_take(m, d, d.kept):
        after, again = take(m, w, s, d.kept)
        yield Step(f"{name} takes job {d.kept.run[0]}/{d.kept.run[1]}, which it was handed", after, again)
    if d.wire and d.wire.state == ANSWERED and d.mail and d.mail.ahead:
        return
    if d.wire and d.wire.state == ANSWERED:
        yield heard(m, w, s, d.wire, f"{name} hears the answer to its {told(d.wire)}")
    elif d.wire and sound(w, d):
        yield asked(m, w, s, d.wire, name)
    elif sound(w, d):
        for wish in wants(m, w, s):
            number = d.number if by_next(d, wish.verb) else wish.number or d.number
            yield asked(m, with_daemon(w, s, number=number), s, wish, name)
        if d.phase in (UP, STOPPING) and d.renewed and not in_doubt(m, d):
            yield from sweep(m, w, d, name)
            yield from hand_over(m, w, s, d, name)


def told(request: Request) -> str:
    """For people."""
    number = f" #{request.number}" if request.number else ""
    return f"{request.verb}{number}" + "".join(f" {verb} of job {j}/{n}" for _, (j, n, verb) in request.tokens)


def asked(m: Model, w: World, s: int, request: Request, name: str) -> Step:
    """It asks, or asks again, or is served. Without further faults nothing can come between that and the answer."""
    what, at_once = told(request), w.faults == m.bounds.faults and not w.daemons[s].mail and not to_come(m, w)
    if request.state != ASKED and not at_once:
        verb = "asks:" if request.state == NEW else "repeats its"
        return Step(f"{name} {verb} {what}", with_daemon(w, s, wire=request._replace(state=ASKED)))
    after, answer = broker.serve(m, w, (s, w.daemons[s].boot), request)
    request = request._replace(state=ANSWERED, answer=answer)
    if at_once:
        return heard(m, after, s, request, f"{name}'s {what} is served and answered")
    mail = after.daemons[s].mail
    return Step(
        f"the broker serves {name}'s {what}", with_daemon(after, s, wire=request, mail=mail and mail._replace(ahead=True))
    )


def heard(m: Model, w: World, s: int, request: Request, what: str) -> Step:
    after, again = hear(m, w, s, request)
    return Step(f"{what}: a job is run again ({again})" if again else what, after, again)


def finish(m: Model, w: World, s: int, d: Daemon, name: str) -> Iterator[Step]:
    """A run ends: well, or badly, or because its daemon stops."""
    verbs = ["ack"]
    if m.bounds.failures:
        verbs.append("release" if w.failed < m.bounds.failures else "bury")
    elif d.phase == STOPPING:
        verbs.append("release")
    for run in d.runs:
        for verb in verbs if run[2] == RUNS else ():
            j, n, _ = run
            runs = tuple((j, n, verb) if other == run else other for other in d.runs)
            after = with_job(with_daemon(w, s, runs=runs), j, ended=True)
            if verb == "ack" and j == 0 and not m.has("follow with ack"):
                after = broker.follow(m, after)
            if m.bounds.failures and verb == "release":
                after = after._replace(failed=w.failed + 1)
            yield Step(f"{name}'s run of job {j}/{n} ends: {verb}", after)


def sweep(m: Model, w: World, d: Daemon, name: str) -> Iterator[Step]:
    after = broker.beat(m, w)
    unsure = after.hush or (d.steady < m.bounds.lease and m.has("steady"))
    dead = [epoch for epoch, ticks in w.epochs if ticks <= (GIVEN_UP if unsure else 0)]
    for epoch in dead:
        after = broker.recover(m, after, epoch)
    if dead:
        yield Step(f"{name} sweeps: what {', '.join(f'{NAMES[s]}{boot}' for s, boot in dead)} held is ready", after)


def hand_over(m: Model, w: World, s: int, d: Daemon, name: str) -> Iterator[Step]:
    if d.handing == 0 and w.entry:
        yield Step(f"{name} reads the outbox", with_daemon(w, s, handing=1))
    elif d.handing == 1:
        after = with_daemon(w, s, handing=2)._replace(mark=m.has("mark"))
        if not w.mark and w.jobs[-1].place in (ABSENT, DONE):  # an id that is there is not added again
            after = broker.enqueue(after)
        yield Step(f"{name} hands the follow-up over", after)
    elif d.handing == 2:
        after = with_daemon(w, s, handing=0)._replace(entry=False, mark=w.mark and m.has("lasting mark"))
        yield Step(f"{name} takes the follow-up out of the outbox", after)


# -- a client ---------------------------------------------------------------------------------------------------------


def to_come(m: Model, w: World) -> list[int]:
    """The jobs that a client has not dispatched yet."""
    first = len(w.jobs) - m.bounds.dispatched
    return [j for j, job in enumerate(w.jobs) if j >= first and job.place == ABSENT]


def dispatches(m: Model, w: World) -> Iterator[Step]:
    """The next job. The broker may not have noticed yet that a connection is broken, and then counts it as a listener."""
    for j in to_come(m, w)[:1]:
        if len(w.jobs) > 1:  # then it can be taken between two askings of a reservation, for it rings nobody
            yield Step(f"job {j}, which had been delayed, is due", with_job(w, j, place=READY))
        s, boot = w.offer[0] if w.offer else (0, 0)
        d = w.daemons[s]
        for listener in (False,) if d.phase == DOWN or d.boot != boot else (True,) if d.linked else (True, False):
            after = broker.dispatch(m, w, j, listener)
            epoch = after.jobs[j].owner
            what = f"is handed to {NAMES[epoch[0]]}{epoch[1]}" if epoch else "is ready"
            yield Step(f"a client dispatches job {j}: it {what}", after)


# -- what comes of itself, sooner or later ----------------------------------------------------------------------------


def of_itself(m: Model, w: World) -> Iterator[Step]:
    for s, d in enumerate(w.daemons):
        if d.paused:
            yield Step(f"{NAMES[s]} gets SIGCONT", with_daemon(w, s, paused=False))
        if not d.linked:
            yield Step(f"{NAMES[s]} is connected again", with_daemon(w, s, linked=True))
    if not w.up:
        yield Step("the broker is back", w._replace(up=True))
    if w.stray and w.up:
        (s, boot), request = w.stray
        after, _ = broker.serve(m, w._replace(stray=None), *w.stray)
        yield Step(f"what {NAMES[s]}{boot} had sent arrives: {told(request)}", after)
    if w.mark and not w.entry and not any(d.handing for d in w.daemons):
        yield Step("the mark expires", w._replace(mark=False))
    if all(d.renewed or not sound(w, d) for d in w.daemons):  # nothing but a fault keeps anybody from renewing in time
        yield Step("a third of a lease passes", tick(m, w))


def tick(m: Model, w: World) -> World:
    lease = m.bounds.lease
    return w._replace(
        daemons=tuple(d._replace(why=GONE) if d.phase == DOWN else older(d, w.up, lease) for d in w.daemons),
        epochs=tuple((epoch, max(ticks - 1, min(ticks, 0))) for epoch, ticks in w.epochs),
        beat=min(lease, w.beat + 1),
        hush=max(0, w.hush - 1),
    )


def older(d: Daemon, up: bool, lease: int) -> Daemon:
    return d._replace(
        age=min(lease, d.age + 1),
        renewed=False,
        steady=min(lease, d.steady + 1) if d.linked and up else 0,
        wire=d.wire and d.wire._replace(age=min(lease, d.wire.age + (d.wire.verb in ("renew", "open")))),
        must_hold=min(lease, d.must_hold + 1) if d.must_hold >= 0 else -1,
        why=PAUSED if d.paused else CUT if not d.linked else d.why,
    )


# -- faults -----------------------------------------------------------------------------------------------------------


def faults(m: Model, w: World) -> Iterator[Step]:
    for s, d in enumerate(w.daemons):
        if d.phase != DOWN and not (w.faults == 1 and s > 0):  # the first one may as well hit A, for they are alike
            for kind, what, after in against(m, w, s, d):
                if kind in m.bounds.kinds:
                    yield Step(f"{NAMES[s]} {what}", after, fault=True)
    if "away" in m.bounds.kinds and w.up:
        after = w
        for s in range(len(w.daemons)):
            after, _ = next(broken(m, after, s))
        yield Step("the broker goes away", after._replace(up=False), fault=True)
    if "jump" in m.bounds.kinds:
        epochs = tuple((epoch, min(ticks, 0)) for epoch, ticks in w.epochs)
        after = w._replace(epochs=epochs, beat=m.bounds.lease, hush=0)
        yield Step("the broker's clock is put forward by hours", after, fault=True)


def against(m: Model, w: World, s: int, d: Daemon) -> Iterator[tuple[str, str, World]]:
    """Kind, in words, and what follows."""
    for after, astray in broken(m, w, s):
        yield "kill", f"gets SIGKILL{astray}", killed(after, s)
        if d.linked:
            yield "cut", f"is cut off{astray}", with_daemon(after, s, linked=False)
    if not d.paused:
        yield "pause", "gets SIGSTOP", with_daemon(w, s, paused=True)
    if d.phase == UP and not d.paused:
        yield "stop", "gets SIGTERM", with_daemon(w, s, phase=STOPPING)


def broken(m: Model, w: World, s: int) -> Iterator[tuple[World, str]]:
    """The connection of `s` breaks; what was sent on it is lost, or arrives later."""
    d = w.daemons[s]
    lost = with_daemon(w, s, wire=d.wire and d.wire._replace(state=LOST, answer=None), steady=0, handing=0, mail=None)
    if d.offer == OFFERED and looks(m, "connected"):
        lost = with_daemon(lost, s, offer=ASK)
    yield lost, ""
    if not m.has("abort") and d.wire and d.wire.state == ASKED and w.stray is None:
        yield lost._replace(stray=((s, d.boot), d.wire)), f" ({told(d.wire)} is still on its way)"


def killed(w: World, s: int) -> World:
    d = w.daemons[s]
    for j, n, _ in d.runs:
        if w.jobs[j].number == n and w.jobs[j].ran == BEGUN:
            w = with_job(w, j, ran=KILLED)
    return with_daemon(w, s, **Daemon(DOWN, d.boot, file=d.file, next=min(d.next, NEXT), why=d.why)._asdict())
