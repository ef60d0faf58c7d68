"""A daemon: what it asks for next, and what it makes of the answers."""

from __future__ import annotations

from collections.abc import Iterator

from .world import (
    ABSENT,
    ASK,
    BEGUN,
    DONE,
    DOWN,
    LAPSED,
    NEXT,
    OFFER_GONE,
    OFFERED,
    OPENING,
    PAUSED,
    READY,
    RUNS,
    STOPPING,
    UP,
    Daemon,
    Handed,
    Model,
    Request,
    Reserved,
    Run,
    World,
    in_doubt,
    leased,
    with_daemon,
    with_job,
)


def wants(m: Model, w: World, s: int) -> Iterator[Request]:
    """What it may ask for next."""
    d = w.daemons[s]
    epoch, number = (s, d.boot), d.number + 1
    if d.file and (d.phase == UP or m.has("replay first")):
        yield Request("settle", number, d.file)
    elif d.phase == OPENING:
        yield Request("open")
    else:
        doubt = in_doubt(m, d)
        if d.must_hold >= 0:
            yield Request("hold", number, tuple((epoch, (j, n, "hold")) for j, n, _ in d.runs))
        elif not d.renewed or doubt:
            yield Request("renew", doubtful=doubt)
        sure = d.must_hold < 0 and not (doubt and m.has("doubt"))
        if d.phase == UP and sure and (any(job.place == READY for job in w.jobs) or idle(m, w, d)):
            yield Request("reserve", d.next or number)
        if d.phase == STOPPING and d.offer:
            yield Request("withdraw", d.next)
        outcomes = ended(d)
        if not m.has("ack after work"):
            outcomes = tuple((j, n, "ack") for j, n, _ in d.runs if leased(w, epoch, (j, n, RUNS)))
        if outcomes:
            yield Request("settle", number, tuple((epoch, run) for run in outcomes))
        unsettled = d.runs if m.has("settle before close") else [run for run in d.runs if run not in outcomes]
        if d.phase == STOPPING and not unsettled and not ((d.offer or d.kept) and m.has("withdraw")):
            yield Request("close")


def idle(m: Model, w: World, d: Daemon) -> bool:
    """It has a slot to offer, or is to ask what became of its offer."""
    if d.offer or not m.bounds.dispatched:
        return d.offer == ASK
    return w.offer is None and any(job.place == ABSENT for job in w.jobs)


def ended(d: Daemon) -> tuple[Run, ...]:
    """Runs that await their settlement."""
    return tuple(run for run in d.runs if run[2] != RUNS)


def hear(m: Model, w: World, s: int, request: Request) -> tuple[World, str]:
    """The world after `s` heard the answer, and why a job was run again ("": none was)."""
    w, d = with_daemon(w, s, wire=None), w.daemons[s]
    if request.verb in ("reserve", "withdraw"):
        return begin(m, hear_reserved(m, w, s, request.answer), s, request.answer.runs)
    if request.verb == "open":
        w = with_daemon(w, s, phase=UP, age=request.age, renewed=request.age == 0)
    elif request.verb == "renew":
        w = hear_renewal(m, w, s, request)
    elif request.verb == "close":
        w = leave(m, w, s)
    elif request.verb == "hold":
        stale = [run[:2] for (_, run), good in zip(request.tokens, request.answer, strict=True) if not good and m.has("cancel")]
        runs = tuple(run for run in d.runs if run[2] != RUNS or run[:2] not in stale)
        w = with_daemon(w, s, runs=runs, age=d.must_hold, must_hold=-1)
    else:
        w = hear_settled(w, s, request)
    return w, ""


def looks(m: Model, when: str) -> bool:
    return m.has("look for the offer") and m.has(f"look when {when}")


def hear_renewal(m: Model, w: World, s: int, request: Request) -> World:
    age = request.age if m.has("count from asking") else 0
    doubt = (request.doubtful and m.has("doubt")) or (request.answer & LAPSED and m.has("tell of lapses"))
    if doubt and m.has("forget in doubt") and w.daemons[s].kept:
        w = with_daemon(w, s, kept=None, offer=ASK)
    if request.answer & OFFER_GONE and w.daemons[s].offer == OFFERED and looks(m, "renewed"):
        w = with_daemon(w, s, offer=ASK)
    w = w._replace(lapsed=tuple(epoch for epoch in w.lapsed if epoch != (s, w.daemons[s].boot)))
    w = with_daemon(w, s, renewed=request.age == 0)
    return with_daemon(w, s, must_hold=age) if doubt and w.daemons[s].runs else with_daemon(w, s, age=age)


def hear_settled(w: World, s: int, request: Request) -> World:
    d = w.daemons[s]
    for (epoch, (j, n, _)), good in zip(request.tokens, request.answer, strict=True):
        if not good and w.jobs[j].number == n and epoch == (s, d.boot):
            w = w._replace(wrong="an outcome was refused, though nobody had reserved the job again")
    settled = {run for epoch, run in request.tokens if epoch == (s, d.boot)}
    file = () if request.tokens == d.file else d.file
    return with_daemon(w, s, runs=tuple(run for run in d.runs if run not in settled), file=file)


def hear_reserved(m: Model, w: World, s: int, answer: Reserved) -> World:
    """What it was handed is what this answer brings, or what the next one would."""
    if not answer.number:
        return w
    d = w.daemons[s]
    stale = d.kept and d.kept.number != answer.number + 1 and m.has("take the next")
    return with_daemon(w, s, next=answer.number + 1, offer=OFFERED if answer.offered else "", kept=None if stale else d.kept)


def asks_for_jobs(d: Daemon) -> bool:
    """A reservation is under way, or was lost."""
    return d.wire is not None and d.wire.verb in ("reserve", "withdraw")


def may_take(m: Model, d: Daemon, handed: Handed) -> bool:
    """Or give back: who stops takes nothing."""
    sure = d.must_hold < 0 and not in_doubt(m, d)
    waits = asks_for_jobs(d) and m.has("wait for the answer")
    return (sure or d.phase != UP) and not waits and (handed.number == d.next or not m.has("take the next"))


def hear_handed(m: Model, w: World, s: int, handed: Handed) -> tuple[World, str]:
    """As `hear`: a job came that was not asked for."""
    w, d = with_daemon(w, s, mail=None), w.daemons[s]
    if may_take(m, d, handed):
        return take(m, w, s, handed)
    if handed.number < d.next or not m.has("keep what was handed"):
        return w, ""
    return with_daemon(w, s, kept=handed._replace(ahead=False)), ""


def take(m: Model, w: World, s: int, handed: Handed) -> tuple[World, str]:
    w = with_daemon(w, s, kept=None, offer="", next=max(w.daemons[s].next, handed.number + 1))
    return begin(m, w, s, (handed.run,))


def begin(m: Model, w: World, s: int, leases: tuple[Run, ...]) -> tuple[World, str]:
    """Run what was reserved. An older run of the same job here is cancelled."""
    d, again = w.daemons[s], ""
    for run in leases:
        job = w.jobs[run[0]]
        if d.phase != UP:
            return with_daemon(w, s, runs=tuple(sorted((*d.runs, (*run[:2], "return"))))), ""
        if leased(w, (s, d.boot), run):
            again = job.ran
            w = with_job(w, run[0], ran=BEGUN)
        elif job.ran or job.place == DONE:  # the answer was long under way
            again = d.why or PAUSED if in_doubt(m, d) else BEGUN
        if again == BEGUN:
            w = w._replace(wrong="a job is run again, and nothing had happened to its first run")
        others = [other for other in d.runs if other[0] != run[0] or other[2] != RUNS]
        w = with_daemon(w, s, runs=tuple(sorted((*others, run))))
    return w, again


def leave(m: Model, w: World, s: int) -> World:
    """Its process ends, in order."""
    d = w.daemons[s]
    file = tuple(((s, d.boot), run) for run in d.runs) if m.has("keep outcomes") else ()
    return with_daemon(w, s, **Daemon(DOWN, d.boot, file=file, next=min(d.next, NEXT), why=d.why)._asdict())
