"""kqueue.io.http in a real daemon, in each place where a job may run, and against the servers of others: aiohttp, nginx."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kqueue import io
from kqueue.errors import JobFailed
from kqueue.io import http
from kqueue.kernel import Kernel
from tests.apps import http_jobs
from tests.daemon import Daemon
from tests.io.conftest import Server
from tests.io.http_world import Site, kernel, pool_counts, site, until_gone
from tests.io.test_in_jobs import sockets
from tests.io.test_tls import Authority, authority
from tests.servers import START_TIMEOUT_S, _die_with_us, free_port, lack

__all__ = ["authority", "kernel", "site"]  # fixtures

Serve = Callable[..., Server]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(
        tmp_path, f"sqlite:///{tmp_path}/kqueue.db", modules="[tests.apps.http_jobs]", isolated_modules="[tests.apps.http_jobs]"
    )
    yield daemon
    daemon.close()


@pytest.mark.parametrize("kind", ["http_inline", "http_inline_async", "http_isolated", "http_pooled", "http_asyncio"])
def test_it_works_wherever_a_job_runs(daemon: Daemon, site: Site, kind: str) -> None:
    daemon.start()
    job: Any = getattr(http_jobs, kind)
    (first,) = daemon.dispatch(job.job(site.url))
    results = [first.result(20)]
    before = site.connections
    results += [handle.result(20) for handle in daemon.dispatch(*[job.job(site.url)] * 4)]
    assert results == [[True, [1, 100_000, 3, True]]] * 5
    if kind.startswith("http_inline"):
        assert site.connections - before <= 3 * 5, "the pools are the daemon's, not the jobs'"
    assert not [line for line in daemon.log if "left" in line or "orphan" in line], daemon.log
    assert daemon.stop() == 0


def test_a_job_that_is_timed_out_leaves_nothing(daemon: Daemon, serve: Serve, site: Site) -> None:
    silent = serve(until_gone)
    daemon.start()
    (warm_up,) = daemon.dispatch(http_jobs.http_get.job(site.url))
    assert warm_up.result(20) == 200
    before = sockets(daemon.pid)
    for handle in daemon.dispatch(*[http_jobs.http_late.job(f"http://127.0.0.1:{silent.port}/")] * 20):
        with pytest.raises(JobFailed, match="longer than its timeout"):
            handle.result(20)
    assert silent.accepted == 20
    assert sockets(daemon.pid) <= before
    assert daemon.stop() == 0


# -- servers of others ------------------------------------------------------------------------------------------------------


AIOHTTP = """
import asyncio, sys
from aiohttp import web

async def echo(request):
    body = await request.read()
    return web.json_response({"method": request.method, "size": len(body), "first": body[:4].decode("latin-1"),
                              "query": dict(request.query)})

async def form(request):
    found = {}
    async for part in await request.multipart():
        data = await part.read()
        found[part.name] = [part.filename, len(data)]
    return web.json_response(found)

async def stream(request):
    response = web.StreamResponse()
    response.enable_chunked_encoding()
    response.enable_compression()
    await response.prepare(request)
    for number in range(100):
        await response.write(b"line %d\\n" % number * 100)
    await response.write_eof()
    return response

async def moved(request):
    raise web.HTTPTemporaryRedirect("/echo")

app = web.Application(client_max_size=1 << 30)
for path, page in (("/echo", echo), ("/form", form), ("/stream", stream), ("/moved", moved)):
    app.router.add_route("*", path, page)

async def main():
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_aiohttp_as_the_server(kernel: Kernel) -> None:
    if subprocess.run([sys.executable, "-c", "import aiohttp"], capture_output=True).returncode:
        lack("aiohttp")
    server = subprocess.Popen([sys.executable, "-c", AIOHTTP], stdout=subprocess.PIPE, text=True, preexec_fn=_die_with_us)
    assert server.stdout is not None
    url = f"http://127.0.0.1:{int(server.stdout.readline())}"

    def lines() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 1000

    def job() -> Any:
        assert (yield http.post(f"{url}/echo", body=lines(), params={"a": "b c"})).json() == {
            "method": "POST", "size": 1_000_000, "first": "xxxx", "query": {"a": "b c"},
        }  # fmt: skip
        found = (yield http.post(f"{url}/form", data={"a": "1"}, files={"f": ("n.txt", b"y" * 70_000)})).json()
        assert found == {"a": [None, 1], "f": ["n.txt", 70_000]}
        response = yield http.get(f"{url}/stream")
        assert response.headers["content-encoding"] in ("gzip", "deflate")
        assert response.body == b"".join(b"line %d\n" % number * 100 for number in range(100))
        response = yield http.put(f"{url}/moved", json=[1])
        assert (response.json()["method"], response.json()["first"]) == ("PUT", "[1]")
        answers = yield io.gather(*(http.get(f"{url}/echo", params={"n": str(n)}) for n in range(300)))
        assert [answer.json()["query"]["n"] for answer in answers] == [str(n) for n in range(300)]

    try:
        kernel.run(job())
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


NGINX = """
daemon off; master_process off; pid {room}/pid; error_log {room}/error;
events {{ worker_connections 256; }}
http {{
  access_log {room}/access; client_body_temp_path {room}/body; proxy_temp_path {room}/proxy; fastcgi_temp_path {room}/fastcgi;
  uwsgi_temp_path {room}/uwsgi; scgi_temp_path {room}/scgi; keepalive_requests 10; client_max_body_size 1m;
  gzip on; gzip_types text/plain; gzip_min_length 1;
  log_format line "$connection $connection_requests $status";
  server {{
    listen 127.0.0.1:{port} ssl; ssl_certificate {cert}; ssl_certificate_key {key}; server_name localhost;
    root {room}/www; access_log {room}/lines line; default_type text/plain;
    location /moved {{ return 301 /page.txt; }}
    location /limited {{ gzip off; limit_rate 1k; alias {room}/www/page.txt; }}
    location /put {{ return 201 "put"; }}
  }}
}}
"""


def test_nginx_as_the_server(kernel: Kernel, authority: Authority, tmp_path: Path) -> None:
    """Over TLS. It closes a connection after ten requests, packs, and says 413 before a body is there."""
    program = shutil.which("nginx") or lack("nginx")
    authority.server("nginx")
    (tmp_path / "www").mkdir()
    (tmp_path / "www/page.txt").write_bytes(b"page " * 5_000)
    port = free_port()
    config = tmp_path / "nginx.conf"
    files = {kind: str(authority.directory / f"nginx.{kind}") for kind in ("pem", "key")}
    config.write_text(NGINX.format(room=tmp_path, port=port, cert=files["pem"], key=files["key"]))
    os.chmod(tmp_path, 0o755)
    server = subprocess.Popen(
        [program, "-c", str(config), "-p", str(tmp_path), "-e", str(tmp_path / "error")], stderr=subprocess.DEVNULL,
        preexec_fn=_die_with_us,
    )  # fmt: skip
    url = f"https://localhost:{port}"
    client = http.Client(verify=authority.ca, proxy="")

    def job() -> Any:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with suppress(http.HTTPConnectFailed):
                page = yield client.get(f"{url}/page.txt")
                break
            assert time.monotonic() < deadline, (tmp_path / "error").read_text()
        assert page.headers["content-encoding"] == "gzip"
        for _ in range(24):
            assert (yield client.get(f"{url}/moved")).body == b"page " * 5_000
        assert (yield client.put(f"{url}/put", data=b"x" * 100_000)).status == 201
        assert (yield client.put(f"{url}/put", data=b"x" * 2_000_000)).status == 413
        assert (yield client.get(f"{url}/nothing")).status == 404
        with pytest.raises(http.HTTPTimeout):
            yield client.get(f"{url}/limited", timeout=0.2)

    try:
        kernel.run(job())
    finally:
        server.kill()
        server.wait()
    lines = [line.split() for line in (tmp_path / "lines").read_text().splitlines()]
    per_connection = [sum(line[0] == each for line in lines) for each in {line[0] for line in lines}]
    assert max(per_connection) == 10, json.dumps(per_connection)
    assert len(per_connection) <= 8
    assert pool_counts(kernel)[0][0] == 0
