"""The examples of docs/io work as they stand, and its tables name what there is."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from kqueue import Retry, io
from kqueue.io import errors
from kqueue.kernel import Kernel
from kqueue.registry import registry
from tests.io.conftest import Server
from tests.io.http_world import Site, kernel, site

DOCS = Path(__file__).parent.parent.parent / "docs"
__all__ = ["kernel", "site"]  # fixtures

Serve = Callable[..., Server]


def example(page: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The function that the job `name` of docs/io/`page` is made of."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (DOCS / "io" / page).read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.setattr(registry, "_jobs", dict(getattr(registry, "_jobs", {})), raising=False)
    namespace: dict[str, Any] = {"__name__": "docs_io"}
    exec(code, namespace)
    return namespace[name]


def answers(sock: socket.socket) -> None:
    sock.recv(1000)
    sock.sendall(b"200 fine\nand more")


def test_the_example_of_streams(kernel: Kernel, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    whois = example("streams.md", "whois", monkeypatch)
    assert kernel.run(whois("example.org", "127.0.0.1", serve(answers).port)) == "200 fine\nand more"


def test_the_example_of_structure(kernel: Kernel, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    check = example("structure.md", "check", monkeypatch)
    assert kernel.run(check(["127.0.0.1"] * 30, serve(answers).port)) == ["200 fine"] * 30


def test_the_example_of_http(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    convert = example("http.md", "convert", monkeypatch)
    site.pages["/rates"] = (200, b'{"USD": 1.25}')
    assert kernel.run(convert(10, f"{site.url}/rates")) == 12.5
    assert site.asked[-1][1] == "/rates?base=EUR"
    with pytest.raises(Retry) as again:
        kernel.run(convert(10, f"{site.url}/status?code=503&after=7"))
    assert again.value.delay_s == 7
    with pytest.raises(io.http.HTTPStatusError):
        kernel.run(convert(10, f"{site.url}/status?code=404"))


def test_every_error_of_http_is_in_its_table() -> None:
    page = (DOCS / "io/http.md").read_text()
    told = re.findall(r"^\| `io\.http\.(HTTP\w+|\w+Failed|Invalid\w+|\w*Redirect\w*)` \|", page, re.MULTILINE)
    there = [name for name, value in vars(io.http).items() if isinstance(value, type) and issubclass(value, io.http.HTTPFailed)]
    assert sorted(told) == sorted(there)
    for name in io.http.__all__:
        assert getattr(io.http, name)
    settings = re.findall(r"(\w+)=", re.search(r"`Client\(base_url=.*?\)`", page, re.DOTALL)[0])  # type: ignore[index]
    assert sorted(settings) == sorted(signature(io.http.Client).parameters)
    defaults = ", ".join(f"{name}={value:g}" if value else f"{name}=None" for name, value in io.http.Timeouts()._asdict().items())
    assert f"`Timeouts({defaults})`" in page.replace("\n", " ")


def test_every_error_is_in_the_table() -> None:
    told = re.findall(r"^\| `io\.(\w+)` \|", (DOCS / "io/streams.md").read_text(), re.MULTILINE)
    there = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.IOFailed)]
    assert sorted(told) == sorted(there)


def test_every_page_is_in_the_list_of_pages() -> None:
    listed = re.findall(r"^\| \[(.+)\]\(\1\) \|", (DOCS / "io/README.md").read_text(), re.MULTILINE)
    assert sorted([*listed, "README.md"]) == sorted(page.name for page in (DOCS / "io").glob("*.md"))


def test_every_name_is_told_of_and_can_be_had() -> None:
    text = "".join(page.read_text() for page in (DOCS / "io").glob("*.md"))
    for name in set(io.__all__) - {"Operation"}:
        assert getattr(io, name)
        assert re.search(rf"\b{name}\b", text), f"docs/io does not tell of io.{name}"
    with pytest.raises(AttributeError):
        io.__getattr__("nothing")
