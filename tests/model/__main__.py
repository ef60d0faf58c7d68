"""Explore more than the tests do; or leave a rule out, and read a shortest way to what that costs. Exits with 1 then."""

from __future__ import annotations

import argparse
import sys

from .explore import explore
from .world import ECONOMIES, FAULTS, RULES, Bounds, Model

LARGER = {  # each takes from seconds to some minutes
    "any two faults": Bounds(),
    "any fault, a run that fails": Bounds(faults=1, failures=1),
    "any fault, two jobs": Bounds(faults=1, jobs=2),
    "any fault, a follow-up, a run that fails": Bounds(faults=1, jobs=2, failures=1, follow="same"),
    "any fault, a follow-up in another queue": Bounds(faults=1, jobs=2, follow="another"),
    "any fault, a job that is handed over": Bounds(faults=1, dispatched=1),
    "a death or a cut, two jobs that are handed over": Bounds(2, 1, ("kill", "cut"), lease=2, dispatched=2),
    "three deaths": Bounds(faults=3, kinds=("kill",)),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--without", choices=sorted(RULES | ECONOMIES), default="", metavar="RULE", help="leave a rule out")
    parser.add_argument("--faults", type=int, help="at most so many, instead of what is listed")
    parser.add_argument("--kinds", nargs="*", choices=FAULTS, default=FAULTS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--failures", type=int, default=0, help="how often a run may fail")
    parser.add_argument("--follow", choices=("same", "another"), default="", help="the last job follows the first one")
    parser.add_argument("--dispatched", type=int, default=0, help="how many of the jobs come later, and may be handed over")
    args = parser.parse_args()
    chosen = LARGER
    if args.faults is not None or args.without:
        bounds = Bounds(args.jobs, args.faults or 1, tuple(args.kinds), args.failures, args.follow, dispatched=args.dispatched)
        chosen = {f"{bounds.faults} of {', '.join(bounds.kinds)}": bounds}
    worst = 0
    for name, bounds in chosen.items():
        found = explore(Model(bounds, args.without))
        again = ", ".join(sorted(found.again)) or "nothing"
        print(f"{name}: {found.states:,} states, {found.steps:,} steps; a second run after: {again}", flush=True)
        if found.violated:
            worst = 1
            print(f"VIOLATED: {found.violated}", *found.trace, sep="\n    ")
    return worst


if __name__ == "__main__":
    sys.exit(main())
