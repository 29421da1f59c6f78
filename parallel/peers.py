"""When a rank is gone: who it is, told by those that waited for it.

A rank whose exchange fails knows only whom it waited for itself, who may have waited in turn. So
each writes down whom it blames, gives the others time to do the same, until all but one have, and
reads: missing is who is blamed and has not written. Where no one can be asked, the blame stays
where it was.

This ends exchanges that torch ends: those of gloo, by the timeout of `join`. NCCL ends the process
by itself, and names no rank; a run's watchdog sees such hangs from outside.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

_GRACE_S = 10.0  # for the others to write: they may have begun to wait that much later
_LOOK_S = 0.1
_ANSWER_S = 5.0  # for the store to answer


class LostRankError(RuntimeError):
    """A rank is gone, or does not answer; the message names it, and the step."""


class _Here:
    """This process, as far as a message about others goes."""

    store: dist.Store | None = None
    rank = 0
    size = 1
    step: int | None = None


def meet(store: dist.Store, rank: int, size: int) -> None:
    """The world that this process has joined, and the store that all its ranks reach."""
    _Here.store, _Here.rank, _Here.size = dist.PrefixStore("lost", store), rank, size


def at_step(step: int) -> None:
    """Say which step begins, for messages."""
    _Here.step = step


@contextmanager
def waiting_for(peer: int | None) -> Iterator[None]:
    """Turn the fault of an exchange with a rank (None: with all of them) into `LostRankError`."""
    began = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(_told(peer, time.monotonic() - began, error)) from error


def _told(peer: int | None, seconds: float, error: RuntimeError) -> str:
    missing = _missing(peer)
    who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}" if missing else "a rank"
    has, is_ = ("have", "are") if len(missing) > 1 else ("has", "is")
    if peer is not None and peer not in missing:  # another's word, which does not say how
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
    """Who is blamed and blames nobody, as far as the store tells."""
    found: list[list[int]] = []
    # A store that is gone with its rank may not answer at all: it is asked beside.
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
        if _Here.rank == 0:  # which may be where the store lives
            _until(lambda: those_who("read"), len(wrote))
    except RuntimeError:
        return []
    silent = [rank for rank in others if rank not in blames]
    blamed = {peer, *blames.values()}
    return [rank for rank in silent if rank in blamed] or silent


def _until(those: Callable[[], list[int]], enough: int) -> list[int]:
    """Those, once there are enough of them, or when the time is up."""
    end = time.monotonic() + _GRACE_S
    while len(found := those()) < enough and time.monotonic() < end:
        time.sleep(_LOOK_S)
    return found
