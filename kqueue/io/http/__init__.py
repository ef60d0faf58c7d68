"""An HTTP client for jobs: `kqueue.io.http`, with the extra `kqueue[http]`.

    response = yield io.http.get("https://example.org/prices", params={"of": "tea"}, timeout=10)
    prices = response.raise_for_status().json()

HTTP/1.1 over the streams of kqueue.io; h11 knows the protocol, this package does the rest. These functions share one `Client`,
whose connections are kept for the next request, in each loop its own. Who wants other settings makes a `Client` of his own.
"""

from __future__ import annotations

try:
    import h11 as _h11  # noqa: F401  (asked for here, so that whoever lacks it hears of it when his module is loaded)
except ModuleNotFoundError as error:
    if error.name != "h11":
        raise
    raise ModuleNotFoundError(
        "kqueue.io.http needs h11, which is not installed: pip install 'kqueue[http]'", name="h11"
    ) from None

from .client import Client
from .errors import (
    HTTPBodyTooLarge,
    HTTPConnectFailed,
    HTTPConnectionLost,
    HTTPFailed,
    HTTPProtocolError,
    HTTPStatusError,
    HTTPTimeout,
    InvalidRequest,
    ProxyFailed,
    RedirectRefused,
    TooManyRedirects,
)
from .headers import Headers
from .response import Response, StreamedResponse
from .timeouts import Timeouts

__all__ = [
    "Client", "HTTPBodyTooLarge", "HTTPConnectFailed", "HTTPConnectionLost", "HTTPFailed", "HTTPProtocolError", "HTTPStatusError",
    "HTTPTimeout", "Headers", "InvalidRequest", "ProxyFailed", "RedirectRefused", "Response", "StreamedResponse", "Timeouts",
    "TooManyRedirects", "delete", "get", "head", "options", "patch", "post", "put", "request", "stream",
]  # fmt: skip

_shared = Client()
_shared.disown()  # this may be loaded by the first job that needs it, and serves the others, too

request = _shared.request
stream = _shared.stream
get = _shared.get
head = _shared.head
options = _shared.options
post = _shared.post
put = _shared.put
patch = _shared.patch
delete = _shared.delete
