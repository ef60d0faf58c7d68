"""Asking Redis: which node gets which commands, what its answers mean, and what has to be asked again. The I/O is its owner's.

    asking = Asking(calls, scripts, routes, address)
    while asking.left:
        for part in asking.parts():            # one for each node: without a cluster, one
            trouble = part.hear(exchange(part.node, part.commands(digests)))
            …                                  # "": go on; else wait a little, then go on
        if asking.hopped():
            …                                  # learn the map (redis_cluster); asking.astray is trouble as well
    asking.replies

Shared by the daemon, whose exchange is a generator, and by the client, whose exchange blocks.

Rule 1. What is asked again carries the same number as before, so asking twice changes nothing (see redis_scripts).
Rule 2. A script is never sent after an ASK, but waits until its slot has moved: while that goes on, a queue's keys stand on two
        nodes, and a script sees one of them. Every script declares a key that never exists, so the old node runs none either.
Rule 3. With `sync`, what was promised counts when so many replicas have it; until then it is asked again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from hiredis import pack_command

from ...errors import BrokerRefused
from .redis_cluster import Routes, read_redirect
from .redis_mend import Arg, mend, suspects, told
from .redis_url import Address

RIGHTS: Final = ("NOAUTH", "WRONGPASS", "NOPERM")  # somebody may give them back
SYNC_WAIT_MS: Final = 1000  # for replicas; shorter than what makes a silent connection a lost one
MANY_HOPS: Final = 5  # from node to node, until it is taken for trouble
_GOES_ON: Final = "work goes on when"
_LATER: Final = {  # code -> what happens next, and what people can do
    "LOADING": f"{_GOES_ON} it has read its data",
    "BUSY": f"{_GOES_ON} that script ends (SCRIPT KILL ends one that has written nothing)",
    "MASTERDOWN": f"{_GOES_ON} this replica has its master again, or give the address of a master",
    "CLUSTERDOWN": f"{_GOES_ON} every slot has a node again (CLUSTER INFO says more)",
    "TRYAGAIN": f"{_GOES_ON} the slot has moved",
    "READONLY": f"{_GOES_ON} it takes writes; a replica does not, so give its master's address, or redis+sentinel://…",
    "OOM": f"{_GOES_ON} there is room below its maxmemory; what it holds is worked off, new jobs are not taken",
    "MISCONF": f"{_GOES_ON} it can save again; its log says why it cannot",
    "NOREPLICAS": f"{_GOES_ON} so many replicas are back as its min-replicas-to-write says",
    "UNBLOCKED": f"{_GOES_ON} the new master is found",
}
_NEXT_STEP: Final = {
    "NOAUTH": "put user and password into the queue's URL",
    "WRONGPASS": "check user and password in the queue's URL",
    "NOPERM": "allow the user what KQueue needs: ~kq:* &kq:* +@read +@write +@scripting +@connection +@pubsub +time",
    "WRONGTYPE": "a key of KQueue was overwritten by something else; look at the keys kq:* and rename or delete that one",
    "NOPROTO": "KQueue needs Redis or Valkey 6.2 or later",
}
# Before Redis 7 an error inside of a script came as "ERR Error running script (…): @user_script:12: WRONGTYPE Operation …".
_IN_SCRIPT: Final = re.compile(r"ERR Error running script.*?: -?([A-Z]{3,}) ")
_ALSO_LATER: Final = ("ERR max number of clients", "ERR WAIT cannot be used with replica")


class Verdict(NamedTuple):
    """What an error reply means. `later`: the same request may succeed later; else it never will."""

    code: str
    later: bool
    text: str  # the server's words, and what happens next or what to do


def judge(message: str) -> Verdict:
    """Read an error reply."""
    message = message.split("\n", 1)[0][:300]
    inside = _IN_SCRIPT.match(message)
    code = inside[1] if inside else message.partition(" ")[0]
    step = _LATER.get(code) or _NEXT_STEP.get(code)
    later = code in _LATER or message.startswith(_ALSO_LATER)
    return Verdict(code, later, f"{message.rstrip('.')}; {step}" if step else message)


Command = Sequence[Arg]

# Scripts that only read, or whose effect comes again by itself when it is lost with a master: what was recovered is swept once
# more, an epoch is renewed soon, and registered anew by its next reservation. All others promise something to somebody:
# that a job is there (enqueue), over (settle, cancel), or nobody else's (reserve: a reservation that is lost would be given out
# again while the job runs).
UNPROMISED: Final = {"open", "renew", "sweep", "close", "stats", "show", "outbox"}


class Call(NamedTuple):
    """One run of a script: EVALSHA, its digest, then `args`: the number of keys, the key, the rest."""

    script: str
    args: list[Arg]


def commands(asked: Iterable[Call | Command], digests: Mapping[str, Arg]) -> list[Command]:
    """What is sent to ask that."""
    return [("EVALSHA", digests[one.script], *one.args) if isinstance(one, Call) else one for one in asked]


def pack(sent: Iterable[Command]) -> bytes:
    """Commands as they go over the wire."""
    return b"".join([pack_command(tuple(command)) for command in sent])  # type: ignore[arg-type]  # its stub means a 1-tuple


def last_word(answers: Sequence[Any]) -> Any:
    """The answer to the last of several commands, or the error of the first one that failed."""
    return next((answer for answer in answers if isinstance(answer, Exception)), answers[-1])


def key_of(asked: Call | Command) -> Arg:
    return asked.args[1] if isinstance(asked, Call) else asked[1]


class Asking:
    """Requests on their way to their replies.

    `address` is for messages; `words(error)` is what the server said.
    `wait_for_rights`: missing rights are trouble that may pass.
    `on_mended(text)` hears of keys of a wrong type that were moved out of the way (see redis_mend).
    `once`: what is refused, now or for good, is not asked again; its reply is None, and the reason is added to `refusals`.
    `unless_full`: so is what is refused because memory is full, and only that.
    `sync`: how many replicas must have what is promised.
    """

    def __init__(
        self, asked: Sequence[Call | Command], scripts: Mapping[str, str], routes: Routes, address: str, *,
        wait_for_rights: bool = False, words: Callable[[Exception], str] = str,
        on_mended: Callable[[str], None] = lambda text: None, once: bool = False, refusals: list[str] | None = None,
        sync: int = 0, unless_full: bool = False,
    ) -> None:  # fmt: skip
        self.replies: list[Any] = [None] * len(asked)
        self.left = list(range(len(asked)))  # positions that have no reply yet
        self.asked = asked
        self.scripts = scripts
        self.routes = routes
        self.address = address
        self.wait_for_rights = wait_for_rights
        self.words = words
        self.on_mended = on_mended
        self.once = once
        self.unless_full = unless_full
        self.refusals = [] if refusals is None else refusals
        self.sync = sync
        self.forgetful: set[Address] = set()  # nodes that have forgotten our scripts
        self.asking: dict[int, Address] = {}  # position -> the node that an ASK named, for this once
        self.wrong: dict[str, dict[str, str]] = {}  # what keys begin with -> names and types of those to be mended
        self.mended: set[str] = set()  # what the keys begin with that were
        self.redirected = False  # a node said MOVED, and `hopped` was not asked since
        self._hops = 0

    def parts(self) -> list[Part]:
        """What is left to ask, by node."""
        if not self.routes.clustered:
            return [Part(self, self.routes.first, self.left)]
        nodes: dict[tuple[Address, bool], list[int]] = {}
        for position in self.left:
            node = self.asking.pop(position, None)
            place = (self.routes.of(key_of(self.asked[position])), False) if node is None else (node, True)
            nodes.setdefault(place, []).append(position)
        return [Part(self, node, positions, asking) for (node, asking), positions in nodes.items()]

    def hopped(self) -> bool:
        """Whether a node said, since this was asked the last time, that another one has it: the map is to be learned again."""
        hopped, self.redirected = self.redirected, False
        self._hops += hopped
        return hopped

    @property
    def astray(self) -> str:
        """What is wrong when there is no end to that; "": nothing is."""
        return "its nodes do not agree yet on which of them holds what we ask for" if self._hops >= MANY_HOPS else ""


class Part:
    """What one node is asked. `asking`: each of it comes after an ASK."""

    def __init__(self, whole: Asking, node: Address, positions: Sequence[int], asking: bool = False) -> None:
        self.node = node
        self._whole = whole
        self.positions = positions
        self._asking = asking
        self._loads = node in whole.forgetful
        self._mends = [prefix for prefix in whole.wrong if whole.routes.of(prefix) == node]

    @property
    def promised(self) -> Arg:
        """The key of something that replicas must have before it counts; "": there is nothing of that kind."""
        whole = self._whole
        return next((key_of(whole.asked[p]) for p in self.positions if self._promises(p)), "") if whole.sync else ""

    def commands(self, digests: Mapping[str, Arg]) -> list[Command]:
        """What to send: everything that has no reply, and before it what is needed for there to be one."""
        whole = self._whole
        sent: list[Command] = [("SCRIPT", "LOAD", text) for text in whole.scripts.values()] if self._loads else []
        sent += [mend(prefix, whole.wrong[prefix]) for prefix in self._mends]
        for command in commands([whole.asked[position] for position in self.positions], digests):
            if self._asking:
                sent.append(("ASKING",))
            sent.append(command)
        return sent

    def hear(self, answers: Sequence[Any], held_by: Any = None) -> str:
        """Take the answers to `commands`. Why some have to be asked again later; "": none has. BrokerRefused: that is useless.

        `held_by`: the answer to `sync`, when something is `promised`.
        """
        whole = self._whole
        first = len(whole.scripts) if self._loads else 0
        hopeless = self._hear_mended(answers[first : first + len(self._mends)])
        answers = answers[first + len(self._mends) :][1 if self._asking else 0 :: 2 if self._asking else 1]
        whole.forgetful.discard(self.node)
        trouble = self._shortage(held_by) if self.promised else ""
        unsafe = bool(trouble)
        again = [] if self.positions is whole.left else [p for p in whole.left if p not in self.positions]
        for position, answer in zip(self.positions, answers, strict=True):
            if not isinstance(answer, Exception):
                if unsafe and self._promises(position):
                    again.append(position)
                else:
                    whole.replies[position] = answer
                continue
            why = self._hear_error(position, judge(whole.words(answer)), hopeless)
            if why is not None:
                trouble = trouble or why
                again.append(position)
        whole.left = again
        return trouble

    def _hear_error(self, position: int, verdict: Verdict, hopeless: Mapping[str, str]) -> str | None:
        """Why to ask this again later; "": at once; None: not at all."""
        whole, asked = self._whole, self._whole.asked[position]
        if verdict.code == "NOSCRIPT" and not self._loads:
            whole.forgetful.add(self.node)
            return ""
        if verdict.code in ("MOVED", "ASK"):
            return self._redirected(position, verdict)
        if verdict.code == "WRONGTYPE" and self._may_mend(asked, hopeless):
            return ""
        if whole.once or (whole.unless_full and verdict.code == "OOM"):
            whole.refusals.append(verdict.text)
            return None
        if verdict.later or (whole.wait_for_rights and verdict.code in RIGHTS):
            return verdict.text
        if verdict.code == "WRONGTYPE" and whole.wait_for_rights and hopeless:
            return "; ".join((verdict.text, *hopeless.values()))
        raise BrokerRefused(f"{whole.address}: {'; '.join((verdict.text, *hopeless.values()))}")

    def _redirected(self, position: int, verdict: Verdict) -> str:
        slot, node = read_redirect(verdict.text, self.node)
        if verdict.code == "MOVED":
            self._whole.routes.moved(slot, node)
            self._whole.redirected = True
        elif isinstance(self._whole.asked[position], Call):  # Rule 2
            return f"slot {slot} is being moved to {node[0]}:{node[1]}; work on its queues goes on when that is done"
        else:
            self._whole.asking[position] = node
        return ""

    def _promises(self, position: int) -> bool:
        asked = self._whole.asked[position]
        return isinstance(asked, Call) and asked.script not in UNPROMISED

    def _shortage(self, held_by: Any) -> str:
        """Why what was promised does not count yet; "": it does."""
        whole = self._whole
        if isinstance(held_by, Exception):
            verdict = judge(whole.words(held_by))
            passing = verdict.later or verdict.code in ("MOVED", "ASK")
            if passing or (whole.wait_for_rights and verdict.code in RIGHTS):
                return verdict.text
            raise BrokerRefused(f"{whole.address}: {verdict.text}; queue.sync_replicas needs the right to WAIT (+wait)")
        if isinstance(held_by, int) and held_by >= whole.sync:
            return ""
        return (
            f"only {held_by or 0} of {whole.sync} replicas have what was written, so it does not count as done yet; it does when "
            "they have it. Look at its replicas (INFO replication), or lower queue.sync_replicas"
        )

    def _hear_mended(self, answers: Sequence[Any]) -> dict[str, str]:
        """Take the answers to `mend`. Those that are errors, by what the keys begin with."""
        whole, failed = self._whole, {}
        for prefix, answer in zip(self._mends, answers, strict=True):
            whole.wrong.pop(prefix, None)
            if isinstance(answer, Exception):
                failed[prefix] = f"it could not be moved out of the way: {judge(whole.words(answer)).text}"
                continue
            whole.mended.add(prefix)
            for text in told(answer):
                whole.on_mended(text)
        return failed

    def _may_mend(self, asked: Call | Command, hopeless: Mapping[str, str]) -> bool:
        """Have the keys looked at that this request uses; False when they were, and it is no use."""
        prefix, names = suspects(asked.script, asked.args) if isinstance(asked, Call) else suspects("", asked)
        if prefix in self._whole.mended or prefix in hopeless:
            return False
        self._whole.wrong.setdefault(prefix, {}).update(names)
        return True


# WAIT waits for what its own connection wrote. A request that comes again, perhaps by another connection, is answered from memory
# and writes nothing, so something is written first. The DEL lets it pass where memory is full (Rule 3 in redis_lua).
_SYNC: Final = "redis.call('DEL', KEYS[1]) redis.call('SET', KEYS[1], 1, 'EX', 60)"


def sync(key: Arg, replicas: int, timeout_ms: int = SYNC_WAIT_MS) -> list[Command]:
    """Commands of which the last one's answer is the number of replicas that have all that was written so far.

    `key`: of something that was written, to find its slot.
    """
    prefix = key if isinstance(key, bytes) else str(key).encode("utf-8", "surrogateescape")
    return [("EVAL", _SYNC, 1, prefix + b"sync"), ("WAIT", replicas, timeout_ms)]
