"""A try at the start: whether the children of this daemon can be what kqueue.yaml wants, in a child that does it and says.

What a host permits hangs on capabilities, the kernel, its modules, the container and its filters, and no look at any of them
tells it. And whoever the daemon lets a job become must be one that it can still kill.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import Refused
from .identity import become, check_possible, identity_of
from .namespaces import NoNetwork, enter_network, make_private_tmp
from .privileges import Privileges


class NotPermitted(Exception):
    """What setting `key` wants cannot be."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def try_out(privileges: Privileges, search_path: Sequence[str]) -> list[str]:
    """What the operator should know. Raises NotPermitted."""
    wanted = privileges._replace(environment=(), allowed_users=None, umask=None)
    if wanted == Privileges():
        return []
    for key, user, group in (("user", privileges.user, None), ("group", None, privileges.group)):
        try:
            identity_of(user, group)
        except Refused as error:
            raise NotPermitted(f"isolated.{key}", str(error)) from None
    report = _in_a_child(privileges, search_path)
    if report["key"]:
        raise NotPermitted(report["key"], report["message"])
    warnings: list[str] = report["warnings"]
    return warnings


def _in_a_child(privileges: Privileges, search_path: Sequence[str]) -> dict[str, Any]:
    report_fd, its_report = os.pipe()
    its_hold, hold_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(hold_fd)
            os.close(report_fd)
            os.write(its_report, json.dumps(_try(privileges, search_path)).encode())
            os.close(its_report)
            os.read(its_hold, 1)  # until the parent is through with us
        finally:
            os._exit(0)
    os.close(its_report)
    os.close(its_hold)
    with os.fdopen(report_fd, "rb") as pipe:
        data = pipe.read()
    may_end = True
    try:
        os.kill(pid, signal.SIGKILL)
    except PermissionError:
        may_end = False
    os.close(hold_fd)
    os.waitpid(pid, 0)
    report: dict[str, Any] = json.loads(data) if data else _report("isolated", "a child that tried it out died")
    if not report["key"] and not may_end:
        message = f"the daemon could start jobs as {privileges.user}, but not end them (it has no CAP_KILL)"
        report = _report("isolated.user", message)
    return report


def _report(key: str = "", message: str = "", warnings: Sequence[str] = ()) -> dict[str, Any]:
    return {"key": key, "message": message, "warnings": list(warnings)}


def _try(privileges: Privileges, search_path: Sequence[str]) -> dict[str, Any]:
    """In the child, in the order of `settling_in`."""
    key = ""
    try:
        if privileges.directory is not None:
            key = "isolated.directory"
            os.chdir(privileges.directory)
        if not privileges.network:
            key = "isolated.network"
            enter_network(NoNetwork().fd())
        if privileges.private_tmp:
            key = "isolated.private_tmp"
            make_private_tmp(1)
        key = "isolated.user" if privileges.user is not None else "isolated.group"
        if privileges.user is not None or privileges.group is not None:
            was_uid = os.geteuid()
            identity = identity_of(privileges.user, privileges.group)
            check_possible(identity)
            become(identity)
            if identity.uid != was_uid and _leads_back(was_uid):
                return _report(key, f"a job could become user {was_uid} again: this process keeps its capabilities (SecureBits=)")
    except Refused as error:
        return _report(key, str(error))
    except OSError as error:
        return _report(key, f"{privileges.directory if key == 'isolated.directory' else ''}: {error.strerror}".lstrip(": "))
    return _report(warnings=list(_warnings(privileges, search_path)))


def _leads_back(uid: int) -> bool:
    try:
        os.setresuid(-1, uid, -1)
    except PermissionError:
        return False
    return True


def _warnings(privileges: Privileges, search_path: Sequence[str]) -> Iterator[str]:
    who = f"user {privileges.user}" if privileges.user is not None else "a job"
    hidden = ", or lies in the /tmp that is replaced for it" if privileges.private_tmp else ""
    if not os.access(sys.executable, os.X_OK):
        yield f'{who} may not run {sys.executable}{hidden}: jobs with start="exec" will fail, and so will subprocesses of Python'
    for directory in dict.fromkeys([*search_path, os.path.dirname(os.path.dirname(__file__)), os.path.dirname(os.__file__)]):
        if not os.access(directory, os.R_OK | os.X_OK):
            yield f"{who} may not read {directory}{hidden}: what a job imports from there only when it runs will fail"
    if not os.access(".", os.X_OK):
        yield f"{who} may not enter {os.getcwd()}, where jobs begin: set isolated.directory"
