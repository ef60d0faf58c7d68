"""What goes wrong with a request: one small tree below IOFailed. Each message names the method, the URL, what happened and the
next step; never a password, nor what stands in a query.

    HTTPFailed
     ├─ InvalidRequest       what was asked for cannot be sent: the URL, a header, the body (a UsageError)
     ├─ HTTPConnectFailed    no address, refused, no TLS, a wrong certificate: `reason` has the error (a ConnectFailed)
     ├─ ProxyFailed          the proxy did not let us through
     ├─ HTTPConnectionLost   the connection broke, or ended too early (a ConnectionLost)
     ├─ HTTPTimeout          `phase` took too long: pool, connect, tls, write, head, read or total (a TimedOut)
     ├─ HTTPProtocolError    what came is not HTTP, or not what it says it is
     ├─ HTTPBodyTooLarge     more came than `max_body`
     ├─ RedirectRefused      to where nobody should follow
     │   └─ TooManyRedirects
     └─ HTTPStatusError      by `raise_for_status`: 4xx or 5xx; `response` has it

`retryable` says whether the same request may succeed later and does no harm when it is sent twice.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ...errors import UsageError
from ..errors import CertificateRefused, ConnectFailed, ConnectionLost, IOFailed, TimedOut
from .dates import moment_of

if TYPE_CHECKING:
    from .response import Response

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})  # RFC 9110, section 9.2.2
_NOT_DONE = frozenset({408, 425, 429, 503})  # the server says that it did not do it
_MAY_PASS = frozenset({500, 502, 504})


class HTTPFailed(IOFailed):
    """A request failed. `method` and `url` say which (without a user, and without what was in the query)."""

    def __init__(self, what: str, *, method: str, url: str, retryable: bool = False) -> None:
        super().__init__(f"{method} {url}: {what}".lstrip() if url else what)
        self.method = method
        self.url = url
        self.retryable = retryable


class InvalidRequest(HTTPFailed, UsageError):
    """What was asked for cannot be sent. Nothing was."""

    def __init__(self, what: str, *, method: str = "", url: str = "") -> None:
        super().__init__(what, method=method, url=url)


class HTTPConnectFailed(HTTPFailed, ConnectFailed):
    """There is no connection. `reason`: NameNotFound, ConnectFailed, TLSFailed or CertificateRefused."""

    def __init__(self, reason: IOFailed, *, method: str, url: str) -> None:
        super().__init__(str(reason), method=method, url=url, retryable=not isinstance(reason, CertificateRefused))
        self.reason = reason


class ProxyFailed(HTTPFailed):
    """The proxy did not let us through."""


class HTTPConnectionLost(HTTPFailed, ConnectionLost):
    """The connection broke, or ended too early."""


class HTTPTimeout(HTTPFailed, TimedOut):
    """`phase` took too long: one of the fields of Timeouts."""

    def __init__(self, what: str, *, phase: str, method: str, url: str, retryable: bool) -> None:
        super().__init__(what, method=method, url=url, retryable=retryable)
        self.phase = phase


class HTTPProtocolError(HTTPFailed):
    """What came is not HTTP, or not what it says it is."""


class HTTPBodyTooLarge(HTTPFailed):
    """More came than was allowed."""


class RedirectRefused(HTTPFailed):
    """The server sends us to where we do not go."""


class TooManyRedirects(RedirectRefused):
    """It goes round in circles, most likely."""


class HTTPStatusError(HTTPFailed):
    """The server says no: a status of 4xx or 5xx."""

    def __init__(self, response: Response) -> None:
        status, method = response.status, response.method
        retryable = status in _NOT_DONE or (status in _MAY_PASS and method in IDEMPOTENT)
        text = f"answered {status} {response.reason}".rstrip()
        super().__init__(f"{text}; {_advice(status, retryable)}", method=method, url=response.shown_url, retryable=retryable)
        self.response = response
        self.status = status

    @property
    def retry_after_s(self) -> float | None:
        """Seconds that the server asks us to wait (Retry-After); None: it does not say."""
        text = self.response.headers.get("retry-after", "").strip()
        if text.isdecimal():
            return float(text[:9])
        moment = moment_of(text)
        return None if moment is None else max(0.0, moment - time.time())


def _advice(status: int, retryable: bool) -> str:
    if status in (401, 403):
        return "see whether the credentials (auth=, headers=) are those that it wants"
    if status == 407:
        return "the proxy wants credentials: write them in its URL"
    if status == 404:
        return "there is nothing at this URL"
    if status in (408, 429) or retryable:
        return "it may work later: see error.retryable and error.retry_after_s"
    return "its reasons are in error.response.text"
