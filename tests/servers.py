"""Real servers for tests: started on a free port of 127.0.0.1, killed for real, and never left running.

Where the program is missing the test is skipped with the reason; under CI (`CI=true`) that is a failure: no skip goes unseen.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

START_TIMEOUT_S = 20.0
PR_SET_PDEATHSIG = 1


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_us() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class RedisServer:
    """One redis-server in `directory`. `options` are its own, as ("--appendonly", "yes"). Started by `start`, ended by `stop`."""

    def __init__(self, directory: Path, *options: str, tls: Certificates | None = None, port: int = 0) -> None:
        self.directory = directory
        self.options = options
        self.tls = tls
        self.port = port or free_port()
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
        return self._run([program, *fixed, *self.options])

    def _run(self, command: list[str]) -> RedisServer:
        log = (self.directory / "redis.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_us
            )
        self._await()
        return self

    def _await(self) -> None:
        """Until it takes connections."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(self.socket_path)
                except OSError:
                    time.sleep(0.005)
                else:
                    return
        raise RuntimeError(f"redis-server did not start:\n{(self.directory / 'redis.log').read_text()[-2000:]}")

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

    def replicate(self, master: RedisServer) -> None:
        """Become its replica, and wait until all it has is here."""
        self.command("REPLICAOF", "127.0.0.1", master.port)
        self.until("master_link_status", "up")
        self.until("slave_repl_offset", master.info("master_repl_offset"))

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
        self.lines = (
            f"port {self.port}", "bind 127.0.0.1", f"unixsocket {self.socket_path}", f"dir {directory}",
            f"sentinel monitor main 127.0.0.1 {master.port} 1", "sentinel down-after-milliseconds main 1000",
            "sentinel failover-timeout main 2000", *([f"requirepass {password}"] if password else []),
        )  # fmt: skip

    def start(self) -> Sentinel:
        program = shutil.which("redis-server") or lack("redis-server")
        file = self.directory / "sentinel.conf"
        file.write_text("\n".join(self.lines) + "\n")
        self._run([program, str(file), "--sentinel"])
        return self

    def until_it_knows(self, replicas: int) -> None:
        """So many replicas, each of which it could promote."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while str(self.command("SENTINEL", "REPLICAS", "main")).count("b'master-link-status': b'ok'") != replicas:
            assert time.monotonic() < deadline, "the Sentinel finds no replica"
            time.sleep(0.01)


class Certificates:
    """A CA of our own, and a certificate for 127.0.0.1 and localhost that it signed, made by openssl in `directory`."""

    def __init__(self, directory: Path) -> None:
        openssl = shutil.which("openssl") or lack("openssl")
        self.directory = directory
        self.ca = str(directory / "ca.pem")
        key, request, certificate = (str(directory / f"server.{kind}") for kind in ("key", "csr", "pem"))
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
