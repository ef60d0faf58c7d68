"""Signed envelopes: who has the key may dispatch, and what somebody else wrote or altered is buried, never run.

    %kq1:<id of the key, 8 hex digits>:<HMAC-SHA256 over the bytes that follow, 64 hex digits>:{"v":1,"id":…}

The JSON is signed as it stands and never encoded again; an envelope without a signature begins with "{". A key file has one key a
line, lines of comments that begin with #, and perhaps several keys: the first signs, all are accepted. So a key can be replaced
while jobs wait.

Whoever has no key reads a signed envelope without checking it: a daemon before its key is configured, the operator's commands. A
child gets the JSON alone. `hmac` (and so hashlib) is imported only where there is a key, since the supervisor does without.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from typing import Final

from .errors import ConfigError, EnvelopeError, NewerEnvelope

ENVIRONMENT: Final = "KQUEUE_SIGNING_KEY_FILE"
MIN_KEY_BYTES: Final = 32  # of the line, whatever it encodes; `openssl rand -hex 32` writes 64
MAX_FILE_BYTES: Final = 64 * 1024
_MARK: Final = b"%kq"  # JSON cannot begin so
_HEAD: Final = re.compile(rb"%kq1:([0-9a-f]{8}):([0-9a-f]{64}):")


class Keys:
    """The keys of one file. `warning`: what is wrong with the file, though it can be used; "": nothing."""

    def __init__(self, keys: Sequence[bytes], file: str, warning: str = "") -> None:
        import hmac

        self.file = file
        self.warning = warning
        self._hmac = hmac
        self._keys = {self._id(key): key for key in reversed(keys)}
        self._first = self._id(keys[0])

    def __repr__(self) -> str:
        return f"<{len(self._keys)} keys of {self.file}>"  # and never a key

    @property
    def ids(self) -> list[str]:
        """Of all keys; the one that signs is the first."""
        return [self._first.decode(), *sorted(id.decode() for id in self._keys if id != self._first)]

    def sign(self, data: bytes) -> bytes:
        """`data` with its signature."""
        return b"%%kq1:%b:%b:%b" % (self._first, self._mac(self._keys[self._first], data), data)

    def check(self, data: bytes) -> bytes:
        """The envelope in `data`, once its signature is proven. Raises EnvelopeError saying what is wrong and what to do."""
        head = _head(data)
        if head is None:
            raise EnvelopeError(
                f"the envelope is not signed, and security.signing_key_file wants that: whoever dispatched it needs "
                f"${ENVIRONMENT} or that setting; dispatch it again from there"
            )
        id, mac = head.groups()
        key = self._keys.get(id)
        if key is None:
            raise EnvelopeError(
                f"the envelope is signed with the key {id.decode()}, which is not in {self.file} ({', '.join(self.ids)}): "
                "if whoever dispatched it is yours, add that key there, or give it one of these, and dispatch again"
            )
        envelope = data[head.end() :]
        if not self._hmac.compare_digest(mac, self._mac(key, envelope)):
            raise EnvelopeError(
                f"the envelope was altered after it was signed with the key {id.decode()}, or was never signed with it: find out "
                "who else may write to the broker; if the job is wanted, dispatch it again"
            )
        return envelope

    def _mac(self, key: bytes, data: bytes) -> bytes:
        return self._hmac.digest(key, data, "sha256").hex().encode()

    def _id(self, key: bytes) -> bytes:
        return self._mac(key, b"kqueue: the id of this key")[:8]  # no envelope begins so


def load(path: str) -> Keys:
    """The keys in the file `path`. Raises ConfigError for one that cannot be used."""
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the signing key file {path} cannot be read: {error.strerror or error}") from None
    if mode & 0o002:
        raise ConfigError(f"anybody can write to the signing key file {path}, and so sign: chmod 600 it, and replace its keys")
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"the signing key file {path} is over {MAX_FILE_BYTES} bytes: it has one key a line, and few of them")
    keys = []
    for number, line in enumerate(data.split(b"\n"), 1):
        key = line.strip()
        if not key or key.startswith(b"#"):
            continue
        if not all(0x20 < byte < 0x7F for byte in key):
            raise ConfigError(f"{path}:{number}: a key is one word of printable ASCII, as `openssl rand -hex 32` prints it")
        if len(key) < MIN_KEY_BYTES:
            raise ConfigError(
                f"{path}:{number}: a key of {len(key)} characters, which is less than {MIN_KEY_BYTES}; "
                "make one with `openssl rand -hex 32`"
            )
        keys.append(key)
    if not keys:
        raise ConfigError(f"the signing key file {path} has no key: `openssl rand -hex 32` makes one")
    readable = f"anybody on this host can read the signing key file {path}: chmod 640 it" if mode & 0o004 else ""
    return Keys(keys, path, readable)


def unsigned(data: bytes) -> bytes:
    """The envelope in `data`, whose signature, if it has one, is not checked. Raises EnvelopeError for half a signature."""
    if data.startswith(b"{"):
        return data
    head = _head(data)
    return data if head is None else data[head.end() :]


def signed_by(data: bytes) -> str | None:
    """The id of the key that `data` says it was signed with; None: it says none."""
    head = _HEAD.match(data)
    return None if head is None else head[1].decode()


def _head(data: bytes) -> re.Match[bytes] | None:
    head = _HEAD.match(data)
    if head is None and data.startswith(_MARK):
        version = re.match(rb"%kq([0-9]{1,4}):", data)
        if version is not None and int(version[1]) > 1:
            raise NewerEnvelope("the envelope is signed in the way of a later version of KQueue: upgrade this one")
        raise EnvelopeError("the envelope begins with half a signature: something other than KQueue wrote or cut it")
    return head
