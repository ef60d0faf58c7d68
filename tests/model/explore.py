"""Every reachable state of a Model, breadth first, so that the trace to a violation is a shortest one; and what must hold in it.

A property is a predicate of one World; what a step should not have done, it says itself in `World.wrong`. When nothing is
violated, the states are walked backwards: whatever has happened, every job can still come to its end without another fault.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from .steps import steps
from .world import ABSENT, DEAD, DONE, DOWN, LEASED, RUNS, Model, Reserved, World, first, in_doubt, normal


class Found(NamedTuple):
    states: int
    steps: int
    again: dict[str, tuple[str, ...]]  # why jobs were run a second time, each with a shortest trace
    violated: str = ""  # "": nothing is
    trace: tuple[str, ...] = ()


def violated(m: Model, w: World) -> str:
    """What does not hold in `w`; "": all does."""
    if w.wrong:
        return w.wrong
    sure = [(j, n) for d in w.daemons if not in_doubt(m, d) for j, n, state in d.runs if state == RUNS]
    if len({j for j, _ in sure}) < len(sure):
        return "two runs of a job are live, and neither daemon is in doubt"
    if any(w.jobs[j].number != n for j, n in sure):
        return "a daemon that is not in doubt runs a job that it has lost"
    for j, job in enumerate(w.jobs):
        if job.place == DONE and not job.ended and not any(run[0] == j for d in w.daemons for run in d.runs):
            return "a job is lost: acked, and never run to its end"
        if job.place == LEASED and job.owner not in dict(w.epochs):
            return "a job is leased to an epoch that nobody knows, so nobody can recover it"
        if job.place == LEASED and not known(w, j):
            return "a job is leased to a daemon that does not know of it, and will not hear of it"
    if w.born > 1:
        return "a follow-up was enqueued twice"
    if w.born and w.jobs[0].place != DONE:
        return "a follow-up was enqueued, and its job is not done"
    return ""


def known(w: World, j: int) -> bool:
    """Its owner has it, or what brings it is under way, or is to be asked for. Looked at where jobs are handed over."""
    owner = w.jobs[j].owner
    assert owner is not None
    s, boot = owner
    d = w.daemons[s]
    if not d.next or d.boot != boot or d.phase == DOWN:
        return True  # then who recovers finds it
    last = dict(w.memory).get(((s, boot), "reserve"))
    runs = list(last.answer if last and last.number >= d.next else ())
    runs += [*d.runs, *(handed.run for handed in (d.mail, d.kept) if handed)]
    if d.wire and isinstance(d.wire.answer, Reserved):
        runs += d.wire.answer.runs
    return any(run[:2] == (j, w.jobs[j].number) for run in runs)


def over(w: World) -> bool:
    """Every job came to its end, and so did what followed."""
    ends = (DONE, DEAD, ABSENT) if w.jobs[0].place == DEAD else (DONE, DEAD)
    return not w.entry and all(job.place in ends for job in w.jobs)


def finished(w: World) -> bool:
    """Nothing can happen any more that a job would notice."""
    return over(w) and not (
        w.stray or any(d.runs or d.file or d.handing or d.mail or d.kept or (d.wire and d.wire.answer) for d in w.daemons)
    )


def explore(model: Model) -> Found:
    queue = [first(model)]
    index = {queue[0]: 0}
    came: list[tuple[int, str]] = [(0, "")]  # of each state: from which one, and how
    before: defaultdict[int, list[int]] = defaultdict(list)  # of each state: from which ones it comes without a fault
    again: dict[str, tuple[str, ...]] = {}
    count = 0

    def trace(n: int, *last: str) -> tuple[str, ...]:
        told = list(last)
        while n:
            n, what = came[n]
            told.append(what)
        return tuple(reversed(told))

    for n, world in enumerate(queue):
        for step in () if finished(world) else steps(model, world):
            count += 1
            then = normal(step.world)
            to = index.setdefault(then, len(queue))
            if to == len(queue):
                queue.append(then)
                came.append((n, step.what))
                if why := violated(model, then):
                    return Found(len(queue), count, again, why, trace(to))
            if step.again and step.again not in again:
                again[step.again] = trace(n, step.what)
            if not step.fault:
                before[to].append(n)
    near = {n for n, world in enumerate(queue) if over(world)}
    hopeful = set(near)
    while near:
        near = {n for to in near for n in before[to]} - hopeful
        hopeful |= near
    stuck = next((n for n in range(len(queue)) if n not in hopeful), None)
    if stuck is not None:
        return Found(len(queue), count, again, "a job waits for ever", trace(stuck))
    return Found(len(queue), count, again)
