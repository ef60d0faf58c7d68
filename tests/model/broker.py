"""The broker: each function is one script, so atomic."""

from __future__ import annotations

from typing import Any

from .world import (
    BEGUN,
    DEAD,
    DONE,
    DOWN,
    GIVEN_UP,
    LAPSED,
    LEASED,
    OFFER_GONE,
    READY,
    RUNS,
    Epoch,
    Handed,
    Memory,
    Model,
    Request,
    Reserved,
    World,
    leased,
    with_daemon,
    with_job,
)


def serve(m: Model, w: World, sender: Epoch, request: Request) -> tuple[World, Any]:
    """The world after `request`, and the answer."""
    if request.verb in ("reserve", "withdraw"):
        return reserve(m, w, sender, request.number, request.verb == "reserve")
    if request.verb in ("settle", "hold"):
        return settle(m, w, sender, request)
    if request.verb == "renew":
        lapsed = sender in w.lapsed or not alive(w, sender)
        gone = w.offer is None or w.offer[0] != sender
        return renew(m, register(m, w, sender), sender), LAPSED * lapsed + OFFER_GONE * (gone and m.bounds.dispatched > 0)
    if request.verb == "open":
        return open_(m, w, sender), None
    return expiring(w, sender, GIVEN_UP), None  # close


def expiring(w: World, epoch: Epoch, ticks: int) -> World:
    return w._replace(epochs=tuple(sorted({**dict(w.epochs), epoch: ticks}.items())))


def remembering(w: World, sender: Epoch, verb: str, number: int, answer: Any) -> World:
    return w._replace(memory=tuple(sorted({**dict(w.memory), (sender, verb): Memory(number, answer)}.items())))


def alive(w: World, epoch: Epoch) -> bool:
    return dict(w.epochs).get(epoch, 0) > 0


def register(m: Model, w: World, epoch: Epoch) -> World:
    """Who had expired lives again, and is to hear of it."""
    if alive(w, epoch):
        return w
    return expiring(w, epoch, m.bounds.lease)._replace(lapsed=tuple(sorted({*w.lapsed, epoch})))


def reserve(m: Model, w: World, epoch: Epoch, number: int, wanted: bool) -> tuple[World, Reserved]:
    """At most one job. When none is there, who adds one may hand it over, unless there is an offer of somebody else."""
    last, handing = dict(w.memory).get((epoch, "reserve")), m.bounds.dispatched > 0
    later = last is not None and last.number > number and handing and m.has("answer the next")
    if last and (last.number == number or later) and m.has("remember reserve"):
        return w, Reserved(last.number * handing, tuple(run for run in last.answer if leased(w, epoch, run)))
    j = next((j for j, job in enumerate(w.jobs) if job.place == READY and wanted), None)
    if j is None:
        offered = handing and wanted and (w.offer is None or w.offer[0] == epoch)
        if offered or (w.offer and w.offer[0] == epoch):
            w = w._replace(offer=(epoch, number + 1) if offered else None)
        return w, Reserved(number * handing, (), offered)
    run = (j, w.jobs[j].number + 1, RUNS)
    w = with_job(w, j, place=LEASED, owner=epoch, number=run[1])
    if w.offer and w.offer[0] == epoch and m.has("hand once"):
        w = w._replace(offer=None)
    w = register(m, w, epoch) if m.has("revive") else w
    return remembering(w, epoch, "reserve", number, (run,)), Reserved(number * handing, (run,))


def dispatch(m: Model, w: World, j: int, listener: bool) -> World:
    """A client adds job `j`. Who has offered to take it is handed it; `listener`: somebody hears the channel of that."""
    if w.offer is None or any(job.place == READY for job in w.jobs):
        return ring(with_job(w, j, place=READY))
    epoch, number = w.offer
    last = dict(w.memory).get((epoch, "reserve"))
    once = last is None or last.number + 1 < number or not (m.has("hand once") and m.has("compare numbers"))
    if not ((alive(w, epoch) or not m.has("hand to the living")) and once and (listener or not m.has("hand to a listener"))):
        return ring(with_job(w, j, place=READY))
    run = (j, w.jobs[j].number + 1, RUNS)
    w = with_job(w, j, place=LEASED, owner=epoch, number=run[1])
    w = remembering(ring(w), epoch, "reserve", number, (run,))
    d = w.daemons[epoch[0]]
    if d.boot == epoch[1] and d.phase != DOWN and d.linked:
        w = with_daemon(w, epoch[0], mail=Handed(number, run))
    return w


def ring(w: World) -> World:
    """Something is ready, and who waits hears of it: whoever made an offer is to reserve."""
    return w._replace(offer=None)


def settle(m: Model, w: World, sender: Epoch, request: Request) -> tuple[World, tuple[bool, ...]]:
    """For each token whether it was good."""
    last = dict(w.memory).get((sender, "settle"))
    if last and last.number == request.number and m.has("remember settle"):
        return w, tuple(last.answer)
    answers = []
    for epoch, (j, number, verb) in request.tokens:
        job = w.jobs[j]
        good = job.place in (READY, LEASED) and job.owner == epoch and (job.number == number or not m.has("fence"))
        answers.append(good)
        if good and job.number != number:
            w = w._replace(wrong="a stale token changed a job")
        if good and verb == "hold" and job.place == READY and m.has("take back"):
            w = with_job(w, j, place=LEASED, ran=BEGUN if job.ran else "")
            w = register(m, w, epoch) if m.has("revive") else w
        elif good and verb != "hold":
            place = {"ack": DONE, "bury": DEAD}.get(verb, READY)
            w = with_job(w, j, place=place, owner=None, ran="" if verb == "release" else job.ran)
            w = ring(w) if place == READY else w
            if verb == "ack" and j == 0 and m.has("follow with ack"):
                w = follow(m, w)
    return remembering(w, sender, "settle", request.number, tuple(answers)) if any(answers) else w, tuple(answers)


def follow(m: Model, w: World) -> World:
    """What the ack of the first job brings with it."""
    if m.bounds.follow == "another":
        return w._replace(entry=True)
    return enqueue(w) if m.bounds.follow else w


def enqueue(w: World) -> World:
    return ring(with_job(w, len(w.jobs) - 1, place=READY))._replace(born=w.born + 1)


def renew(m: Model, w: World, epoch: Epoch) -> World:
    w = expiring(beat(m, w), epoch, m.bounds.lease)
    return with_daemon(w, epoch[0], why="") if w.daemons[epoch[0]].boot == epoch[1] else w


def beat(m: Model, w: World) -> World:
    """Somebody renews or sweeps."""
    return w._replace(beat=0, hush=m.bounds.lease if 2 * w.beat > m.bounds.lease and m.has("hush") else w.hush)


def open_(m: Model, w: World, epoch: Epoch) -> World:
    w = renew(m, w, epoch)
    for other, _ in w.epochs:
        if other != epoch and (other[0] == epoch[0] or not m.has("identity")):
            w = recover(m, w, other)
    return w


def recover(m: Model, w: World, epoch: Epoch) -> World:
    """What `epoch` holds is ready again. Ghost: may its runs be run again?"""
    why = w.daemons[epoch[0]].why
    for j, job in enumerate(w.jobs):
        if job.place == LEASED and job.owner == epoch:
            owner = epoch if m.has("keep token") else None
            w = ring(with_job(w, j, place=READY, owner=owner, ran=why if why and job.ran == BEGUN else job.ran))
    return w._replace(
        epochs=tuple(item for item in w.epochs if item[0] != epoch),
        memory=tuple(item for item in w.memory if item[0] != (epoch, "reserve")),
        lapsed=tuple(other for other in w.lapsed if other != epoch),
    )
