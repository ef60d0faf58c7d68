"""The connection to Redis: how it comes about, how it is lost, how it comes back, and that it leaves nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kqueue.brokers import dial, redis_transport
from kqueue.brokers.base import SETTLED, Settlement
from kqueue.brokers.commands import redis_asking
from kqueue.client.redis import RedisClient
from kqueue.errors import BrokerRefused, BrokerUnavailable

from ..servers import Certificates, Proxy, RedisServer
from .conftest import RedisRig, new_job, only

rig = only(RedisRig)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """One that a test may kill and reconfigure. Not started yet."""
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls_server(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("tls-redis"), tls=certificates).start()
    yield server
    server.stop()


def open_at(rig: RedisRig, url: str) -> Any:
    rig.url = url
    return rig.broker()


def refusal(rig: RedisRig, url: str) -> str:
    with pytest.raises(BrokerRefused) as caught:
        open_at(rig, url)
    return str(caught.value)


def runs_a_job(rig: RedisRig, broker: Any) -> bool:
    rig.do(broker.enqueue([new_job()]))
    (lease,) = rig.do(broker.reserve("q", {"inline": 1})).leases
    return bool(rig.do(broker.settle([Settlement(lease.token, "q", "ack")])) == [SETTLED])


# -- how it comes about -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_it_reaches_redis_over_tcp(rig: RedisRig, host: str) -> None:
    assert runs_a_job(rig, open_at(rig, rig.server.url_for(host=host)))


def test_it_reaches_redis_over_a_unix_socket(rig: RedisRig) -> None:
    assert runs_a_job(rig, open_at(rig, f"unix://{rig.server.socket_path}"))
    assert RedisClient(f"unix://{rig.server.socket_path}").stats()["q"] == (0, 0, 0, 0)


def test_a_name_is_looked_up_in_a_child_that_is_gone_afterwards(rig: RedisRig, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, type: looked_up)
    before = children()
    assert runs_a_job(rig, open_at(rig, rig.server.url_for(host="redis.example")))
    assert children() == before


def test_the_database_number_counts(rig: RedisRig) -> None:
    broker = open_at(rig, rig.server.url_for(db=5))
    rig.do(broker.enqueue([new_job("a")]))
    assert rig.server.command("EXISTS", "kq:{q}:job:a", db=5) == 1
    assert rig.server.command("EXISTS", "kq:{q}:job:a", db=0) == 0
    assert RedisClient(rig.url).show("a") is not None
    assert "DB index is out of range" in refusal(rig, rig.server.url_for(db=99))


@pytest.mark.usefixtures("told_each_time")
def test_it_waits_for_a_redis_that_starts_later(rig: RedisRig, server: RedisServer) -> None:
    rig.url = server.url
    broker = rig.make_broker()
    opening = rig.kernel.spawn(broker.open(rig.owner(), ["q"], 15.0))
    rig.until(lambda: len(rig.news) >= 2)
    assert {kind for kind, _, _ in rig.news} == {"lost"}
    assert all("Connection refused" in text and 0 <= retry_in_s <= 5.0 for _, text, retry_in_s in rig.news)
    server.start()
    rig.until(lambda: opening.ended)
    assert opening.value.recovered == {}
    assert rig.news[-1] == ("back", "", 0.0)
    rig.opened.append(broker)


# -- who is let in ----------------------------------------------------------------------------------------------------


RIGHTS = redis_asking._NEXT_STEP["NOPERM"].partition(": ")[2].split()  # what our own message tells the operator to allow


@pytest.fixture
def locked(server: RedisServer) -> RedisServer:
    """One with three users."""
    server.start()
    server.commands(
        [
            ("ACL", "SETUSER", "worker", "on", ">right", "resetchannels", *RIGHTS),
            ("ACL", "SETUSER", "deaf", "on", ">right", "~kq:*", "resetchannels", "+@all"),
            ("ACL", "SETUSER", "reader", "on", ">right", "~kq:*", "&*", "+@read", "+@connection"),
        ]
    )
    return server


def test_the_rights_that_we_ask_for_are_enough(rig: RedisRig, locked: RedisServer) -> None:
    broker = open_at(rig, locked.url_for("worker", "right"))
    assert runs_a_job(rig, broker)
    client = RedisClient(rig.url)
    assert client.enqueue([new_job("a"), new_job("b", delay_s=10)]) == [True, True]
    assert client.cancel("a", b"{}") is True
    assert [row.state for row in client.list(None, None, 10)] == ["dead", "delayed"]
    for verb in (broker.renew(), broker.sweep(), broker.stats(), broker.publish({"manifest:q": b"{}"})):
        rig.do(verb)
    assert client.documents("manifest:") == {"manifest:q": b"{}"}
    assert rig.news == []
    client.close()


@pytest.mark.parametrize("user", ["worker", "nobody"])
def test_a_wrong_password_is_refused_and_never_repeated(rig: RedisRig, locked: RedisServer, user: str) -> None:
    said = refusal(rig, locked.url_for(user, "sesame"))
    assert said == (
        f"redis://127.0.0.1:{locked.port}/0: WRONGPASS invalid username-password pair or user is disabled; "
        "check user and password in the queue's URL"
    )
    assert rig.news == []


def test_no_password_where_one_is_needed_is_refused(rig: RedisRig, tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--requirepass", "right").start()
    try:
        assert "NOAUTH" in refusal(rig, server.url)
        assert runs_a_job(rig, open_at(rig, server.url_for(password="right")))
        rig.do(rig.opened.pop().close())
    finally:
        server.stop()


def test_a_user_without_the_rights_to_run_scripts_is_refused(rig: RedisRig, locked: RedisServer) -> None:
    said = refusal(rig, locked.url_for("reader", "right"))
    assert "NOPERM" in said
    assert "+@scripting" in said


def test_without_channel_rights_it_says_so_once_and_looks_every_second(rig: RedisRig, locked: RedisServer) -> None:
    broker = open_at(rig, locked.url_for("deaf", "right"))
    ((kind, text, _),) = rig.news
    assert kind == "warning"
    assert "NOPERM" in text
    assert "&kq:*" in text
    assert rig.do(broker.wait(10.0)) is True, "a look"
    assert rig.do(broker.wait(0.05)) is False, "and none within the next second"
    broker._look_at = rig.kernel.clock.monotonic() + 0.1
    assert rig.do(broker.wait(None)) is True
    assert len(rig.news) == 1


def test_a_password_that_is_changed_while_it_runs_is_reported_and_waited_for(rig: RedisRig, locked: RedisServer) -> None:
    broker = open_at(rig, locked.url_for("worker", "right"))
    locked.commands([("ACL", "SETUSER", "worker", "resetpass", ">left"), ("CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES"),
                     ("CLIENT", "KILL", "TYPE", "PUBSUB")])  # fmt: skip
    task = rig.kernel.spawn(broker.enqueue([new_job("a")]))
    rig.until(lambda: any("WRONGPASS" in text for _, text, _ in rig.news))
    locked.command("ACL", "SETUSER", "worker", "resetpass", ">right")
    rig.until(lambda: task.ended)
    assert task.value == [True]
    assert rig.news[-1][0] == "back"


# -- TLS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tls_with_a_ca_of_our_own(rig: RedisRig, tls_server: RedisServer, certificates: Certificates, host: str) -> None:
    tls_server.command("FLUSHALL")
    url = tls_server.url_for(host=host, query=f"ssl_ca_certs={certificates.ca}")
    broker = open_at(rig, url)
    assert runs_a_job(rig, broker)
    jobs = [new_job(f"{n:02}", envelope=os.urandom(1 << 20), at=1.0) for n in range(7)]
    rig.do(broker.enqueue(jobs))
    leases = rig.do(broker.reserve("q", {"inline": 7})).leases
    assert [lease.envelope for lease in leases] == [job.envelope for job in jobs], "large ones too, which take many records"
    assert rig.do(broker.reserve("q", {"inline": 1})).leases == []
    client = RedisClient(url)
    assert client.enqueue([new_job("b")]) == [True]
    assert rig.do(broker.wait(10.0)) is True
    client.close()


def test_a_certificate_that_nobody_vouches_for_is_refused(rig: RedisRig, tls_server: RedisServer) -> None:
    said = refusal(rig, tls_server.url)
    assert "does not verify" in said
    assert "ssl_ca_certs" in said
    assert runs_a_job(rig, open_at(rig, tls_server.url_for(query="ssl_cert_reqs=none")))


def test_a_ca_file_that_is_not_there_is_refused(rig: RedisRig, tls_server: RedisServer) -> None:
    assert "/no/such/ca.pem: No such file" in refusal(rig, tls_server.url_for(query="ssl_ca_certs=/no/such/ca.pem"))


def test_tls_and_no_tls_do_not_meet(rig: RedisRig, tls_server: RedisServer, certificates: Certificates) -> None:
    for url in (
        f"redis://127.0.0.1:{tls_server.port}/0",
        f"rediss://127.0.0.1:{rig.server.port}/0?ssl_ca_certs={certificates.ca}",
    ):
        assert stays_lost(rig, url), "which is no refusal: it may be a server that is being set up"


def stays_lost(rig: RedisRig, url: str) -> str:
    """The first thing that is reported of a broker which does not get open."""
    rig.url, rig.news[:] = url, []
    broker = rig.make_broker()
    opening = rig.kernel.spawn(broker.open(rig.owner(), ["q"], 15.0))
    rig.until(lambda: rig.news)
    assert not opening.ended
    rig.do(broker.close())
    rig.until(lambda: opening.ended)
    assert isinstance(opening.error, BrokerUnavailable)
    kind, text, _ = rig.news[0]
    assert kind == "lost"
    return text


# -- who answers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def impostor() -> Iterator[Callable[[bytes], str]]:
    """Makes a server that answers whatever it is told with the same bytes; the URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    answers: list[bytes] = []

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                if not answers:
                    return
                connection.recv(65536)
                connection.sendall(answers[0])
                with suppress(ConnectionResetError):  # which is how we leave
                    connection.recv(65536)

    thread = threading.Thread(target=serve)
    thread.start()

    def make(answer: bytes) -> str:
        answers.append(answer)
        return f"redis://127.0.0.1:{listener.getsockname()[1]}/0"

    yield make
    answers.clear()
    socket.create_connection(listener.getsockname()).close()
    thread.join()
    listener.close()


HELLO = b"%2\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$5\r\n"


def test_an_old_redis_is_refused_by_name(rig: RedisRig, impostor: Callable[[bytes], str]) -> None:
    assert "it is Redis 6.0.9; KQueue needs 6.2 or later" in refusal(rig, impostor(HELLO + b"6.0.9\r\n"))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"-ERR unknown command 'HELLO', with args beginning with: '3'\r\n", "older than Redis 6"),
        (b"-NOPROTO sorry, this protocol version is not supported.\r\n", "6.2 or later"),
        (b"-DENIED Redis is running in protected mode because no password is set.\r\n", "DENIED"),
        (b"+OK\r\n", "of an unknown kind"),
    ],
)
def test_what_will_never_serve_us_is_refused(rig: RedisRig, impostor: Callable[[bytes], str], answer: bytes, reason: str) -> None:
    assert reason in refusal(rig, impostor(answer))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak Redis"),
        (b"-LOADING Redis is loading the dataset in memory\r\n", "LOADING"),
        (b"-ERR max number of clients reached\r\n", "max number of clients"),
    ],
)
def test_what_may_serve_us_later_is_waited_for(
    rig: RedisRig, impostor: Callable[[bytes], str], answer: bytes, reason: str
) -> None:
    assert reason in stays_lost(rig, impostor(answer))


def test_who_says_nothing_is_given_up(rig: RedisRig, impostor: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_transport, "CONNECT_TIMEOUT_S", 0.2)
    assert "no answer to the handshake in 0.2 s" in stays_lost(rig, impostor(b""))


# -- how it is lost, and comes back -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("told_each_time")
def test_nothing_is_lost_when_redis_is_killed_and_started_again(rig: RedisRig, server: RedisServer) -> None:
    broker = open_at(rig, server.start().url)
    rig.do(broker.enqueue([new_job(f"{n:02}", at=1.0) for n in range(20)]))
    leases = rig.do(broker.reserve("q", {"inline": 5})).leases
    server.kill()
    verbs = [
        broker.settle([Settlement(lease.token, "q", "ack") for lease in leases]), broker.reserve("q", {"inline": 5}),
        broker.enqueue([new_job("20", at=1.0)]), broker.renew(), broker.sweep(), broker.publish({"x": b"1"}),
    ]  # fmt: skip
    tasks = [rig.kernel.spawn(verb) for verb in verbs]
    rig.until(lambda: len(rig.news) >= 3)
    assert not any(task.ended for task in tasks)
    server.start()
    rig.until(lambda: all(task.ended for task in tasks))
    assert tasks[0].value == [SETTLED] * 5
    assert [lease.token.id for lease in tasks[1].value.leases] == [f"{n:02}" for n in range(5, 10)]
    assert tasks[2].value == [True]
    assert rig.do(broker.stats())["q"] == (11, 0, 5, 0)
    assert [kind for kind, _, _ in rig.news][-1] == "back"


def test_what_was_sent_on_a_connection_that_was_given_up_does_not_arrive_later(rig: RedisRig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ours = rig.kernel.run(dial.dial("127.0.0.1", slow.getsockname()[1], "", None, 5.0, rig.kernel.clock.monotonic))
        theirs, _ = slow.accept()
        sent = 0
        with suppress(BlockingIOError):
            while True:
                sent += ours.send(bytes(65536))
        ours.close()
        arrived = 0
        with theirs, suppress(ConnectionResetError):
            while data := theirs.recv(65536):
                arrived += len(data)
    assert 0 < arrived < sent


def test_silence_while_somebody_waits_is_a_lost_connection(rig: RedisRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_transport, "REPLY_TIMEOUT_S", 0.2)
    proxy = Proxy(rig.server.port)
    try:
        broker = open_at(rig, proxy.url)
        proxy.mute = True
        task = rig.kernel.spawn(broker.enqueue([new_job("a")]))
        rig.until(lambda: rig.news)
        assert rig.news[0][1] == "no reply in 0.2 s"
        proxy.mute = False
        rig.until(lambda: task.ended)
        assert task.value == [True]
        rig.do(rig.opened.pop().close())
    finally:
        proxy.stop()


def test_backoff_stays_under_a_third_of_the_lease(rig: RedisRig) -> None:
    transport = open_at(rig, rig.url)._nodes._transport(("127.0.0.1", rig.server.port))
    assert all(transport.backoff_s(tries) <= 0.1 * 2**tries for tries in range(4) for _ in range(50))
    many = [transport.backoff_s(1000) for _ in range(200)]
    assert max(many) <= 5.0
    assert max(many) - min(many) > 1.0, "spread, so that a crowd does not come at once"


# -- what it leaves behind --------------------------------------------------------------------------------------------


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.usefixtures("told_each_time")
def test_it_leaves_no_fd_and_no_process(rig: RedisRig, server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_transport, "FIRST_BACKOFF_S", 0.001)
    before = fds(), children()
    for url in (rig.server.url, f"redis://no-such-host.invalid:{rig.server.port}/0", f"redis://127.0.0.1:{server.port}/0"):
        for soon in (False, True):
            rig.url, rig.news[:] = url, []
            broker = rig.make_broker()
            opening = rig.kernel.spawn(broker.open(rig.owner(), ["q"], 15.0))
            if soon:
                rig.kernel.turn()
            else:
                rig.until(lambda opening=opening: opening.ended or len(rig.news) > 2)
            rig.do(broker.close())
            rig.until(lambda opening=opening: opening.ended)
    assert (fds(), children()) == before
    assert len(rig.kernel.poller) == 0


def test_a_refused_broker_leaves_nothing_open(rig: RedisRig) -> None:
    before = fds()
    refusal(rig, rig.server.url_for("nobody", "x"))
    assert fds() == before


def test_a_verb_of_a_closed_broker_fails_at_once(rig: RedisRig) -> None:
    broker = open_at(rig, rig.url)
    rig.do(rig.opened.pop().close())
    with pytest.raises(BrokerUnavailable, match="closed"):
        rig.do(broker.enqueue([new_job()]))
    rig.do(broker.close())


def test_closing_does_not_wait_for_a_redis_that_is_gone(rig: RedisRig, server: RedisServer) -> None:
    broker = open_at(rig, server.start().url)
    server.kill()
    rig.do(rig.opened.pop().close())
    with pytest.raises(BrokerUnavailable, match="closed"):
        rig.do(broker.renew())


@pytest.mark.parametrize("error", ["Name or service not known", ""])
def test_the_child_that_looks_up_answers_or_is_killed(rig: RedisRig, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str, port: int, type: int) -> Any:
        if error:
            raise socket.gaierror(-2, error)
        threading.Event().wait()

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    before = children()
    with pytest.raises(BrokerUnavailable, match=f"cannot resolve x.invalid: {error or 'no answer in 0.1 s'}"):
        rig.do(dial.resolve("x.invalid", 1, 0.1 if not error else 10.0))
    assert children() == before


def test_the_daemon_s_side_stays_small() -> None:
    heavy = {"asyncio", "dataclasses", "hashlib", "inspect", "logging", "random", "redis", "ssl", "subprocess", "urllib.parse"}
    code = (
        "import sys, kqueue.brokers.base, kqueue.kernel; before = set(sys.modules); "
        "import kqueue.brokers.redis; print(*(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "hiredis" in done.stdout.split()
    assert not heavy & set(done.stdout.split())
