"""A queue's SQLite file: its creation, a connection to it that minds forks, what its errors mean, and the doorbells beside it.

The daemon and the client share this. It never waits: a locked file raises at once, and who called decides how to wait.

Forks. A connection must not cross one, and opening another in the child is no cure: SQLite keeps a list of its locks in the
process's memory, the child inherits the list but not the kernel's locks, so its own connection believes in locks that nobody
holds. When the parent then closes, it takes itself for the last one and deletes the WAL that the child has just committed to
(tried with 3.40: the child's job was gone). So connections are closed *before* a fork, by Python's hook, and reopened at need.

Doorbells. `<db>.bells/` holds one Unix datagram socket per daemon. Whoever made something ready sends each a byte after its
commit, without waiting: a full socket has rung already. A ring saves waiting, no more: who dies before it, or may not, leaves its
job to the next sweep, about a third of a lease later. A socket gets its name by a rename after it was bound, so a name that
refuses has lost its daemon for good (names are epochs, never used twice), and whoever meets it may unlink it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from ...errors import BrokerRefused, BrokerUnavailable
from .host_clock import HOST, HostClock
from .sqlite_schema import FROM_VERSION_1, SCHEMA, VERSION
from .sqlite_transaction import Transaction

T = TypeVar("T")

MIN_SQLITE: Final = (3, 31, 0)  # the oldest that a supported distribution carries (Ubuntu 20.04); upserts need 3.24
LOCKED_PAUSE_S: Final = 0.001  # between two tries of a locked file; other writers hold it for about a millisecond
_LOCKED: Final = ("is locked", "locking protocol")
_PASSING: Final = ("disk is full", "disk I/O error", "out of memory")
_PASSING_ONCE_OPEN: Final = ("unable to open", "readonly database")  # before, they mean that the path will not do
_REMEDIES: Final = {
    "disk is full": "free space on its disk",
    "readonly database": "make the file, those beside it and their directory writable again (mode, owner, mount)",
    "unable to open": "see whether its directory is there, and how many files may be open (ulimit -n)",
    "out of memory": "give this process more memory",
}
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


def is_locked(error: Exception) -> bool:
    """Somebody else is writing. By the message, since Python tells SQLite's codes only from 3.11 on."""
    return _says(error, _LOCKED)


def is_passing(error: Exception) -> bool:
    """The disk or the system does not let us, now; the transaction was rolled back and may be repeated."""
    return _says(error, _PASSING + _PASSING_ONCE_OPEN)


def jittered(seconds: float) -> float:
    """`seconds`, give or take half of it, so that two who wait for each other part."""
    return seconds * (0.5 + os.urandom(1)[0] / 255)  # the random module would import hashlib


class SQLiteFile:
    """The file at `path`, and this process's one connection to it. Thread-safe: one transaction at a time.

    `mode` is that of a file it creates; a file that exists keeps its own. Its directory and the doorbells follow the file's mode.
    """

    def __init__(self, path: str, *, mode: int = 0o600, clock: HostClock = HOST) -> None:
        self.path = os.path.abspath(path)  # neither a URI nor ":memory:" survives that
        self.bells = self.path + ".bells"
        self._mode = mode
        self._clock = clock
        self._lock = threading.RLock()  # re-entrant, for a signal handler that forks
        self._db: sqlite3.Connection | None = None
        self._pid = 0  # of the process that opened it
        self._inode = (0, 0)  # of the file that was opened last; (0, 0): none was
        self.replaced = 0  # how often another file stood there when it was opened again
        with _forking:
            _files.add(self)

    def write(self, work: Callable[[Transaction], T], *, create: bool = True) -> tuple[T, bool]:
        """Run `work` in one durable transaction, and say whether to ring. What `work` raises undoes all of it.

        Raises what `is_locked` and `is_passing` tell apart, BrokerRefused for a file that will not do, and BrokerUnavailable when
        there is none and `create` is false.
        """
        return self._transact("BEGIN IMMEDIATE", work, create)

    def read(self, work: Callable[[Transaction], T]) -> T:
        """Run `work` on one snapshot. Raises as `write` does; never creates the file."""
        return self._transact("BEGIN", work, False)[0]

    def close(self) -> None:
        """Close the connection; the next transaction opens another."""
        with self._lock:
            db, self._db = self._db, None
            if db is not None and self._pid == os.getpid():
                db.close()
            elif db is not None:
                _inherited.append(db)  # closing it would roll back, in shared memory, what the parent is writing

    def _transact(self, begin: str, work: Callable[[Transaction], T], create: bool) -> tuple[T, bool]:
        with self._lock:
            db = self._connection(create)
            with _between(db, begin):
                transaction = Transaction(db, self._clock)
                value = work(transaction)
                transaction.write_counts()
            return value, transaction.rings

    def _connection(self, create: bool) -> sqlite3.Connection:
        if self._db is not None:
            if self._pid != os.getpid():
                raise BrokerRefused(
                    f"this process was forked without Python's fork hooks while {self.path} was open, and so has no locks of its "
                    "own in it: connect after the fork"
                )
            if _inode(self.path) == self._inode:
                return self._db
            self.close()  # the file was removed or replaced; what is written to the old one, nobody would ever see
        if sqlite3.sqlite_version_info < MIN_SQLITE:
            needed = ".".join(map(str, MIN_SQLITE))
            raise BrokerRefused(f"SQLite {sqlite3.sqlite_version} is too old, KQueue needs {needed}: install a newer libsqlite3")
        if create:
            self._create()
        elif not os.path.exists(self.path):
            raise BrokerUnavailable(f"no database at {self.path}: start kqueued, or dispatch a job first")
        db = None
        try:
            db = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
            self._prepare(db)
        except (sqlite3.Error, BrokerRefused) as error:
            if db is not None:
                db.close()
            if isinstance(error, BrokerRefused) or is_locked(error) or _says(error, _PASSING):
                raise
            if _is_full(os.path.dirname(self.path)):
                raise sqlite3.OperationalError(f"{error}, since the disk is full") from None
            raise self.explain(error) from None
        inode = _inode(self.path)
        self.replaced += self._inode not in ((0, 0), inode)
        self._db, self._pid, self._inode = db, os.getpid(), inode
        return db

    def _create(self) -> None:
        folder = os.path.dirname(self.path)
        try:
            if not os.path.exists(folder):
                os.makedirs(folder, exist_ok=True)
                os.chmod(folder, _folder_mode(self._mode))  # whatever the umask says
            # O_EXCL: were the file there, closing this descriptor would drop every lock that this process has on it (POSIX).
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode)
        except OSError as error:
            if os.path.exists(self.path):
                return  # the usual case; whether it will do is for SQLite to say
            if error.errno in _FULL:
                raise sqlite3.OperationalError(f"cannot create it, since the disk is full ({error.strerror})") from None
            raise BrokerRefused(
                f"cannot create the database {self.path}: {error.strerror}; "
                f"make {folder} a directory that this user may write, or set queue.url to another path"
            ) from None
        os.fchmod(fd, self._mode)
        os.close(fd)

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.text_factory = _decode
        (journal,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        if journal != "wal":
            raise BrokerRefused(f"{self.path} cannot be used with a write-ahead log ({journal}): put it on a local disk")
        for pragma in ("synchronous = FULL", "temp_store = MEMORY", "journal_size_limit = 67108864"):
            db.execute(f"PRAGMA {pragma}")
        if not _has_schema(db):
            with _between(db, "BEGIN IMMEDIATE"):
                if not _has_schema(db):  # somebody else may have been quicker
                    for statement in SCHEMA:
                        db.execute(statement)
        try:
            # What cannot be written, SQLite opens for reading only, without a word. That it would be locked is answer enough.
            db.execute("DELETE FROM kq_meta WHERE 0")
        except sqlite3.OperationalError as error:
            if not is_locked(error):
                raise
        found = db.execute(_SCHEMA_VERSION).fetchone()
        if found == (1,):
            with _between(db, "BEGIN IMMEDIATE"):
                if db.execute(_SCHEMA_VERSION).fetchone() == (1,):  # somebody else may have been quicker
                    for statement in FROM_VERSION_1:
                        db.execute(statement)
            found = db.execute(_SCHEMA_VERSION).fetchone()
        if found is None or not isinstance(found[0], int):
            raise BrokerRefused(f"{self.path} has a table kq_meta that is not KQueue's: use another path")
        if found[0] > VERSION:
            raise BrokerRefused(
                f"{self.path} was written by a later KQueue (schema {found[0]}, this one knows {VERSION}): upgrade kqueue here"
            )

    def explain(self, error: Exception) -> Exception:
        """`error` in one line with a next step, where the file is to blame; else `error` itself."""
        if type(error) not in (sqlite3.OperationalError, sqlite3.DatabaseError):
            return error  # the others are about what was asked
        return self._refusal(str(error))

    def remedy(self, error: Exception) -> str:
        """What people can do about an error that `is_passing`."""
        if _is_full(os.path.dirname(self.path)):  # which SQLite may call an I/O error
            return _REMEDIES["disk is full"]
        return next((step for words, step in _REMEDIES.items() if words in str(error)), "look at its disk (dmesg)")

    def _refusal(self, said: str) -> BrokerRefused:
        path, folder = self.path, os.path.dirname(self.path)
        if os.path.isdir(path):
            why = f"it is a directory; name a file in it, such as {os.path.join(path, 'kqueue.db')}"
        elif "not a database" in said:
            why = f"{said}; move it away, or set queue.url to another path"
        elif "malformed" in said:
            why = f"{said}; stop whatever uses it, save what is left by `sqlite3 {path} .recover`, and move it away"
        elif _is_read_only(folder):
            why = "its file system is mounted read-only; mount it for writing, or set queue.url to another path"
        elif not os.access(path, os.R_OK | os.W_OK):
            why = "this user may not read and write it; change its mode or owner"
        elif not os.access(folder, os.W_OK | os.X_OK):
            why = f"this user may not write its directory, where the write-ahead log stands; change the mode or owner of {folder}"
        elif "readonly" in said:
            why = f"{said}; change the mode or owner of {path}-wal and {path}-shm"
        else:
            why = f"{said}; if nobody changed its tables, its disk is to be looked at"
        return BrokerRefused(f"cannot use the database {path}: {why}")


_SCHEMA_VERSION: Final = "SELECT value FROM kq_meta WHERE key = 'schema'"


def ring(bells: str, but: str = "") -> None:
    """Ring every daemon's bell in the directory `bells`, except the one named `but`. Never waits, never raises."""
    try:
        # By the descriptor, because a socket's path may have 107 bytes, and the database's may be longer.
        fd = os.open(bells, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return  # no daemon has ever been here; or out of descriptors, see below
    try:
        names = [name for name in os.listdir(fd) if name.endswith(".sock") and name != but]
        if names:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bell:
                bell.setblocking(False)
                for name in names:
                    _ring_one(bell, fd, name)
    except OSError:
        pass  # out of descriptors: the job is in the store, and each daemon's next sweep finds it
    finally:
        os.close(fd)


def _ring_one(bell: socket.socket, folder_fd: int, name: str) -> None:
    try:
        bell.sendto(b"\1", bell_path(folder_fd, name))
    except ConnectionRefusedError:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=folder_fd)
    except OSError:
        pass  # full, which is as good as rung; gone; or not ours to ring, see above


def bell_path(folder_fd: int, name: str) -> str:
    """A path of `name` in the directory behind `folder_fd` that is short whatever the directory's own is. Linux only."""
    return f"/proc/self/fd/{folder_fd}/{name}"


def make_bells(file: SQLiteFile) -> int:
    """A descriptor of the directory of doorbells, which is made when it is missing. Raises OSError."""
    status = os.stat(file.path)
    with contextlib.suppress(FileExistsError):
        os.mkdir(file.bells)
        os.chmod(file.bells, _folder_mode(status.st_mode))
        with contextlib.suppress(OSError):
            os.chown(file.bells, -1, status.st_gid)
    return os.open(file.bells, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


# -- inside -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _between(db: sqlite3.Connection, begin: str) -> Iterator[None]:
    """`begin` and COMMIT, or ROLLBACK when what stands between them, or COMMIT itself, raises."""
    db.execute(begin)
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _is_full(folder: str) -> bool:
    try:
        disk = os.statvfs(folder)
    except OSError:
        return False
    return disk.f_bavail == 0 or disk.f_favail == 0 < disk.f_files  # some file systems have no number of files


def _is_read_only(folder: str) -> bool:
    try:
        return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def _says(error: Exception, words: tuple[str, ...]) -> bool:
    return isinstance(error, sqlite3.OperationalError) and any(phrase in str(error) for phrase in words)


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _has_schema(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM sqlite_master WHERE name = 'kq_meta'").fetchone() is not None


def _inode(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0)
    return (status.st_dev, status.st_ino)


def _folder_mode(mode: int) -> int:
    """The mode of a directory for those who may use a file of `mode`: 0600 -> 0700, 0660 -> 0770."""
    return (mode & 0o666) | (mode & 0o444) >> 2


_files: Final[weakref.WeakSet[SQLiteFile]] = weakref.WeakSet()
_forking: Final = threading.RLock()  # one fork at a time, and no new file meanwhile
_held: Final[list[SQLiteFile]] = []  # whose locks the fork holds
_inherited: Final[list[sqlite3.Connection]] = []


def _before_fork() -> None:
    _forking.acquire()
    for file in list(_files):
        file._lock.acquire()
        _held.append(file)
        file.close()


def _after_fork() -> None:
    while _held:
        _held.pop()._lock.release()
    _forking.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
