"""One connection to Redis that never blocks the loop: a state machine, kept by one task, and a FIFO of who waits for which reply.

    idle --start--> connect --> handshake --> ready --> lost --backoff--> connect …
    connect, handshake --> refused   when the server will not have us, and never had
    any --stop--> stopped

Rule 1. Requests are sent at once and in order, and replies are matched in order. Who stops waiting (a cancelled task) leaves its
        place in the FIFO; the reply is read and dropped.
Rule 2. When the connection is lost, everyone in the FIFO gets BrokerUnavailable, and nobody knows what the server still did.
        Repeating is the caller's business, since only it knows how to do it without doing it twice.
Rule 3. Silence of REPLY_TIMEOUT_S while somebody waits is a lost connection.
Rule 4. Once it was ready it never gives up: what was a refusal at the start (a password) is reported then, and tried again.
Rule 5. Whom to connect to is asked anew each time where there are Sentinels (`locate`), and who is no master is left again.

RESP3, so that doorbells (pushes) and replies share the connection. Nothing here may import redis-py, or hashlib (the server
computes the digests of scripts). The bytes are redis_wire's, waiting for replicas is redis_replicas', several nodes and asking
again are redis_nodes'.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from hiredis import PushNotification, ReplyError

from ..errors import BrokerRefused, BrokerUnavailable
from ..kernel.traps import PARKED, Park, Trap, sleep
from .base import Verb
from .commands.redis_asking import Command, judge
from .commands.redis_durability import QUESTIONS, durability
from .commands.redis_hello import read_hello
from .commands.redis_mend import Arg
from .commands.redis_url import Address, Target
from .redis_replicas import Replicas
from .redis_wire import Wire, connect

if TYPE_CHECKING:
    from ..kernel.loop import Kernel, Task

REPLY_TIMEOUT_S: Final = 5.0
CONNECT_TIMEOUT_S: Final = 5.0  # for all of resolve, connect, tls and handshake
FIRST_BACKOFF_S: Final = 0.1
REPORT_AGAIN_S: Final = 30.0  # between two lines about the same trouble

_LATE: Final = object()

News = Callable[[str, str, float], None]  # kind ("lost", "back" or "warning"), text, seconds until the next try
Locate = Callable[[float], Verb[Address]]  # where to connect to, within so many seconds


class _Request(Trap):
    """Send commands, and wait for all of their replies: a list, in which errors stand as ReplyError."""

    __slots__ = ("commands", "error", "replies", "sent", "task", "transport")

    def __init__(self, transport: RedisTransport, commands: Sequence[Command]) -> None:
        self.transport = transport
        self.commands = commands
        self.replies: list[Any] = []
        self.sent = False
        self.error: BrokerUnavailable | None = None  # the connection was lost first
        self.task: Task | None = None  # None: nobody waits (yet, or any more)

    def arm(self, kernel: Kernel, task: Task) -> Any:
        if not self.sent:
            self.sent = True
            self.transport.send(self)
        if self.error is not None:
            raise self.error
        if len(self.replies) == len(self.commands):
            return self.replies
        self.task = task
        task.undo = self._leave
        kernel.wake_at(task, kernel.clock.monotonic() + REPLY_TIMEOUT_S, value=_LATE)
        return PARKED

    def _leave(self) -> None:
        self.task = None


class RedisTransport:
    """The connection. `start` spawns the task that keeps it, `call` is for everyone else, `stop` leaves nothing behind.

    `on_push(channel, message)` hears of doorbells, `on_ready()` of every new connection, `on_news` of trouble.
    `locate`: asks Sentinels; None: it is always `target`.
    """

    def __init__(
        self, target: Target, scripts: Mapping[str, str], *, on_push: Callable[[bytes, bytes], None],
        on_ready: Callable[[], None], on_news: News, locate: Locate | None = None,
    ) -> None:  # fmt: skip
        self.target = target
        self.at = target  # whom we are, or were last, connected to
        self.state = "idle"
        self.ready_at: float | None = None  # clock seconds: since when it is ready; None: it is not
        self.replicas = Replicas(self)
        self.scripts = scripts
        self.digests: dict[str, bytes] = {}  # by name of the script, once ready
        self.bells_refused = False  # the user may not subscribe
        self.in_cluster = False  # it is a node of one
        self._on_push, self._on_ready, self._on_news = on_push, on_ready, on_news
        self._locate = locate
        self._channels: Sequence[str] = ()
        self._name = ""
        self._cap_s = FIRST_BACKOFF_S
        self._kernel: Kernel | None = None
        self._keeper: Task | None = None
        self._refusal: BrokerRefused | None = None
        self._lives = 0  # connections that there were
        self._was_ready = False
        self._failed = False  # a connection was lost, or could not be made
        self._reported: dict[str, float] = {}  # trouble that there is -> clock seconds: when it was last told
        self._told: set[str] = set()  # warnings that were given
        self._waiting: deque[Task] = deque()  # for ready
        self._wire: Wire | None = None
        self._fifo: deque[_Request] = deque()
        self._heard_at = 0.0  # or when the first of the FIFO came into it
        self._pushed = 0  # confirmed subscriptions
        self._lost = ""  # why the keeper is to give this connection up; "": it is not

    @property
    def closed(self) -> bool:
        """Nothing will come of waiting."""
        return self.state in ("idle", "stopped")

    @property
    def life(self) -> int:
        """The number of the connection that is ready; 0: none is."""
        return self._lives if self.state == "ready" else 0

    @property
    def idle(self) -> bool:
        """Nobody waits for a reply."""
        return not self._fifo

    # -- for verbs --------------------------------------------------------------------------------------------------

    def start(self, kernel: Kernel, name: str, channels: Sequence[str], cap_s: float, stubborn: bool = False) -> None:
        """Begin to connect, as a client called `name`, listening to `channels`; wait at most `cap_s` seconds between tries.

        `stubborn`: as if it had been ready before (Rule 4).
        """
        self._kernel, self._name, self._channels, self._cap_s = kernel, name, channels, cap_s
        self._was_ready = stubborn
        self.state = "connect"
        self._keeper = kernel.spawn(self._keep(), name=f"redis {self.target.address}")

    def stop(self) -> None:
        """Close the connection, end the keeper, fail whoever still waits."""
        if self.state == "stopped":
            return
        if self._kernel is not None and self._keeper is not None:
            self._kernel.cancel(self._keeper, GeneratorExit())
        self._drop("it was closed", "stopped")
        self._wake_waiting()

    def call(self, commands: Sequence[Command]) -> Verb[list[Any]]:
        """The replies, with errors as ReplyError among them. BrokerUnavailable: the connection was lost, or is closed."""
        yield from self.ready()
        request = _Request(self, commands)
        replies: Any = yield request
        while replies is _LATE:
            if self._now() - self._heard() >= REPLY_TIMEOUT_S:
                self._give_up(f"no reply in {REPLY_TIMEOUT_S:g} s")
            replies = yield request
        return replies  # type: ignore[no-any-return]

    def ready(self, patient: bool = True, timeout_s: float | None = None) -> Verb[bool]:
        """Wait for a connection, at most `timeout_s` seconds; whether there is one.

        BrokerRefused: there will be none; BrokerUnavailable: it is closed, or lost and nobody waits. For the first one of all is
        waited in any case.
        """
        while self.state != "ready":
            if self._refusal is not None:
                raise self._refusal
            if self.closed or (self._failed and not patient):
                raise BrokerUnavailable(f"{self.target.address}: the connection is {'closed' if self.closed else 'lost'}")
            yield Park(self._waiting, timeout_s)
            if timeout_s is not None:
                break
        return self.state == "ready"

    def send(self, request: _Request) -> None:
        """Put the request's commands on the wire; what the socket does not take now, the keeper sends later."""
        if self.state != "ready" or self._wire is None:
            raise BrokerUnavailable(f"{self.target.address}: {self._lost or 'the connection is closed'}")
        self._fifo.append(request)
        if len(self._fifo) == 1:
            self._heard_at = self._now()  # before, nobody expected to hear anything
        flushed = not self._wire.sending
        self._wire.put(request.commands)
        if flushed:
            try:
                self._wire.flush()
            except BrokerUnavailable as error:
                self._give_up(str(error))
            if self._wire.sending:
                self._poke()

    def look_again(self) -> Verb[None]:
        """Where there are Sentinels, ask whether this is still the master; when it is not, give the connection up."""
        if self._locate is None or self.state != "ready":
            return
        try:
            host, port = yield from self._locate(CONNECT_TIMEOUT_S)
        except (BrokerUnavailable, BrokerRefused):
            return  # they may know more the next time
        if self.state == "ready" and (host, port) != (self.at.host, self.at.port):
            self._give_up(f"the master is {host}:{port} by now")

    def backoff_s(self, tries: int) -> float:
        """Full jitter over a time that doubles with each try: seconds."""
        jitter = int.from_bytes(os.urandom(4), "big") / 2**32  # `random` would import hashlib
        return jitter * min(self._cap_s, FIRST_BACKOFF_S * 2.0 ** min(tries, 30))

    def report(self, trouble: str, retry_in_s: float) -> None:
        """Tell that something does not work now; `report_well` tells once when it does again.

        Many requests may wait for the same thing, each with tries of its own: it is told once, and again each REPORT_AGAIN_S.
        """
        last = self._reported.get(trouble)
        if last is None or self._now() - last >= REPORT_AGAIN_S:
            self._reported[trouble] = self._now()
            self._on_news("lost", trouble, retry_in_s)

    def report_well(self) -> None:
        if self._reported:
            self._reported.clear()
            self._on_news("back", "", 0.0)

    def warn(self, text: str) -> None:
        """Tell of something that people should look after, though work goes on."""
        self._on_news("warning", text, 0.0)

    # -- the keeper -------------------------------------------------------------------------------------------------

    def _keep(self) -> Verb[None]:
        try:
            yield from self._keep_connected()
        finally:  # stopped; or broken, and then nobody may wait for it for ever
            if self.state != "refused":
                self._drop("the connection was closed", "stopped")
            self._wake_waiting()

    def _keep_connected(self) -> Verb[None]:
        tries = 0
        while True:
            try:
                yield from self._establish()
                yield from self._serve()
            except BrokerRefused as error:
                if not self._was_ready:
                    self._drop(str(error), "refused")
                    self._refusal = error
                    return
                reason = str(error)
            except (BrokerUnavailable, OSError) as error:
                reason = str(error)
            if self.ready_at is not None and self._now() - self.ready_at > self._cap_s:
                tries = 0  # it did work; a server that lets us in and throws us out at once does not
            self._drop(reason, "lost")
            delay_s = self.backoff_s(tries)
            tries += 1
            self.report(reason, delay_s)
            yield sleep(delay_s)

    def _establish(self) -> Verb[None]:
        """From nothing to ready."""
        deadline = self._now() + CONNECT_TIMEOUT_S
        self.state = "connect"
        if self._locate is not None:
            self.at = self.target.at((yield from self._locate(CONNECT_TIMEOUT_S)))
        try:
            self._wire = yield from connect(self.at, max(0.0, deadline - self._now()), self._now)
        except BrokerUnavailable as error:
            step = "a Sentinel named it" if self._locate is not None else "start Redis there, or correct the URL"
            raise BrokerUnavailable(f"{error}; {step}") from None
        self.state = "handshake"
        yield from self._greet(deadline)
        self.state = "ready"
        self.ready_at = self._now()
        self._lives += 1
        self._was_ready = True
        self.report_well()
        self._on_ready()
        self._wake_waiting()

    def _serve(self) -> Verb[None]:
        """Pass replies on until the connection is lost, which raises BrokerUnavailable."""
        while True:
            yield from self._io(None)
            for reply in self._read():
                if not self._fifo:
                    raise BrokerUnavailable(f"an answer that nobody asked for: {reply!r:.200}")
                request = self._fifo[0]
                request.replies.append(reply)
                if len(request.replies) == len(request.commands):
                    self._fifo.popleft()
                    if request.task is not None and self._kernel is not None:
                        self._kernel.wake(request.task, request.replies)

    # -- the handshake ----------------------------------------------------------------------------------------------

    def _greet(self, deadline: float) -> Verb[None]:
        """HELLO, which also names and authenticates us; then the database, the scripts, the doorbells."""
        at = self.at
        auth: list[Arg] = ["AUTH", at.username or "default", at.password] if at.password or at.username else []
        (hello,) = yield from self._exchange([("HELLO", 3, *auth, "SETNAME", self._name)], deadline)
        if isinstance(hello, ReplyError) and "unknown command" in str(hello).lower():
            raise BrokerRefused(f"{at.address}: it is older than Redis 6 (it does not know HELLO); KQueue needs 6.2 or later")
        self._check(hello)
        self._look_who(hello)
        select: list[Command] = [("SELECT", at.db)] if at.db else []
        loads: list[Command] = [*select, *(("SCRIPT", "LOAD", text) for text in self.scripts.values())]
        replies = yield from self._exchange([*loads, *QUESTIONS], deadline)
        for reply in replies[: len(loads)]:
            self._check(reply)
        self.digests = dict(zip(self.scripts, replies[len(select) : len(loads)], strict=True))
        for finding in durability(replies[len(loads) :]):
            if finding.serious and finding.text not in self._told:
                self._told.add(finding.text)
                self.warn(f"{at.address}: {finding.text}")
        if self._channels:
            yield from self._subscribe(deadline)

    def _look_who(self, reply: Any) -> None:
        hello = read_hello(reply, self.at, named=self._locate is not None)
        self.in_cluster = hello.clustered
        if hello.is_old:
            version = hello.version or "of an unknown kind"
            raise BrokerRefused(f"{self.at.address}: it is Redis {version}; KQueue needs 6.2 or later")

    def _subscribe(self, deadline: float) -> Verb[None]:
        """SUBSCRIBE is answered by a push when it worked, by an error as a reply when it did not."""
        replies = yield from self._exchange([("SUBSCRIBE", *self._channels)], deadline, pushes=len(self._channels))
        if replies and not self.bells_refused:
            self.bells_refused = True
            step = f"allow the user the channels of KQueue (ACL SETUSER {self.target.username or 'default'} &kq:*)"
            self.warn(f"no doorbells, so new jobs are looked for every second: {replies[0]}; {step}")
        elif not replies:
            self.bells_refused = False

    def _exchange(self, commands: Sequence[Command], deadline: float, pushes: int = 0) -> Verb[list[Any]]:
        """Before ready: send, and wait for every reply (or for so many pushes instead)."""
        assert self._wire is not None
        self._wire.put(commands)
        self._wire.flush()
        replies: list[Any] = []
        self._pushed = 0
        while len(replies) < len(commands) and not (pushes and self._pushed >= pushes):
            yield from self._io(deadline)
            replies += self._read()
        return replies

    def _check(self, reply: Any) -> None:
        if isinstance(reply, ReplyError):
            verdict = judge(str(reply))
            raise (BrokerUnavailable if verdict.later else BrokerRefused)(f"{self.at.address}: {verdict.text}")

    # -- the wire ---------------------------------------------------------------------------------------------------

    def _io(self, deadline: float | None) -> Verb[None]:
        """Wait until something came, or until more may be sent, and send it. Raises when the connection is to be given up."""
        assert self._wire is not None
        left_s = None if deadline is None else max(0.0, deadline - self._now())
        if not self._lost:
            ready = yield from self._wire.wait(left_s)
            if not ready and deadline is not None and self._now() >= deadline:
                raise BrokerUnavailable(f"no answer to the handshake in {CONNECT_TIMEOUT_S:g} s")
        if self._lost:
            raise BrokerUnavailable(self._lost)
        self._wire.flush()

    def _read(self) -> list[Any]:
        """The replies that came; pushes are passed on."""
        assert self._wire is not None
        replies: list[Any] = []
        for reply in self._wire.read():
            if isinstance(reply, PushNotification):
                self._push(reply)
            else:
                replies.append(reply)
        return replies

    def _push(self, push: Sequence[Any]) -> None:
        if push[0] == b"subscribe":
            self._pushed += 1
        elif push[0] == b"message":
            self._on_push(push[1], push[2])

    def _heard(self) -> float:
        return self._heard_at if self._wire is None else max(self._heard_at, self._wire.heard_at)

    def _give_up(self, reason: str) -> None:
        """Have the keeper end this connection."""
        self._lost = self._lost or reason
        self._poke()

    def _poke(self) -> None:
        """Have the keeper look at what it waits for again."""
        if self._kernel is not None and self._keeper is not None:
            self._kernel.wake(self._keeper, 0)

    def _drop(self, reason: str, state: str) -> None:
        """Close the socket, and fail everyone in the FIFO."""
        self.state = state
        self.ready_at = None
        self._failed = True
        if self._wire is not None:
            self._wire.close()
        self._wire = None
        self._lost = ""
        fifo, self._fifo = self._fifo, deque()
        for request in fifo:
            request.error = BrokerUnavailable(f"{self.target.address}: {reason}")
            if request.task is not None and self._kernel is not None:
                self._kernel.wake(request.task, error=request.error)

    def _wake_waiting(self) -> None:
        if self._kernel is not None:
            self._kernel.unpark(self._waiting)

    def _now(self) -> float:
        assert self._kernel is not None
        return self._kernel.clock.monotonic()
