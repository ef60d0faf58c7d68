"""What a Redis keeps when it is killed, or full, read from its own answers: what would be lost, when, and the line that mends it.

The daemon asks at each connection and warns; `kqueue doctor` asks by `Store.health`. No I/O here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ..base import Finding

# One setting each: more at once takes Redis 7.
SETTINGS: Final = ("appendonly", "appendfsync", "save", "maxmemory", "maxmemory-policy")
NEARLY_FULL: Final = 0.9  # of maxmemory
QUESTIONS: Final[Sequence[Sequence[str]]] = (
    *(("CONFIG", "GET", name) for name in SETTINGS), ("INFO", "persistence"), ("INFO", "memory"),
)  # fmt: skip


def durability(answers: Sequence[Any]) -> list[Finding]:
    """What to say about the answers to QUESTIONS, of which any may be an error: a user may lack the rights to ask.

    Where both CONFIG and INFO are forbidden there is nothing to say.
    """
    config, info = _read_config(answers[: len(SETTINGS)]), _read_info(answers[len(SETTINGS) :])
    return [*_persistence(config, info), *_eviction(config, info), *_fullness(config, info)]


def _persistence(config: Mapping[str, str], info: Mapping[str, str]) -> Iterable[Finding]:
    appends = config.get("appendonly", {"0": "no", "1": "yes"}.get(info.get("aof_enabled", ""), ""))
    if appends == "no":
        lost, snapshots = "every job that waits or runs then", config.get("save")
        if snapshots != "":
            when = f" ({snapshots})" if snapshots else ", if any"
            lost = f"what was dispatched, started or finished since its last snapshot{when}"
        keeps = "it keeps nothing on disk" if snapshots == "" else "it keeps no append-only file"
        yield _warning(
            f"{keeps}, so when it is killed or restarted {lost} is lost: "
            'write "appendonly yes" and "appendfsync always" into redis.conf (everysec: the last second can be lost)'
        )
    elif appends == "yes":
        synced = config.get("appendfsync")
        if synced == "no":
            yield _warning(
                "it lets the system decide when its append-only file reaches the disk, so when the machine fails half a minute "
                'of jobs can be lost: write "appendfsync always" into redis.conf, or everysec'
            )
        elif synced == "everysec":
            yield _note(
                "its append-only file reaches the disk once a second, so two seconds of what was dispatched or finished can be "
                'lost when the machine fails: "appendfsync always" in redis.conf loses nothing, and is slower'
            )
    for name, what in (("aof_last_write_status", "append-only file"), ("rdb_last_bgsave_status", "snapshot")):
        if info.get(name) == "err":
            yield _warning(f"it could not write its last {what}: free space on its disk, or mend it; its log says why")


def _eviction(config: Mapping[str, str], info: Mapping[str, str]) -> Iterable[Finding]:
    policy = config.get("maxmemory-policy", info.get("maxmemory_policy", "noeviction"))
    limit = config.get("maxmemory", info.get("maxmemory", "0"))
    if policy == "noeviction":
        return
    if policy.startswith("volatile-"):
        lost = "it forgets whom it answered what, and a lost reply can make a job run twice"
    else:
        lost = "it deletes jobs, whole queues among them"
    mend = 'write "maxmemory-policy noeviction" into redis.conf'
    if limit == "0":
        yield _note(f"its maxmemory-policy is {policy}: as soon as a maxmemory is set and reached, {lost}; {mend}")
    else:
        yield _warning(f"its maxmemory-policy is {policy}, so when its memory is full ({limit} bytes) {lost}: {mend}")


def _fullness(config: Mapping[str, str], info: Mapping[str, str]) -> Iterable[Finding]:
    """No number that changes is told, or a daemon would tell it anew at each connection."""
    if config.get("maxmemory-policy", info.get("maxmemory_policy", "noeviction")) != "noeviction":
        return
    limit = int(info.get("maxmemory") or config.get("maxmemory") or 0)
    used = int(info.get("used_memory", 0)) - int(info.get("mem_not_counted_for_evict", 0))
    step = "raise maxmemory, or let daemons work off what waits and forget dead letters"
    if limit and used >= limit:
        yield Finding(True, f"its memory is full (maxmemory is {limit} bytes), so it takes no new jobs: {step}", failing=True)
    elif limit and used >= NEARLY_FULL * limit:
        much = f"{NEARLY_FULL:.0%} of its memory or more is used (maxmemory is {limit} bytes)"
        yield _warning(f"{much}; when it is full it takes no new jobs: {step}")


def _read_config(answers: Sequence[Any]) -> dict[str, str]:
    """What could be asked, by name. RESP2 answers in pairs, RESP3 in a dict."""
    found = {}
    for name, answer in zip(SETTINGS, answers, strict=True):
        if isinstance(answer, Mapping):
            answer = [part for pair in answer.items() for part in pair]
        if isinstance(answer, (list, tuple)) and len(answer) == 2:
            found[name] = _text(answer[1])
    return found


def _read_info(answers: Sequence[Any]) -> dict[str, str]:
    texts = [_text(answer) for answer in answers if isinstance(answer, (bytes, str))]
    lines = [line.partition(":") for text in texts for line in text.splitlines() if ":" in line]
    return {name: value for name, _, value in lines}


def _text(answer: Any) -> str:
    return answer.decode("utf-8", "replace") if isinstance(answer, bytes) else str(answer)


def _warning(text: str) -> Finding:
    return Finding(True, text)


def _note(text: str) -> Finding:
    return Finding(False, text)
