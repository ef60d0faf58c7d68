"""What `send_mail` offloads: runs in a process of the pool, where it may block. Its answer is JSON.

    {"refused": {address: [code, text]}}
    {"kind": one of mail._KINDS, "message", "code", "recipients": {address: [code, text]}}

The daemon imports this file for the name of the function, so whatever is large is imported when that runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import smtplib

Answer = dict[str, Any]


def deliver(text: str, given: Mapping[str, Any], how: Mapping[str, Any]) -> Answer:
    """Send the message `text`. `given`: sender and recipients, or None for those in its headers. `how`: see send_mail."""
    import email.policy
    import smtplib
    import ssl

    data = text.encode("latin-1")
    message = email.message_from_bytes(data, policy=email.policy.SMTP.clone(refold_source="none"))
    where = f"{how['host']}:{how['port']}"
    try:
        with _connect(how) as server:
            if how["login"] is not None:
                server.login(*how["login"])
            refused = server.send_message(message, given["sender"], given["recipients"])
            return {"refused": {address: _reply(*reply) for address, reply in refused.items()}}
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


def _connect(how: Mapping[str, Any]) -> smtplib.SMTP:
    import smtplib
    import ssl

    context = ssl.create_default_context(cafile=how["ca_file"]) if how["tls"] else None
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
