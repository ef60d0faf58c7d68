"""Real servers for tests: started on a free port of 127.0.0.1, killed for real, and never left running.

Where the program is missing the test is skipped with the reason; under CI (`CI=true`) that is a failure: no skip goes unseen.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

import hiredis
import pytest

from tests.daemon import wait_gone

START_TIMEOUT_S = 20.0
PR_SET_PDEATHSIG = 1
# Below those that Linux gives to connections (from 32768 on), with those of a cluster's bus 10000 further; some for each process
# of pytest-xdist: PYTEST_XDIST_WORKER is gw0, gw1, …
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = range(10000 + _WORKER % 4 * 2500, 12500 + _WORKER % 4 * 2500)
_next_ports = itertools.cycle(random.sample(PORTS, len(PORTS)))  # each once: servers that are made and not started hold none


def lack(what: str) -> NoReturn:
    """Skip the test, or fail it under CI, because `what` is not installed."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is not installed, and under CI nothing may be skipped")
    pytest.skip(f"{what} is not installed")


def redis_version() -> str:
    """For the header of pytest's report."""
    program = shutil.which("redis-server")
    if program is None:
        return "redis-server: not installed"
    words = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()
    return next((f"redis-server: {word[2:]}" for word in words if word.startswith("v=")), "redis-server: of unknown version")


def postgres_version() -> str:
    """For the header of pytest's report."""
    found = _of_postgresql("postgres")
    return f"postgresql: {found.parts[-3]}" if found else "postgresql: not installed by Debian"


def free_port() -> int:
    """One that stays free while its server is down: no connection of anybody gets it by chance, nor does another test process."""
    for port in _next_ports:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("a cycle has no end")


def _die_with_us() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Server(Protocol):
    """What `_start_on_a_free_port` starts."""

    port: int
    had_its_port: bool
    new_port: Callable[[], int]

    def attempt(self) -> bool: ...


def _start_on_a_free_port(server: Server, log: Path, name: str) -> None:
    """Where somebody else took its port before its first start, it has another one afterwards; later it waits for its own."""
    deadline = time.monotonic() + START_TIMEOUT_S
    said_before = log.stat().st_size if log.exists() else 0
    while not server.attempt():
        said = log.read_text()[said_before:]
        if "ddress already in use" not in said or time.monotonic() > deadline:
            raise RuntimeError(f"{name} did not start:\n{said[-2000:]}")
        if not server.had_its_port:
            server.port = server.new_port()
        said_before += len(said)
        time.sleep(0.05)
    server.had_its_port = True


class RedisServer:
    """One redis-server in `directory`. `options` are its own, as ("--appendonly", "yes"). Started by `start`, ended by `stop`."""

    def __init__(
        self, directory: Path, *options: str, tls: Certificates | None = None, new_port: Callable[[], int] = free_port
    ) -> None:
        self.directory = directory
        self.options = options
        self.tls = tls
        self.new_port = new_port
        self.port = new_port()
        self.had_its_port = False
        self.socket_path = str(directory / "redis.sock")
        self.password = ""  # of the default user
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self.url_for()

    def url_for(self, user: str = "", password: str = "", db: int = 0, host: str = "127.0.0.1", query: str = "") -> str:
        login = f"{user}:{password}@" if user or password else ""
        return f"redis{'s' if self.tls else ''}://{login}{host}:{self.port}/{db}{'?' if query else ''}{query}"

    def start(self) -> RedisServer:
        _start_on_a_free_port(self, self.directory / "redis.log", "redis-server")
        return self

    def _command(self) -> list[str]:
        program = shutil.which("redis-server") or lack("redis-server")
        ports = ["--port", "0", "--tls-port", str(self.port)] if self.tls else ["--port", str(self.port)]
        tls = self.tls.options if self.tls else []
        fixed = [
            "--bind",
            "127.0.0.1",
            "--unixsocket",
            self.socket_path,
            "--dir",
            str(self.directory),
            "--save",
            "",
            "--repl-diskless-sync-delay",  # 5 s otherwise
            "0",
            *ports,
            *tls,
            *([] if "--appendonly" in self.options else ["--appendonly", "yes"]),  # else every daemon warns that it keeps nothing
        ]
        return [program, *fixed, *self.options]

    def attempt(self) -> bool:
        """Whether it came up."""
        with (self.directory / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_us
            )
        return self._await()

    def _await(self) -> bool:
        """Until it takes connections and has read back what it kept: it answers LOADING to commands until then."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(START_TIMEOUT_S)
                try:
                    probe.connect(self.socket_path)
                    login = f"AUTH {self.password}\r\n" if self.password else ""  # NOAUTH would hide LOADING
                    probe.sendall(f"{login}PING\r\n".encode())
                    with probe.makefile("rb") as answers:
                        answer = b"".join(answers.readline() for _ in range(2 if login else 1))
                except OSError:
                    answer = b""
            if answer and b"-LOADING" not in answer:
                return True
            time.sleep(0.005)
        return False

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    stop = kill

    def command(self, *args: str | bytes | int, db: int = 0) -> object:
        """One command over the Unix socket, as the default user without a password."""
        return self.commands([args], db)[0]

    def commands(self, many: list[tuple[str | bytes | int, ...]], db: int = 0) -> list[object]:
        """Several at once; an error reply raises."""
        import redis

        with redis.Redis(unix_socket_path=self.socket_path, db=db, password=self.password or None) as client:
            return [client.execute_command(*args) for args in many]  # type: ignore[no-untyped-call]


    def info(self, field: str) -> str:
        """One field of INFO."""
        import redis

        with redis.Redis(unix_socket_path=self.socket_path) as client:
            return str(client.info("everything").get(field, ""))

    def until(self, field: str, value: str) -> None:
        """Wait until INFO says so."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.info(field) != value:
            assert time.monotonic() < deadline, f"{field} stays {self.info(field)!r}, and never becomes {value!r}"
            time.sleep(0.01)

    def until_it_has_what(self, master: RedisServer) -> None:
        """Wait until all that `master` has now is here, and perhaps more."""
        offset = int(master.info("master_repl_offset"))
        deadline = time.monotonic() + START_TIMEOUT_S
        while int(self.info("slave_repl_offset") or 0) < offset:
            assert time.monotonic() < deadline, f"it has {self.info('slave_repl_offset')} bytes, and never the {offset}th"
            time.sleep(0.01)

    def replicate(self, master: RedisServer, port: int = 0) -> None:
        """Become its replica (by another port than its own), and wait until all it has is here and it knows that."""
        self.command("REPLICAOF", "127.0.0.1", port or master.port)
        self.until("master_link_status", "up")
        self.until_it_has_what(master)
        deadline = time.monotonic() + START_TIMEOUT_S
        while "'state': 'online'" not in master.info("slave0"):
            assert time.monotonic() < deadline, "the master never takes its replica for one"
            time.sleep(0.01)
        # It may be "online" and still be sent nothing before it has answered for the first time, a second later.
        replicas = int(master.info("connected_slaves"))
        wait = ("WAIT", replicas, int(START_TIMEOUT_S * 1000))
        answers = master.commands([("SET", "replicated", 1), ("DEL", "replicated"), wait])
        assert answers[-1] == replicas, "the replicas never have what is written"

    def pause(self) -> None:
        """SIGSTOP: it is there, and says nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


class Sentinel(RedisServer):
    """A Sentinel that watches `master` as "main", alone: its own vote is enough."""

    def __init__(self, directory: Path, master: RedisServer, password: str = "") -> None:
        super().__init__(directory)
        self.password = password
        self.master = master

    def _command(self) -> list[str]:
        lines = (
            f"port {self.port}", "bind 127.0.0.1", f"unixsocket {self.socket_path}", f"dir {self.directory}",
            f"sentinel monitor main 127.0.0.1 {self.master.port} 1", "sentinel down-after-milliseconds main 1000",
            "sentinel failover-timeout main 2000", *([f"requirepass {self.password}"] if self.password else []),
        )  # fmt: skip
        program = shutil.which("redis-server") or lack("redis-server")
        file = self.directory / "sentinel.conf"
        file.write_text("\n".join(lines) + "\n")
        return [program, str(file), "--sentinel"]

    def until_it_knows(self, replicas: int) -> None:
        """So many replicas, each of which it could promote."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while str(self.command("SENTINEL", "REPLICAS", "main")).count("b'master-link-status': b'ok'") != replicas:
            assert time.monotonic() < deadline, "the Sentinel finds no replica"
            time.sleep(0.01)


class Cluster:
    """Nodes of a Redis Cluster, `directory`/0 and so on: `masters` that share the slots, then `replicas` of the first of them."""

    def __init__(self, directory: Path, *options: str, masters: int = 3, replicas: int = 0) -> None:
        fixed = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-require-full-coverage", "no")
        self.nodes = []
        self.masters = masters
        for number in range(masters + replicas):
            (directory / str(number)).mkdir()
            self.nodes.append(RedisServer(directory / str(number), *fixed, *options, new_port=_port_with_a_bus))

    @property
    def url(self) -> str:
        return self.nodes[0].url

    def start(self) -> Cluster:
        """Start all of them, and have them be one cluster."""
        share = 16384 // self.masters
        for number, node in enumerate(self.nodes):
            node.start()
            node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < self.masters:
                last = 16384 if number == self.masters - 1 else (number + 1) * share
                node.command("CLUSTER", "ADDSLOTS", *range(number * share, last))
            node.command("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port)
        self.until(lambda node: len(self._table(node)) == len(self.nodes))
        for node in self.nodes[self.masters :]:
            node.command("CLUSTER", "REPLICATE", self.id_of(self.nodes[0]))
            node.until("master_link_status", "up")
        self.until(lambda node: "cluster_state:ok" in str(node.command("CLUSTER", "INFO")))
        self.until(lambda node: sum("slave " in line for line in self._table(node)) == len(self.nodes) - self.masters)
        return self

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()

    def until(self, holds: Callable[[RedisServer], bool]) -> None:
        """Wait until `holds` of every node that runs."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not all(holds(node) for node in self.nodes if node.process is not None):
            assert time.monotonic() < deadline, "the nodes do not agree"
            time.sleep(0.01)

    def id_of(self, node: RedisServer) -> str:
        return next(line.split()[0] for line in self._table(node) if "myself" in line)

    def _table(self, node: RedisServer) -> list[str]:
        found = node.command("CLUSTER", "NODES")
        text = found.decode() if isinstance(found, bytes) else str(found)
        return text.strip().splitlines()

    def home(self, key: str) -> RedisServer:
        """The node that holds `key`, as the cluster itself says."""
        slot = self.slot(key)
        for first, last, holder, *_ in self._slots():
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == holder[1])
        raise LookupError(key)

    def slot(self, key: str) -> int:
        found = self.nodes[0].command("CLUSTER", "KEYSLOT", key)
        assert isinstance(found, int)
        return found

    def _slots(self) -> list[tuple[int, int, list[Any]]]:
        with socket.socket(socket.AF_UNIX) as raw:  # redis-py would turn the answer into a dict
            raw.connect(next(node for node in self.nodes if node.process is not None).socket_path)
            raw.sendall(b"CLUSTER SLOTS\r\n")
            reader = hiredis.Reader()
            while (answer := reader.gets()) is False:
                reader.feed(raw.recv(1 << 16))
        return answer  # type: ignore[no-any-return]

    def queue_at(self, node: RedisServer) -> str:
        """The name of a queue that `node` holds."""
        return next(name for n in range(1000) if self.home(f"kq:{{{(name := f'q{n}')}}}:") is node)

    def begin_move(self, key: str, to: RedisServer) -> RedisServer:
        """Announce that the slot of `key` moves to `to`; the node that has it until then."""
        source, slot = self.home(key), self.slot(key)
        to.command("CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(to))
        return source

    def move_keys(self, key: str, source: RedisServer, to: RedisServer, count: int = 1000) -> int:
        """Move at most `count` keys of the slot of `key`; how many there were."""
        keys = source.command("CLUSTER", "GETKEYSINSLOT", self.slot(key), count)
        assert isinstance(keys, list)
        if keys:
            source.command("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", *keys)
        return len(keys)

    def end_move(self, key: str, to: RedisServer) -> None:
        for node in (to, *(node for node in self.nodes[: self.masters] if node is not to)):
            node.command("CLUSTER", "SETSLOT", self.slot(key), "NODE", self.id_of(to))


def postgres_program(name: str) -> str:
    found = _of_postgresql(name)
    return str(found) if found else shutil.which(name) or lack("postgresql")


def _of_postgresql(name: str) -> Path | None:
    """The newest there is: Debian keeps the server's programs out of PATH, those of each version by themselves."""
    found = Path("/usr/lib/postgresql").glob(f"*/bin/{name}")
    return max(found, key=lambda path: int(path.parts[-3]), default=None)


class PostgresServer:
    """A PostgreSQL of one's own: superuser "postgres", password "secret", in a new directory that goes with it.

    It does not run as root, so root starts it as the user "postgres", who cannot get into pytest's own directories.
    """

    def __init__(self, *options: str, tls: Certificates | None = None) -> None:
        self.options = options
        self.new_port = free_port
        self.port = free_port()
        self.had_its_port = False
        self.directory = Path(tempfile.mkdtemp(prefix="kq-postgres-"))
        self.tls = tls
        self.process: subprocess.Popen[bytes] | None = None
        self._user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}

    @property
    def dsn(self) -> str:
        return self.dsn_for()

    def dsn_for(
        self, user: str = "postgres", password: str = "secret", db: str = "postgres", port: int = 0, query: str = ""
    ) -> str:
        return f"postgresql://{user}:{password}@127.0.0.1:{port or self.port}/{db}{query}"

    def start(self) -> PostgresServer:
        data = self.directory / "data"
        if not data.exists():
            self._init(data)
        _start_on_a_free_port(self, self.directory / "log", "PostgreSQL")
        return self

    def attempt(self) -> bool:
        """Whether it came up."""
        data = self.directory / "data"
        settings = [
            "listen_addresses=127.0.0.1", f"port={self.port}", f"unix_socket_directories={self.directory}", "fsync=off",
            "max_connections=60", "shared_buffers=16MB", *(self._tls() if self.tls else []), *self.options,
        ]  # fmt: skip
        command = [postgres_program("postgres"), "-D", str(data), *(part for each in settings for part in ("-c", each))]
        with self._log() as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_us, **self._user
            )
        return self._await()

    def _init(self, data: Path) -> None:
        password = self.directory / "password"
        password.write_text("secret")
        if self._user:
            for path in (self.directory, password):
                shutil.chown(path, "postgres", "postgres")
        options = ["-U", "postgres", "-A", "scram-sha-256", f"--pwfile={password}", "--locale=C", "-E", "UTF8", "--no-sync"]
        command = [postgres_program("initdb"), "-D", str(data), *options]
        subprocess.run(command, check=True, capture_output=True, cwd=self.directory, **self._user)

    def _tls(self) -> list[str]:
        assert self.tls is not None
        for name in ("server.key", "server.pem"):
            path = self.directory / name
            shutil.copy(self.tls.directory / name, path)
            path.chmod(0o600)
            if self._user:
                shutil.chown(path, "postgres", "postgres")
        files = (f"ssl_key_file={self.directory}/server.key", f"ssl_cert_file={self.directory}/server.pem")
        return ["ssl=on", *files]

    def _log(self) -> Any:
        return (self.directory / "log").open("ab")

    def _await(self) -> bool:
        """Until it lets us in."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            ready = [postgres_program("pg_isready"), "-q", "-h", str(self.directory), "-p", str(self.port)]
            if subprocess.run(ready, check=False).returncode == 0:
                return True
            time.sleep(0.02)
        return False

    def kill(self) -> None:
        """SIGKILL; and wait until the processes that served its clients have noticed."""
        if self.process is not None:
            family = [int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]
            self.process.kill()
            self.process.wait()
            self.process = None
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            wait_gone(family)

    def stop(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def sql(self, text: str, *params: Any) -> list[Any]:
        """Rows, by psycopg itself."""
        import psycopg

        with psycopg.connect(self.dsn, autocommit=True, options="-c lock_timeout=5000") as connection:
            cursor = connection.execute(text, params or None)
            return cursor.fetchall() if cursor.description else []

    def busy(self) -> list[Any]:
        """Clients that are not idle, with what they do; those of `sql` are not among them."""
        return self.sql(
            "select state, query from pg_stat_activity "
            "where backend_type = 'client backend' and pid <> pg_backend_pid() and state <> 'idle'"
        )


def _port_with_a_bus() -> int:
    """A free port whose neighbour 10000 further, which nodes talk by, is free as well."""
    while True:
        port = free_port()
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port + 10000))
            return port


class Certificates:
    """A CA of our own, and a certificate for 127.0.0.1 and localhost that it signed, made by openssl in `directory`."""

    def __init__(self, directory: Path) -> None:
        openssl = shutil.which("openssl") or lack("openssl")
        self.directory = directory
        self.ca = str(directory / "ca.pem")
        key, request, certificate = (str(directory / f"server.{kind}") for kind in ("key", "csr", "pem"))
        self.key, self.certificate = key, certificate
        (directory / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        ca_key, days = str(directory / "ca.key"), ["-days", "30"]
        new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        signed = ["-CA", self.ca, "-CAkey", ca_key, "-CAcreateserial", "-extfile", str(directory / "names")]
        for args in (
            ["req", "-x509", *new_key, "-keyout", ca_key, "-out", self.ca, *days, "-subj", "/CN=test CA"],
            ["req", *new_key, "-keyout", key, "-out", request, "-subj", "/CN=localhost"],
            ["x509", "-req", "-in", request, *signed, "-out", certificate, *days],
        ):
            subprocess.run([openssl, *args], check=True, capture_output=True)
        self.options = [
            "--tls-cert-file",
            certificate,
            "--tls-key-file",
            key,
            "--tls-ca-cert-file",
            self.ca,
            "--tls-auth-clients",
            "no",
        ]


class Proxy:
    """Stands between a client and a server on 127.0.0.1, and loses what it is told to lose. Runs in a thread of its own."""

    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self.open = True  # False: it accepts nobody
        self.mute = False  # replies are swallowed, nobody is cut off
        self.cuts = 0  # made so far
        self.on_cut: Callable[[], object] = lambda: None  # called in the thread, before anybody can notice
        self._cut: str = ""  # what to cut next: "reply" (the server has done it) or "request" (it has not)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake_read, self._wake_write = os.pipe()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._peers: dict[socket.socket, tuple[socket.socket, str]] = {}  # what comes from it is sent there, and is a …
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def cut(self, what: str = "reply") -> None:
        """Swallow the next "reply" or "request", and cut that connection."""
        self._cut = what

    def cut_all(self) -> None:
        """Cut every connection now."""
        os.write(self._wake_write, b"c")

    def stop(self) -> None:
        os.write(self._wake_write, b"q")
        self._thread.join()
        for opened in (self._listener, *self._peers):
            opened.close()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == self._wake_read:
                    if os.read(self._wake_read, 1) == b"q":
                        return
                    for peer in list(self._peers):
                        self._drop(peer)
                elif key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._peers:
                    assert isinstance(key.fileobj, socket.socket)
                    self._pass_on(key.fileobj)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            if not self.open:
                raise ConnectionRefusedError
            server = socket.create_connection(("127.0.0.1", self.server_port))
        except OSError:
            client.close()
            return
        self._peers |= {client: (server, "request"), server: (client, "reply")}
        for end in (client, server):
            self._selector.register(end, selectors.EVENT_READ)

    def _pass_on(self, source: socket.socket) -> None:
        to, kind = self._peers[source]
        try:
            data = source.recv(1 << 16)
            if data and kind == self._cut:
                self._cut = ""
                self.on_cut()
                self.cuts += 1
                data = b""
            if data and not (self.mute and kind == "reply"):
                to.sendall(data)
        except OSError:
            data = b""
        if not data:
            self._drop(source)

    def _drop(self, end: socket.socket) -> None:
        for peer in (end, self._peers.pop(end, (end, ""))[0]):
            self._peers.pop(peer, None)
            with suppress(KeyError, ValueError):
                self._selector.unregister(peer)
            peer.close()
