"""What the children of this daemon may do: as which user they run, and what of the host they see. The supervisor's side of it.

    kqueue.yaml, `isolated`  ->  Privileges  --for all-->  the template (`plain`)   \\
    a job's declaration      ->  Privileges  --for one-->  a request (`of_job`)      --> settling_in.py does it

Only what the operator and the code declare is asked here. An envelope cannot name a user: `of_job` is given the options of the
registration, which come from `jobs.commands` or from the template's manifest, and no override of a dispatch.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from ..config import IsolatedConfig, SecuritySettings
from ..options import JobOptions


class Privileges(NamedTuple):
    """Of all children. What a job declares itself goes before `user` and `group`, and can only take away of the rest."""

    user: str | None = None  # None: the daemon's own
    group: str | None = None  # None: that of `user`
    umask: int | None = None  # None: the daemon's own
    directory: str | None = None  # where jobs begin; None: where the daemon does
    nice: int = 0
    environment: tuple[str, ...] = ()  # names and patterns, besides environment.ALLOWED
    private_tmp: bool = False
    network: bool = True
    allowed_users: tuple[str, ...] | None = None  # that the code of jobs may name; None: all but root

    @classmethod
    def from_config(cls, isolated: IsolatedConfig, security: SecuritySettings) -> Privileges:
        """What kqueue.yaml says below `isolated`, and whom it lets the code of jobs name."""
        shared = {name: getattr(isolated, name) for name in cls._fields if name in IsolatedConfig._fields}
        return cls(**shared, allowed_users=security.allowed_users)

    def plain(self) -> dict[str, Any]:
        """JSON values, for the template. Names of variables are none of its business: it has been given what it may have."""
        return {name: value for name, value in self._asdict().items() if name != "environment"}

    def of_job(self, declared: JobOptions, max_memory_mib: int, *, by_operator: bool) -> dict[str, Any]:
        """The part of a request that says in what this job differs from a process without any of it.

        `by_operator`: it is `jobs.commands` that declares, not the code of a job.
        """
        asked: dict[str, Any] = {}
        if declared.user is not None or declared.group is not None:
            asked["identity"] = (declared.user or self.user, declared.group, by_operator)
        elif self.user is not None or self.group is not None:
            asked["identity"] = (self.user, self.group, True)
        if not (self.network and declared.network):
            asked["network"] = False
        if self.private_tmp or declared.private_tmp:
            asked["private_tmp"] = max_memory_mib
        return asked


FIELDS: Final = ("identity", "network", "private_tmp")
"""What `of_job` may set: for the life of a process."""
DEFAULT: Final = Privileges()
