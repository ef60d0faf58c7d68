"""Signed envelopes: whatever was not signed with one of our keys, as it stands, does not run; and the key stays where it is."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kqueue
import kqueue.dispatch
from kqueue import BoundJob, KQueueRuntime, SecurityConfig, current, enqueue, events, job, sleep
from kqueue.brokers.base import Row
from kqueue.brokers.commands.memory import MemoryStore
from kqueue.brokers.memory import MemoryBroker
from kqueue.client import Client, where
from kqueue.client.memory import MemoryClient
from kqueue.codec import MAX_BYTES, Envelope, decode, encode, from_json
from kqueue.dispatch import NewJob, prepare
from kqueue.errors import ConfigError, EnvelopeError, KQueueError, NewerEnvelope, UsageError
from kqueue.execution import wire
from kqueue.execution.child_frames import parse
from kqueue.registry import registry
from kqueue.signing import ENVIRONMENT, MIN_KEY_BYTES, Keys, load, signed_by, unsigned
from tests.daemon import Daemon
from tests.test_isolated import Bench

OLD, NEW, FOREIGN = (word.encode() * 8 for word in ("old.key!", "new-key?", "eve's key"))
ENVELOPE = encode(Envelope("id", "note", ["a", "ü", {"k": [1, 2.5, None]}], {}))


def keys(*of: bytes) -> Keys:
    return Keys(of, "/etc/kqueue.key")


def write(path: Path, *lines: bytes, mode: int = 0o600) -> str:
    path.write_bytes(b"\n".join(lines) + b"\n")
    path.chmod(mode)
    return str(path)


# -- the signature ------------------------------------------------------------------------------------------------------------


def test_what_is_signed_stands_there_as_it_was_and_comes_back_as_it_was() -> None:
    signed = keys(OLD).sign(ENVELOPE)
    assert signed.endswith(ENVELOPE)
    assert not signed.startswith(b"{")
    assert keys(OLD).check(signed) == unsigned(signed) == ENVELOPE
    assert unsigned(ENVELOPE) == ENVELOPE
    assert (signed_by(signed), signed_by(ENVELOPE)) == (keys(OLD).ids[0], None)
    signed.decode()  # text, since JSON frames carry it


def test_a_change_of_any_byte_is_found() -> None:
    ring = keys(OLD, NEW)
    signed = ring.sign(ENVELOPE)
    for place in range(len(signed)):
        for flip in (0x01, 0x20, 0x80):
            altered = bytearray(signed)
            altered[place] ^= flip
            with pytest.raises(EnvelopeError):
                ring.check(bytes(altered))


def test_so_is_anything_cut_off_or_added() -> None:
    ring = keys(OLD)
    signed = ring.sign(ENVELOPE)
    for size in range(len(signed)):
        for cut in (signed[:size], signed[size + 1 :]):
            with pytest.raises(EnvelopeError):
                ring.check(cut)
    for more in (signed + b" ", signed + b"\n", signed + signed, ring.sign(signed)[:-1]):
        with pytest.raises(EnvelopeError):
            ring.check(more)
    with pytest.raises(EnvelopeError):
        decode(ring.check(ring.sign(signed)))  # signed twice: proven, and still no envelope


def test_a_signature_of_one_envelope_is_none_of_another() -> None:
    ring = keys(OLD)
    other = encode(Envelope("id2", "note", [], {}))
    head = ring.sign(ENVELOPE)[: -len(ENVELOPE)]
    with pytest.raises(EnvelopeError, match="was altered after it was signed with the key"):
        ring.check(head + other)


def test_messages_say_which_it_is_and_what_to_do() -> None:
    ring = keys(OLD)
    with pytest.raises(EnvelopeError, match=rf"is not signed.*needs \${ENVIRONMENT}.*dispatch it again"):
        ring.check(ENVELOPE)
    unknown = keys(FOREIGN)
    with pytest.raises(EnvelopeError, match=rf"the key {unknown.ids[0]}, which is not in /etc/kqueue.key \({ring.ids[0]}\)"):
        ring.check(unknown.sign(ENVELOPE))
    with pytest.raises(EnvelopeError, match=rf"altered after it was signed with the key {ring.ids[0]}"):
        ring.check(ring.sign(ENVELOPE) + b" ")
    forged = keys(FOREIGN).sign(ENVELOPE).replace(keys(FOREIGN).ids[0].encode(), ring.ids[0].encode(), 1)
    with pytest.raises(EnvelopeError, match="or was never signed with it"):
        ring.check(forged)


SHORT = b"%kq1:" + b"0" * 8 + b":" + b"0" * 63 + b":{}"


@pytest.mark.parametrize("data", [b"%kq", b"%kq1:", SHORT, b"%kq0:{}", b"%kqx", b"%kq1:{}"])
def test_half_a_signature_is_an_error_for_everybody(data: bytes) -> None:
    for read in (unsigned, keys(OLD).check):
        with pytest.raises(EnvelopeError, match="half a signature") as refusal:
            read(data)
        assert not isinstance(refusal.value, NewerEnvelope)


def test_a_signature_of_a_later_version_is_a_deploy_under_way() -> None:
    for read in (unsigned, keys(OLD).check):
        with pytest.raises(NewerEnvelope, match="later version"):
            read(b"%kq2:whatever{}")


def test_a_key_is_replaced_while_jobs_wait() -> None:
    waiting = keys(OLD).sign(ENVELOPE)
    for ring in (keys(OLD, NEW), keys(NEW, OLD)):
        assert ring.check(waiting) == ring.check(keys(NEW).sign(ENVELOPE)) == ENVELOPE
        assert signed_by(ring.sign(ENVELOPE)) == ring.ids[0]
    with pytest.raises(EnvelopeError):
        keys(NEW).check(waiting)


def test_no_key_shows() -> None:
    ring = keys(OLD, NEW)
    shown = repr(ring) + str(ring.ids) + repr(ring.sign(ENVELOPE))
    assert OLD.decode() not in shown
    assert NEW.decode() not in shown
    assert ring.ids == [keys(OLD).ids[0], keys(NEW).ids[0]]
    assert len(set(keys(OLD, NEW, FOREIGN).ids)) == 3


# -- the file -----------------------------------------------------------------------------------------------------------------


def test_a_file_has_a_key_a_line(tmp_path: Path) -> None:
    text = (b"# made in May", b"", b"  " + NEW + b"  \r", b"\t# the one before", OLD, NEW)
    ring = load(write(tmp_path / "keys", *text))
    assert (ring.ids, ring.warning) == (keys(NEW, OLD).ids, "")
    assert ring.check(keys(OLD).sign(ENVELOPE)) == ENVELOPE


@pytest.mark.parametrize("key", [b"0123456789abcdef" * 4, b"q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA=", b"x" * 20 + b"#" * 20])
def test_a_key_is_the_line_whatever_it_encodes(tmp_path: Path, key: bytes) -> None:
    assert load(write(tmp_path / "keys", key)).ids == keys(key).ids


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([b""], "has no key: `openssl rand -hex 32` makes one"), ([b"# nothing", b"  "], "has no key"),
        ([OLD, b"x" * (MIN_KEY_BYTES - 1)], "keys:2: a key of 31 characters, which is less than 32; make one with `openssl rand"),
        ([b"two words " * 8], "keys:1: a key is one word of printable ASCII"), ([b"\xff" * 40], "keys:1: a key is one word"),
        ([OLD, b"", "schlüssel".encode() * 8], "keys:3: a key is one word"), ([b"\0" * 64], "keys:1: a key is one word"),
        ([b"\xef\xbb\xbf" + OLD], "keys:1: a key is one word"), ([OLD] * 2000, "is over 65536 bytes"),
    ],
)  # fmt: skip
def test_what_is_no_key_is_refused_with_its_line_and_never_shown(tmp_path: Path, lines: list[bytes], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(write(tmp_path / "keys", *lines))
    assert message in str(refusal.value)
    assert not any(line and line.decode("latin1") in str(refusal.value) for line in lines)


def test_who_may_write_the_file_could_sign_and_who_may_read_it_could_too(tmp_path: Path) -> None:
    for mode in (0o602, 0o666, 0o777):
        with pytest.raises(ConfigError, match="anybody can write to the signing key file"):
            load(write(tmp_path / "keys", OLD, mode=mode))
    for mode in (0o644, 0o444):
        assert "anybody on this host can read the signing key file" in load(write(tmp_path / "keys", OLD, mode=mode)).warning
    for mode in (0o600, 0o400, 0o640, 0o660):
        assert load(write(tmp_path / "keys", OLD, mode=mode)).warning == ""


def test_a_file_that_is_not_there_or_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        load(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(str(tmp_path))


# -- the runtime --------------------------------------------------------------------------------------------------------------


class House:
    """A memory broker, and runtimes with and without keys on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = MemoryStore()
        self.client = MemoryClient(self.store)
        self.told: list[Any] = []
        self.ran: list[Any] = []

        @job(name="note", keep_result=60, max_attempts=1)
        def note(word: str) -> Any:
            yield sleep(0)
            self.ran.append(word)

        self.note = note

    def run(self, *of: bytes, mode: int = 0o600, **settings: Any) -> KQueueRuntime:
        path = write(self.directory / "keys", *of, mode=mode) if of else None
        runtime = KQueueRuntime(MemoryBroker(self.store), security=SecurityConfig(signing_key_file=path, **settings))
        for kind in (events.JobEnded, events.Warned):
            runtime.events.subscribe(kind, self.told.append)
        assert runtime.run(burst=True, handle_signals=False) == 0
        return runtime

    def dispatch(self, bound: BoundJob, ring: Keys | None = None) -> NewJob:
        prepared = prepare(bound, bound.registration, keys=ring)
        self.client.enqueue([prepared])
        return prepared

    def row(self, id: str) -> Row:
        row = self.client.show(id)
        assert row is not None
        return row

    def reason(self, id: str) -> str:
        """Why it is dead."""
        row = self.row(id)
        assert (row.state, row.counters) == ("dead", (0, 0, 0, 0, 0))
        (certificate,) = map(from_json, row.certificates)
        assert (certificate["cause"], certificate["ended_by"]) == ("refused", "supervisor")
        return str(certificate["error"]["message"])


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr(registry, "_jobs", {})
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    return House(tmp_path)


def test_only_what_was_signed_runs_and_the_rest_is_buried_with_the_reason(house: House) -> None:
    plain = house.dispatch(house.note.job("unsigned"))
    foreign = house.dispatch(house.note.job("foreign"), keys(FOREIGN))
    ours = prepare(house.note.job("altered"), house.note.registration, keys=keys(OLD))
    altered = ours._replace(envelope=ours.envelope.replace(b'"altered"', b'"forged!"'))
    moved = prepare(house.note.job("moved"), house.note.registration, keys=keys(OLD))._replace(id="elsewhere")
    house.client.enqueue([altered, moved])
    good = [house.dispatch(house.note.job(word), ring) for word, ring in (("new", keys(NEW)), ("old", keys(OLD)))]
    house.run(NEW, OLD)
    assert sorted(house.ran) == ["new", "old"]
    assert [house.row(each.id).state for each in good] == ["done", "done"]
    assert "is not signed" in house.reason(plain.id)
    assert f"with the key {keys(FOREIGN).ids[0]}, which is not in" in house.reason(foreign.id)
    assert "was altered after it was signed" in house.reason(altered.id)
    assert "says that it is" in house.reason("elsewhere")


def test_without_a_key_a_signed_job_is_read_so_that_clients_can_have_theirs_first(house: House) -> None:
    house.dispatch(house.note.job("signed"), keys(FOREIGN))
    house.dispatch(house.note.job("plain"))
    half = house.dispatch(house.note.job("half"))
    house.store._jobs[half.id].envelope = b"%kq1:" + half.envelope
    house.run()
    assert sorted(house.ran) == ["plain", "signed"]
    assert "half a signature" in house.reason(half.id)


def test_a_later_kind_of_signature_waits_for_the_deploy(house: House) -> None:
    later = house.dispatch(house.note.job("later"))
    house.store._jobs[later.id].envelope = b"%kq2:" + later.envelope
    house.run(OLD)
    assert (house.row(later.id).state, house.row(later.id).counters.deferrals) == ("delayed", 1)


def test_what_inline_jobs_enqueue_is_signed_and_so_are_follow_ups(house: House) -> None:
    @job(name="parent")
    def parent() -> Any:
        yield enqueue(house.note.job("enqueued"))
        current().then(house.note.options(delay=0).job("after"))

    settled: list[Any] = []
    real = house.store.settle
    house.store.settle = lambda batch: (settled.extend(batch), real(batch))[1]  # type: ignore[method-assign]
    house.dispatch(parent.job(), keys(OLD))
    runtime = house.run(OLD)
    assert house.ran[0] == "enqueued"
    (follow_up,) = [each for item in settled for each in item.follow_ups]
    assert runtime.keys is not None
    assert decode(runtime.keys.check(follow_up.envelope)).args == ["after"]


def test_limits_of_size_count_the_json(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = SimpleNamespace(time=lambda: 1_790_000_000.123)  # it stands there with as many digits as it has
    monkeypatch.setattr(kqueue.dispatch, "time", frozen)
    limit = 1024
    exact = "x" * (limit - len(prepare(house.note.job(""), None, arguments_too=False).envelope))
    envelope = prepare(house.note.job(exact), house.note.registration, keys=keys(OLD), max_bytes=limit)
    assert len(unsigned(envelope.envelope)) == limit < len(envelope.envelope)
    house.client.enqueue([envelope])
    house.run(OLD, max_envelope_bytes=limit)
    assert house.ran == [exact]


def test_a_retry_that_must_end_by_a_time_reads_the_time_in_a_signed_envelope(house: House) -> None:
    @job(name="late", retry_until=0.001, backoff=5)
    def late() -> Any:
        yield
        raise LookupError

    id = house.dispatch(late.job(), keys(OLD)).id
    house.run(OLD)
    assert "after retry_until" in from_json(house.row(id).certificates[0])["why"]


def test_a_file_that_anybody_can_read_is_warned_of_and_one_that_is_none_stops_the_start(house: House, tmp_path: Path) -> None:
    house.run(OLD, mode=0o644)
    (warned,) = [fact for fact in house.told if isinstance(fact, events.Warned)]
    assert "anybody on this host can read" in warned.message
    with pytest.raises(ConfigError, match="has no key"):
        house.run(b"# none")
    with pytest.raises(ConfigError, match="cannot be read"):
        KQueueRuntime(MemoryBroker(house.store), security=SecurityConfig(signing_key_file=str(tmp_path / "none")))


# -- children -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    path = write(tmp_path / "keys", OLD)
    monkeypatch.setenv(ENVIRONMENT, path)
    bench = Bench()
    bench.security = SecurityConfig(max_timeout_s=3600, signing_key_file=path)
    return bench


def test_what_children_dispatch_is_signed_by_the_supervisor(bench: Bench) -> None:
    ran = bench.one("dispatches", 3)
    rows = [bench.client.show(id) for id in ran.result]
    assert [decode(keys(OLD).check(row.envelope or b"")).args for row in rows if row] == [[0], [1], [2]]
    assert [row.lane for row in rows if row] == ["isolated"] * 3


def test_so_are_their_follow_ups(bench: Bench) -> None:
    ran = bench.one("then_plain")
    follow_ups = bench.settled[0].follow_ups
    assert [decode(keys(OLD).check(each.envelope)).id for each in follow_ups] == ran.result


def test_a_child_sees_neither_key_nor_signature(bench: Bench) -> None:
    seen = bench.one("sees").result
    assert seen["secrets"] == []
    assert seen["envelope"].startswith('{"v":1,"id":')


def test_a_child_cannot_pass_a_signature_of_its_own() -> None:
    signed = keys(FOREIGN).sign(ENVELOPE)
    for kind in (wire.ENQUEUE, wire.THEN):
        assert parse(kind, b"[[0,null,%d]]\n%b" % (len(ENVELOPE), ENVELOPE))
        with pytest.raises(wire.WireError):
            parse(kind, b"[[0,null,%d]]\n%b" % (len(signed), signed))


# -- clients ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(house: House) -> Client:
    return Client(house.client, keys=keys(OLD))


def test_a_client_signs_whatever_it_dispatches(house: House, client: Client) -> None:
    handles = [
        *client.dispatch([house.note.job("bound"), house.note.job("two")]),
        client.send("note", ["by name"], {}, kqueue.options.DispatchOptions()),
    ]
    assert [decode(keys(OLD).check(house.row(each.id).envelope or b"")).id for each in handles] == [each.id for each in handles]
    house.run(OLD)
    assert sorted(house.ran) == ["bound", "by name", "two"]
    assert [each.result() for each in handles] == [None] * 3


def test_a_client_without_a_key_hears_at_dispatch_that_it_needs_one(house: House) -> None:
    client = Client(house.client)
    client.dispatch([house.note.job("before")])
    house.run(OLD)
    late = Client(house.client)
    with pytest.raises(UsageError, match=rf"takes signed jobs only, and there is no key here: set \${ENVIRONMENT}"):
        late.dispatch([house.note.job("after")])
    with pytest.raises(UsageError, match="takes signed jobs only"):
        Client(house.client, SecurityConfig(signing_key_file="/etc/key")).dispatch([house.note.job("after")])
    house.run()
    Client(house.client).dispatch([house.note.job("again")])
    house.run()
    assert house.ran == ["again"]


def test_where_a_client_finds_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def signed_with(client: Client) -> str | None:
        handle = client.dispatch([BoundJob("any", [], {})])[0]
        row = client.store.show(handle.id)
        client.store.close()
        return signed_by((row and row.envelope) or b"")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kqueue.client, "_default", None)
    config = tmp_path / "other.yaml"
    config.write_text("queue: {url: 'sqlite:///q.db'}\nsecurity: {signing_key_file: keys}\n")
    monkeypatch.delenv("KQUEUE_CONFIG", raising=False)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setenv("KQUEUE_URL", f"sqlite:///{tmp_path}/q.db")
    with pytest.raises(ConfigError, match=r"keys cannot be read"):
        kqueue.connect(str(config))
    write(tmp_path / "keys", OLD, mode=0o644)
    assert signed_with(where()) is None
    assert signed_with(kqueue.connect(str(config))) == keys(OLD).ids[0]
    assert "anybody on this host can read" in caplog.text
    monkeypatch.setenv(ENVIRONMENT, write(tmp_path / "mine", NEW))
    for client in (where(), kqueue.connect(f"sqlite:///{tmp_path}/q.db"), kqueue.connect(str(config))):
        assert signed_with(client) == keys(NEW).ids[0]
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read"):
        kqueue.connect()
    client = where()
    assert client.store.list(None, None, 10), "who only looks needs no key"
    with pytest.raises(ConfigError, match="cannot be read"):
        client.dispatch([BoundJob("any", [], {})])
    client.store.close()


# -- the whole of it ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    write(tmp_path / "keys", NEW, OLD)
    daemon = Daemon(tmp_path, f"sqlite:///{tmp_path}/q.db", more="security: {signing_key_file: keys}")
    yield daemon
    daemon.close()


def test_a_daemon_with_a_key_from_dispatch_to_result(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    ended = daemon.kqueue("dispatch", "note", "--args", '["by command"]', "--wait", "--json")
    assert json.loads(ended.stdout)["result"] == "by command", ended.stderr
    handle = daemon.dispatch(BoundJob("crunch", [3], {}), BoundJob("fans_out", [2], {}))
    assert handle[0].result(20)["n"] == 3
    assert {line.split(maxsplit=1)[1] for line in daemon.marks.wait("note", 3)} == {"by command", "from 0", "from 1"}
    assert len(handle[1].result(20)) == 2
    forged = prepare(BoundJob("note", ["forged"], {}), None)
    daemon.client.store.enqueue([forged])
    with pytest.raises(KQueueError, match="is not signed"):
        kqueue.client.Handle(daemon.client.store, forged.id, None).result(20)
    shown = daemon.kqueue("show", forged.id)
    assert "the envelope is not signed" in shown.stdout
    shown = daemon.kqueue("show", handle[0].id)
    assert f"signed     with the key {keys(NEW).ids[0]}" in shown.stdout
    assert "crunch" in daemon.kqueue("jobs", "--state", "done").stdout
    with closing(sqlite3.connect(tmp_path / "q.db")) as db:
        held = b"".join(bytes(value) for row in db.execute("SELECT * FROM kq_job") for value in row if isinstance(value, bytes))
    assert NEW not in held
    assert NEW not in "\n".join(daemon.log).encode()
    assert daemon.stop() == 0


def test_check_names_the_keys_and_what_is_wrong_with_the_file(daemon: Daemon, tmp_path: Path) -> None:
    import subprocess
    import sys

    def check() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kqueue.cli.kqueued", "-c", str(daemon.config), "--check"]
        return subprocess.run(command, capture_output=True, text=True, env=daemon.environment, check=False, timeout=60)

    new, old = keys(NEW).ids[0], keys(OLD).ids[0]
    assert f"signed with the key {new}; also accepted: {old}\n" in check().stdout
    os.chmod(tmp_path / "keys", 0o644)
    assert "(anybody on this host can read the signing key file" in check().stdout
    (tmp_path / "keys").write_bytes(b"short\n")
    wrong = check()
    line = daemon.config.read_text().splitlines().index("security: {signing_key_file: keys}") + 1
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(f"{daemon.config}:{line}: {tmp_path}/keys:1: a key of 5 characters")
    assert len(wrong.stderr.splitlines()) == 1
    assert daemon.run() == 2
    assert daemon.log == wrong.stderr.splitlines()


def test_the_longest_envelope_still_goes_through_every_store(tmp_path: Path) -> None:
    client = Client(kqueue.client.open_store(f"sqlite:///{tmp_path}/q.db"), keys=keys(OLD))
    text = "x" * (MAX_BYTES - len(encode(Envelope("0" * 26, "any", [""], {}, enqueued_at=1790000000.123))))
    handle = client.dispatch([BoundJob("any", [text], {})])[0]
    row = client.store.show(handle.id)
    assert row is not None
    assert len(keys(OLD).check(row.envelope or b"")) in range(MAX_BYTES - 4, MAX_BYTES + 1)
    client.store.close()
