"""What a child does between its fork and the first line of its job. The order is not taste: see ISOLATION in the design.

    forked --prepare--+------------------------------------+--equip--> runs its job
                      +--keep_only--> spare, waits for one --+

`prepare` is all that can be done before there is a job to do it for; a child is forked ahead, so that no job waits for that.
`ready_to_fork` is what need not be done in each child, because a fork inherits it.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal.signal makes enums, at ten times the price
import faulthandler
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from setproctitle import setproctitle

from . import limits, stack, wire
from .base import SECRETS
from .killing import JOB_ID

_DEFAULT: Final = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_EVERY_FD: Final = os.sysconf("SC_OPEN_MAX")


def ready_to_fork() -> None:
    """In the template, after its imports, which may have changed any of this. STACK_FD is open there."""
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    for name in SECRETS:
        os.environ.pop(name, None)
    tell_where_it_stands()
    tidy_streams()


def prepare(template_pid: int) -> None:
    """In a fork: become a process of its own."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in _DEFAULT:
        _signal.signal(number, _signal.SIG_DFL)
    limits.yield_to_the_oom_killer()
    limits.forbid_core_dumps()
    limits.prctl(limits.PR_SET_NO_NEW_PRIVS, 1)
    die_with(template_pid)


def keep_only(orders: socket.socket) -> socket.socket:
    """Let go of all that the template has open, but for its output and `orders`, here returned."""
    os.dup2(orders.detach(), wire.JOB_FD, inheritable=False)
    os.closerange(wire.STACK_FD + 1, _EVERY_FD)
    return socket.socket(fileno=wire.JOB_FD)


def die_with(template_pid: int) -> None:
    """When the template dies, the kernel ends this process. Changing the user undoes it."""
    limits.prctl(limits.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != template_pid:  # it has died just before
        os._exit(70)


def equip(request: Mapping[str, Any], fds: Sequence[int]) -> None:
    """Become the process of the job of `request`. `fds`: its ends of job socket, stdout, stderr and stack."""
    for fd, place in zip(fds, (wire.JOB_FD, 1, 2, wire.STACK_FD), strict=True):
        os.dup2(fd, place, inheritable=place in (1, 2))
    os.closerange(wire.STACK_FD + 1, _EVERY_FD)
    os.environ[JOB_ID] = request["id"]
    if request.get("start") != "pool":  # whose jobs each have their own
        limits.apply(request["limits"])
    name_process(request)


def tidy_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def name_spare() -> None:
    setproctitle("kqueued: spare child")


def name_process(request: Mapping[str, Any]) -> None:
    setproctitle(f"kqueued: job {request['job']} {request['id']}")


def tell_where_it_stands() -> None:
    """When it crashes, runs out of CPU time, or is asked: by handlers in C, which need neither the interpreter nor its lock."""
    faulthandler.enable(wire.STACK_FD)
    faulthandler.register(stack.SIGNAL, wire.STACK_FD)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    faulthandler.register(signal.SIGXCPU, wire.STACK_FD, chain=True)  # and then it dies of it
