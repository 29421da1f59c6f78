"""Which rank is lost, when an exchange fails.

A rank whose exchange fails knows only which rank it waited for; that one may itself have waited for
another. So each rank writes to the common store which rank it waited for (*blames*), waits until
all others but one have written or `_GRACE_S` seconds are over, and reads. Lost are the ranks that
are blamed and have not written, or if none is both, all that have not written. If the store does
not answer, the rank that was waited for is named.

This works for exchanges that fail with an error: gloo's, after the timeout given to `join`. NCCL
ends the process without naming a rank; such hangs are seen by the run's watchdog.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

_GRACE_S = 10.0  # seconds to wait for the others to write: they may time out that much later
_LOOK_S = 0.1  # seconds between two looks at the store
_ANSWER_S = 5.0  # seconds for the store itself to answer, beside two times _GRACE_S


class LostRankError(RuntimeError):
    """A rank is gone or does not answer. The message names it, and the step if it is known."""


class _Here:
    """This process: its rank, its step, and the store that all ranks reach."""

    store: dist.Store | None = None
    rank = 0
    size = 1
    step: int | None = None


def join_store(store: dist.Store, rank: int, size: int) -> None:
    """Note this process's rank and the world's size, and the store that all ranks reach."""
    _Here.store, _Here.rank, _Here.size = dist.PrefixStore("lost", store), rank, size


def at_step(step: int) -> None:
    """Note which step begins, for error messages."""
    _Here.step = step


@contextmanager
def waiting_for(peer: int | None) -> Iterator[None]:
    """Turn a failed exchange with `peer` (None: with all ranks) into a `LostRankError`."""
    began = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(_told(peer, time.monotonic() - began, error)) from error


def _told(peer: int | None, seconds: float, error: RuntimeError) -> str:
    missing = _missing(peer)
    who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}" if missing else "a rank"
    has, is_ = ("have", "are") if len(missing) > 1 else ("has", "is")
    if peer is not None and peer not in missing:  # blamed by others, who do not say how it failed
        late = f"{is_} gone or {'do' if len(missing) > 1 else 'does'} not answer"
    elif "imed out" in str(error):
        late = f"{has} not answered for {seconds:.0f} s"
    else:
        late = f"{is_} gone"
    step = "" if _Here.step is None else f" in step {_Here.step}"
    asked = f", which waited for rank {peer}" if peer is not None and peer not in missing else ""
    cause = str(error).splitlines()[0][:200]
    return f"{who} {late}{step}; so says rank {_Here.rank}{asked} ({cause})"


def _missing(peer: int | None) -> list[int]:
    """The ranks that are blamed and have blamed nobody, else `peer`."""
    found: list[list[int]] = []
    # A store whose process is gone may never answer: ask it in a thread, and wait for that long.
    asking = threading.Thread(target=lambda: found.append(_ask(peer)), daemon=True)
    asking.start()
    asking.join(2 * _GRACE_S + _ANSWER_S)
    if found and found[0]:
        return found[0]
    return [] if peer is None else [peer]


def _ask(peer: int | None) -> list[int]:
    store = _Here.store
    if store is None:
        return []
    others = [rank for rank in range(_Here.size) if rank != _Here.rank]

    def those_who(key: str) -> list[int]:
        return [rank for rank in others if store.check([f"{key}{rank}"])]

    try:
        store.set(f"blames{_Here.rank}", json.dumps(peer))
        wrote = _until(lambda: those_who("blames"), len(others) - 1)
        blames = {rank: json.loads(store.get(f"blames{rank}")) for rank in wrote}
        store.set(f"read{_Here.rank}", "")
        if _Here.rank == 0:  # it may host the store: stay until the others have read
            _until(lambda: those_who("read"), len(wrote))
    except RuntimeError:
        return []
    silent = [rank for rank in others if rank not in blames]
    blamed = {peer, *blames.values()}
    return [rank for rank in silent if rank in blamed] or silent


def _until(those: Callable[[], list[int]], enough: int) -> list[int]:
    """The ranks that `those` returns, once there are `enough` or after `_GRACE_S` seconds."""
    end = time.monotonic() + _GRACE_S
    while len(found := those()) < enough and time.monotonic() < end:
        time.sleep(_LOOK_S)
    return found
