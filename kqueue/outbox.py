"""Outcomes that a daemon could not settle before it had to exit: a file in `state_dir`, replayed by token at the next start.

The file is complete or not there: it is written beside its name, synced, and renamed. What is replayed is fenced like every
other settlement, so a file that is old, or that is replayed twice, changes nothing.
"""

from __future__ import annotations

import os
from binascii import a2b_base64, b2a_base64
from collections.abc import Sequence
from typing import Any, Final

from .brokers.base import Counters, NewJob, Settlement, Token
from .codec import from_json, to_json
from .errors import EnvelopeError

VERSION: Final = 1


class Outbox:
    """The file at `path`. No lock of its own: whoever uses it holds the instance's."""

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self) -> list[Settlement]:
        """What stands in it, oldest first; nothing when there is none. ValueError: it is no outbox that we can read."""
        try:
            with open(self.path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return []
        try:
            fields = from_json(data)
            if fields["v"] != VERSION:
                raise TypeError(f"its version is {fields['v']!r:.20}, this KQueue reads {VERSION}")
            return [_read(row) for row in fields["settlements"]]
        except (EnvelopeError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"it cannot be read ({type(error).__name__}: {error})") from None

    def write(self, settlements: Sequence[Settlement]) -> None:
        """Keep `settlements` in place of what stood there. OSError: they are not kept."""
        new = self.path + ".new"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(to_json({"v": VERSION, "settlements": [_row(each) for each in settlements]}))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(new, self.path)
        folder = os.open(os.path.dirname(self.path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)  # the name, too
        finally:
            os.close(folder)

    def clear(self) -> None:
        """It has been settled."""
        if os.path.exists(self.path):
            os.unlink(self.path)

    def set_aside(self) -> str:
        """Move what cannot be read out of the way; where it is now."""
        aside = self.path + ".unreadable"
        os.replace(self.path, aside)
        return aside


def _row(item: Settlement) -> list[Any]:
    jobs = [[job.id, job.queue, job.lane, job.priority, _text(job.envelope), job.delay_s, job.at] for job in item.follow_ups]
    return [
        list(item.token), item.queue, item.verb, list(item.counters), item.delay_s, item.lane, _text(item.certificate),
        _text(item.result), item.keep_s, jobs,
    ]  # fmt: skip


def _read(row: Sequence[Any]) -> Settlement:
    token, queue, verb, counters, delay_s, lane, certificate, result, keep_s, jobs = row
    if verb not in ("ack", "release", "bury"):
        raise TypeError(f"no lease ends by {verb!r:.20}")
    return Settlement(
        Token(*token), queue, verb, Counters(*counters), delay_s, lane, _bytes(certificate), _bytes(result), keep_s,
        tuple(_job(fields) for fields in jobs),
    )  # fmt: skip


def _job(fields: Sequence[Any]) -> NewJob:
    id, queue, lane, priority, envelope, delay_s, at = fields
    return NewJob(id, queue, lane, priority, _bytes(envelope) or b"", delay_s, at)


def _text(data: bytes | None) -> str | None:
    return None if data is None else b2a_base64(data, newline=False).decode()


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else a2b_base64(text, strict_mode=True)
