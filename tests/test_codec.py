"""Envelopes: what goes in comes out, and whatever else comes in is refused with its reason, never with a crash."""

from __future__ import annotations

import enum
import json
import math
import random
import string
from collections import OrderedDict
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import pytest

from kqueue.codec import MAX_BYTES, MAX_DEPTH, OPTIONS, TAG, Envelope, decode, encode, from_json, pack, to_json, unpack
from kqueue.errors import EnvelopeError, NewerEnvelope


def round_trip(value: Any) -> Any:
    return unpack(from_json(to_json(pack(value))))


def envelope(*args: Any, **kwargs: Any) -> Envelope:
    return Envelope("01J", "send_email", args, kwargs)


def nested(depth: int, value: Any = 1) -> Any:
    for _ in range(depth):
        value = [value]
    return value


# -- values -------------------------------------------------------------------------------------------------------------------

BERLIN = timezone(timedelta(hours=1))
PLAIN = [
    None, True, False, 0, -1, 2**63, -(10**4000), 0.0, 1e308, 5e-324, "", "text", "Grüße 🎉", 'quo"te\\\n\t\0\x1f\u2028', [],
    {}, [[]],
]  # fmt: skip
TAGGED = [
    datetime(2026, 11, 24, 8, 0, 0, 123456), datetime(2026, 11, 24, tzinfo=timezone.utc), datetime(1, 1, 1, tzinfo=BERLIN),
    datetime.max, date(2026, 11, 24), date.min, time(8, 30), time(23, 59, 59, 999999, tzinfo=BERLIN), timedelta(0),
    timedelta(days=-1, microseconds=1), timedelta.max, timedelta.min, UUID(int=0), UUID(int=2**128 - 1), Decimal("1.10"),
    Decimal("-0"), Decimal("1E+100"), Decimal("Infinity"), b"", b"\x00\xff bytes", set(), {1, "a", None},
    {(1, (2, 3)), (4,)}, {frozenset({1, 2}), frozenset()}, {("a", frozenset({(b"b", UUID(int=7))}))},
]  # fmt: skip


def named(value: Any) -> str:
    """The same in every process, unlike a set's order."""
    return f"set of {len(value)}" if isinstance(value, set) else f"{value!a:.30}"


@pytest.mark.parametrize("value", PLAIN + TAGGED, ids=named)
def test_a_value_comes_back_as_it_was_and_of_its_own_type(value: Any) -> None:
    for carried in (value, [value, {"key": [value]}]):
        back = round_trip(carried)
        assert back == carried
        assert repr(back) == repr(carried) or isinstance(value, set)
    assert type(round_trip(value)) is type(value)


def test_negative_zero_and_the_precision_of_floats_survive() -> None:
    assert math.copysign(1, round_trip(-0.0)) == -1
    for value in (0.1, 1 / 3, 1e-300, 123456789.123456789):
        assert round_trip(value) == value


class Colour(str, enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Shouting(str):
    def __str__(self) -> str:
        return self.upper()


class Mixed:
    """A base that is no plain type, in front or behind."""


class Late(str, Mixed): ...


class Early(Mixed, float): ...


class Count(int):
    def __int__(self) -> int:
        return -1


class Point(NamedTuple):
    x: int
    y: int


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Colour.RED, "red"), (Level.HIGH, 3), (Shouting("quiet"), "quiet"), (Late("late"), "late"), (Early(1.5), 1.5),
        (Count(7), 7), ((1, (2, 3)), [1, [2, 3]]), (Point(1, 2), [1, 2]), (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        ({Colour.RED: 1}, {"red": 1}), (frozenset({1}), {1}), (bytearray(b"ab"), b"ab"),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_a_relative_of_a_plain_type_comes_back_as_the_plain_one(value: Any, plain: Any) -> None:
    back = round_trip(value)
    assert back == plain
    assert type(back) is type(plain)


LOOKALIKES = [{TAG: "set"}, {TAG: "datetime", "v": "x"}, {TAG: {TAG: 1}}, {"v": 1, TAG: "dict"}, {TAG: None}]


@pytest.mark.parametrize("value", LOOKALIKES)
def test_a_dict_that_looks_like_a_tag_is_still_a_dict(value: Any) -> None:
    assert round_trip(value) == value
    assert round_trip([{"a": value}]) == [{"a": value}]


class Opaque:
    def __repr__(self) -> str:
        return "<opaque>"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"args\[1\] is nan, which JSON cannot carry"),
        (float("-inf"), r"args\[1\] is -inf"),
        ({"a": [1, float("nan")]}, r"args\[1\]\['a'\]\[1\] is nan"),
        (Opaque(), r"args\[1\] is of type Opaque, which a job cannot carry; pass an id, a path, or plain JSON values"),
        ([Opaque()], r"args\[1\]\[0\] is of type Opaque"),
        ({1, Opaque()}, r"args\[1\] is of type Opaque"),
        (object, r"args\[1\] is of type type"),
        (len, "builtin_function_or_method"),
        (memoryview(b""), "memoryview"),
        (1j, "complex"),
        (iter([]), "list_iterator"),
        ({1: "a"}, r"args\[1\] has the key 1; keys must be strings, since JSON would change others"),
        ({None: "a"}, "has the key None"),
        ({("a",): 1}, r"has the key \('a',\)"),
        ("half a pair: \ud800", "not valid Unicode"),
        ({"\udfff": 1}, "not valid Unicode"),
        (10**5000, "integer string conversion"),
        (nested(MAX_DEPTH + 2), "nested deeper than 100 levels, or contains itself"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_json_cannot_carry_is_a_type_error_that_says_where_it_stands(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        encode(envelope("fine", value))
    with pytest.raises(TypeError):
        encode(envelope(key=value))


def test_what_contains_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    round_and_round: dict[str, Any] = {}
    round_and_round["a"] = {"b": [round_and_round]}
    deep: Any = frozenset()
    for _ in range(3000):
        deep = frozenset({deep})
    for value in (endless, round_and_round, deep):
        with pytest.raises(TypeError, match="contains itself"):
            pack(value)
        with pytest.raises(TypeError, match="contains itself"):
            encode(envelope(value))
    with pytest.raises(TypeError, match="contains itself"):
        to_json(endless)


@pytest.mark.parametrize(
    "wrap", [lambda v: [v], lambda v: {"a": v}, lambda v: {TAG: v}, lambda v: frozenset({v}), lambda v: (v,)]
)
def test_whatever_may_be_packed_may_be_unpacked(wrap: Any) -> None:
    """Up to the very last level that `pack` takes."""
    value, packed = 1, 0
    for _ in range(MAX_DEPTH + 5):
        value = wrap(value)
        try:
            data = encode(envelope(value, key=value))
        except TypeError:
            break
        packed += 1
        back = decode(data)
        unpack(back.args)
        unpack(back.kwargs["key"])
    assert MAX_DEPTH <= packed <= MAX_DEPTH + 2


# -- at random ------------------------------------------------------------------------------------------------------------------


def random_text(dice: random.Random) -> str:
    alphabet = dice.choice([string.printable, "äßπ漢字🎉", '"\\\0\n\u2028', TAG, "ab"])
    return "".join(dice.choices(alphabet, k=dice.randint(0, 8)))


def random_hashable(dice: random.Random, depth: int) -> Any:
    kind = dice.randint(0, 12 if depth else 9)
    if kind < 2:
        return random_text(dice)
    if kind == 2:
        return dice.choice([None, dice.randint(-(10**30), 10**30), dice.randint(-5, 5)])
    if kind == 3:
        return dice.choice([dice.random(), dice.uniform(-1e300, 1e300), -0.0])
    if kind == 4:
        zone = dice.choice([None, timezone.utc, timezone(timedelta(minutes=dice.randint(-800, 800)))])
        day = dice.randint(2, 9998), dice.randint(1, 12), dice.randint(1, 28)
        return datetime(*day, 1, 2, 3, dice.randint(0, 999999), tzinfo=zone)
    if kind == 5:
        return dice.choice([date(dice.randint(1, 9999), 2, 3), time(dice.randint(0, 23), 1, 2, dice.randint(0, 999999))])
    if kind == 6:
        return timedelta(dice.randint(-999999, 999999), dice.randint(0, 86399), dice.randint(0, 999999))
    if kind == 7:
        return UUID(int=dice.getrandbits(128))
    if kind == 8:
        return Decimal(dice.randint(-(10**40), 10**40)).scaleb(dice.randint(-30, 30))
    if kind == 9:
        return dice.randbytes(dice.randint(0, 20))
    members = [random_hashable(dice, depth - 1) for _ in range(dice.randint(0, 3))]
    return tuple(members) if kind == 10 else frozenset(members)


def random_value(dice: random.Random, depth: int) -> Any:
    kind = dice.randint(0, 6)
    if not depth or kind < 2:
        value = random_hashable(dice, 0)
        return value
    if kind < 4:
        return [random_value(dice, depth - 1) for _ in range(dice.randint(0, 4))]
    if kind == 4:
        return {random_hashable(dice, depth - 1) for _ in range(dice.randint(0, 4))}
    return {random_text(dice): random_value(dice, depth - 1) for _ in range(dice.randint(0, 4))}


def without_tuples(value: Any) -> Any:
    """`value` as it comes back: outside of sets, a tuple is a list and a frozenset a set."""
    if isinstance(value, list):
        return [without_tuples(item) for item in value]
    return {key: without_tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("seed", range(20))
def test_random_trees_come_back(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(50):
        args = [random_value(dice, 5) for _ in range(dice.randint(0, 3))]
        kwargs = {random_text(dice): random_value(dice, 4) for _ in range(dice.randint(0, 3))}
        data = encode(Envelope("id", "job", args, kwargs))
        back = decode(data)
        assert unpack(back.args) == without_tuples(args)
        assert {key: unpack(value) for key, value in back.kwargs.items()} == without_tuples(kwargs)
        if not back.tagged:
            assert (back.args, back.kwargs) == (args, kwargs), "what is said to have no tags has none"
        json.loads(data.decode("utf-8"), parse_constant=pytest.fail)


def well_formed() -> bytes:
    return encode(Envelope("01J", "job", [1, {"a": [True, None, 1.5]}, datetime(2026, 1, 1)], {"k": {b"x"}}, trace="00-1-2-3"))


def try_to_read(data: bytes) -> bool:
    """Whether `data` is an envelope. Anything but EnvelopeError is a bug."""
    try:
        back = decode(data)
        unpack(back.args)
        {key: unpack(value) for key, value in back.kwargs.items()}
    except EnvelopeError as error:
        return not str(error).encode()  # there is a reason, and it can stand in a log
    assert isinstance(back.args, list)
    assert isinstance(back.kwargs, dict)
    return True


@pytest.mark.parametrize("seed", range(10))
def test_garbage_is_refused_and_never_crashes(seed: int) -> None:
    dice = random.Random(seed)
    good = well_formed()
    assert try_to_read(good)
    for _ in range(300):
        data = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(data) + 1)
            kind = dice.randint(0, 4)
            if kind == 0:
                data[at : at + 1] = dice.randbytes(1)
            elif kind == 1:
                del data[at : at + dice.randint(1, 20)]
            elif kind == 2:
                data[at:at] = dice.choice([b"[", b"{", b'"', b"1e999", b"null", b"NaN", b"\\ud800", b"\xff", b'{"$kq":"set"}'])
            elif kind == 3:
                data[at:at] = data[at : at + dice.randint(1, 30)]
            else:
                data = data[:at] or bytearray(b"{")
        try_to_read(bytes(data))
        try_to_read(dice.randbytes(dice.randint(0, 60)))


@pytest.mark.parametrize("seed", range(10))
def test_wrong_types_are_refused_and_never_crash(seed: int) -> None:
    dice = random.Random(seed)
    fields = json.loads(well_formed())
    odd: list[Any] = [
        None, True, False, 0, -1, 1, 2, 1.5, 10**400, -(10**4000), "", "x", "x" * 300, "\n", "\ud800", [], [1], {}, {"a": 1},
        nested(99), {TAG: "set"}, {TAG: "set", "v": "ab"}, {TAG: ["set"], "v": []}, {TAG: "timedelta", "v": [1e308]},
        {TAG: "UUID", "v": 5}, {TAG: "datetime", "v": []}, {TAG: "dict", "v": []}, {TAG: "bytes", "v": "!"},
        {TAG: "Decimal", "v": {}}, {TAG: {}, "v": 1}, {TAG: "bytes", "v": "ä"}, {TAG: "set", "v": [[{}]]},
        {TAG: "time", "v": "25:00"}, {TAG: "eval", "v": "1"}, {TAG: None},
    ]  # fmt: skip
    for _ in range(400):
        changed = dict(fields)
        for _ in range(dice.randint(1, 2)):
            name = dice.choice([*fields, *OPTIONS, "more"])
            changed[name] = dice.choice(odd)
            if dice.random() < 0.2:
                del changed[name]
            if dice.random() < 0.3:
                changed["args"] = [dice.choice(odd), {"a": dice.choice(odd)}]
        try_to_read(json.dumps(changed).encode())


# -- envelopes ------------------------------------------------------------------------------------------------------------------


def test_an_envelope_reads_as_it_was_written() -> None:
    written = Envelope(
        "01JABC", "send_email", [1, "a"], {"to": "a@b.c"}, "mail", "isolated", -7, 1790000000.123,
        {"timeout": 5, "backoff": [1, 2]}, "00-4bf9-00f0-01", False,
    )  # fmt: skip
    data = encode(written)
    assert decode(data) == written
    assert json.loads(data) == {
        "v": 1, "id": "01JABC", "job": "send_email", "args": [1, "a"], "kwargs": {"to": "a@b.c"}, "queue": "mail",
        "lane": "isolated", "priority": -7, "timeout": 5, "backoff": [1, 2], "enqueued_at": 1790000000.123,
        "trace": "00-4bf9-00f0-01",
    }  # fmt: skip
    assert b" " not in data


def test_what_a_stranger_may_leave_out() -> None:
    assert decode(b'{"v":1,"id":"a","job":"b"}') == Envelope("a", "b", [], {}, "default", "inline", 0, 0.0, {}, None, False)
    assert decode(b' {"job" : "b", "v":1, "id":"a", "more": [1], "trace": null, "timeout": null} ').options == {}


def test_a_name_may_have_255_characters() -> None:
    fields = {"v": 1, "id": "a", "job": "ß" * 255, "queue": "q" * 255}
    assert decode(json.dumps(fields).encode()).job == "ß" * 255
    with pytest.raises(EnvelopeError, match='"job" is not a printable text of 1 to 255 characters'):
        decode(json.dumps({**fields, "job": "ß" * 256}).encode())


def test_only_known_options_are_taken_from_an_envelope() -> None:
    fields = {"v": 1, "id": "a", "job": "b", **dict.fromkeys([*OPTIONS, "isolated", "start", "max_files"], 1)}
    assert decode(json.dumps(fields).encode()).options == dict.fromkeys(OPTIONS, 1)


def test_text_that_php_has_escaped_is_text() -> None:
    back = decode(rb'{"v":1,"id":"a","job":"b","args":["Gr\u00fc\u00dfe \ud83c\udf89","\u0024kq",{"\u0024kq":"set","v":[1]}]}')
    assert back.tagged, "an escape may hide a tag"
    assert unpack(back.args) == ["Grüße 🎉", "$kq", {1}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"null", "the envelope is null, not an object"),
        (b"[]", "the envelope is an array, not an object"),
        (b'"text"', "the envelope is a string"),
        (b"5", "the envelope is a number"),
        (b"true", "the envelope is a boolean"),
        (b"{}", '"v" is None'),
        (b'{"v":1} x', "not JSON: Extra data"),
        (b"{'v':1}", "not JSON"),
        (b'\xef\xbb\xbf{"v":1,"id":"a","job":"b"}', "not JSON"),
        ('{"v":1,"id":"a","job":"b"}'.encode("utf-16"), "not JSON"),
        (b'{"v":1,"id":"a","job":"\xff"}', "not JSON: 'utf-8' codec"),
        (b'{"v":1,"id":"a","job":"b","args":[NaN]}', "NaN is not JSON"),
        (b'{"v":1,"id":"a","job":"b","args":[-Infinity]}', "-Infinity is not JSON"),
        (b'{"v":1,"id":"a","job":"b","args":[1e999]}', "1e999 is larger than any float"),
        (b'{"v":1,"id":"a","job":"b","args":["\\ud800"]}', "surrogates not allowed"),
        (b'{"v":1,"id":"a","job":"b","args":[' + b"9" * 5000 + b"]}", "not JSON: Exceeds the limit"),
        (b'{"v":1,"id":"a","job":"b","enqueued_at":' + b"9" * 400 + b"}", "a number out of range"),
        (b'{"v":"1"}', "no valid version: \"v\" is '1'"),
        (b'{"v":true}', "no valid version"),
        (b'{"v":0}', "no valid version"),
        (b'{"v":1.0}', "no valid version"),
        (b'{"v":1}', '"id" is not a printable text of 1 to 255 characters: None'),
        (b'{"v":1,"id":""}', '"id" is not a printable text'),
        (b'{"v":1,"id":"a b","job":"b"}', '"id" may hold letters, digits, - and _'),
        (b'{"v":1,"id":"%s","job":"b"}' % (b"x" * 65), r'"id" may hold .* \(at most 64\)'),
        (b'{"v":1,"id":"a"}', '"job" is not a printable text'),
        (b'{"v":1,"id":"a","job":5}', '"job" is not a printable text of 1 to 255 characters: 5'),
        (b'{"v":1,"id":"a","job":"two\\nlines"}', '"job" is not a printable text'),
        (b'{"v":1,"id":"a","job":"b","args":{}}', '"args" is an object, not a list'),
        (b'{"v":1,"id":"a","job":"b","args":null}', '"args" is null, not a list'),
        (b'{"v":1,"id":"a","job":"b","kwargs":[]}', '"kwargs" is an array, not a dict'),
        (b'{"v":1,"id":"a","job":"b","priority":1.5}', '"priority" is a number, not a int'),
        (b'{"v":1,"id":"a","job":"b","priority":true}', '"priority" is a boolean'),
        (b'{"v":1,"id":"a","job":"b","enqueued_at":"now"}', '"enqueued_at" is a string, not a number'),
        (b'{"v":1,"id":"a","job":"b","lane":"fast"}', "\"lane\" is 'fast'; allowed are inline and isolated"),
        (b'{"v":1,"id":"a","job":"b","lane":[]}', '"lane" is'),
        (b'{"v":1,"id":"a","job":"b","queue":""}', '"queue" is not a printable text'),
        (b'{"v":1,"id":"a","job":"b","trace":5}', '"trace" is a number, not a str'),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 50_000, "not JSON"),
    ],
    ids=lambda value: repr(value[:50]) if isinstance(value, bytes) else "",
)
def test_what_is_no_envelope_is_refused_with_its_reason(data: bytes, message: str) -> None:
    with pytest.raises(EnvelopeError, match=message) as refusal:
        decode(data)
    assert len(str(refusal.value)) < 250
    assert not isinstance(refusal.value, NewerEnvelope)


@pytest.mark.parametrize("version", [2, 3, 10**300])
def test_a_newer_version_is_told_apart_since_a_rolling_deploy_looks_like_that(version: int) -> None:
    """Whatever else it holds: this KQueue does not know what is right there."""
    with pytest.raises(NewerEnvelope, match="this KQueue reads up to 1: upgrade it"):
        decode(b'{"v":%d,"id":5,"jobs":[]}' % version)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"$kq":"dict","v":{"a":', b'[{"$kq":"set","v":['])
@pytest.mark.parametrize("depth", [90, 110, 300, 900, 2000, 20_000])
def test_depth_bombs_are_refused_where_they_are_unpacked_at_the_latest(opening: bytes, depth: int) -> None:
    closing = bytes({ord("["): b"]", ord("{"): b"}"}[c][0] for c in reversed(opening) if c in b"[{")
    data = b'{"v":1,"id":"a","job":"b","args":[' + opening * depth + (b"1" if opening != b"[" else b"") + closing * depth + b"]}"
    if depth >= 110:
        with pytest.raises(EnvelopeError, match=r"not JSON|nested deeper than 100 levels"):
            unpack(decode(data).args)
    else:
        try_to_read(data)


def test_an_envelope_may_be_a_mebibyte_and_no_more() -> None:
    room = MAX_BYTES - len(encode(envelope("")))
    largest = encode(envelope("x" * room))
    assert len(largest) == MAX_BYTES
    assert decode(largest).args == ["x" * room]
    with pytest.raises(EnvelopeError, match="'send_email' is 1048577 bytes, allowed are 1048576: put the data somewhere else"):
        encode(envelope("x" * (room + 1)))
    with pytest.raises(EnvelopeError, match="the envelope is 1048577 bytes, allowed are 1048576"):
        decode(largest + b" ")


def test_the_limit_can_be_another() -> None:
    small = encode(envelope())
    assert decode(small, max_bytes=len(small)).id == "01J"
    with pytest.raises(EnvelopeError, match="allowed are 10"):
        encode(envelope(), max_bytes=10)
    with pytest.raises(EnvelopeError, match=f"allowed are {len(small) - 1}"):
        decode(small, max_bytes=len(small) - 1)


def test_tags_are_noticed_so_that_unpacking_can_be_skipped_without_them() -> None:
    assert not decode(encode(envelope(1, "text", a=[None]))).tagged
    for value in (datetime.max, {TAG: 1}, TAG, "\\", '"', "\n"):
        assert decode(encode(envelope(value))).tagged


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("set", "ab"), ("set", {"a": 1}), ("set", None), ("set", [{}]), ("timedelta", "12"), ("timedelta", [1e308]),
        ("timedelta", ["a"]), ("Decimal", 1.5), ("Decimal", "1,5"), ("Decimal", [0, [1], 2]), ("UUID", 5), ("UUID", "zz"),
        ("bytes", [1]), ("bytes", "!"), ("bytes", "ä"), ("date", 5), ("date", "2026-13-01"), ("time", "25:00"), ("datetime", []),
        ("dict", []), ("dict", None),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_its_tag_is_refused(name: str, content: Any) -> None:
    with pytest.raises(EnvelopeError, match=f"a value tagged '{name}' cannot be read: "):
        unpack([{TAG: name, "v": content}])


def test_a_tag_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(EnvelopeError, match="a value tagged 'pickle' cannot be read: known tags are datetime"):
        unpack({TAG: "pickle", "v": "gASV"})


def test_it_is_the_same_json_where_no_encoder_is_written_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [["ä\u2028\"\\\n", 1, -1.5, True, None, {"a": [{}]}, 1 << 70], "text", 1.5, {}, {"\x00": "\x7f"}]
    in_c = [to_json(value) for value in values]
    assert [from_json(data) for data in in_c] == values
    for written_in_c in (True, False):
        if not written_in_c:
            monkeypatch.setattr("kqueue.codec._chunks", None)
        assert [to_json(value) for value in values] == in_c
        for wrong in ([math.nan], {"a": math.inf}, ["\ud800"], [object()]):
            with pytest.raises(TypeError):
                to_json(wrong)
