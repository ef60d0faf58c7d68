"""Connections: what they cost in a daemon, and that none is left.

TLS: 2,000 inline jobs with a connection each, all open at once; the server answers when it has a request on each. The memory is
what the daemon has more then than when it was idle, a connection; the rate is that of the handshakes, with the server's half of
them on the same machine.

Requests: 100,000 inline jobs that send one GET each, 500 at once, by a client that closes what lies idle for a second. The
daemon's open files are counted when a fifth of them is done and it is at rest again, and in the end; one more is a failure.
"""

from __future__ import annotations

import os
import subprocess
import time

import marks
import procfs
from bench import Bench
from http_jobs import Answering
from kqueued import Failure, Kqueued, connect
from throughput import fill
from webbed import forgetful, secure

from kqueue.client import Client

CONNECTIONS = 2_000
AT_ONCE = 500
PARTS = 5
SETTLE_S = 30.0


def measure_tls(bench: Bench) -> dict[str, float]:
    count = bench.pick(CONNECTIONS, CONNECTIONS // 10)
    room, url = bench.empty_queue()
    client = connect(url)
    certificate = f"{room}.pem"
    _make_certificate(certificate)
    with Answering(0.0, count, certificate) as server, Kqueued(room, url, ["webbed"]) as daemon:
        secure.dispatch(server.port, certificate)  # loads ssl, and waits for the others
        daemon.wait_for("connected", 1)
        idle_mib = procfs.memory(daemon.pid).resident
        fill(secure, count - 1, server.port, certificate)
        daemon.wait_for("connected", count)
        held_mib = procfs.memory(daemon.pid).resident
        server.wait_for_all()
        daemon.finished(client, connected=count, secure=count)
        moments = marks.read(daemon.marks, "connected")
    return {"tls_memory": (held_mib - idle_mib) * 1024 / (count - 1), "tls_rate": marks.rate(moments[1:])}


def measure_requests(bench: Bench) -> dict[str, float]:
    jobs = bench.pick(100_000, 10_000)
    room, url = bench.empty_queue()
    client = connect(url)
    with Answering(0.0, 0) as server, Kqueued(room, url, ["webbed"], inline=AT_ONCE) as daemon:
        first = _files_after(daemon, client, server, jobs // PARTS, jobs // PARTS)
        last = _files_after(daemon, client, server, jobs - jobs // PARTS, jobs)
        moments = marks.read(daemon.marks, "forgetful")
    if last > first:
        raise Failure(f"{last} files are open after {jobs} requests, and were {first} after a fifth of them")
    return {"requests": marks.rate(moments[jobs // PARTS :])}


def _files_after(daemon: Kqueued, client: Client, server: Answering, more: int, in_all: int) -> int:
    """How many files are open when `more` requests are done, and what lay idle since is closed."""
    fill(forgetful, more, f"http://127.0.0.1:{server.port}/")
    daemon.finished(client, forgetful=in_all)
    deadline, least = time.monotonic() + SETTLE_S, AT_ONCE
    while (count := len(os.listdir(f"/proc/{daemon.pid}/fd"))) < least or count > AT_ONCE // 5:
        least = min(least, count)
        if time.monotonic() > deadline:
            raise Failure(f"{count} files are open {SETTLE_S:g} s after the last request")
        time.sleep(2.0)  # longer than a connection may lie idle
    return count


def _make_certificate(path: str) -> None:
    """For localhost, with its key."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", path, "-out", path]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"openssl made no certificate: {done.stderr.strip()}")
