"""io.redis with a real server: commands, pipelines, subscriptions, blocking commands, the pool, and peers with bad manners."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue import io
from kqueue.brokers.dial import tls_context
from kqueue.context import enter
from kqueue.errors import JobCancelled, UsageError
from kqueue.kernel import Kernel, join, sleep
from tests.io.conftest import Server, a_job
from tests.io.databases import cut_everywhere, pools, settle, watched_kernel
from tests.servers import Certificates, Cluster, Proxy, RedisServer, Sentinel, free_port

watched = pytest.fixture(name="kernel")(watched_kernel)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture
def empty(server: RedisServer) -> RedisServer:
    server.command("FLUSHALL")
    return server


def clients(server: RedisServer) -> list[str]:
    """What those of io.redis did last."""
    listed = server.command("CLIENT", "LIST")
    assert isinstance(listed, bytes)
    each = [dict(field.split("=", 1) for field in line.split()) for line in listed.decode().splitlines()]
    return [client["cmd"] for client in each if client["name"] == "kqueue.io"]


def until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# -- the ordinary case ----------------------------------------------------------------------------------------------------


def test_commands(kernel: Kernel, empty: RedisServer) -> None:
    odd = bytes(range(256)) * 2

    def job() -> Any:
        redis = io.redis(empty.url)
        assert (yield redis.get("k")) is None
        assert (yield redis.command("SET", "k", odd, "EX", 60)) == b"OK"
        assert (yield redis.get(b"k")) == odd
        assert (yield redis.set("k", 1, nx=True)) is None
        assert (yield redis.set("k", 1.5, ex=30)) == b"OK"
        assert 0 < (yield redis.ttl("k")) <= 30
        assert (yield redis.incr("n", 5)) == 5
        assert (yield redis.mset({"a": 1, "b": bytearray(b"x"), "c": memoryview(b"y")})) == b"OK"
        assert (yield redis.mget("a", "b", "c", "d")) == [b"1", b"x", b"y", None]
        assert (yield redis.exists("a", "d")) == 1
        assert (yield redis.delete("a", "b", "c")) == 3
        yield redis.hset("h", {"f": 1, "g": 2})
        assert (yield redis.hincrby("h", "f", 4)) == 5
        assert (yield redis.hgetall("h")) == {b"f": b"5", b"g": b"2"}
        assert (yield redis.hget("h", "g")) == b"2"
        assert (yield redis.hdel("h", "g")) == 1
        assert (yield redis.rpush("l", 1, 2)) == 2
        assert (yield redis.lpush("l", 0)) == 3
        assert (yield redis.lrange("l")) == [b"0", b"1", b"2"]
        assert [(yield redis.lpop("l")), (yield redis.rpop("l")), (yield redis.llen("l"))] == [b"0", b"2", 1]
        assert (yield redis.sadd("s", "x", "y")) == 2
        assert (yield redis.srem("s", "y")) == 1
        assert [(yield redis.smembers("s")), (yield redis.sismember("s", "x"))] == [[b"x"], 1]
        assert (yield redis.zadd("z", {"one": 1, "two": 2.5})) == 2
        assert (yield redis.zrange("z", 2, 3, by_score=True)) == [b"two"]
        assert (yield redis.command("ZSCORE", "z", "two")) == 2.5
        assert (yield redis.zrem("z", "one")) == 1
        assert (yield redis.expire("z", 10)) == 1
        assert (yield redis.eval("return {KEYS[1], ARGV[1]}", ["k"], ["v"])) == [b"k", b"v"]
        text = io.redis(empty.url, decode=True)
        yield text.set("t", "žlutý")
        assert (yield text.get("t")) == "žlutý"
        assert (yield text.hgetall("h")) == {"f": "5"}
        yield redis.set("t", b"\xff")
        assert (yield text.get("t")).encode("utf-8", "surrogateescape") == b"\xff", "nothing is lost"
        big = b"x" * 20_000_000
        yield redis.set("big", big)
        assert (yield redis.get("big")) == big

    kernel.run(job())
    assert sorted((pool.lent, pool.idle) for pool in pools(kernel)) == [(0, 1), (0, 1)]


def test_the_three_ways_to_wait_are_the_same(kernel: Kernel, empty: RedisServer) -> None:
    redis = io.redis(empty.url)

    def by_yield() -> Any:
        return (yield redis.command("ECHO", "x"))

    def by_yield_from() -> Any:
        return (yield from redis.command("ECHO", "x"))

    async def by_await() -> Any:
        async with redis.pipeline() as pipe, await redis.subscribe("c") as inbox:
            pipe.command("ECHO", "x")
            pipe.publish("c", "y")
            echo, heard = await pipe.run()
            assert (heard, (await inbox.next()).data) == (1, b"y")
            return echo

    assert kernel.run(by_yield()) == kernel.run(by_yield_from()) == kernel.run(by_await()) == b"x"


def test_pipelines(kernel: Kernel, empty: RedisServer) -> None:
    def job() -> Any:
        redis = io.redis(empty.url)
        with redis.pipeline() as pipe:
            pipe.set("k", "text")
            pipe.incr("k")
            pipe.get("k")
            with pytest.raises(io.RedisError, match="INCRBY: ERR value is not an integer"):
                yield pipe.run()
            pipe.incr("k")
            pipe.get("k")
            error, value = yield pipe.run(errors=True)
            assert (type(error), value) == (io.RedisError, b"text")
            assert (yield pipe.run()) == []
        with redis.pipeline(atomic=True) as pipe:
            pipe.incr("n")
            pipe.lpush("n", 1)
            pipe.incr("n")
            first, error, last = yield pipe.run(errors=True)
            assert (first, error.code, last) == (1, "WRONGTYPE", 2)
            pipe.incr("n")
            pipe.command("GET")
            with pytest.raises(io.RedisError, match="GET: ERR wrong number of arguments"):
                yield pipe.run()
        assert (yield redis.get("n")) == b"2", "none of them was done"
        with redis.pipeline() as pipe:
            for n in range(50_000):
                pipe.set(f"key {n}", b"x" * 100)
                pipe.get(f"key {n}")
            assert len((yield pipe.run())) == 100_000
        with pytest.raises(UsageError, match="1 commands of a pipeline were never sent"), redis.pipeline() as pipe:
            pipe.get("k")
        with pytest.raises(UsageError, match="argument 1 of GET"), redis.pipeline() as pipe:
            pipe.get(None)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="BLPOP waits at the server"):
            redis.pipeline().command("BLPOP", "k", 0)

    kernel.run(job())
    assert [pool.idle for pool in pools(kernel)] == [1]


def test_what_cannot_be_sent(kernel: Kernel, empty: RedisServer) -> None:
    def job() -> Any:
        redis = io.redis(empty.url)
        for wrong in (None, True, ["x"], {"x": 1}):
            with pytest.raises(UsageError, match="argument 2 of SET is"):
                yield redis.set("k", wrong)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="cannot be written in UTF-8"):
            yield redis.set("k", "\ud800")
        for command, instead in (
            (("SUBSCRIBE", "x"), "subscribe"), (("multi",), "atomic=True"), ((b"WATCH", "k"), "session"), (("SELECT", 1), "URL"),
            (("CLIENT", b"reply", "OFF"), "session"), (("WAIT", 1, 0), "session"), (("MONITOR",), "does not speak"),
        ):  # fmt: skip
            with pytest.raises(UsageError, match=instead):
                yield redis.command(*command)
        with pytest.raises(UsageError, match="takes a command"):
            redis.command()
        for url in ("http://x", "redis://u:secret@h/notanumber", "redis://h?nonsense=1", "redis://h?sync_replicas=1"):
            with pytest.raises(UsageError, match=r"of io\.redis") as refused:
                io.redis(url)
            assert "secret" not in str(refused.value)

    kernel.run(job())


def test_a_session_may_change_its_connection(kernel: Kernel, empty: RedisServer) -> None:
    def job() -> Any:
        redis = io.redis(empty.url)
        with (yield redis.session()) as own:
            yield own.command("WATCH", "k")
            yield redis.set("k", "other")
            yield own.command("MULTI")
            assert (yield own.set("k", "ours")) == b"QUEUED"
            assert (yield own.command("EXEC")) is None
            yield own.command("SELECT", 1)
            yield own.set("k", "of database 1")
            with pytest.raises(io.RedisError, match="WRONGTYPE"):
                yield own.lpush("k", 1)
            with pytest.raises(UsageError, match="subscribe"):
                yield own.command("SUBSCRIBE", "x")
            with pytest.raises(UsageError, match="takes a command"):
                yield own.command(timeout=0.1)
            with pytest.raises(io.RedisError, match="unknown command"):
                yield own.command("NOSUBSCRIBE")
        assert (yield redis.get("k")) == b"other"
        with pytest.raises(io.Closed):
            yield own.get("k")

    kernel.run(job())
    until(lambda: len(clients(empty)) == 1)


# -- where it is ----------------------------------------------------------------------------------------------------------


def test_every_form_of_url(kernel: Kernel, tmp_path: Path) -> None:
    for name in ("tls", "certificates", "plain"):
        (tmp_path / name).mkdir()
    certificates = Certificates(tmp_path / "certificates")
    secured = RedisServer(tmp_path / "tls", tls=certificates).start()
    plain = RedisServer(tmp_path / "plain").start()
    plain.commands([("ACL", "SETUSER", "app", "on", ">p@ss", "~*", "&*", "+@all"), ("CONFIG", "SET", "requirepass", "main")])

    def job() -> Any:
        assert (yield io.redis(secured.url_for(query=f"ssl_ca_certs={certificates.ca}")).command("PING")) == b"PONG"
        named = secured.url_for(host="localhost", query=f"ssl_ca_certs={certificates.ca}")
        with (yield io.redis(named).subscribe("x")) as inbox:
            yield io.redis(named).publish("x", "over TLS")
            assert (yield inbox.next()).data == b"over TLS"
        with pytest.raises(io.CertificateRefused):
            yield io.redis(secured.url).command("PING")
        with pytest.raises(io.TLSFailed, match="nowhere"):
            yield io.redis(secured.url_for(query="ssl_ca_certs=/nowhere.pem")).command("PING")
        with pytest.raises((io.TLSFailed, io.TimedOut)):  # Redis takes a ClientHello for the beginning of a command
            yield io.redis(plain.url.replace("redis:", "rediss:")).command("PING", timeout=0.2)
        assert b" db=3 " in (yield io.redis(plain.url_for("app", "p%40ss", db=3)).command("CLIENT", "INFO"))
        assert (yield io.redis(f"unix://:main@{plain.socket_path}?db=2").command("PING")) == b"PONG"
        with pytest.raises(io.RedisError, match="check user and password") as refused:
            yield io.redis(plain.url_for("app", "secret")).command("PING")
        assert (refused.value.code, "secret" in str(refused.value)) == ("WRONGPASS", False)
        with pytest.raises(io.RedisError, match="put user and password into the URL"):
            yield io.redis(plain.url).command("PING")
        with pytest.raises(io.RedisError, match="out of range"):
            yield io.redis(plain.url_for("", "main", db=99)).command("PING")
        with pytest.raises(io.ConnectFailed):
            yield io.redis(f"redis://127.0.0.1:{free_port()}").command("PING")
        with pytest.raises(io.ConnectFailed):
            yield io.redis(f"unix://{tmp_path}/nowhere").command("PING")

    try:
        kernel.run(job())
    finally:
        secured.stop()
        plain.stop()


def test_cas_are_read_once(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(*args: Any) -> Any:
        read.append(args[0])
        return tls_context(*args)

    monkeypatch.setattr("kqueue.brokers.dial.tls_context", counted)
    certificates = Certificates(tmp_path)
    server = RedisServer(tmp_path, tls=certificates).start()
    redis = io.redis(server.url_for(query=f"ssl_ca_certs={certificates.ca}"))

    def job() -> Any:
        assert (yield redis.command("BLPOP", "nothing", 0.01)) is None
        for _ in range(2):
            with (yield redis.session()) as own, (yield redis.subscribe("x")) as inbox:
                yield own.publish("x", "y")
                assert (yield inbox.next()).data == b"y"

    try:
        kernel.run(job())
    finally:
        server.stop()
    assert read == [certificates.ca]


def test_the_master_that_a_sentinel_names(kernel: Kernel, tmp_path: Path, server: RedisServer) -> None:
    sentinel = Sentinel(tmp_path, server).start()

    def job() -> Any:
        url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{sentinel.port}/main/0"
        assert (yield io.redis(url).command("PING")) == b"PONG"
        with pytest.raises(io.ConnectFailed, match="no Sentinel names the master of 'nobody'"):
            yield io.redis(url.replace("main", "nobody")).command("PING")
        with pytest.raises(io.RedisError, match=r"is a Sentinel, which holds no data; write redis\+sentinel"):
            yield io.redis(sentinel.url).command("GET", "k")

    try:
        kernel.run(job())
    finally:
        sentinel.stop()


def test_a_key_of_another_node(kernel: Kernel, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path).start()

    def job() -> Any:
        redis = io.redis(cluster.url)
        other = next(key for key in map(str, range(100)) if cluster.home(key) is cluster.nodes[1])
        with pytest.raises(io.RedisRedirected, match=f"127.0.0.1:{cluster.nodes[1].port}, another node of a Redis Cluster"):
            yield redis.get(other)
        mine = next(key for key in map(str, range(100)) if cluster.home(key) is cluster.nodes[0])
        assert (yield redis.set(mine, 1)) == b"OK"

    try:
        kernel.run(job())
    finally:
        cluster.stop()


# -- waiting at the server --------------------------------------------------------------------------------------------------


def test_blocking_commands_keep_nobody_from_a_connection(kernel: Kernel, empty: RedisServer) -> None:
    def waiter(n: int) -> Any:
        return (yield io.redis(empty.url, max_connections=1).command("BLPOP", f"list {n}", 0))

    def job() -> Any:
        redis = io.redis(empty.url, max_connections=1)
        tasks = [kernel.spawn(waiter(n)) for n in range(20)]
        while clients(empty).count("blpop") < 20:
            yield sleep(0.005)
        for n in range(20):
            yield redis.rpush(f"list {n}", n)
        for n, task in enumerate(tasks):
            assert (yield join(task)) == [b"list %d" % n, b"%d" % n]
        assert (yield redis.command("BLPOP", "nothing", 0.01)) is None
        assert (yield redis.command("XREAD", "BLOCK", 10, "STREAMS", "stream", "$")) is None

    kernel.run(job())


def test_a_blocking_command_that_is_given_up_takes_nothing(kernel: Kernel, empty: RedisServer) -> None:
    redis = io.redis(empty.url)

    def waiter() -> Any:
        return (yield redis.command("BLPOP", "list", 0))

    def job() -> Any:
        yield redis.rpush("other", "x")
        yield redis.command("BLPOP", "other", 0)  # leaves a connection, so the next one's time is not spent on connecting
        with pytest.raises(io.TimedOut, match=r"did not answer BLPOP in "):
            yield redis.command("BLPOP", "list", 0, timeout=0.05)
        while "blpop" in clients(empty):
            yield sleep(0.005)
        task = kernel.spawn(waiter())
        while "blpop" not in clients(empty):
            yield sleep(0.005)
        kernel.cancel(task, JobCancelled("stop"))
        with pytest.raises(JobCancelled):
            yield join(task)
        while "blpop" in clients(empty):
            yield sleep(0.005)
        yield redis.rpush("list", "kept")
        assert (yield redis.lrange("list")) == [b"kept"]

    kernel.run(job())


# -- subscriptions --------------------------------------------------------------------------------------------------------


def test_subscriptions(kernel: Kernel, empty: RedisServer) -> None:
    def job() -> Any:
        redis = io.redis(empty.url, decode=True)
        with (yield redis.subscribe("news", "more", patterns=["n*", "x*"])) as inbox:
            with pytest.raises(io.TimedOut, match=r"no message came in 0\.05 s"):
                yield inbox.next(timeout=0.05)
            assert (yield redis.publish("news", "one")) == 2
            assert [(yield inbox.next()), (yield inbox.next())] == [("news", "one", None), ("news", "one", "n*")]
            yield inbox.remove("news", patterns=["n*"])
            yield inbox.add("other")
            with redis.pipeline() as pipe:
                for n in range(10_000):
                    pipe.publish("other", n)
                pipe.publish("news", "nobody hears")
                assert (yield pipe.run())[-1] == 0
            for n in range(10_000):
                assert (yield inbox.next(timeout=5)) == ("other", str(n), None)
            with pytest.raises(io.TimedOut):
                yield inbox.next(timeout=0.01)
        with pytest.raises(io.Closed):
            yield inbox.next()
        with pytest.raises(UsageError, match="takes channels"):
            yield redis.subscribe()

    kernel.run(job())
    until(lambda: "subscribe" not in str(clients(empty)))


def test_a_subscription_whose_server_goes(kernel: Kernel, tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()

    def job() -> Any:
        redis = io.redis(server.url)
        with (yield redis.subscribe("news")) as inbox:
            yield redis.publish("news", "last")
            assert (yield inbox.next()).data == b"last"
            server.kill()
            with pytest.raises(io.ConnectionLost):
                yield inbox.next()
        with pytest.raises(io.ConnectFailed):
            yield redis.get("k")
        server.start()
        assert (yield redis.get("k")) is None, "the connections of before are nobody's business"

    try:
        kernel.run(job())
    finally:
        server.stop()


def test_who_may_not_subscribe(kernel: Kernel, tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    server.command("ACL", "SETUSER", "poor", "on", ">x", "~*", "resetchannels", "+@all")

    def job() -> Any:
        with pytest.raises(io.RedisError, match="SUBSCRIBE: NOPERM"):
            yield io.redis(server.url_for("poor", "x")).subscribe("news")

    try:
        kernel.run(job())
    finally:
        server.stop()


# -- what goes wrong --------------------------------------------------------------------------------------------------------


def test_nobody_gets_what_another_one_asked(kernel: Kernel, empty: RedisServer) -> None:
    """Commands are cut off at every moment, over one connection at most, and each answer is that to its own question."""
    redis = io.redis(empty.url, max_connections=1)

    def job() -> Any:
        assert (yield redis.command("ECHO", "one")) == b"one"
        with redis.pipeline(atomic=True) as pipe:
            pipe.incr("n")
            pipe.command("ECHO", "two")
            assert (yield pipe.run())[1] == b"two"
        assert (yield redis.command("BLPOP", "nothing", 0.01)) is None
        with (yield redis.subscribe("c")) as inbox:
            yield redis.publish("c", "three")
            assert (yield inbox.next()).data == b"three"
        assert (yield redis.command("ECHO", "four")) == b"four"

    def check() -> Any:
        assert (yield redis.command("ECHO", "between")) == b"between"

    assert cut_everywhere(kernel, job, lambda cut: kernel.run(check())) > 8
    until(lambda: len(clients(empty)) <= 2)


def test_a_timeout_is_told_and_the_connection_is_not_used_again(kernel: Kernel, server: RedisServer) -> None:
    proxy = Proxy(server.port)

    def job() -> Any:
        redis = io.redis(proxy.url, timeout=0.1)
        yield redis.set("k", "v")
        proxy.mute = True
        with pytest.raises(io.TimedOut, match=r"did not answer GET in 0\.1"):
            yield redis.get("k")
        with pytest.raises(io.TimedOut):
            yield redis.get("k")
        proxy.mute = False
        assert (yield redis.get("k")) == b"v"
        proxy.cut("request")
        with pytest.raises(io.ConnectionLost):
            yield redis.get("k")
        proxy.cut_all()
        assert (yield redis.get("k")) == b"v"

    try:
        kernel.run(job())
    finally:
        proxy.stop()


def test_who_does_not_speak_redis(kernel: Kernel, serve: Callable[..., Server]) -> None:
    def garbage(sock: socket.socket) -> None:
        sock.recv(100)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    def old(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(b"-ERR unknown command 'HELLO'\r\n")

    def full(sock: socket.socket) -> None:
        sock.sendall(b"-ERR max number of clients reached\r\n")
        sock.recv(1000)

    def talkative(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(b"%1\r\n+role\r\n+master\r\n")
        sock.recv(1000)
        sock.sendall(b"+one\r\n+another\r\n")
        sock.recv(1000)

    def job() -> Any:
        for peer, kind, words in (
            (garbage, io.ConnectionLost, "does not speak Redis"), (old, io.RedisError, "needs Redis or Valkey 6"),
            (talkative, io.ConnectionLost, "sent more than it was asked"),
            (full, io.RedisTryAgain, "max number of clients"),
        ):  # fmt: skip
            with pytest.raises(kind, match=words):
                yield io.redis(f"redis://127.0.0.1:{serve(peer).port}").get("k")

    kernel.run(job())


def test_what_passes_is_told_apart(kernel: Kernel, empty: RedisServer, tmp_path: Path) -> None:
    replica = RedisServer(tmp_path).start()
    replica.replicate(empty)

    def job() -> Any:
        with pytest.raises(io.RedisTryAgain, match="it is a replica") as refused:
            yield io.redis(replica.url).set("k", "v")
        assert refused.value.code == "READONLY"
        empty.command("CONFIG", "SET", "maxmemory", 1)
        with pytest.raises(io.RedisTryAgain, match="OOM"):
            yield io.redis(empty.url).set("k", "v")

    try:
        kernel.run(job())
    finally:
        empty.command("CONFIG", "SET", "maxmemory", 0)
        replica.stop()


# -- the pool ---------------------------------------------------------------------------------------------------------------


def test_1_000_jobs_on_a_pool_of_10(kernel: Kernel, empty: RedisServer) -> None:
    def one(n: int) -> Any:
        value = yield io.redis(empty.url).command("ECHO", n)
        assert pools(kernel)[0].lent <= 10
        return int(value)

    def job() -> Any:
        answers = []
        for task in [kernel.spawn(one(n)) for n in range(1000)]:
            answers.append((yield join(task)))
        return answers

    assert kernel.run(job()) == list(range(1000))
    assert pools(kernel)[0].idle == len(clients(empty)) == 10


def test_idle_connections_are_closed(kernel: Kernel, empty: RedisServer) -> None:
    def job() -> Any:
        redis = io.redis(empty.url, idle=0.05)
        yield redis.get("k")
        while pools(kernel)[0].idle:
            yield sleep(0.005)
        yield redis.get("k")

    kernel.run(job())


def test_what_a_job_left_open_ends_with_it(kernel: Kernel, empty: RedisServer) -> None:
    kept: list[Any] = []

    def forgets() -> Any:
        redis = io.redis(empty.url)
        yield redis.get("k")
        kept.append((yield redis.subscribe("c")))
        kept.append((yield redis.session()))

    context = a_job()
    enter(context)
    kernel.run(forgets())
    context.close_all()
    enter(None)
    assert [each.closed for each in kept] == [True, True]
    settle(kernel)
    assert pools(kernel)[0].idle == 1, "what the pool has outlives the job"


def test_what_lies_idle_makes_room_for_who_needs_an_fd(
    kernel: Kernel, empty: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kqueue.io.gate.room", lambda: 3)

    def one(n: int) -> Any:
        return (yield io.redis(empty.url_for(db=n % 10)).command("ECHO", n))

    def job() -> Any:
        answers = []
        for task in [kernel.spawn(one(n)) for n in range(200)]:
            answers.append(int((yield join(task))))
        return answers

    assert kernel.run(job()) == list(range(200))
    assert len(clients(empty)) <= 3
