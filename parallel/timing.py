"""Who is told how long this rank waits for messages. Imports nothing, and costs nothing unused."""

from __future__ import annotations

from typing import Any, Protocol


class Observer(Protocol):
    """Takes moments on this rank's device, without waiting for it."""

    def now(self) -> Any:
        """This moment."""

    def waited(self, left: Any, came: Any) -> None:
        """An exchange that was begun at `left` is over now; it was waited for since `came`."""


class _Told:
    observer: Observer | None = None


def tell(observer: Observer | None) -> None:
    """From now on tell `observer` of this process's exchanges; None: nobody."""
    _Told.observer = observer


def observer() -> Observer | None:
    return _Told.observer
