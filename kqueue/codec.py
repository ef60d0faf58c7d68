"""Envelopes <-> bytes: strict JSON, versioned. What a queue holds is these bytes, and nothing ever re-encodes them.

    {"v":1,"id":"01J…","job":"send_email","args":[…],"kwargs":{…},"queue":"default","lane":"inline","enqueued_at":1.7e9}

`args` and `kwargs` are JSON values. What JSON lacks is tagged, as in {"$kq":"date","v":"2026-11-24"}; `pack` puts the tags
in, `unpack` takes them out, and the supervisor never unpacks for an isolated job: that happens in the child.

Options stand in an envelope only when the dispatch asked for them; what is absent comes from the job's own declaration at the
time it runs. Nothing here pickles, imports or evaluates anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from operator import itemgetter
from sys import intern
from typing import Any, Final, NamedTuple

from .errors import EnvelopeError, NewerEnvelope
from .ids import PATTERN

VERSION: Final = 1
MAX_BYTES: Final = 1024 * 1024  # INTERFACES: over 1 MiB is refused, unless configured otherwise
MAX_DEPTH: Final = 100  # of nested arrays and objects in arguments and results
TAG: Final = "$kq"
_TAG: Final = TAG.encode()
LANES: Final = ("inline", "isolated")
OPTIONS: Final = (  # may be in an envelope
    "timeout", "max_memory", "max_cpu", "max_files", "max_processes", "max_file_size", "max_attempts", "backoff", "keep_result",
    "retry_until", "retry_on", "dont_retry_on", "causes",
)  # fmt: skip


_OPTIONS: Final = frozenset(OPTIONS)
_NO_OPTIONS: Final[Mapping[str, Any]] = {}
_AS_IS: Final = frozenset((str, int, bool, type(None)))


class Envelope(NamedTuple):
    """One job as it was dispatched. `options` holds those of OPTIONS that the dispatch set."""

    id: str
    job: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    queue: str = "default"
    lane: str = "inline"
    priority: int = 0
    enqueued_at: float = 0.0  # seconds since 1970, by the dispatcher's clock; for people, not for ordering
    options: Mapping[str, Any] = {}
    trace: str | None = None  # W3C traceparent
    tagged: bool = True  # False: surely nothing to unpack


def encode(envelope: Envelope, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of `envelope`, whose args and kwargs are packed here.

    Raises TypeError for a value that cannot be carried, naming where it stands; EnvelopeError over `max_bytes`.
    """
    fields: dict[str, Any] = {
        "v": VERSION,
        "id": envelope.id,
        "job": envelope.job,
        "args": [value if type(value) in _AS_IS else pack(value, f"args[{i}]") for i, value in enumerate(envelope.args)],
        "kwargs": {key: value if type(value) in _AS_IS else pack(value, key) for key, value in envelope.kwargs.items()},
        "queue": envelope.queue,
        "lane": envelope.lane,
        "priority": envelope.priority,
        **envelope.options,
        "enqueued_at": round(envelope.enqueued_at, 3),
    }
    if envelope.trace is not None:
        fields["trace"] = envelope.trace
    data = to_json(fields)
    if len(data) > max_bytes:
        raise EnvelopeError(
            f"job {envelope.job!r} is {len(data)} bytes, allowed are {max_bytes}: put the data somewhere else and dispatch a key"
        )
    return data


def decode(data: bytes, max_bytes: int = MAX_BYTES, expected_id: str = "") -> Envelope:
    """The envelope in `data`. Arguments stay packed. Raises EnvelopeError (NewerEnvelope for a later version).

    Where its id is `expected_id`, it is that very string, and the memory of a second one is not needed.
    """
    if len(data) > max_bytes:
        raise EnvelopeError(f"the envelope is {len(data)} bytes, allowed are {max_bytes}")
    fields = from_json(data)
    if not isinstance(fields, dict):
        raise EnvelopeError(f"the envelope is {_kind(fields)}, not an object")
    version = fields.get("v")
    if type(version) is not int or version < 1:
        raise EnvelopeError(f'the envelope has no valid version: "v" is {version!r:.40}')
    tagged = _TAG in data or b"\\" in data
    if (usual := _usual(fields, tagged, expected_id)) is not None:
        return usual
    if version > VERSION:
        raise NewerEnvelope(f"the envelope is of version {version}, this KQueue reads up to {VERSION}: upgrade it")
    try:
        return Envelope(
            id=_text(fields, "id"),
            job=_text(fields, "job"),
            args=_typed(fields, "args", list, []),
            kwargs=_typed(fields, "kwargs", dict, {}),
            queue=_text(fields, "queue", "default"),
            lane=_lane(fields),
            priority=_typed(fields, "priority", int, 0),
            enqueued_at=float(_typed(fields, "enqueued_at", (int, float), 0.0)),
            options={name: fields[name] for name in _OPTIONS & fields.keys() if fields[name] is not None},
            trace=_typed(fields, "trace", str, None),
            tagged=tagged,
        )
    except OverflowError as error:
        raise EnvelopeError(f"the envelope holds a number out of range: {error}") from None


_usual_fields: Final = itemgetter("v", "id", "job", "args", "kwargs", "queue", "lane", "priority", "enqueued_at")


def _usual(fields: dict[str, Any], tagged: bool, expected_id: str) -> Envelope | None:
    """What `encode` writes of a job without options, at a third of the price; None: it is something else, or wrong."""
    if len(fields) != 9:
        return None
    try:
        version, id, job, args, kwargs, queue, lane, priority, enqueued_at = _usual_fields(fields)
    except KeyError:
        return None
    if not (
        version == VERSION and type(id) is type(job) is type(queue) is str and PATTERN.fullmatch(id) and _is_text(job)
        and _is_text(queue) and type(args) is list and type(kwargs) is dict and lane in LANES and type(priority) is int
        and type(enqueued_at) is float
    ):  # fmt: skip
        return None
    if id == expected_id:
        id = expected_id
    # The same few names stand in all of them: ten thousand jobs that wait share theirs.
    job, queue, lane = intern(job), intern(queue), intern(lane)
    return Envelope(id, job, args, kwargs, queue, lane, priority, enqueued_at, _NO_OPTIONS, None, tagged)


def _is_text(value: str) -> bool:
    return 0 < len(value) <= 255 and value.isprintable()


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text:.20} is larger than any float")
    return number


# Made once: json.dumps and json.loads make a new encoder or decoder at every call that has options (6 µs each), and so does
# JSONEncoder.encode with the part of it that is written in C (1 µs).
_encoder = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"))
_in_c: Any = getattr(json.encoder, "c_make_encoder", None)
_chunks = _in_c and _in_c(
    None, _encoder.default, json.encoder.encode_basestring, None, ":", ",", False, False, False
)  # fmt: skip


def _encode(value: Any) -> str:
    return "".join(_chunks(value, 0)) if _chunks else _encoder.encode(value)


_decoder = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)
_decode = _decoder.decode
_scan: Any = _decoder.scan_once  # type: ignore[attr-defined]  # what its raw_decode calls; its stub does not know it


def to_json(value: Any) -> bytes:
    """Compact UTF-8 JSON. Raises TypeError for what JSON cannot carry (NaN and infinities, too)."""
    try:
        return _encode(value).encode()
    except UnicodeEncodeError as error:
        raise TypeError(f"a text is not valid Unicode: {error}") from None
    except ValueError as error:
        raise TypeError(str(error)) from None
    except RecursionError:
        raise TypeError("a value is nested too deep, or contains itself") from None


def from_json(data: bytes) -> Any:
    """Strict JSON. Raises EnvelopeError whatever is wrong with it."""
    value: Any
    try:
        text = data.decode()
        try:
            value, end = _scan(text, 0)
        except StopIteration:
            end = -1
        if end != len(text):  # white space around it, or something that is wrong, which this one tells
            value = _decode(text)
        if b"\\u" in data:
            _encode(value).encode()  # half of a surrogate pair is no text, and could never be written again
        return value
    except (ValueError, RecursionError) as error:
        raise EnvelopeError(f"not JSON: {error}") from None


# Of a subclass, its value; `str(value)` would call what the subclass overrides.
_PLAIN: Final[tuple[tuple[type, Any], ...]] = ((str, str.__str__), (int, int.__int__), (float, float.__float__))


def pack(value: Any, where: str = "value", depth: int = 0) -> Any:
    """`value` in plain JSON types, with tags for datetime, date, time, timedelta, UUID, Decimal, bytes and set.

    Raises TypeError naming `where` for anything else.
    """
    kind = type(value)
    if kind in _AS_IS:
        return value
    if kind is float:
        if math.isfinite(value):
            return value
        raise TypeError(f"{where} is {value!r}, which JSON cannot carry")
    if depth > MAX_DEPTH:
        raise TypeError(f"{where} is nested deeper than {MAX_DEPTH} levels, or contains itself")
    if isinstance(value, (list, tuple)):
        return [pack(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r:.60}; keys must be strings, since JSON would change others")
        plain = {key: pack(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
        return {TAG: "dict", "v": plain} if TAG in plain else plain
    for base, convert in _PLAIN:
        if isinstance(value, base):
            return pack(value.value if isinstance(value, Enum) else convert(value), where, depth + 1)
    return _tag(value, where, depth)


def unpack(value: Any, depth: int = 0) -> Any:
    """The inverse of `pack`, but for tuples, which come back as lists.

    Raises EnvelopeError for a tag it does not know, a value that does not fit its tag, and what is nested too deep.
    """
    if depth > MAX_DEPTH + 2:  # the list of arguments is a level, and so is the last value
        raise EnvelopeError(f"a value is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, list):
        return [unpack(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: unpack(item, depth + 1) for key, item in value.items()}
    name, content = value[TAG], value.get("v")
    if name == "dict" and isinstance(content, dict):
        return {key: unpack(item, depth + 1) for key, item in content.items()}
    try:
        return _untag(name, content, depth)
    except Exception as error:
        raise EnvelopeError(f"a value tagged {name!r:.40} cannot be read: {error}") from None


def _tag(value: Any, where: str, depth: int) -> dict[str, Any]:
    from base64 import b64encode
    from datetime import date, datetime, time, timedelta
    from decimal import Decimal
    from uuid import UUID

    if isinstance(value, (datetime, date, time)):
        name = next(k.__name__ for k in (datetime, date, time) if isinstance(value, k))
        return {TAG: name, "v": value.isoformat()}
    if isinstance(value, timedelta):
        return {TAG: "timedelta", "v": [value.days, value.seconds, value.microseconds]}
    if isinstance(value, (UUID, Decimal)):
        return {TAG: "UUID" if isinstance(value, UUID) else "Decimal", "v": str(value)}
    if isinstance(value, (bytes, bytearray)):
        return {TAG: "bytes", "v": b64encode(value).decode()}
    if isinstance(value, (set, frozenset)):
        return {TAG: "set", "v": [pack(item, where, depth + 1) for item in value]}
    raise TypeError(
        f"{where} is of type {type(value).__name__}, which a job cannot carry; pass an id, a path, or plain JSON values"
    )


def _untag(name: Any, content: Any, depth: int) -> Any:
    from base64 import b64decode
    from datetime import date, datetime, time, timedelta
    from decimal import Decimal
    from uuid import UUID

    readers: dict[str, Any] = {
        "datetime": datetime.fromisoformat,
        "date": date.fromisoformat,
        "time": time.fromisoformat,
        "timedelta": lambda parts: timedelta(*parts),
        "UUID": UUID,
        "Decimal": Decimal,
        "bytes": lambda text: b64decode(text, validate=True),
        "set": lambda items: {_hashable(unpack(item, depth + 1)) for item in items},
    }
    if name not in readers:
        raise ValueError(f"known tags are {', '.join(readers)}")
    if not isinstance(content, list if name in ("set", "timedelta") else str):
        raise ValueError(f"its value is {_kind(content)}")
    return readers[name](content)


def _hashable(value: Any) -> Any:
    """What stood in a set was hashable, so a list was a tuple, and a set a frozenset."""
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    return frozenset(value) if isinstance(value, set) else value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _typed(fields: dict[str, Any], name: str, kinds: Any, default: Any) -> Any:
    value = fields.get(name, default)
    if value is default or (isinstance(value, kinds) and not isinstance(value, bool)):
        return value
    wanted = kinds.__name__ if isinstance(kinds, type) else "number"
    raise EnvelopeError(f'"{name}" is {_kind(value)}, not a {wanted}')


def _text(fields: dict[str, Any], name: str, default: str | None = None) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str) or not _is_text(value):
        raise EnvelopeError(f'"{name}" is not a printable text of 1 to 255 characters: {value!a:.60}')
    if name == "id" and not PATTERN.fullmatch(value):
        raise EnvelopeError(f'"id" may hold letters, digits, - and _ (at most 64): {value!r:.60}')
    return value


def _lane(fields: dict[str, Any]) -> str:
    lane = fields.get("lane", "inline")
    if lane not in LANES:
        raise EnvelopeError(f'"lane" is {lane!r:.40}; allowed are {" and ".join(LANES)}')
    return str(lane)
