"""Frames and messages arrive whole, in whatever pieces they travel, and what is none is refused before anything is allocated."""

from __future__ import annotations

import itertools
import os
import random
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from kqueue.execution import wire
from kqueue.execution.output import LINES_PER_S, MAX_LINE, TAIL, Lines, Rate, Tail
from kqueue.execution.wire import Frames, WireError, frame, read_frame, receive_message, send_message

# -- frames of a job socket ---------------------------------------------------------------------------------------------------

SENT = [(wire.PROGRESS, b""), (wire.RESULT, b"42"), (wire.ENQUEUE, b"x" * 70_000), (wire.FAILURE, b"\0\xff" * 5)]
STREAM = b"".join(frame(kind, payload) for kind, payload in SENT)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 1000, 65536, len(STREAM)])
def test_frames_come_out_whole_whatever_the_pieces(size: int) -> None:
    frames = Frames()
    pieces = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    assert [got for piece in pieces for got in frames.feed(piece)] == SENT


@pytest.mark.parametrize("seed", range(5))
def test_frames_come_out_whole_of_random_pieces(seed: int) -> None:
    dice = random.Random(seed)
    sent = [(dice.choice([wire.RESULT, wire.PROGRESS]), dice.randbytes(dice.randint(0, 300))) for _ in range(200)]
    stream = b"".join(frame(kind, payload) for kind, payload in sent)
    frames, got = Frames(), []
    while stream:
        size = dice.choice([0, 1, 5, dice.randint(0, 2000)])
        got += frames.feed(stream[:size])
        stream = stream[size:]
    assert got == sent


def test_a_frame_is_not_given_out_before_its_last_byte() -> None:
    frames = Frames()
    for byte in STREAM[:11]:
        assert [kind for kind, _ in frames.feed(bytes([byte]))] in ([], [wire.PROGRESS])
    assert list(frames.feed(STREAM[11:12])) == [(wire.RESULT, b"42")]


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello, this is no frame",
        struct.pack(">IB", 0, wire.RESULT),  # a length that leaves no room for the kind
        struct.pack(">IB", wire.MAX_FRAME + 1, wire.RESULT),
        struct.pack(">IB", 2**32 - 1, wire.RESULT),
        struct.pack(">IB", 1, 0),
        struct.pack(">IB", 1, wire.RUN),  # which only a supervisor says
        b"\0" * 5,
        b"\xff" * 5,
    ],
)
def test_what_is_no_frame_is_refused_by_its_first_five_bytes(garbage: bytes) -> None:
    frames = Frames()
    assert list(frames.feed(garbage[:4])) == []
    with pytest.raises(WireError, match="a frame of kind"):
        list(frames.feed(garbage[4:]))


def test_what_came_whole_before_the_garbage_has_come() -> None:
    frames = Frames().feed(frame(wire.RESULT, b"42") + b"garbage")
    assert next(frames) == (wire.RESULT, b"42")
    with pytest.raises(WireError):
        next(frames)


def test_the_largest_frame_is_a_frame() -> None:
    payload = b"x" * (wire.MAX_FRAME - 1)
    assert list(Frames().feed(frame(wire.RESULT, payload))) == [(wire.RESULT, payload)]
    with pytest.raises(WireError):
        list(Frames().feed(frame(wire.RESULT, payload + b"x")))


def test_who_stops_listening_after_each_frame_misses_none() -> None:
    """As a run does at its end: what came with that is the next one's. Cut anywhere."""
    sent = [(wire.RESULT, b"42"), (wire.PROGRESS, b""), (wire.DONE, b"x" * 20), (wire.RESULT, b"null")]
    stream = b"".join(frame(*each) for each in sent)
    for cut in range(len(stream) + 1):
        frames, got, left = Frames(), [], 0
        for data in (stream[:cut], stream[cut:]):
            left += len(data)
            while (one := next(frames.feed(data), None)) is not None:
                got.append(one)
                left -= len(frame(*one))
                assert (frames.is_whole, frames.is_empty) == (left >= 5, left == 0)
                data = b""
        assert got == sent


def test_many_small_frames_in_one_piece_take_no_time_to_speak_of() -> None:
    many = frame(wire.PROGRESS, b"[0.5,null]") * 50_000
    assert sum(1 for _ in Frames().feed(many)) == 50_000


Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def stream() -> Iterator[Pair]:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, its:
        yield ours, its


def test_a_child_reads_its_frame_whole_and_no_byte_more(stream: Pair) -> None:
    ours, its = stream
    ours.sendall(frame(wire.RUN, b"envelope") + frame(wire.REPLY, b"{}"))
    assert read_frame(its, (wire.RUN, wire.CALL)) == (wire.RUN, b"envelope")
    assert read_frame(its, (wire.REPLY,)) == (wire.REPLY, b"{}")


class Drip:
    """A socket that gives out three bytes at most, however much it is asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def recv(self, size: int) -> bytes:
        piece, self.data = self.data[: min(size, 3)], self.data[min(size, 3) :]
        return piece


def test_a_child_reads_whole_frames_from_a_slow_socket() -> None:
    drip: Any = Drip(frame(wire.RUN, b"envelope") + frame(wire.REPLY, b""))
    assert read_frame(drip, (wire.RUN,)) == (wire.RUN, b"envelope")
    assert read_frame(drip, (wire.REPLY,)) == (wire.REPLY, b"")
    with pytest.raises(EOFError):
        read_frame(drip, (wire.REPLY,))


@pytest.mark.parametrize("sent", [b"", b"\0", frame(wire.RUN, b"envelope")[:-1]])
def test_a_supervisor_that_is_gone_is_the_end_of_the_file(stream: Pair, sent: bytes) -> None:
    ours, its = stream
    ours.sendall(sent)
    ours.close()
    with pytest.raises(EOFError, match="the supervisor is gone"):
        read_frame(its, (wire.RUN,))


@pytest.mark.parametrize("sent", [frame(wire.REPLY, b"{}"), struct.pack(">IB", 2**31, wire.RUN), struct.pack(">IB", 0, wire.RUN)])
def test_a_child_refuses_what_it_did_not_ask_for(stream: Pair, sent: bytes) -> None:
    ours, its = stream
    ours.sendall(sent)
    with pytest.raises(WireError):
        read_frame(its, (wire.RUN, wire.CALL))


# -- messages of the template -------------------------------------------------------------------------------------------------


@pytest.fixture
def packets() -> Iterator[Pair]:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, its:
        ours.setblocking(False)
        its.setblocking(False)
        yield ours, its


def test_a_message_brings_its_fds_along(packets: Pair) -> None:
    ours, its = packets
    read_fd, write_fd = os.pipe()
    send_message(ours, wire.STARTED, {"pid": 42}, [write_fd])
    send_message(ours, wire.EXITED, {"status": 0})
    os.close(write_fd)
    kind, fields, fds = receive_message(its) or pytest.fail("it is gone")
    assert (kind, fields, len(fds)) == (wire.STARTED, {"pid": 42}, 1)
    assert not os.get_inheritable(fds[0])
    os.write(fds[0], b"through the pipe")
    assert os.read(read_fd, 100) == b"through the pipe"
    assert receive_message(its) == (wire.EXITED, {"status": 0}, [])
    for fd in (read_fd, *fds):
        os.close(fd)


def test_no_message_and_no_other_end_are_told_apart(packets: Pair) -> None:
    ours, its = packets
    with pytest.raises(BlockingIOError):
        receive_message(its)
    ours.close()
    assert receive_message(its) is None
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        send_message(its, wire.READY, {})


def sent_until_full(sock: socket.socket) -> int:
    for number in itertools.count():
        try:
            send_message(sock, wire.JOB_KNOWN, {"number": number})
        except BlockingIOError:
            return number
    raise AssertionError


def test_a_full_buffer_is_told_and_loses_nothing(packets: Pair) -> None:
    ours, its = packets
    for number in range(sent_until_full(ours)):
        assert receive_message(its) == (wire.JOB_KNOWN, {"number": number}, [])


@pytest.mark.parametrize("data", [b"\x03", b"\x03{", b"\x03\xff", b"\x03[NaN]", b"\xff" * 100])
def test_a_message_that_cannot_be_read_is_refused_and_its_fds_are_closed(packets: Pair, data: bytes) -> None:
    ours, its = packets
    read_fd, write_fd = os.pipe()
    before = set(os.listdir("/proc/self/fd"))
    socket.send_fds(ours, [data], [read_fd, write_fd])
    with pytest.raises(WireError, match=r"a message of kind .* that cannot be read: not JSON"):
        receive_message(its)
    assert set(os.listdir("/proc/self/fd")) == before
    os.close(read_fd)
    os.close(write_fd)


def test_a_message_that_was_cut_says_why(packets: Pair) -> None:
    ours, its = packets
    with pytest.raises(WireError, match="allowed are 65536"):
        send_message(ours, wire.JOB_KNOWN, {"signature": "x" * wire.MAX_MESSAGE})
    ours.send(bytes([wire.JOB_KNOWN]) + b"x" * wire.MAX_MESSAGE)  # by somebody else
    with pytest.raises(WireError, match="for it is larger than 65536 bytes"):
        receive_message(its)
    send_message(ours, wire.READY, {})
    assert receive_message(its) == (wire.READY, {}, []), "the next one is whole again"


# -- output -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_output_is_cut_into_lines_whatever_the_pieces(size: int) -> None:
    text = "one\n\ntwo\r\nGrüße 🎉\nunended".encode()
    lines, got = Lines(), []
    for start in range(0, len(text), size):
        got += lines.feed(text[start : start + size])
    assert got == ["one", "", "two", "Grüße 🎉"]
    assert lines.rest() == ["unended"]
    assert lines.rest() == []


def test_what_is_not_utf8_shows_and_does_not_raise() -> None:
    assert Lines().feed(b"\xff\xfe caf\xc3\n") == ["\ufffd\ufffd caf\ufffd"]


@pytest.mark.parametrize("pieces", [1, 3, 100])
@pytest.mark.parametrize("length", [MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, 3 * MAX_LINE, 3 * MAX_LINE + 5])
def test_a_line_without_end_is_cut_and_never_gathered(length: int, pieces: int) -> None:
    text = b"x" * length + b"\nnext\n"
    lines, got = Lines(), []
    for start in range(0, len(text), len(text) // pieces):
        got += lines.feed(text[start : start + len(text) // pieces])
        assert len(lines._rest) <= MAX_LINE
    assert got[-1] == "next"
    assert "".join(got[:-1]) == "x" * length
    assert max(map(len, got)) <= MAX_LINE


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_of_a_flood_only_so_many_lines_are_read_and_the_rest_counted(size: int) -> None:
    lines, got, flood = Lines(), [], b"".join(b"%d\n" % number for number in range(1000)) + b"unended"
    most = 10
    for start in range(0, len(flood), size):
        got += lines.feed(flood[start : start + size], most - len(got))
    assert got[:most] == [str(number) for number in range(most)]
    assert len(got) <= most + 1
    assert len(got) + lines.take_skipped() == 1000
    assert lines.take_skipped() == 0
    assert lines.rest() == ["unended"]


def test_without_a_limit_nothing_is_skipped() -> None:
    lines = Lines()
    assert len(lines.feed(b"\n" * 5000)) == 5000
    assert len(lines.feed(b"a\n" * 5, 5)) == 5
    assert lines.take_skipped() == 0


def test_the_tail_is_the_last_of_everything() -> None:
    dice = random.Random(1)
    tail, everything = Tail(), b""
    for _ in range(300):
        piece = bytes(dice.choices(b"abc\n", k=dice.choice([0, 1, 10, 5000, 3 * TAIL])))
        tail.add(piece)
        everything += piece
        assert tail.text() == everything[-TAIL:].decode()
        assert sum(map(len, tail._pieces)) < 2 * TAIL + 3 * TAIL
    assert Tail().text() == ""


def test_a_tail_of_single_bytes_stays_small() -> None:
    tail = Tail()
    for _ in range(5 * TAIL):
        tail.add(b"x")
        tail.add(b"")
    assert len(tail._pieces) <= 2 * TAIL + 2
    assert tail.text() == "x" * TAIL


def test_a_tail_that_was_cut_inside_a_character_still_reads() -> None:
    tail = Tail()
    tail.add("🎉".encode() * TAIL)
    assert tail.text().endswith("🎉🎉")
    tail.add(b"x")
    assert tail.text().endswith("🎉x")


def test_a_flood_is_held_back_by_the_second_and_counted() -> None:
    rate = Rate()
    assert [rate.allows(100.0) for _ in range(LINES_PER_S + 50)].count(True) == LINES_PER_S
    assert rate.held_back == 50
    assert not rate.allows(100.99)
    assert rate.allows(101.0)
    assert rate.held_back == 51
    assert rate.left(101.5) == LINES_PER_S - 1
    assert rate.left(102.0) == LINES_PER_S
    for _ in range(LINES_PER_S + 1):
        rate.spend()
    assert rate.left(102.5) == 0
