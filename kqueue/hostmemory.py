"""What memory there is for jobs: what the host has available now, what our own cgroup allows, and the budget that follows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

MIB: Final = 1048576
_UNLIMITED: Final = 1 << 60  # cgroup v1 writes "no limit" as the number of bytes in 2**63 rounded down to a page


class Budget(NamedTuple):
    """What the `max_memory` of all isolated jobs that run may add up to."""

    total_mib: int = 0  # 0: there is no budget
    basis: str = ""  # how it came about, for people


NO_BUDGET: Final = Budget()


def budget(written: str) -> Budget:
    """The budget that `isolated.memory_budget` means here and now: "80%" of what is available, or a size. Raises UsageError."""
    if not written.endswith("%"):
        from .settings import parse_size  # which the supervisor does without, where it is a percentage

        return Budget(max(1, parse_size(float(written) if written.replace(".", "", 1).isdigit() else written) // MIB), written)
    available, whose = available_memory()
    total_mib = max(1, available * int(written[:-1]) // 100 // MIB)
    return Budget(total_mib, f"{written} of the {available // MIB} MiB that {whose}")


def available_memory(root: str = "") -> tuple[int, str]:
    """Bytes that may be used, and by whose word. `root`: in front of /proc and /sys, for tests."""
    available = _available(f"{root}/proc/meminfo")
    limits = list(_cgroup_limits(root))
    if limits and min(limits) < available:
        return min(limits), "its cgroup allows"
    return available, "the host has available"


def _available(path: str) -> int:
    with open(path, "rb") as file:
        for line in file:
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"{path} does not say what is available")


def _cgroup_limits(root: str) -> Iterator[int]:
    """Of our own cgroup and of all around it, in bytes. None where a limit cannot be read."""
    try:
        with open(f"{root}/proc/self/cgroup") as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, name = f"{root}/sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = f"{root}/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        while True:
            try:
                with open(f"{mount}{path.rstrip('/')}/{name}") as file:
                    limit = file.read().strip()
                if limit != "max" and int(limit) < _UNLIMITED:
                    yield int(limit)
            except (OSError, ValueError):
                pass
            if path in ("", "/"):
                break
            path = path.rpartition("/")[0]
