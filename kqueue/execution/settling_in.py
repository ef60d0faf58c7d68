"""What a child does between its fork and the first line of its job. The order is not taste: see ISOLATION in the design.

    forked --prepare--+------------------------------------+--equip--> runs its job
                      +--keep_only--> spare, waits for one --+

`prepare` is all that can be done before there is a job to do it for; a child is forked ahead, so that no job waits for that.
`ready_to_fork` is what need not be done in each child, because a fork inherits it, and `Preparations` what it need not look up.

In `equip` the fds come first, so that the child can say why it goes no further; then what takes the daemon's privileges; then the
user; and PDEATHSIG once more, since a change of user clears it.
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

from setproctitle import getproctitle, setproctitle

from ..environment import NEVER
from ..errors import Refused
from ..loading import ImportFailed
from . import limits, stack, wire
from .identity import Identity, become, check_declared, check_possible, identity_of
from .killing import JOB_ID
from .namespaces import NoNetwork, enter_network, make_private_tmp
from .privileges import Privileges

_DEFAULT: Final = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_EVERY_FD: Final = os.sysconf("SC_OPEN_MAX")


def ready_to_fork(of_all: Privileges) -> None:
    """In the template, after its imports, which may have changed any of this. STACK_FD is open there. Raises ImportFailed."""
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    for name in NEVER:  # it was executed without them, but its imports may have read them from somewhere else
        os.environ.pop(name, None)
    if of_all.umask is not None:
        os.umask(of_all.umask)
    if of_all.directory is not None:
        try:
            os.chdir(of_all.directory)
        except OSError as error:
            raise ImportFailed("isolated.directory", f"isolated.directory: {of_all.directory}: {error.strerror}") from None
    limits.forbid_core_dumps()
    limits.prctl(limits.PR_SET_NO_NEW_PRIVS, 1)
    tell_where_it_stands()
    tidy_streams()


class Preparations:
    """In the template: what a child needs to know, and what of it can be known once for all."""

    def __init__(self, of_all: Privileges) -> None:
        self._of_all = of_all
        self._no_network = NoNetwork()
        self._identities: dict[tuple[str | None, str | None, bool], Identity] = {}

    def of(self, request: Mapping[str, Any]) -> tuple[Mapping[str, Any], Sequence[int]]:
        """What to add to a request for the child itself, fields and fds. `request`: with what Privileges.of_job says."""
        asked, network = request.get("identity"), request.get("network")
        if asked is None and network is None:
            return {}, ()
        try:
            become = {} if asked is None else {"become": self._identity(*asked)}
            return become, () if network is None else (self._no_network.fd(),)
        except Refused as error:
            return {"refusal": str(error)}, ()

    def _identity(self, user: str | None, group: str | None, by_operator: bool) -> Identity:
        known = self._identities.get((user, group, by_operator))
        if known is None:
            if not by_operator:
                check_declared(user, group, self._of_all.user, self._of_all.allowed_users)
            known = identity_of(user, group)
            check_possible(known)
            self._identities[user, group, by_operator] = known
        return known


def prepare(template_pid: int, nice: int) -> None:
    """In a fork: become a process of its own."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in _DEFAULT:
        _signal.signal(number, _signal.SIG_DFL)
    if nice:
        os.nice(nice)
    limits.yield_to_the_oom_killer()
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
        os._exit(wire.NO_WAY_TO_SAY)


def equip(request: Mapping[str, Any], fds: Sequence[int], template_pid: int) -> None:
    """Become the process of the job of `request`. `fds`: its ends of job socket, stdout, stderr and stack; see Preparations.

    Raises Refused when that job cannot run like this, OSError when the host is short of something.
    """
    for fd, place in zip(fds, (wire.JOB_FD, 1, 2, wire.STACK_FD), strict=False):
        os.dup2(fd, place, inheritable=place in (1, 2))
    if "refusal" in request:
        raise Refused(request["refusal"])
    if request.get("network") is False:
        enter_network(fds[-1])
    os.closerange(wire.STACK_FD + 1, _EVERY_FD)
    if (max_mib := request.get("private_tmp")) is not None:
        make_private_tmp(max_mib)
    os.environ[JOB_ID] = request["id"]
    if request.get("start") != "pool":  # whose jobs each have their own
        limits.apply(request["limits"])
    if "become" in request:
        become(Identity(*request["become"]))
        die_with(template_pid)
    name_process(request)


def tidy_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def ready_to_be_named() -> None:
    """Have the library look for the place of titles."""
    getproctitle()


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
