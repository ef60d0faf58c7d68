"""Where a Redis is: the URL, read without urllib (which the daemon does not load). No I/O.

    redis://[[user]:password@]host[:port][/db]          one server, or nodes of a Redis Cluster (one is enough; more with commas)
    rediss://…                                          the same by TLS
    unix:///path[?db=N]                                 a Unix socket
    redis+sentinel://[…@]host[:port],…/SERVICE[/db]     the Sentinels that know where the master of SERVICE is
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from ...errors import UsageError, nearest

Address = tuple[str, int]  # host, port

PORT: Final = 6379
SENTINEL_PORT: Final = 26379

_TLS_OPTIONS: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
_SENTINEL_OPTIONS: Final = ("sentinel_username", "sentinel_password")
_FORMS: Final = {
    "redis": "redis://host:6379/0",
    "rediss": "rediss://host:6379/0",
    "unix": "unix:///path/to/redis.sock?db=0",
    "redis+sentinel": "redis+sentinel://host:26379,host:26379/SERVICE/0",
}
_URL: Final = re.compile(r"[a-z+]+://(?:(?P<user>[^@/]*)@)?(?P<hosts>[^/?]*)(?P<path>/[^?]*)?(?:\?(?P<query>.*))?")
_HOST: Final = re.compile(r"(?P<host>\[[^]]*\]|[^:]*)(?::(?P<port>\d+))?")


class Tls(NamedTuple):
    """The ssl_* options of a URL, named as redis-py names them. "" for a file: none, or the system's."""

    ca_certs: str = ""
    certfile: str = ""
    keyfile: str = ""
    cert_reqs: str = "required"  # or "optional", "none"
    check_hostname: str = "true"  # whether the certificate has to be the host's

    @property
    def checks_host(self) -> bool:
        return self.cert_reqs == "required" and self.check_hostname.lower() not in ("false", "no", "0")


class Target(NamedTuple):
    """A parsed URL. `path` is of a Unix socket, "" when it is TCP; `tls` None: no TLS; `service` "": no Sentinels."""

    host: str
    port: int
    path: str
    db: int
    username: str
    password: str
    tls: Tls | None
    hosts: tuple[Address, ...] = ()  # all that the URL names: nodes of one cluster, or Sentinels
    service: str = ""
    sentinel_username: str = ""
    sentinel_password: str = ""
    sync_replicas: int = 0  # that must have what was promised

    @property
    def address(self) -> str:
        """The URL without secrets."""
        db = f"/{self.db}"
        if self.path:
            return f"unix://{self.path}" + (f"?db={self.db}" if self.db else "")
        if self.service:
            return f"redis+sentinel://{_listed(self.hosts)}/{self.service}{db}"
        return f"redis{'s' if self.tls is not None else ''}://{_listed(self.known)}{db}"

    @property
    def known(self) -> tuple[Address, ...]:
        """All that may be asked first, even where the URL names a socket."""
        return self.hosts or ((self.host, self.port),)

    def at(self, address: Address) -> Target:
        """The same on another server: a node of the cluster, or whom a Sentinel named."""
        return self._replace(host=address[0], port=address[1], path="", hosts=(), service="")

    def node(self, address: Address) -> Target:
        """The same at one of its nodes; the first of `known` is reached as the URL says, be it by a socket or by Sentinels."""
        return self if address == self.known[0] and (self.path or self.service) else self.at(address)

    def sentinel(self, address: Address) -> Target:
        """What it takes to connect to the Sentinel at `address`."""
        return self.at(address)._replace(db=0, username=self.sentinel_username, password=self.sentinel_password)


def _listed(hosts: tuple[Address, ...]) -> str:
    return ",".join(f"{f'[{host}]' if ':' in host else host}:{port}" for host, port in hosts)


def parse_url(url: str) -> Target:
    """Read a URL of one of the forms above. Raises UsageError, which names no secret."""
    scheme = url.partition(":")[0]
    match = _URL.fullmatch(url)
    if match is None or scheme not in _FORMS:
        raise _unreadable(scheme)
    user, _, password = (match["user"] or "").partition(":")
    path = _decode(match["path"] or "")
    options = _options(scheme, match["query"] or "")
    tls = _tls(options)
    service = ""
    if scheme == "redis+sentinel":
        service, _, path = path.strip("/").partition("/")
        if not service:
            raise UsageError(f"the queue's URL ({scheme}://…) names no service; write {_FORMS[scheme]}")
    local = scheme == "unix"
    hosts = () if local else _hosts(scheme, match["hosts"])
    return Target(
        *(hosts[0] if hosts else ("localhost", PORT)),
        path if local else "",
        _number(scheme, "database number", options.get("db") or ("" if local else path.strip("/")) or "0"),
        _decode(user),
        _decode(password),
        tls if scheme == "rediss" or (service and any(name in options for name in _TLS_OPTIONS)) else None,
        hosts,
        service,
        options.get("sentinel_username", ""),
        options.get("sentinel_password", ""),
        _number(scheme, "number of replicas", options.get("sync_replicas") or "0"),
    )


def _unreadable(scheme: str) -> UsageError:
    forms = ", ".join(_FORMS.values())
    return UsageError(f"cannot read the queue's URL ({scheme}://…); write one of {forms}, with user:password@ before the host")


def _hosts(scheme: str, text: str) -> tuple[Address, ...]:
    hosts = []
    for part in text.split(","):
        match = _HOST.fullmatch(part)
        if match is None:
            raise _unreadable(scheme)
        port = int(match["port"] or (SENTINEL_PORT if scheme == "redis+sentinel" else PORT))
        hosts.append((_decode(match["host"]).strip("[]") or "localhost", port))
    return tuple(hosts)


def _options(scheme: str, query: str) -> dict[str, str]:
    known = ("db", "sync_replicas", *_TLS_OPTIONS, *(_SENTINEL_OPTIONS if scheme == "redis+sentinel" else ()))
    options = {}
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        if name not in known:
            raise UsageError(f"unknown option {name!r} in the queue's URL ({scheme}://…){nearest(name, known)}")
        options[name] = _decode(value)
    return options


def _tls(options: Mapping[str, str]) -> Tls:
    tls = Tls(**{name.removeprefix("ssl_"): options[name] for name in _TLS_OPTIONS if name in options})
    if tls.cert_reqs not in ("required", "optional", "none"):
        raise UsageError(f"ssl_cert_reqs={tls.cert_reqs} in the queue's URL is none of required, optional, none")
    return tls


def _number(scheme: str, what: str, text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"{text!r} in the queue's URL ({scheme}://…) is no {what}; write a number, such as 0")
    return int(text)


def _decode(text: str) -> str:
    return re.sub("(?:%[0-9A-Fa-f]{2})+", lambda hex: bytes.fromhex(hex[0].replace("%", "")).decode("utf-8", "replace"), text)
