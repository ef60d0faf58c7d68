"""Proxies: which one, as the environment or the client's own setting says, and the way through it."""

from __future__ import annotations

import os
from binascii import b2a_base64
from collections.abc import Generator, Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple

import h11

from ..errors import IncompleteRead, StreamLimit
from ..streams import Stream
from ..surroundings import left
from .errors import InvalidRequest, ProxyFailed
from .urls import URL, parse

MAX_HEAD: Final = 65536  # bytes of what a proxy answers to CONNECT
_MAX_INTERIM: Final = 20
_MAY_PASS: Final = frozenset({408, 429, 500, 502, 503, 504})


def basic(user: str, password: str) -> bytes:
    """The value of Authorization for them (RFC 7617)."""
    return b"Basic " + b2a_base64(f"{user}:{password}".encode(), newline=False)


class Proxies(NamedTuple):
    """Which proxy a URL goes through."""

    by_scheme: Mapping[str, str]  # their URLs, which matter only where they are used
    exceptions: tuple[str, ...] = ()  # hosts that are connected to directly

    def proxy_for(self, url: URL) -> URL | None:
        """Raises InvalidRequest for one that we cannot go through."""
        text = self.by_scheme.get(url.scheme)
        if text is None or any(_is_meant(rule, url) for rule in self.exceptions):
            return None
        try:
            proxy = proxy_url(text)
        except InvalidRequest as error:
            raise InvalidRequest(str(error), url=url.shown) from None
        if proxy.scheme == url.scheme == "https":
            where = proxy.authority
            raise InvalidRequest(
                f"TLS within TLS is not supported, and the proxy https://{where} wants that: give http://{where}, if it takes "
                "CONNECT there, or except the host by NO_PROXY", url=url.shown,
            )  # fmt: skip
        return proxy


def from_environment(environment: Mapping[str, str] = os.environ) -> Proxies:
    """By HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY; in lower case, they are preferred."""

    def value(name: str) -> str:
        if name == "http_proxy" and "REQUEST_METHOD" in environment:  # under CGI, a client may set HTTP_PROXY by a header
            return environment.get(name, "")
        return environment.get(name) or environment.get(name.upper(), "")

    found = {}
    for scheme in ("http", "https"):
        text = value(f"{scheme}_proxy") or value("all_proxy")
        if text:
            found[scheme] = text
    return Proxies(found, tuple(rule.strip().lower() for rule in value("no_proxy").split(",") if rule.strip()))


@lru_cache(maxsize=8)
def proxy_url(text: str) -> URL:
    """Raises InvalidRequest for a kind of proxy that we do not speak with."""
    if "://" not in text:
        text = f"http://{text}"
    scheme = text.partition("://")[0].lower()
    if scheme not in ("http", "https"):
        where = "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, or proxy=; NO_PROXY excepts hosts"
        raise InvalidRequest(f"a proxy by {scheme}:// is not supported, only by http:// and https://; see {where}")
    return parse(text)


def _is_meant(rule: str, url: URL) -> bool:
    """Whether a rule of NO_PROXY means this host: a name and what is below it, an address, a network, "*"; maybe with a port."""
    name, colon, port = rule.rpartition(":")
    if colon and port.isdecimal() and (":" not in name or name.endswith("]")):
        if int(port) != url.port:
            return False
        rule = name
    if rule == "*":
        return True
    if "/" in rule:
        from ipaddress import ip_address, ip_network  # half a megabyte, and seldom needed

        try:
            return ip_address(url.host) in ip_network(rule.strip("[]"), strict=False)
        except ValueError:
            return False
    rule = rule.strip("[]").lstrip("*").lstrip(".")
    return bool(rule) and (url.host == rule or url.host.endswith(f".{rule}"))


def tunnel(stream: Stream, proxy: URL, url: URL, method: str, deadline: float | None) -> Generator[Any, Any, None]:
    """Have the proxy at the other end of `stream` connect us to the origin of `url` (CONNECT)."""
    host = f"[{url.host}]" if ":" in url.host else url.host
    target = f"{host}:{url.port}".encode()
    headers = [(b"host", target)]
    if proxy.user:
        headers.append((b"proxy-authorization", basic(proxy.user, proxy.password)))
    protocol = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
    head = protocol.send(h11.Request(method=b"CONNECT", target=target, headers=headers))
    assert head is not None
    yield from stream.write(head, timeout=left(deadline))
    protocol.send(h11.EndOfMessage())
    where = f"the proxy {proxy.host}:{proxy.port}"
    try:
        for _ in range(_MAX_INTERIM):
            protocol.receive_data((yield from stream.read_until(b"\r\n\r\n", MAX_HEAD, timeout=left(deadline))))
            answer = protocol.next_event()
            if isinstance(answer, h11.Response):
                break
        else:
            raise h11.RemoteProtocolError("no end of interim responses")
    except (h11.RemoteProtocolError, IncompleteRead, StreamLimit) as error:
        raise ProxyFailed(
            f"{where} gave no answer to CONNECT that is HTTP: {error}", method=method, url=url.shown, retryable=True
        ) from None
    if 200 <= answer.status_code < 300:
        return
    why = f"{answer.status_code} {answer.reason.decode('latin-1')}".rstrip()
    advice = "; write user and password in its URL, http://USER:PASSWORD@HOST:PORT" if answer.status_code == 407 else ""
    raise ProxyFailed(
        f"{where} lets us not through to {url.host}:{url.port}: {why}{advice}", method=method, url=url.shown,
        retryable=answer.status_code in _MAY_PASS,
    )  # fmt: skip
