"""URLs as they are connected to and sent: checked, in ASCII, without a user and a fragment."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote, urlencode, urljoin, urlsplit

from .errors import InvalidRequest

DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_KEPT: Final = "%/:=&?~+!$,;'@()*[]"  # of what stands in a path or a query; "%" since it may be quoted already
_IN_NAMES: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-._")
Params = Mapping[str, Any] | Iterable[tuple[str, Any]]


class URL(NamedTuple):
    scheme: str
    host: str  # an IPv6 address without its brackets
    port: int
    path: str
    query: str
    user: str = ""
    password: str = ""

    @property
    def origin(self) -> tuple[str, str, int]:
        return (self.scheme, self.host, self.port)

    @property
    def authority(self) -> str:
        """As in the header Host."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def target(self) -> str:
        return f"{self.path}?{self.query}" if self.query else self.path

    @property
    def shown(self) -> str:
        """For messages: nothing that could be a secret."""
        return f"{self.scheme}://{self.authority}{self.path}{'?…' if self.query else ''}"

    def __str__(self) -> str:
        """Without the user."""
        return f"{self.scheme}://{self.authority}{self.target}"

    def with_params(self, params: Params) -> URL:
        """With `params` after what is in the query already. A list as a value: once for each."""
        more = urlencode(list(params.items()) if isinstance(params, Mapping) else list(params), doseq=True)
        return self._replace(query="&".join(part for part in (self.query, more) if part))


@lru_cache(maxsize=512)
def parse(text: str) -> URL:
    """Raises InvalidRequest for what is no http or https URL."""
    _check(text)
    try:
        parts = urlsplit(text)
        scheme, port, host = parts.scheme.lower(), parts.port, parts.hostname
    except ValueError as error:
        raise InvalidRequest(f"the URL {_harmless(text)} cannot be read: {error}") from None
    if scheme not in DEFAULT_PORTS:
        raise InvalidRequest(f"the URL {_harmless(text)} begins with neither http:// nor https://")
    if not host or port == 0:
        raise InvalidRequest(f"the URL {_harmless(text)} has no {'port' if host else 'host'} to connect to")
    path = quote(parts.path or "/", safe=_KEPT)
    query = quote(parts.query, safe=_KEPT)
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return URL(scheme, _host(host, "[" in parts.netloc), port or DEFAULT_PORTS[scheme], path, query, user, password)


def join(base: URL, text: str) -> URL:
    """Where `text` leads from `base`; it may be a whole URL, too. Raises InvalidRequest."""
    _check(text)  # urljoin leaves line breaks out in silence
    try:
        whole = urljoin(str(base), text)
    except ValueError as error:
        raise InvalidRequest(f"the URL {_harmless(text)} cannot be read: {error}") from None
    return parse(whole)


def _check(text: str) -> None:
    if not isinstance(text, str):
        raise InvalidRequest(f"a URL is a str, not {type(text).__name__}")
    if any((ord(char) < 33 and char != " ") or ord(char) == 127 for char in text) or text != text.strip() or "\\" in text:
        raise InvalidRequest(f"the URL {_harmless(text)} has characters in it that no URL has")


def _host(host: str, is_literal: bool) -> str:
    if is_literal:
        try:
            socket.inet_pton(socket.AF_INET6, host)
        except OSError:
            raise InvalidRequest(f"[{host:.80}] is no IPv6 address") from None
        return host
    if not host.isascii():
        try:
            host = host.encode("idna").decode("ascii")
        except UnicodeError as error:
            raise InvalidRequest(f"{host!r:.80} is no name of a host: {error}") from None
    host = host.lower()
    if not _IN_NAMES.issuperset(host) or len(host) > 253 or ".." in host or host.startswith("."):
        raise InvalidRequest(f"{host!r:.80} is no name of a host")
    return host


def _harmless(text: str) -> str:
    """For messages, without what stands before an @ and in the query."""
    head, _, rest = text.partition("?")
    scheme, found, after = head.partition("://")
    if found and "@" in after:
        head = f"{scheme}://{after.rpartition('@')[2]}"
    return repr(f"{head}{'?…' if rest else ''}"[:200])
