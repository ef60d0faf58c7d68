"""The kernel: one thread, one loop, generators that yield traps.

It knows neither jobs nor brokers, and imports nothing of KQueue outside this package.
"""

from .clock import Clock, VirtualClock
from .loop import Abandoned, Kernel, Task, running
from .slots import Slots
from .traps import PARKED, READ, WRITE, Park, Trap, join, run, sleep, wait_any, wait_io, wait_process

__all__ = [
    "PARKED", "READ", "WRITE", "Abandoned", "Clock", "Kernel", "Park", "Slots", "Task", "Trap", "VirtualClock", "join", "run",
    "running", "sleep", "wait_any", "wait_io", "wait_process",
]  # fmt: skip
