"""The client: what applications import to dispatch jobs and look at them. Blocking, thread- and fork-safe, and without a kernel.

It stands on floor 0 and on the brokers' commands only, so a web server that dispatches a job carries none of the daemon.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ..brokers.base import MAX_BATCH, Store
from ..config import Config
from ..config_file import load_config
from ..dispatch import NewJob, options_of, prepare
from ..errors import JobNotFound, UsageError, nearest
from ..job import BoundJob, JobHandle
from ..options import DispatchOptions, JobOptions
from ..registry import Registration, registry
from ..security import SecurityConfig, check_dispatch
from ..settings import resolve_url
from ..signing import ENVIRONMENT, Keys
from ..signing import load as load_keys
from .handle import Handle
from .published import Published

CONFIG_FILE: Final = "kqueue.yaml"


class Client:
    """Dispatches to one store. `security`: None: no limits are known here, so those apply that were published for each queue.

    What is dispatched is signed with `keys`, else with those of `key_file`, which is read when it is first needed: who only looks
    need not be able to. What was published is looked up again at most every 10 s by `clock`.
    """

    def __init__(
        self, store: Store, security: SecurityConfig | None = None, *, keys: Keys | None = None,
        key_file: str | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.store = store
        self._security = security
        self._keys = keys
        self._key_file = key_file
        self._published = Published(store, clock)
        # By job: its options, the limits, and the options that it has by them. The same again, as declared ones are, pass unseen.
        self._checked: dict[str, tuple[JobOptions, SecurityConfig, JobOptions]] = {}

    def dispatch(self, jobs: Sequence[BoundJob]) -> list[JobHandle]:
        """Enqueue `jobs`, in one round trip for each queue and 500 jobs. See `job.dispatch_many`."""
        prepared = [self._prepare(bound, bound.registration or self._known(bound.name)) for bound in jobs]
        by_queue: dict[str, list[NewJob]] = {}
        for job in prepared:
            by_queue.setdefault(job.queue, []).append(job)
        for queue, batch in by_queue.items():
            for start in range(0, len(batch), MAX_BATCH):
                self.store.enqueue(batch[start : start + MAX_BATCH], self._limits(queue).queue_depth)
        return [Handle(self.store, job.id, job.queue) for job in prepared]

    def keys(self) -> Keys | None:
        """What signs here; None: nothing does. Raises ConfigError for a file that cannot be used."""
        if self._keys is None and self._key_file is not None:
            self._keys = keys = load_keys(self._key_file)
            if keys.warning:
                import logging

                logging.getLogger("kqueue").warning("%s", keys.warning)
        return self._keys

    def named(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: DispatchOptions) -> BoundJob:
        """A job by its name. JobNotFound when daemons have published their manifests, and the name is in none of them."""
        manifest = self.manifest()
        if manifest and name not in manifest and registry.get(name) is None:
            known = nearest(name, list(manifest))
            raise JobNotFound(f"{self.store.address} knows no job {name!r}{known}; it knows {', '.join(sorted(manifest))}")
        return BoundJob(name, args, kwargs, options)

    def send(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: DispatchOptions) -> JobHandle:
        """Dispatch `named(…)`; a handle."""
        return self.dispatch([self.named(name, args, kwargs, options)])[0]

    def get(self, id: str) -> JobHandle:
        """A handle for a job by its id."""
        return Handle(self.store, id, None)

    def manifest(self, refresh: bool = False) -> dict[str, Registration]:
        """The jobs that daemons published, by name; empty before one ran. `refresh`: look now, however recent the last look."""
        return self._published.manifest(refresh)

    def _known(self, name: str) -> Registration | None:
        return registry.get(name) or self.manifest().get(name)

    def _prepare(self, bound: BoundJob, registration: Registration | None) -> NewJob:
        options, keys = options_of(bound, registration), self.keys()
        limits = self._limits(options.queue)
        if keys is None and (limits.signed or limits.signing_key_file is not None):
            raise UsageError(
                f"queue {options.queue!r} of {self.store.address} takes signed jobs only, and there is no key here: "
                f"set ${ENVIRONMENT} to a copy of its daemon's security.signing_key_file"
            )
        checked = self._checked.get(bound.name)
        if checked is None or checked[0] is not options or checked[1] is not limits:
            checked = self._checked[bound.name] = options, limits, check_dispatch(limits, options, bound.name)
        return prepare(bound, registration, options=checked[2], max_bytes=limits.max_envelope_bytes, keys=keys)

    def _limits(self, queue: str) -> SecurityConfig:
        return self._published.limits(queue) if self._security is None else self._security


def open_store(url: str) -> Store:
    """The blocking store that `url` means. UsageError for a scheme that none serves."""
    scheme, _, rest = url.partition("://")
    if scheme == "memory":
        from ..brokers.commands.memory import shared_store
        from .memory import MemoryClient

        return MemoryClient(shared_store(url), url)
    if scheme == "sqlite":
        from .sqlite import SQLiteClient

        return SQLiteClient(rest.removeprefix("/"))
    from .redis import RedisClient

    return RedisClient(url)


def connect(target: str | None = None) -> Client:
    """Say where this process's jobs go: a URL or the path of a kqueue.yaml. Without either: as `where` finds it."""
    global _default
    client = _client_for(target) if target is not None else where()
    client.keys()  # so that what is wrong with them is heard now
    with _lock:
        _default = client
    return client


def where() -> Client:
    """$KQUEUE_URL, else $KQUEUE_CONFIG, else ./kqueue.yaml. UsageError when there is none of them."""
    url = os.environ.get("KQUEUE_URL")
    if url:
        return Client(open_store(resolve_url(url, None)), key_file=_key_file())
    path = os.environ.get("KQUEUE_CONFIG") or (CONFIG_FILE if os.path.exists(CONFIG_FILE) else None)
    if path is None:
        raise UsageError(
            "where do jobs go? Call kqueue.connect(URL or config path), or set $KQUEUE_URL or $KQUEUE_CONFIG, "
            "or run in a directory that has a kqueue.yaml (`kqueue init` writes one)"
        )
    return from_config(load_config(path))


def from_config(config: Config) -> Client:
    """A client for what `config` says, with its limits and its signing key, unless the environment names another."""
    security = SecurityConfig.from_config(config.limits, config.security)
    return Client(open_store(config.queue.url), security, key_file=_key_file() or security.signing_key_file)


def _key_file() -> str | None:
    return os.environ.get(ENVIRONMENT) or None


def _client_for(target: str) -> Client:
    if "://" in target:
        return Client(open_store(resolve_url(target, os.getcwd())), key_file=_key_file())
    return from_config(load_config(target))


_lock = threading.Lock()
_default: Client | None = None


def default() -> Client:
    """The client that `dispatch` uses in this process; found at the first call."""
    global _default
    if _default is None:
        client = where()
        with _lock:
            _default = _default or client
    return _default


def get(id: str) -> JobHandle:
    """A handle for a job by its id."""
    return default().get(id)


def send(name: str, /, *args: Any, **kwargs: Any) -> JobHandle:
    """Dispatch a job by name, from a process that cannot import it. Its options come from what the daemon published."""
    return default().send(name, args, kwargs, DispatchOptions())


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
