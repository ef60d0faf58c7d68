"""`send_mail`: one message to one server by SMTP. Python's smtplib blocks, so it works in a process of the pool (`offload`).

What the server refuses is told by two classes, since they ask for opposite things: a MailDeferred (4xx) is worth a retry, a
MailRejected (5xx) is not. Both keep the codes. What the network refuses is what it is everywhere in `kqueue.io`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..errors import UsageError
from ..execution.jobtraps import offload
from .errors import ConnectFailed, ConnectionLost, IOFailed, TimedOut, TLSFailed
from .operation import operation
from .smtp import UNUSABLE, deliver

if TYPE_CHECKING:
    from email.message import EmailMessage

Refusals = Mapping[str, tuple[int, str]]  # by recipient: code and text of the server

PORTS: Final = {True: 465, "starttls": 587, False: 25}


class MailFailed(IOFailed):
    """A server did not take a message.

    `code`: its reply (RFC 5321, 4.2); 0: it gave none. `refused`: recipients and replies, where it refused all of those.
    """

    def __init__(self, message: str, code: int = 0, refused: Refusals | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.refused = dict(refused or {})


class MailDeferred(MailFailed):
    """Not now: a full mailbox, greylisting, a server that is busy. Try again later."""


class MailRejected(MailFailed):
    """Not ever, as it is: no such mailbox, a wrong password, a message that is too large."""


_KINDS: Final[Mapping[str, type[IOFailed]]] = {
    "rejected": MailRejected, "deferred": MailDeferred, "connect": ConnectFailed, "tls": TLSFailed, "lost": ConnectionLost,
    "timeout": TimedOut,
}  # fmt: skip


@operation
def send_mail(
    message: EmailMessage | bytes, *, host: str = "localhost", port: int = 0, user: str | None = None,
    password: str | None = None, tls: bool | str = "starttls", sender: str | None = None, recipients: Sequence[str] | None = None,
    timeout: float = 60.0, ca_file: str | None = None,
) -> Generator[Any, Any, dict[str, tuple[int, str]]]:  # fmt: skip
    """Send `message`: `yield io.send_mail(message, host="smtp.example.org", user="app", password=secret)`.

    Returns the recipients that the server refused while it took the message for others: {} when it took it for all.

    `tls`: "starttls" (port 587), True from the first byte (port 465), or False (port 25), which takes no password to another
    host. `port` 0: as `tls` has it. `sender`, `recipients`: of the envelope; None: those in the message's headers. Bcc is not
    sent. `timeout`: seconds that the server may take for each answer. `ca_file`: certificates that its own has to be signed by,
    as PEM; None: those that the host trusts.

    Raises MailDeferred, MailRejected, ConnectFailed, ConnectionLost, TLSFailed, TimedOut; UsageError for a message that is none,
    a `ca_file` that cannot be read, and whatever else no server can mend.
    """
    if not host:
        raise UsageError("host is empty: name the server that takes the mail")
    if tls not in PORTS:
        raise UsageError(f'tls must be "starttls", True or False, not {tls!r}')
    if password is not None and tls is False and not _is_here(host):
        raise UsageError(f"a password would go to {host} for everybody to read: use tls, or no password")
    given = {"sender": sender, "recipients": None if recipients is None else list(recipients)}
    login = None if user is None else [user, password or ""]
    how = {"host": host, "port": port or PORTS[tls], "login": login, "tls": tls, "timeout_s": timeout, "ca_file": ca_file}
    answer = yield from offload(deliver, _text(message), given, how)
    if "refused" in answer:
        return _refusals(answer["refused"])
    if answer["kind"] == UNUSABLE:
        raise UsageError(answer["message"])
    kind = _KINDS[answer["kind"]]
    if issubclass(kind, MailFailed):
        raise kind(answer["message"], answer["code"], _refusals(answer["recipients"]))
    raise kind(answer["message"])


def _text(message: EmailMessage | bytes) -> str:
    """It as text of one byte a character, which JSON carries at its own size. Raises UsageError."""
    if isinstance(message, (bytes, bytearray)):
        return bytes(message).decode("latin-1")
    if not hasattr(message, "as_bytes"):
        raise UsageError(f"send_mail() takes an email.message.EmailMessage or bytes, not {type(message).__name__}")
    return message.as_bytes().decode("latin-1")


def _is_here(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _refusals(found: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    return {address: (int(code), str(text)) for address, (code, text) in found.items()}
