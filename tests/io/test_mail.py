"""kqueue.io.send_mail: a real daemon and a real SMTP server, which takes, refuses, hangs, and speaks TLS."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import SMTP
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kqueue import testing
from kqueue.codec import pack, to_json
from kqueue.errors import UsageError
from kqueue.execution.wire import MAX_CALL
from kqueue.io import send_mail
from kqueue.io.mail import _text
from tests.apps import processes
from tests.daemon import PATIENCE_S, ROOT, Daemon
from tests.servers import Certificates, lack

if find_spec("aiosmtpd") is None:
    lack("aiosmtpd")


class Servers:
    """Of one mailbox: plain, with STARTTLS and a password, and with TLS from the first byte. See tests/smtp_server.py."""

    def __init__(self, certificates: Certificates) -> None:
        self.ca = certificates.ca
        command = [sys.executable, "-m", "tests.smtp_server", certificates.certificate, certificates.key]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.ports: dict[str, int] = self.took()

    def took(self) -> Any:
        """The next message that it took."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=PATIENCE_S)

    def at(self, name: str, **more: Any) -> dict[str, Any]:
        tls = {"plain": False, "starttls": "starttls", "tls": True}[name]
        return {"host": "127.0.0.1", "port": self.ports[name], "tls": tls, **more}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(Certificates(tmp_path_factory.mktemp("tls")))
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory: Path = tmp_path_factory.mktemp("mail")
    modules = "[tests.apps.inline, tests.apps.processes]"
    daemon = Daemon(directory, f"sqlite:///{directory}/kqueue.db", modules=modules, isolated_modules="[]").start()
    yield daemon
    assert daemon.stop() == 0
    daemon.close()


def mail(daemon: Daemon, options: dict[str, Any], *to: str, subject: str = "Hi", body: str = "Hello") -> Any:
    return daemon.dispatch(processes.mails.job(subject, body, list(to) or ["bob@example.org"], options))[0].result(PATIENCE_S)


# -- what is sent ------------------------------------------------------------------------------------------------------------


def test_a_message_arrives_as_it_was_written(daemon: Daemon, servers: Servers) -> None:
    assert mail(daemon, servers.at("plain"), subject="Grüße", body=".\nDot, é\n" * 10) == {}
    took = servers.took()
    message: Any = message_from_bytes(took["content"].encode("latin-1"), policy=SMTP)
    assert (took["from"], took["to"]) == ("app@example.org", ["bob@example.org"])
    assert (message["Subject"], message["From"]) == ("Grüße", "App <app@example.org>")
    assert message.get_body().get_content().replace("\r\n", "\n") == ".\nDot, é\n" * 10


def test_bytes_are_sent_as_they_are(daemon: Daemon, servers: Servers) -> None:
    long = "X-Long: " + "word " * 40
    data = f"From: a@example.org\r\nTo: b@example.org\r\nBcc: c@example.org\r\nSubject: raw\r\n{long}\r\n\r\nbody\xff\r\n"
    sent = data.encode("latin-1")
    assert daemon.dispatch(processes.mails_bytes.job(sent, servers.at("plain")))[0].result(PATIENCE_S) == {}
    took = servers.took()
    assert took["content"] == data.replace("Bcc: c@example.org\r\n", "")
    assert took["to"] == ["b@example.org", "c@example.org"]


def test_headers_of_every_shape(daemon: Daemon, servers: Servers) -> None:
    head = 'from: "Last, First" <a@example.org>\nSENDER: s@example.org\nCC: "x, y" <c@example.org>,\n d@example.org\n'
    rest = "To: undisclosed:;\nSubject: =?utf-8?q?=C3=BC?=\n\nBcc: in the body\n.\nend"
    raw = f"{head}bcc: e@example.org,\n\tf@example.org\n{rest}"
    assert daemon.dispatch(processes.mails_bytes.job(raw.encode(), servers.at("plain")))[0].result(PATIENCE_S) == {}
    took = servers.took()
    assert (took["from"], took["to"]) == ("s@example.org", ["c@example.org", "d@example.org", "e@example.org", "f@example.org"])
    assert took["content"] == f"{head}{rest}\n".replace("\n", "\r\n")


@pytest.mark.parametrize("data", [b"Subject: to nobody\r\n\r\nx", b"", b"\n", b"no header at all"])
def test_a_message_for_nobody_is_rejected(daemon: Daemon, servers: Servers, data: bytes) -> None:
    failed = daemon.dispatch(processes.mails_bytes.job(data, servers.at("plain")))[0].result(PATIENCE_S)
    assert (failed["kind"], failed["code"]) == ("MailRejected", 0)
    assert "no recipient" in failed["message"]


def test_the_envelope_may_differ_from_the_headers(daemon: Daemon, servers: Servers) -> None:
    options = servers.at("plain", sender="bounce@example.org", recipients=["else@example.org"])
    assert mail(daemon, options) == {}
    took = servers.took()
    assert (took["from"], took["to"]) == ("bounce@example.org", ["else@example.org"])


def test_attachments_are_carried_at_their_own_size() -> None:
    message = EmailMessage()
    message["From"], message["To"] = "a@example.org", "b@example.org"
    message.add_attachment(b"\0\xff" * 3_000_000, maintype="application", subtype="octet-stream")
    assert len(to_json(pack([_text(message)], "args"))) < 1.1 * len(message.as_bytes()) < MAX_CALL


@pytest.mark.parametrize("name", ["starttls", "tls"])
def test_tls_is_verified_and_a_password_goes_through_it(daemon: Daemon, servers: Servers, name: str) -> None:
    login = {"user": "app", "password": "secret"} if name == "starttls" else {}
    assert mail(daemon, servers.at(name, ca_file=servers.ca, **login)) == {}
    servers.took()
    refused = mail(daemon, servers.at(name, **login))
    assert refused["kind"] == "TLSFailed"
    assert "unable to get local issuer certificate" in refused["message"]


# -- what is refused ----------------------------------------------------------------------------------------------------------


def test_some_recipients_are_refused_and_the_others_get_it(daemon: Daemon, servers: Servers) -> None:
    refused = mail(daemon, servers.at("plain"), "good@example.org", "550@example.org", "452@example.org")
    assert refused == {
        "550@example.org": [550, "go away, 550@example.org"], "452@example.org": [452, "go away, 452@example.org"],
    }  # fmt: skip
    assert servers.took()["to"] == ["good@example.org"]


@pytest.mark.parametrize(
    ("to", "kind", "code"),
    [
        (["550@example.org"], "MailRejected", 550),
        (["451@example.org"], "MailDeferred", 451),
        (["550@example.org", "451@example.org"], "MailDeferred", 451),
    ],
)
def test_whether_a_retry_makes_sense_is_told_by_the_class(
    daemon: Daemon, servers: Servers, to: list[str], kind: str, code: int
) -> None:
    failed = mail(daemon, servers.at("plain"), *to)
    assert (failed["kind"], failed["code"], sorted(failed["refused"])) == (kind, code, sorted(to))
    assert f"127.0.0.1:{servers.ports['plain']} answered {code} go away" in failed["message"]


@pytest.mark.parametrize(("subject", "kind"), [("552", "MailRejected"), ("421", "MailDeferred"), ("451", "MailDeferred")])
def test_a_message_that_is_refused(daemon: Daemon, servers: Servers, subject: str, kind: str) -> None:
    failed = mail(daemon, servers.at("plain"), subject=subject)
    assert (failed["kind"], failed["code"], failed["refused"]) == (kind, int(subject), {})


def test_a_wrong_password_is_rejected_and_not_told(daemon: Daemon, servers: Servers) -> None:
    failed = mail(daemon, servers.at("starttls", ca_file=servers.ca, user="app", password="wrong-one"))
    assert (failed["kind"], failed["code"]) == ("MailRejected", 535)
    assert "wrong-one" not in failed["message"]
    assert mail(daemon, servers.at("starttls", ca_file=servers.ca))["code"] == 530


def test_a_server_without_tls_gets_nothing(daemon: Daemon, servers: Servers) -> None:
    assert mail(daemon, {**servers.at("plain"), "tls": "starttls"})["kind"] == "TLSFailed"
    assert mail(daemon, servers.at("plain"), subject="the next") == {}
    assert "Subject: the next" in servers.took()["content"]


@pytest.mark.parametrize(
    ("greeting", "options", "kind"),
    [
        (None, {}, "ConnectFailed"),
        (b"", {}, "ConnectionLost"),
        (b"hello, I am no SMTP server\r\n", {}, "ConnectionLost"),
        (b"554 we take no mail\r\n", {}, "MailRejected"),
        (b"421 too busy\r\n", {}, "MailDeferred"),
        (b"220 " + b"x" * 100_000, {}, "MailRejected"),
        (b"...", {"timeout": 0.2}, "TimedOut"),
    ],
    ids=["nobody", "hangs up", "garbage", "no service", "busy", "endless", "silent"],
)
def test_servers_with_bad_manners(daemon: Daemon, greeting: bytes | None, options: dict[str, Any], kind: str) -> None:
    done = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            if greeting == b"...":
                done.wait(PATIENCE_S)
            elif greeting:
                connection.sendall(greeting)
                connection.recv(1000)

    with closing(listener):
        if greeting is None:
            listener.close()
        else:
            thread = threading.Thread(target=serve)
            thread.start()
        failed = mail(daemon, {"host": "127.0.0.1", "port": port, "tls": False, **options})
        done.set()
        if greeting is not None:
            thread.join()
    assert failed["kind"] == kind, failed
    assert f"127.0.0.1:{port}" in failed["message"]


# -- what is refused at once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "options", "said"),
    [
        ("text", {}, "takes an email.message.EmailMessage or bytes, not str"),
        (b"", {"tls": "yes"}, 'tls must be "starttls", True or False'),
        (b"", {"tls": False, "host": "mail.example.org", "password": "x"}, "for everybody to read"),
        (b"", {"host": ""}, "host is empty"),
    ],
)
def test_nonsense_is_refused_before_anything_is_sent(message: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        next(iter(send_mail(message, **options)))


@pytest.mark.parametrize("tls", [True, "starttls"])
@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file or directory"), ("", "no certificate"), ("certificate", "no certificate"), ("/", "Is a directory")],
)
def test_a_ca_file_that_is_none_is_named_before_anybody_is_connected_to(
    daemon: Daemon, tmp_path: Path, tls: Any, content: str | None, said: str
) -> None:
    file = tmp_path / "ca.pem"
    if content == "/":
        file.mkdir()
    elif content is not None:
        file.write_text(content)
    with socket.create_server(("127.0.0.1", 0)) as server:
        options = {"host": "127.0.0.1", "port": server.getsockname()[1], "tls": tls, "ca_file": str(file), "timeout": 10.0}
        failed = mail(daemon, options)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert failed["kind"] == "UsageError", failed
    assert f"ca_file {str(file)!r} cannot be used: {said}" in failed["message"]


@pytest.mark.parametrize("tls", [True, "starttls", False])
def test_a_host_that_has_no_name_is_named(daemon: Daemon, tls: Any) -> None:
    failed = mail(daemon, {"host": "mail..example.org", "tls": tls})
    assert (failed["kind"], "'mail..example.org' is no name of a host" in failed["message"]) == ("UsageError", True), failed


def test_a_job_under_test_sends_for_real(servers: Servers) -> None:
    assert testing.run(processes.mails.job("Hi", "Hello", ["bob@example.org"], servers.at("plain"))) == {}
    assert servers.took()["to"] == ["bob@example.org"]
