"""Templates: the one that forks, and those that were replaced and wait for their last child to end.

    replace:  start another beside it --ready--> it is the current one; the old one is retired: it forks no more, and ends when
                     |                           the last of its children has
                     +--import failed, died----> it is dropped, and nothing has changed

A job runs to its end on the code that it began with. What is asked of a template while it is replaced is asked of the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from ..events import Events, TemplateReplaced
from ..kernel import Kernel, Task, join
from .base import NotStarted
from .handle import Child
from .link import TemplateLink
from .privileges import DEFAULT, Privileges

Steps = Generator[Any, Any, Any]


class Templates:
    """Passes on to the current TemplateLink what is asked of it, and to its own what concerns a child."""

    def __init__(
        self, kernel: Kernel, events: Events, identity: str = "", cgroups: bool = True, privileges: Privileges = DEFAULT
    ) -> None:  # fmt: skip
        self._kernel = kernel
        self._events = events
        self._config: Mapping[str, Any] = {}
        self._retired: list[TemplateLink] = []
        self._stopping: dict[TemplateLink, Task] = {}
        self._next: TemplateLink | None = None  # that is being started in place of the current one; None: none is
        self._on_manifest: Callable[[], None] = lambda: None
        self.on_replaced: Callable[[], None] = lambda: None
        self._identity = identity
        self._cgroups = cgroups
        self._privileges = privileges
        self.current = self._new_link()

    @property
    def on_manifest(self) -> Callable[[], None]:
        """Called when a template has told of its jobs."""
        return self._on_manifest

    @on_manifest.setter
    def on_manifest(self, call: Callable[[], None]) -> None:
        self._on_manifest = self.current.on_manifest = call

    def configure(self, config: Mapping[str, Any]) -> None:
        """What templates are to import; see loading.template_config. Read at the next start of one."""
        self._config = config
        self.current.configure(config)

    def start(self) -> Steps:
        yield from self.current.start()

    def fork(self, request: Mapping[str, Any], first: bytes = b"") -> Steps:
        """A running Child; see TemplateLink.fork."""
        while True:
            link = self.current
            yield from link.ready()
            if not link.is_retired:
                child: Child = yield from link.fork(request, first)
                return child
            if link is self.current:
                raise NotStarted("the template is being stopped")

    @property
    def are_used(self) -> bool:
        """Whether there is, or has to be, one."""
        return self.current.is_kept or bool(self._config.get("needed"))

    @property
    def known(self) -> set[str]:
        """Names of the jobs that a child could find."""
        return self.current.known

    def ready(self) -> Steps:
        """See TemplateLink.ready."""
        yield from self.current.ready()

    @property
    def roots(self) -> Sequence[str]:
        """Where the modules of jobs are found."""
        return self.current.roots

    def is_current(self, child: Child) -> bool:
        """Whether the template that forked `child` lives, and is the one that forks now."""
        return not child.lost and child.link is self.current

    def exited(self, child: Child) -> Steps:
        yield from child.link.exited(child)

    def kill(self, child: Child) -> None:
        child.link.kill(child)

    def sweep(self, whose: str) -> Steps:
        """See TemplateLink.sweep. Before the first start."""
        yield from self.current.sweep(whose)

    def forget(self, child: Child) -> None:
        child.link.forget(child)

    def kill_all(self) -> None:
        for link in (self.current, *self._retired):
            link.kill_all()

    def replace(self) -> Steps:
        """Start a template with what is on disk now, and then retire the current one.

        Raises ImportFailed, with nothing changed, when it cannot be started. Another call meanwhile begins anew: the first one
        then returns when that does not, and has done nothing.
        """
        if self._next is not None:
            self._stop_later(self._next)
        link = self._next = self._new_link()
        link.configure({**self._config, "needed": True})
        try:
            yield from link.start()
            superseded = self._next is not link
        except BaseException:
            superseded = self._next is not link
            if not superseded:
                self._next = None
                self._stop_later(link)
                raise
        if superseded:
            return
        self._next = None
        old, self.current = self.current, link
        link.configure(self._config)
        link.on_manifest = self._on_manifest
        self._events.emit(TemplateReplaced(old.pid, link.pid, old.children))
        self._retired.append(old)
        old.retire(lambda: self._stop_later(old))
        self.on_replaced()
        self._on_manifest()

    def stop(self) -> Steps:
        """End all of them, and what they still run."""
        if self._next is not None:
            self._stop_later(self._next)
            self._next = None
        for link in (self.current, *self._retired):
            self._stop_later(link)
        for task in list(self._stopping.values()):
            yield join(task)

    def _new_link(self) -> TemplateLink:
        link = TemplateLink(self._kernel, self._events, self._identity, self._cgroups, self._privileges)
        link.siblings = lambda: self._pids_but(link)
        return link

    def _pids_but(self, link: TemplateLink) -> list[int]:
        """Of all templates that live, but that of `link`."""
        others = {self.current, *self._retired, *self._stopping, *([self._next] if self._next is not None else [])} - {link}
        return [other.template_pid for other in others if other.template_pid]

    def _stop_later(self, link: TemplateLink) -> None:
        """`link` has nothing left to do."""
        if link not in self._stopping:
            task = self._stopping[link] = self._kernel.spawn(link.stop(), name="stop of a template")
            task.on_end = lambda task: self._stopped(link, task)

    def _stopped(self, link: TemplateLink, task: Task) -> None:
        del self._stopping[link]
        if link in self._retired:
            self._retired.remove(link)
