"""What a daemon could not settle before it had to exit: kept whole or not at all, and settled by the next one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kqueue.brokers.base import Counters, NewJob, Settlement, Token
from kqueue.outbox import Outbox

FOLLOW_UP = NewJob("f", "mail", "isolated", -3, b'%kq1:x:y:{"\xc3\xa4":1}', 2.5, None)
SETTLEMENTS = [
    Settlement(Token("e", "1", 7), "q", "ack", follow_ups=(FOLLOW_UP, FOLLOW_UP._replace(at=1.9e9))),
    Settlement(Token("e", "2", 1), "q", "ack", certificate=b"{}", result=b'"\xc3\xa4"', keep_s=60.0),
    Settlement(Token("e", "3", 1), "q", "release", Counters(1, 2, 3, 4, 1), 9.5, "isolated", b"{}"),
    Settlement(Token("e", "4", 1), "q", "bury", Counters(attempts=3), certificate=b""),
]


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(str(tmp_path / "main.outbox"))


def test_what_was_written_is_read_to_the_last_byte(outbox: Outbox) -> None:
    assert outbox.read() == []
    outbox.write(SETTLEMENTS)
    assert outbox.read() == SETTLEMENTS
    outbox.write(SETTLEMENTS[:1])
    assert outbox.read() == SETTLEMENTS[:1]
    assert stat.S_IMODE(os.stat(outbox.path).st_mode) == 0o600, "results and arguments stand in it"
    outbox.clear()
    outbox.clear()
    assert outbox.read() == []


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"v":2,"settlements":[]}', b'{"v":1}', b'{"v":1,"settlements":[[]]}', b"\xff\xfe",
     b'{"v":1,"settlements":[[["e","1",7],"q","drop",[0,0,0,0,0],0,null,null,null,0,[]]]}',
     b'{"v":1,"settlements":[[["e","1",7],"q","ack",[0,0,0,0,0],0,null,"?",null,0,[]]]}',
     b'{"v":1,"settlements":[[["e","1"],"q","ack",[0,0,0,0,0],0,null,null,null,0,[]]]}'],
)  # fmt: skip
def test_what_cannot_be_read_is_said_and_can_be_set_aside(outbox: Outbox, damage: bytes) -> None:
    Path(outbox.path).write_bytes(damage)
    with pytest.raises(ValueError, match="cannot be read"):
        outbox.read()
    aside = outbox.set_aside()
    assert Path(aside).read_bytes() == damage
    assert outbox.read() == []


def test_a_write_that_fails_leaves_what_was_there(outbox: Outbox) -> None:
    outbox.write(SETTLEMENTS)
    os.mkdir(outbox.path + ".new")
    with pytest.raises(OSError, match="directory"):
        outbox.write(SETTLEMENTS[:1])
    assert outbox.read() == SETTLEMENTS
