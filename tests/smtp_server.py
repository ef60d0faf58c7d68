"""A real SMTP server (aiosmtpd) in a process of its own, for tests: python -m tests.smtp_server CERTIFICATE KEY

Its first line says on which ports it listens: plain, with STARTTLS and a password (app, secret), with TLS from the first byte.
Each further one is a message that it took. It refuses a recipient or a subject that is a number, with that as its code. It ends
with its stdin.
"""

from __future__ import annotations

import json
import ssl
import sys
from email import message_from_bytes
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult

from tests.servers import free_port


class Mailbox:
    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        user = address.partition("@")[0]
        if user.isdigit():
            return f"{user} go away, {address}"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        subject = message_from_bytes(envelope.content)["Subject"] or ""
        if subject.isdigit():
            return f"{subject} not this one"
        taken = {"from": envelope.mail_from, "to": envelope.rcpt_tos, "content": envelope.content.decode("latin-1")}
        print(json.dumps(taken), flush=True)
        return "250 taken"


def let_in(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> Any:
    return AuthResult(success=data.login == b"app" and data.password == b"secret", handled=False)


def main(certificate: str, key: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    login: dict[str, Any] = {"authenticator": let_in, "auth_required": True}
    options: dict[str, dict[str, Any]] = {
        "plain": {}, "starttls": {"tls_context": context, "require_starttls": True, **login}, "tls": {"ssl_context": context},
    }  # fmt: skip
    ports = {name: free_port() for name in options}
    for name, port in ports.items():
        Controller(Mailbox(), hostname="127.0.0.1", port=port, **options[name]).start()
    print(json.dumps(ports), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
