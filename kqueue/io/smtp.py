"""What `send_mail` offloads: runs in a process of the pool, where it may block. Its answer is JSON.

    {"refused": {address: [code, text]}}
    {"kind": one of mail._KINDS or UNUSABLE, "message", "code", "recipients": {address: [code, text]}}

The daemon imports this file for the name of the function, so whatever is large is imported when that runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import smtplib
    import ssl

Answer = dict[str, Any]

UNUSABLE: Final = "unusable"  # what was asked for, whatever the server does


class _Unusable(Exception):
    """Of that kind."""


def deliver(text: str, given: Mapping[str, Any], how: Mapping[str, Any]) -> Answer:
    """Send the message `text`. `given`: sender and recipients, or None for those in its headers. `how`: see send_mail."""
    import smtplib
    import ssl

    where = f"{how['host']}:{how['port']}"
    sender, recipients, data = _envelope(text.encode("latin-1"), given)
    if not recipients:
        return _failed("rejected", "the message has no recipient: neither To nor Cc nor Bcc, and none was given")
    options = () if all(address.isascii() for address in (sender, *recipients)) else ("SMTPUTF8", "BODY=8BITMIME")
    try:
        with _connect(how) as server:
            if how["login"] is not None:
                server.login(*how["login"])
            refused = server.sendmail(sender, recipients, data, options)
            return {"refused": {address: _reply(*reply) for address, reply in refused.items()}}
    except _Unusable as error:
        return _failed(UNUSABLE, str(error))
    except smtplib.SMTPRecipientsRefused as error:
        return _all_refused(where, {address: _reply(*reply) for address, reply in error.recipients.items()})
    except smtplib.SMTPServerDisconnected as error:
        if isinstance(error.__context__, TimeoutError):
            return _failed("timeout", f"{where} has not answered in {how['timeout_s']:g} s")
        return _failed("lost", f"{where} hung up: {error}")
    except smtplib.SMTPNotSupportedError as error:
        kind = "tls" if "STARTTLS" in str(error) else "rejected"
        return _failed(kind, f"{where} cannot do what was asked: {error}")
    except smtplib.SMTPResponseException as error:
        code, said = _reply(error.smtp_code, error.smtp_error)
        return _answered(where, code, said)
    except smtplib.SMTPException as error:
        return _failed("rejected", f"{where}: {error}")
    except ssl.SSLError as error:  # a certificate that does not verify, too
        return _failed("tls", f"no TLS with {where}: {getattr(error, 'verify_message', '') or error.reason or error}")
    except TimeoutError:
        return _failed("timeout", f"{where} has not answered in {how['timeout_s']:g} s")
    except OSError as error:
        return _failed("connect", f"{where} cannot be reached: {error.strerror or error}")


def _envelope(message: bytes, given: Mapping[str, Any]) -> tuple[str, list[str], bytes]:
    """Sender, recipients, and what is sent: the message as it is, with the line ends of RFC 5321 (2.3.8) and without Bcc."""
    import re
    from email.parser import BytesHeaderParser
    from email.utils import getaddresses

    data = re.sub(rb"\r\n|\r|\n", b"\r\n", message)
    head, separator, body = data.partition(b"\r\n\r\n")
    headers = BytesHeaderParser().parsebytes(head)

    def found(*names: str) -> list[str]:
        values = [str(value) for name in names for value in headers.get_all(name, [])]
        return [address for _, address in getaddresses(values) if address]

    kept = re.sub(rb"(?im)^bcc:[^\r\n]*(?:\r\n[ \t][^\r\n]*)*(?:\r\n)?", b"", head + b"\r\n")
    sender = given["sender"] if given["sender"] is not None else next(iter(found("Sender", "From")), "")
    recipients = given["recipients"] if given["recipients"] is not None else found("To", "Cc", "Bcc")
    return sender, recipients, kept + separator[2:] + body


def _connect(how: Mapping[str, Any]) -> smtplib.SMTP:
    context = _context(how["ca_file"]) if how["tls"] else None
    try:
        return _connected(how, context)
    except UnicodeError as error:  # of IDNA, which is the first thing that is tried
        raise _Unusable(f"{how['host']!r} is no name of a host: {error}") from None


def _context(ca_file: str | None) -> ssl.SSLContext:
    import ssl

    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError:  # an OSError, with a text that is no help
        why = "no certificate is in it, as PEM"
    except OSError as error:
        why = error.strerror or str(error)
    except ValueError as error:
        why = str(error)
    raise _Unusable(f"ca_file {ca_file!r} cannot be used: {why}")


def _connected(how: Mapping[str, Any], context: ssl.SSLContext | None) -> smtplib.SMTP:
    import smtplib

    if how["tls"] is True:
        return smtplib.SMTP_SSL(how["host"], how["port"], timeout=how["timeout_s"], context=context)
    server = smtplib.SMTP(how["host"], how["port"], timeout=how["timeout_s"])
    if context is not None:
        try:
            server.starttls(context=context)
        except BaseException:
            server.close()
            raise
    return server


def _reply(code: int, text: bytes | str) -> list[Any]:
    return [code, text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)]


def _all_refused(where: str, refused: Mapping[str, Sequence[Any]]) -> Answer:
    """Worth a retry when one of them may be taken later."""
    code = min(int(reply[0]) for reply in refused.values())
    address, (_, said) = next((address, reply) for address, reply in refused.items() if reply[0] == code)
    others = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    return {**_answered(where, code, f"{said} (for {address}{others})"), "recipients": dict(refused)}


def _answered(where: str, code: int, said: str) -> Answer:
    kind = "deferred" if 400 <= code < 500 else "rejected" if code >= 500 else "lost"
    return {**_failed(kind, f"{where} answered {code} {said}".strip()), "code": code}


def _failed(kind: str, message: str) -> Answer:
    return {"kind": kind, "message": message[:1000], "code": 0, "recipients": {}}
