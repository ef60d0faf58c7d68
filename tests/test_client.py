"""The client: what it knows of daemons that run elsewhere, and what it refuses for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from kqueue import job
from kqueue.brokers.base import Counters, NewJob, Row
from kqueue.brokers.commands.memory import MemoryStore
from kqueue.client import Client, open_store
from kqueue.client.handle import Handle
from kqueue.client.memory import MemoryClient
from kqueue.client.published import LOOK_AGAIN_S, NO_LIMITS, read_limits, read_manifest
from kqueue.codec import decode, to_json
from kqueue.dispatch import describe
from kqueue.errors import EnvelopeError, JobFailed, JobNotFound, QueueFull, UsageError
from kqueue.job import BoundJob
from kqueue.options import DispatchOptions, JobOptions
from kqueue.registry import Registration
from kqueue.security import SecurityConfig
from tests.daemon import Daemon
from tests.servers import RedisServer


@job(name="client_plain", timeout=60)
def plain(word: str = "") -> Any:
    yield


@job(name="client_mail", queue="mail")
def mail() -> Any:
    yield


class Counting(MemoryClient):
    """A store that counts the looks at its documents."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())
        self.looks = 0

    def documents(self, prefix: str) -> dict[str, bytes]:
        self.looks += 1
        return super().documents(prefix)


class World:
    """A store, a client that has only its URL, and daemons that publish there."""

    def __init__(self) -> None:
        self.now = 5.0  # seconds
        self.store = Counting()
        self.client = Client(self.store, clock=lambda: self.now)

    def daemon(self, *queues: str, jobs: Mapping[str, JobOptions] | None = None, **limits: Any) -> None:
        """What a daemon of `queues` publishes when it starts."""
        manifest = {name: describe(Registration(name, options, None, True, "app")) for name, options in (jobs or {}).items()}
        for queue in queues:
            documents = {"manifest": manifest, "limits": SecurityConfig(**limits).published()}
            self.store._store.publish({f"{kind}:{queue}": to_json(document) for kind, document in documents.items()})

    def send(self, name: str, **overrides: Any) -> NewJob:
        """Dispatch by name; what stands in the store."""
        handle = self.client.send(name, [], {}, DispatchOptions(overrides=overrides))
        row = self.store.show(handle.id)
        assert row is not None
        return NewJob(row.id, row.queue, row.lane, row.priority, row.envelope or b"")


@pytest.fixture
def world() -> World:
    return World()


# -- limits that the daemon published ---------------------------------------------------------------------------------------


def test_limits_apply_soon_after_a_daemon_starts_though_the_first_dispatch_was_before(world: World) -> None:
    world.client.dispatch([plain.job()] * 3)
    world.daemon("default", queue_depth=4)
    world.now += LOOK_AGAIN_S
    world.client.dispatch([plain.job()])
    with pytest.raises(QueueFull, match="'default' holds 4 jobs, allowed are 4"):
        world.client.dispatch([plain.job()])


def test_limits_that_change_are_noticed(world: World) -> None:
    world.daemon("default", queue_depth=1)
    world.client.dispatch([plain.job()])
    world.daemon("default", queue_depth=2)
    world.now += LOOK_AGAIN_S
    world.client.dispatch([plain.job()])


def test_a_loop_that_dispatches_pays_for_one_look(world: World) -> None:
    for _ in range(100):
        world.client.dispatch([plain.job(), mail.job()])
        world.now += 0.09
    assert world.store.looks == 1
    world.now += 2
    world.client.dispatch([plain.job()])
    assert world.store.looks == 2


def test_a_strict_daemon_refuses_through_a_client_that_has_only_its_url(world: World) -> None:
    world.daemon("default", max_timeout_s=100, max_memory_mib=128)
    world.client.dispatch([plain.job()])
    with pytest.raises(UsageError, match=r"job 'client_plain': timeout 200 is over limits\.timeout 100"):
        world.client.dispatch([plain.options(timeout=200).job()])
    with pytest.raises(UsageError, match=r"timeout 0 \(no limit\) is over limits\.timeout 100"):
        world.client.dispatch([plain.options(timeout=0).job()])
    with pytest.raises(UsageError, match=r"max_memory 256 is over limits\.memory 128"):
        world.client.dispatch([plain.job(), plain.options(max_memory=256).job()])
    assert len(world.store.list(None, None, 10)) == 1, "one that is refused takes the whole batch along"


def test_limits_that_come_to_be_apply_to_a_job_that_passed_before(world: World) -> None:
    world.client.dispatch([plain.job()])
    world.client.dispatch([plain.options(timeout=70).job()])
    world.daemon("default", max_timeout_s=50)
    world.now += LOOK_AGAIN_S
    for _ in range(2):
        with pytest.raises(UsageError, match=r"timeout 60 is over limits\.timeout 50"):
            world.client.dispatch([plain.job()])
    world.client.dispatch([plain.options(timeout=40).job()])
    with pytest.raises(UsageError, match=r"timeout 60 is over limits\.timeout 50"):
        world.client.dispatch([plain.job()])


@job(name="client_shaped")
def shaped(a: int, /, b: int, *, c: int, d: int = 0) -> Any:
    yield


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}), ((1,), {}), ((1, 2), {}), ((1, 2, 3), {"c": 1}), ((1, 2), {"c": 1, "e": 2}), ((1, 2), {"f": 1, "e": 2, "c": 0}),
        ((1, 2), {"b": 1, "c": 1}), ((), {"a": 1, "b": 2, "c": 3}), ((1,), {"d": 1}), ((1, [2]), {"c": {}, "d": []}),
        ((1,), {"b": 2, "c": 3}),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_in_the_words_of_python(world: World, args: Any, kwargs: Any) -> None:
    why = ""
    try:
        signature(shaped.__wrapped__).bind(*args, **kwargs)
    except TypeError as error:
        why = str(error)
    for _ in range(2):  # it is remembered
        if not why:
            world.client.dispatch([shaped.job(*args, **kwargs)])
            continue
        with pytest.raises(UsageError) as refused:
            world.client.dispatch([shaped.job(*args, **kwargs)])
        expected = f"the arguments do not fit job 'client_shaped'{signature(shaped.__wrapped__)}: {why}"
        assert str(refused.value) == expected


def test_a_lenient_one_has_them_clamped(world: World) -> None:
    world.daemon("default", max_timeout_s=100, strict=False)
    id = world.client.dispatch([plain.options(timeout=200).job()])[0].id
    row = world.store.show(id)
    assert row is not None
    assert decode(row.envelope or b"").options == {"timeout": 100}


def test_an_envelope_may_be_as_large_as_the_daemon_says(world: World) -> None:
    world.daemon("default", max_envelope_bytes=2048)
    world.daemon("mail", max_envelope_bytes=4 << 20)
    with pytest.raises(EnvelopeError, match="allowed are 2048"):
        world.client.dispatch([plain.job("x" * 2048)])
    world.client.dispatch([plain.options(queue="mail").job("x" * (2 << 20))])


def test_limits_are_those_of_the_queue_that_a_job_goes_to(world: World) -> None:
    world.daemon("default", max_timeout_s=100)
    world.daemon("mail", max_timeout_s=10, queue_depth=1)
    world.client.dispatch([plain.job(), plain.options(timeout=99).job(), plain.options(queue="elsewhere", timeout=0).job()])
    with pytest.raises(UsageError, match=r"timeout 30 is over limits\.timeout 10"):
        world.client.dispatch([mail.job()])
    with pytest.raises(UsageError, match=r"timeout 60 is over limits\.timeout 10"):
        world.client.dispatch([plain.options(queue="mail").job()])
    world.client.dispatch([mail.options(timeout=1).job()])
    with pytest.raises(QueueFull, match="'mail' holds 1 jobs"):
        world.client.dispatch([mail.options(timeout=1).job()])


def test_a_configuration_of_its_own_goes_before_and_needs_no_look(world: World) -> None:
    world.daemon("default", max_timeout_s=10, queue_depth=1)
    client = Client(world.store, SecurityConfig(queue_depth=2), clock=lambda: world.now)
    client.dispatch([plain.job(), plain.job()])
    with pytest.raises(QueueFull, match="allowed are 2"):
        client.dispatch([plain.job()])
    assert world.store.looks == 0


# -- jobs that daemons published --------------------------------------------------------------------------------------------


def test_daemons_of_other_queues_add_their_jobs(world: World) -> None:
    world.daemon("default", jobs={"a": JobOptions()})
    world.daemon("mail", "bulk", jobs={"b": JobOptions(queue="mail", priority=3)})
    assert world.send("a").queue == "default"
    assert world.send("b")[1:4] == ("mail", "inline", 3)
    with pytest.raises(JobNotFound, match=r"memory:// knows no job .c.*; it knows a, b"):
        world.send("c")


def test_where_manifests_disagree_the_one_of_the_jobs_own_queue_is_right(world: World) -> None:
    world.daemon("a", jobs={"x": JobOptions(queue="mail", timeout=1), "y": JobOptions(queue="gone", timeout=1)})
    world.daemon("mail", jobs={"x": JobOptions(queue="mail", timeout=2), "y": JobOptions(queue="mail", timeout=2)})
    world.daemon("z", jobs={"x": JobOptions(queue="mail", timeout=3), "y": JobOptions(queue="gone", timeout=3)})
    assert {name: known.options.timeout for name, known in world.client.manifest().items()} == {"x": 2, "y": 2}


def test_an_unknown_name_is_looked_up_again_but_seldom(world: World) -> None:
    world.daemon("default", jobs={"old": JobOptions()})
    for _ in range(100):
        with pytest.raises(JobNotFound):
            world.send("new")
    world.daemon("default", jobs={"new": JobOptions(priority=5)})
    with pytest.raises(JobNotFound):
        world.send("new")
    assert world.store.looks == 1
    world.now += LOOK_AGAIN_S
    assert world.send("new").priority == 5
    assert set(world.client.manifest()) == {"new"}
    world.daemon("default", jobs={"newer": JobOptions()})
    assert set(world.client.manifest(refresh=True)) == {"newer"}, "who knows better can look at once"


def test_before_any_daemon_ran_a_name_is_taken_on_trust(world: World) -> None:
    assert world.send("anything").queue == "default"
    world.daemon("default", jobs={"something": JobOptions()})
    world.now += LOOK_AGAIN_S
    with pytest.raises(JobNotFound):
        world.send("anything")


def test_what_a_later_version_adds_does_no_harm() -> None:
    description = describe(plain.registration)
    description["options"]["shiny"] = 1
    (known,) = read_manifest({"manifest:default": to_json({"client_plain": {**description, "more": 2}})}).values()
    assert known == plain.registration._replace(target=None)
    (limits,) = read_limits({"limits:default": to_json({"max_timeout_s": 5, "max_shine": 1})}).values()
    assert limits == NO_LIMITS._replace(max_timeout_s=5)


@pytest.mark.parametrize("garbage", [b"", b"\xff", b"5", b"[]", b"null", b'{"x": 1}', b'{"x": {"name": "x", "options": []}}'])
def test_what_is_no_document_counts_as_not_published(garbage: bytes) -> None:
    good = to_json({"client_plain": describe(plain.registration)})
    assert set(read_manifest({"manifest:a": garbage, "manifest:b": good})) == {"client_plain"}
    assert read_limits({"limits:a": garbage}).get("a", NO_LIMITS) == NO_LIMITS
    assert read_limits({"limits:a": b'{"queue_depth": "many"}', "limits:b": b'{"queue_depth": 1}'})["b"].queue_depth == 1


@pytest.mark.parametrize("certificate", [b"\xff", b"[1]", b"7", b"{}", b'{"error": {}}', b'{"error": "x"}', b'{"error": [1]}'])
def test_a_certificate_that_cannot_be_read_is_no_crash(certificate: bytes) -> None:
    class Garbled(MemoryClient):
        def show(self, id: str, queue: str | None = None) -> Row:
            return Row(id, "q", "dead", "inline", 0, 0.0, Counters(), b"", None, (certificate,))

    with pytest.raises(JobFailed, match=r"^job a is dead: its last certificate cannot be read"):
        Handle(Garbled(MemoryStore()), "a", None).result(timeout=1)


def test_threads_share_a_client(world: World) -> None:
    world.daemon("default", queue_depth=1000)

    def dispatch() -> None:
        for _ in range(50):
            world.client.dispatch([plain.job()])
            world.now += 1

    threads = [threading.Thread(target=dispatch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert world.store.stats()["default"].ready == 400


# -- real daemons -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "redis", "unix"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/q.db"
    server: RedisServer = request.getfixturevalue("redis_server")
    server.command("FLUSHALL")
    return server.url if request.param == "redis" else f"unix://{server.socket_path}?db=0"


@pytest.fixture
def daemons(tmp_path: Path, url: str) -> Iterator[list[Daemon]]:
    """Two on one broker, with different queues and different jobs; neither has been started."""
    settings: list[dict[str, Any]] = [
        {"names": "[default]", "isolated_modules": "[]", "more": "limits: {timeout: 1m, queue_depth: 7}"},
        {"names": "[heavy]", "modules": "[]", "more": "limits: {timeout: 2m}"},
    ]
    daemons = []
    for number, more in enumerate(settings):
        directory = tmp_path / f"daemon{number}"
        directory.mkdir()
        daemons.append(Daemon(directory, url, **more))
    yield daemons
    for daemon in daemons:
        daemon.close()


def test_two_daemons_with_different_queues_and_jobs_share_a_broker(url: str, daemons: list[Daemon]) -> None:
    light, heavy = (daemon.start() for daemon in daemons)
    done = heavy.kqueue("dispatch", "note", "--args", '["hi"]', "--wait")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(' done: "hi"\n')
    done = light.kqueue("dispatch", "crunch", "--args", "[10]", "--queue", "heavy", "--wait")
    assert (done.returncode, done.stderr) == (0, "")
    unknown = light.kqueue("dispatch", "crumch")
    assert unknown.returncode == 2
    assert "knows no job 'crumch' (did you mean \"crunch\"?)" in unknown.stderr

    client = Client(open_store(url))
    assert {"note", "crunch"} <= set(client.manifest())
    client.send("crunch", [10], {}, DispatchOptions(overrides={"queue": "heavy", "timeout": 120}))
    with pytest.raises(UsageError, match=r"timeout 120 is over limits\.timeout 60"):
        client.send("note", ["hi"], {}, DispatchOptions(overrides={"timeout": 120}))
    assert (light.stop(), heavy.stop()) == (0, 0)
    with pytest.raises(QueueFull, match="'default' holds 0 jobs, allowed are 7"):
        client.dispatch([BoundJob("note", ["hi"], {})] * 8)
    client.store.close()
