"""`Closing`: what is closed by the end of its `with`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from types import TracebackType

C = TypeVar("C", bound="Closing")


class Closing(ABC):
    """Has a `close` that waits for nothing. So `with` and `async with` do the same."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> None:
        """At once. More than once does no harm."""

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self: C) -> C:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)
