"""Users: who a name is, and how a process becomes them for good. In the template, its children, and whoever tries at a start.

Files of users and groups, or a directory service behind them, are asked once for each name, in the template, before it forks:
what a child does then is three system calls.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from ..errors import Refused
from . import limits


class Identity(NamedTuple):
    """Whom a process becomes."""

    uid: int
    gid: int
    groups: Sequence[int] | None  # supplementary ones; None: they stay
    name: str  # "": the user stays
    home: str
    is_new: bool  # False: whoever asked is all of that already


def identity_of(user: str | None, group: str | None) -> Identity:
    """Who `user` is, with `group` in place of their own. Raises Refused for a name that nobody has."""
    if user is None:
        return _identity(os.geteuid(), os.getegid() if group is None else _gid(group))
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise Refused(f"there is no user {user!r} on this host") from None
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return _identity(entry.pw_uid, entry.pw_gid if group is None else _gid(group), groups, entry.pw_name, entry.pw_dir)


def _identity(uid: int, gid: int, groups: Sequence[int] | None = None, name: str = "", home: str = "") -> Identity:
    same_ids = os.getresuid() == (uid,) * 3 and os.getresgid() == (gid,) * 3
    same_groups = groups is None or uid != 0 or set(groups) == set(os.getgroups())  # who is not root cannot change them
    return Identity(uid, gid, groups, name, home, not (same_ids and same_groups))


def _gid(group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise Refused(f"there is no group {group!r} on this host") from None


def check_declared(user: str | None, group: str | None, default_user: str | None, allowed: Sequence[str] | None) -> None:
    """Whether the code of a job may name these. Raises Refused.

    `default_user`: of jobs that name none. `allowed`: whom code may name; None: all but root, unless jobs run as root anyway.
    """
    identity = identity_of(user, group)
    if user is not None and user != default_user:
        if allowed is not None and user not in allowed:
            listed = ", ".join(allowed) or "empty: nobody"
            raise Refused(f"security.allowed_users has no {user!r} ({listed}): add it, if this job may run as that user")
        if allowed is None and identity.uid == 0 and default_user is not None:
            raise Refused(f"its code asks for {user!r}, where isolated.user is {default_user}: name it in security.allowed_users")
    if group is not None and identity.uid != 0:
        of_user = identity.groups if identity.groups is not None else [os.getgid(), *os.getgroups()]
        if identity.gid not in of_user:
            member = identity.name or "the daemon's user"
            raise Refused(f"{member} is no member of group {group!r}; another one may be named in kqueue.yaml only")


def check_possible(identity: Identity) -> None:
    """Raise Refused when this process can surely not become `identity`."""
    if os.geteuid() != 0 and identity.is_new:
        raise Refused(f"the daemon does not run as root, so no job of it can run as {_shown(identity)}")


def become(identity: Identity) -> None:
    """Be `identity`, and no other again. Raises Refused where that is not permitted.

    The order is the kernel's: who is no longer root can change no group. All three ids, or the saved one would lead back. A
    change of user closes much of /proc/PID to everybody, the process itself included; what it holds is its own user's to see, so
    that is undone.
    """
    if identity.name:
        environ = os.environ  # one by one: update() asks abstract classes first, which takes a fresh fork 0.2 ms
        environ["HOME"] = identity.home
        environ["USER"] = environ["LOGNAME"] = identity.name
    if identity.is_new:
        _change_to(identity)


def _change_to(identity: Identity) -> None:
    for stream in (1, 2):
        with suppress(OSError):  # "/dev/stdout" is opened anew, with the permissions of its pipe
            os.fchown(stream, identity.uid, identity.gid)
    try:
        if identity.groups is not None:
            os.setgroups(identity.groups)
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
    except PermissionError:
        raise Refused(f"the daemon may not run a job as {_shown(identity)} (it has no CAP_SETUID, CAP_SETGID)") from None
    limits.prctl(limits.PR_SET_DUMPABLE, 1)


def _shown(identity: Identity) -> str:
    return f"user {identity.name}" if identity.name else f"group {grp.getgrgid(identity.gid).gr_name}"


def user_name() -> str:
    """Whose process this is: "user nobody"."""
    try:
        return f"user {pwd.getpwuid(os.geteuid()).pw_name}"
    except KeyError:
        return f"user {os.geteuid()}"
