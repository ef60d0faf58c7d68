"""The client: what is asked for, where redirects lead, and what is sent along."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypedDict

from ...context import forget, keep
from ...errors import UsageError
from ..closing import Closing
from ..operation import Operation, operation
from ..surroundings import deadline_in
from .bodies import NOTHING, Body, body_of
from .cookies import Cookies
from .errors import HTTPFailed, InvalidRequest, RedirectRefused, TooManyRedirects
from .exchange import Exchange
from .headers import Given, Pair, encode, merged
from .pool import Pool, pools
from .proxies import Proxies, basic, from_environment, proxy_url
from .response import Response, StreamedResponse
from .timeouts import Timeouts, timeouts_of
from .urls import URL, Params, join, parse

if TYPE_CHECKING:
    import ssl
    from typing import Unpack  # Python 3.11

    import h11

    from .pool import Connection

MAX_BODY: Final = 64 * 1024 * 1024
DRAINED: Final = 65536  # bytes of the body of a redirect that are read, so that its connection can be used again
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_SECRET: Final = frozenset({b"authorization", b"cookie", b"proxy-authorization"})
_OF_BODIES: Final = frozenset({b"content-type", b"content-length", b"content-encoding", b"content-language", b"content-location"})
_METHOD: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ-_")


class Asked(TypedDict, total=False):
    """What a request may be given besides method and URL."""

    params: Params  # put into the query
    headers: Given  # added to those of the client, or in place of them
    json: Any
    data: Any  # bytes, str, or a mapping or list of pairs: a form
    files: Any  # a mapping or list of pairs of a field and a file: bytes, an open file, (name, one of these[, type])
    body: Any  # bytes, an open file, or what yields bytes: sent while it is made
    auth: tuple[str, str]  # user and password
    timeout: float | Timeouts  # seconds for all of it, or for each phase
    redirects: int  # that are followed; 0: none
    allow_downgrade: bool  # follow one from https to http, too


class _Follow:
    """Which redirects are followed."""

    __slots__ = ("allow_downgrade", "most")

    def __init__(self, asked: Asked, most: int) -> None:
        self.most = asked.get("redirects", most)
        self.allow_downgrade = asked.get("allow_downgrade", False)

    def wants(self, response: StreamedResponse) -> bool:
        """Whether it is a redirect that is to be followed."""
        return response.status in _REDIRECTS and self.most > 0 and "location" in response.headers


class Client(Closing):
    """Requests with settings and connections of their own. A job's is closed when the job ends; others serve any number of jobs.

    `base_url`: what URLs are relative to; its headers and auth go nowhere else. `verify`: True, an ssl.SSLContext, the path of a
    file of CAs, or False. `proxy`: a URL, "" for none, or None: as the environment says. `cookies`: whether they are kept.
    `max_connections` and `max_per_host`: at once, in each loop; others wait. `idle_timeout`: seconds that an unused one is kept.
    """

    def __init__(
        self, *, base_url: str = "", headers: Given | None = None, auth: tuple[str, str] | None = None,
        timeout: float | Timeouts | None = None, verify: bool | str | ssl.SSLContext = True, proxy: str | None = None,
        cookies: bool = False, redirects: int = 10, max_body: int = MAX_BODY, max_connections: int = 4096,
        max_per_host: int = 256, idle_timeout: float = 15.0,
    ) -> None:  # fmt: skip
        if max_connections < 1 or max_per_host < 1:
            raise UsageError("a client needs at least one connection: max_connections= and max_per_host= are at least 1")
        self._base = parse(base_url) if base_url else None
        self._headers = merged(_default_headers(), encode(headers))
        if auth is None and self._base is not None and self._base.user:
            auth = (self._base.user, self._base.password)
        if auth is not None:
            self._headers = merged(self._headers, _authorization(auth))
        self._public_headers = [pair for pair in self._headers if pair[0] not in _SECRET]
        self._timeouts = timeouts_of(timeout, Timeouts())
        self._verify = verify
        self._tls: bool | ssl.SSLContext | None = None  # made when it is needed
        if proxy:
            proxy_url(proxy)  # so a wrong one is said here
        self._proxies = None if proxy is None else Proxies(dict.fromkeys(("http", "https"), proxy) if proxy else {})
        self.cookies = Cookies() if cookies else None
        self._redirects = redirects
        self._max_body = max_body
        self._limits = (max_connections, max_per_host, idle_timeout)
        self._is_closed = False
        keep(self)

    def get(self, url: str, *, max_body: int | None = None, **asked: Unpack[Asked]) -> Operation[Response]:
        return self.request("GET", url, max_body=max_body, **asked)

    def head(self, url: str, *, max_body: int | None = None, **asked: Unpack[Asked]) -> Operation[Response]:
        return self.request("HEAD", url, max_body=max_body, **asked)

    def options(self, url: str, *, max_body: int | None = None, **asked: Unpack[Asked]) -> Operation[Response]:
        return self.request("OPTIONS", url, max_body=max_body, **asked)

    def post(self, url: str, *, max_body: int | None = None, **asked: Unpack[Asked]) -> Operation[Response]:
        return self.request("POST", url, max_body=max_body, **asked)

    def put(self, url: str, *, max_body: int | None = None, **asked: Unpack[Asked]) -> Operation[Response]:
        return self.request("PUT", url, max_body=max_body, **asked)

    def patch(self, url: str, *, max_body: int | None = None, **asked: Unpack[Asked]) -> Operation[Response]:
        return self.request("PATCH", url, max_body=max_body, **asked)

    def delete(self, url: str, *, max_body: int | None = None, **asked: Unpack[Asked]) -> Operation[Response]:
        return self.request("DELETE", url, max_body=max_body, **asked)

    @operation
    def request(
        self, method: str, url: str, *, max_body: int | None = None, **asked: Unpack[Asked]
    ) -> Generator[Any, Any, Response]:
        """The whole response. `max_body`: bytes that its body may have, decoded; HTTPBodyTooLarge above."""
        exchange = self._exchange(method, url, max_body, asked)
        follow = _Follow(asked, self._redirects)
        del asked, url  # thousands may wait from here on
        response = self._arrived(exchange, *(yield from exchange.run(self._pool())))
        if follow.wants(response):
            response = yield from self._follow(response, follow)
        with response:
            body = yield from response.whole(response.exchange.max_body)
        return response.with_body(body)

    @operation
    def stream(self, method: str, url: str, **asked: Unpack[Asked]) -> Generator[Any, Any, StreamedResponse]:
        """The response as soon as its headers are there: `with (yield client.stream("GET", url)) as response:`."""
        exchange = self._exchange(method, url, None, asked)
        follow = _Follow(asked, self._redirects)
        response = self._arrived(exchange, *(yield from exchange.run(self._pool())))
        if follow.wants(response):
            response = yield from self._follow(response, follow)
        if response.has_no_body:
            yield from response.whole(0)
        return response

    def close(self) -> None:
        """Close its connections; those that are in use, when their requests have ended. It serves no other request."""
        self._is_closed = True
        with suppress(UsageError):  # outside of any loop it has no connections
            pools().end(self)
        self.disown()

    def disown(self) -> None:
        """Leave it open when the job ends that made it."""
        forget(self)

    # -- how ----------------------------------------------------------------------------------------------------------

    def _arrived(
        self, exchange: Exchange, connection: Connection, head: h11.Response, history: tuple[Response, ...] = ()
    ) -> StreamedResponse:
        """The response that begins with `head`, of which the cookies are taken."""
        response = StreamedResponse(exchange, connection, head, history)
        if self.cookies is not None:
            self.cookies.learn(exchange.url, response.headers)
        return response

    def _follow(self, response: StreamedResponse, follow: _Follow) -> Generator[Any, Any, StreamedResponse]:
        """The response at the end of the redirects that begin with this one."""
        history: tuple[Response, ...] = ()
        while True:
            with response:
                if len(history) >= follow.most:
                    raise TooManyRedirects(
                        f"it was redirected {follow.most} times, and is again; give redirects=0 to see where to",
                        method=response.method, url=response.shown_url,
                    )  # fmt: skip
                exchange = self._redirected(response.exchange, response, follow.allow_downgrade)
                yield from _drain(response)
            history = (*history, response.with_body(b""))
            response = self._arrived(exchange, *(yield from exchange.run(self._pool())), history)
            if not follow.wants(response):
                return response

    def _exchange(self, method: str, text: str, max_body: int | None, asked: Asked) -> Exchange:
        if self._is_closed:
            raise UsageError("this HTTP client was closed: make another one, or one outside of jobs")
        url = self._url(text)
        method = method.upper()
        if not method or not _METHOD.issuperset(method) or method in ("CONNECT", "TRACE"):
            raise InvalidRequest(f"{method!r:.40} is no method that can be asked for", url=url.shown)
        params = asked.get("params")
        if params:
            url = url.with_params(params)
        body = NOTHING
        if asked.keys() & {"json", "data", "files", "body"}:
            body = body_of(asked.get("json"), asked.get("data"), asked.get("files"), asked.get("body"))
        is_home = self._base is None or url.origin == self._base.origin
        given = encode(asked.get("headers"))
        headers = merged(self._headers if is_home else self._public_headers, given)
        auth = asked.get("auth") or ((url.user, url.password) if url.user else None)
        if auth is not None:
            headers = merged(headers, _authorization(auth))
        headers = _with_body(headers, given, body, method)
        timeouts = timeouts_of(asked.get("timeout"), self._timeouts)
        most = self._max_body if max_body is None else max_body
        return self._made(method, url, headers, body, timeouts, deadline_in(timeouts.total), most)

    def _made(
        self, method: str, url: URL, headers: list[Pair], body: Body, timeouts: Timeouts, ends_at: float | None, max_body: int
    ) -> Exchange:
        """With what depends on where it goes."""
        if self.cookies is not None and not any(name == b"cookie" for name, _ in headers):
            cookie = self.cookies.header_for(url)
            if cookie:
                headers = [*headers, (b"cookie", cookie)]
        if self._proxies is None:
            self._proxies = from_environment()
        tls = self._context() if url.scheme == "https" else False
        return Exchange(method, url, headers, body, timeouts, ends_at, max_body, self._proxies.proxy_for(url), tls)

    def _redirected(self, before: Exchange, response: StreamedResponse, allow_downgrade: bool) -> Exchange:
        def refused(why: str) -> RedirectRefused:
            return RedirectRefused(f"the redirect ({response.status}) {why}", method=before.method, url=before.url.shown)

        try:
            url = join(before.url, response.headers.get_all("location")[0])
            url = url._replace(user="", password="")  # who sends us there does not decide who we are
        except HTTPFailed as error:
            raise refused(f"leads nowhere: {error}") from None
        if before.url.scheme == "https" and url.scheme == "http" and not allow_downgrade:
            raise refused(f"leads from https to {url.shown}: allow_downgrade=True follows it all the same")
        method, body, headers = before.method, before.body, before.headers
        dropped = {b"host"} | ({b"cookie"} if self.cookies is not None else set())
        if (response.status == 303 and method != "HEAD") or (response.status in (301, 302) and method == "POST"):
            method, body = "GET", NOTHING
            dropped |= _OF_BODIES
        elif not body.can_repeat:
            raise refused("wants the body once more, and it can be read once only: give bytes or a list, or ask there at once")
        if url.origin != before.url.origin:
            dropped |= _SECRET
        headers = [pair for pair in headers if pair[0] not in dropped]
        return self._made(method, url, headers, body, before.timeouts, before.ends_at, before.max_body)

    def _url(self, text: str) -> URL:
        return parse(text) if self._base is None else join(self._base, text)

    def _pool(self) -> Pool:
        return pools().of(self, lambda: Pool(*self._limits))

    def _context(self) -> bool | ssl.SSLContext:
        if self._tls is None:
            self._tls = _context(self._verify)
        return self._tls


def _default_headers() -> list[Pair]:
    version = sys.modules[__name__.partition(".")[0]].__version__  # the front's, which stands above us: no import leads there
    return [
        (b"user-agent", f"kqueue/{version}".encode()), (b"accept", b"*/*"), (b"accept-encoding", b"gzip, deflate"),
    ]  # fmt: skip


def _authorization(auth: tuple[str, str]) -> list[Pair]:
    if not isinstance(auth, tuple) or len(auth) != 2:
        raise InvalidRequest("auth= is a user and a password; for another scheme give the header Authorization")
    return [(b"authorization", basic(*auth))]


def _with_body(headers: list[Pair], given: list[Pair], body: Body, method: str) -> list[Pair]:
    names = {name for name, _ in given}
    if b"content-length" in names and (body.pieces is None or body.length is not None):
        headers = [pair for pair in headers if pair[0] != b"content-length"]  # we know it
    if body.content_type and b"content-type" not in names:
        headers = [*headers, (b"content-type", body.content_type.encode())]
    if body.length is None:
        return headers if b"content-length" in names else [*headers, (b"transfer-encoding", b"chunked")]
    if body.length or method in ("POST", "PUT", "PATCH"):
        headers = [*headers, (b"content-length", str(body.length).encode())]
    return headers


def _drain(response: StreamedResponse) -> Generator[Any, Any, None]:
    """Read what is left, if it is little."""
    size = 0
    while size <= DRAINED and (piece := (yield from response.read())):
        size += len(piece)


def _context(verify: bool | str | ssl.SSLContext) -> bool | ssl.SSLContext:
    if verify is True:
        return True
    import ssl  # 4 MB, so not before it is needed

    if isinstance(verify, ssl.SSLContext):
        return verify
    if isinstance(verify, str):
        try:
            return ssl.create_default_context(cafile=verify)
        except OSError as error:
            raise UsageError(f"verify={verify!r} is no file of certificates: {error.strerror or error}") from None
    if verify is False:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    raise UsageError(f"verify= is True, False, an ssl.SSLContext or the path of a file of CAs, not {verify!r}")
