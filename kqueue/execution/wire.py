"""Frames: what supervisor, template and child say to each other. Encoding only; no I/O beyond one send and one receive.

Two kinds of socket:

    template  AF_UNIX SOCK_SEQPACKET. A message is one frame: a byte of kind, then JSON. fds ride along (SCM_RIGHTS).
    job       AF_UNIX SOCK_STREAM. A frame is 4 bytes of length (big endian, of what follows), a byte of kind, then the payload.

Both ends count on the other to lie: a child may write anything, so lengths are bounded before anything is allocated.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from ..codec import from_json, to_json
from ..errors import EnvelopeError

# supervisor -> template
CONFIG: Final = 1  # what to import
FORK: Final = 2  # fds: the child's ends of job socket, stdout, stderr, stack
# template -> supervisor
JOB_KNOWN: Final = 3  # one job of the manifest
READY: Final = 4
IMPORT_FAILED: Final = 5
STARTED: Final = 6  # fds: the child's pidfd
FORK_FAILED: Final = 7
EXITED: Final = 8
WARNING: Final = 9
# supervisor -> child
RUN: Final = 16  # an envelope
CALL: Final = 17  # an offloaded call
REPLY: Final = 18  # to ENQUEUE and THEN
EXECUTE: Final = 27  # a program to become; its stdin comes before that, as an fd with one byte
TAKE: Final = 25  # to a pool process: what is particular to this run, what holds for all of its job, and an envelope; see Take
# child -> supervisor
RESULT: Final = 19  # JSON of the value
FAILURE: Final = 20
PROGRESS: Final = 21
ENQUEUE: Final = 22
THEN: Final = 23  # a follow-up, answered by REPLY, too
BACKOFF: Final = 24  # what the backoff function said, after the FAILURE
DONE: Final = 26  # a pool process is through with a TAKE, what that has cost, and as JSON what it left changed; see DONE_HEAD

CONTROL_FD: Final = 3  # where the template finds its end of its socket
JOB_FD: Final = 3  # where a child finds its own
NO_WAY_TO_SAY: Final = 70  # the exit status of a child that has no other way to say it could not begin (EX_SOFTWARE)
SOCKET_CLOSED: Final = "the job has closed KQueue's socket"  # what a child says on stderr then
STACK_FD: Final = 4  # and the pipe into which it says where it stands, when it is asked or crashes
TRAY_FD: Final = 5  # and, in a process of the pool, its end of its tray

_FROM_CHILD: Final = (RESULT, FAILURE, PROGRESS, ENQUEUE, THEN, BACKOFF, DONE)
_HEADER: Final = struct.Struct(">IB")
DONE_HEAD: Final = struct.Struct("<16s16sddddd")  # the token, that of the run it goes on with; then as child_frames.Done has them
NO_TOKEN: Final = bytes(16)  # it goes on with none
MAX_FRAME: Final = 8 * 1024 * 1024  # a batch of envelopes from a child; anything larger is garbage
MAX_MESSAGE: Final = 64 * 1024  # to and from the template; a Linux socket buffer holds 208 KiB
MAX_CALL: Final = 32 * 1024 * 1024  # the arguments of an offloaded call
MAX_TOLD: Final = MAX_CALL + MAX_MESSAGE  # a frame from the supervisor, which a child believes


class WireError(Exception):
    """The other end does not speak this language."""


def frame(kind: int, payload: bytes) -> bytes:
    """A frame of a job socket."""
    return _HEADER.pack(len(payload) + 1, kind) + payload


class Take(NamedTuple):
    """What a TAKE says. `general` is JSON that most runs of a job share, so that each side makes and reads it once."""

    token: bytes  # of this run; 16 letters or digits
    attempt: int
    id: str
    general: bytes
    envelope: bytes

    def frame(self) -> bytes:
        return frame(TAKE, b"%b %d %b\n%b\n%b" % (self.token, self.attempt, self.id.encode(), self.general, self.envelope))


def read_take(payload: bytes) -> Take:
    particular, general, envelope = payload.split(b"\n", 2)  # JSON has no newline, and an id no blank
    token, attempt, id = particular.split(b" ")
    return Take(token, int(attempt), id.decode(), general, envelope)


class Frames:
    """Takes a job socket's bytes in, gives whole frames out."""

    def __init__(self, kinds: Sequence[int] = _FROM_CHILD) -> None:
        self._buffer = bytearray()
        self._at = 0  # where what was not given out begins
        self._kinds = kinds

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The frames that `data` completes. WireError for an unknown kind or an absurd length."""
        buffer = self._buffer
        if self._at:
            del buffer[: self._at]
            self._at = 0
        buffer += data
        while len(buffer) - self._at >= _HEADER.size:
            length, kind = _HEADER.unpack_from(buffer, self._at)
            if kind not in self._kinds or not 0 < length <= MAX_FRAME:
                raise WireError(f"a frame of kind {kind} and length {length}")
            begin, end = self._at + _HEADER.size, self._at + 4 + length
            if len(buffer) < end:
                return
            self._at = end
            yield kind, bytes(buffer[begin:end])
        if self._at == len(buffer):  # a large one need not be kept until the next
            buffer.clear()
            self._at = 0

    @property
    def is_whole(self) -> bool:
        """Whether something has come that was not given out: it may be a whole frame."""
        return len(self._buffer) - self._at >= _HEADER.size

    @property
    def is_empty(self) -> bool:
        """Whether no part of another frame has come."""
        return len(self._buffer) == self._at


def payload_of(message: bytes) -> bytes:
    """Of one whole frame, as it lies in a tray."""
    return message[_HEADER.size :]


def read_frame(sock: socket.socket, kinds: Sequence[int]) -> tuple[int, bytes]:
    """Block until one whole frame came. EOFError when the other end is gone. For children."""
    length, kind = _HEADER.unpack(_read_exactly(sock, _HEADER.size))
    if kind not in kinds or not 0 < length <= MAX_TOLD:
        raise WireError(f"a frame of kind {kind} and length {length}")
    return kind, _read_exactly(sock, length - 1)


def _read_exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError("the supervisor is gone")
        data += piece
    return bytes(data)


def send_message(sock: socket.socket, kind: int, fields: Any, fds: Sequence[int] = ()) -> None:
    """Send one message to or from the template.

    BlockingIOError when the buffer is full; OSError when the other end is gone; WireError when it is larger than MAX_MESSAGE.
    """
    data = bytes([kind]) + to_json(fields)
    if len(data) > MAX_MESSAGE:
        raise WireError(f"a message of {len(data)} bytes, allowed are {MAX_MESSAGE}")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def receive_message(sock: socket.socket) -> tuple[int, Any, list[int]] | None:
    """(kind, fields, fds), or None when the other end is gone. BlockingIOError when there is nothing, WireError for nonsense."""
    space = socket.CMSG_SPACE(5 * 4)  # at the most: see settling_in.equip
    data, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if not data:
        return None
    try:
        return data[0], from_json(data[1:]), list(fds)
    except EnvelopeError as error:
        for fd in fds:
            os.close(fd)
        larger = f", for it is larger than {MAX_MESSAGE} bytes" if flags & socket.MSG_TRUNC else ""
        raise WireError(f"a message of kind {data[0]} that cannot be read{larger}: {error}") from None
