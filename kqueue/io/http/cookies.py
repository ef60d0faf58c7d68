"""Cookies (RFC 6265, and what 6265bis says of Secure), kept by a client that was asked to, in memory, as long as it is there."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

from .dates import moment_of
from .headers import Headers
from .urls import URL

MAX_PER_HOST: Final = 50
MAX_BYTES: Final = 4096  # of one cookie
MAX_ALL: Final = 3000


class _Cookie(NamedTuple):
    value: str
    is_host_only: bool
    is_secure: bool
    until: float  # time.time()


class Cookies:
    """What servers have set, and what they are sent of it."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str, str], _Cookie] = {}  # by domain, path and name; the oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def header_for(self, url: URL) -> bytes:
        """The value of Cookie; b"": none is sent."""
        found = []
        moment = time.time()
        for (domain, path, name), cookie in list(self._kept.items()):
            if cookie.until <= moment:
                del self._kept[domain, path, name]
            elif _is_for(url, domain, path, cookie):
                found.append((-len(path), f"{name}={cookie.value}"))
        return "; ".join(text for _, text in sorted(found, key=lambda pair: pair[0])).encode("latin-1", "ignore")

    def learn(self, url: URL, headers: Headers) -> None:
        """Keep what the response from `url` sets."""
        for line in headers.get_all("set-cookie"):
            self._set(url, line)

    def _set(self, url: URL, line: str) -> None:
        pair, *attributes = line.split(";")
        name, found, value = (part.strip() for part in pair.partition("="))
        if not name or not found or len(pair) > MAX_BYTES:
            return
        said = {}
        for attribute in attributes:
            key, _, text = attribute.partition("=")
            said[key.strip().lower()] = text.strip()
        domain = said.get("domain", "").lstrip(".").lower()
        if domain and not _may_set(url.host, domain):
            return
        if "secure" in said and url.scheme != "https":
            return
        path = said.get("path", "")
        if not path.startswith("/"):
            path = url.path.rpartition("/")[0] or "/"
        if not _keeps_promise(name, said) or (url.scheme != "https" and self._would_hide(domain or url.host, path, name)):
            return
        until = _until(said)
        place = (domain or url.host, path, name)
        self._kept.pop(place, None)
        if until > time.time():
            self._kept[place] = _Cookie(value, not domain, "secure" in said, until)
            self._bound(place[0])

    def _would_hide(self, domain: str, path: str, name: str) -> bool:
        """Whether a cookie set without TLS would replace one that is Secure, or be sent along with it as if it were that."""
        moment = time.time()
        return any(
            cookie.is_secure and its_name == name and cookie.until > moment
            and (_is_below(domain, its_domain) or _is_below(its_domain, domain)) and _is_within(path, its_path)
            for (its_domain, its_path, its_name), cookie in self._kept.items()
        )  # fmt: skip

    def _bound(self, domain: str) -> None:
        same = [key for key in self._kept if key[0] == domain]
        if len(same) > MAX_PER_HOST:
            del self._kept[same[0]]
        if len(self._kept) > MAX_ALL:
            del self._kept[next(iter(self._kept))]


def _may_set(host: str, domain: str) -> bool:
    """A host may set a cookie for itself, and for the domains above it but the top one. (We have no list of public suffixes.)"""
    return host == domain or (host.endswith(f".{domain}") and "." in domain and not host.replace(".", "").isdecimal())


def _is_for(url: URL, domain: str, path: str, cookie: _Cookie) -> bool:
    if url.host != domain and (cookie.is_host_only or not _is_below(url.host, domain)):
        return False
    if cookie.is_secure and url.scheme != "https":
        return False
    return _is_within(url.path, path)


def _is_below(host: str, domain: str) -> bool:
    return host == domain or host.endswith(f".{domain}")


def _is_within(path: str, folder: str) -> bool:
    return path == folder or (path.startswith(folder) and (folder.endswith("/") or path[len(folder)] == "/"))


def _keeps_promise(name: str, said: dict[str, str]) -> bool:
    """What a name that begins with __Secure- or __Host- says of the cookie (RFC 6265bis) is so."""
    name = name.lower()
    if name.startswith("__host-"):
        return "secure" in said and not said.get("domain") and said.get("path") == "/"
    return "secure" in said or not name.startswith("__secure-")


def _until(said: dict[str, str]) -> float:
    age = said.get("max-age", "")
    if age.removeprefix("-").isdecimal():
        return time.time() + float(age[:10])
    until = moment_of(said["expires"]) if "expires" in said else None
    return float("inf") if until is None else until
