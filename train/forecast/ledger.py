"""How many bytes of tensors are alive while code runs, counted by their storages."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Ledger(TorchDispatchMode):
    """Counts the storages that operators make inside it, until they are freed.

    On meta tensors it also answers for the numbers that there are not: all entries of a tensor are
    found to be nonzero, and every number that is read is 0. Tensors with numbers may be mixed with
    them. What an operator allocates for itself and frees again is not seen.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive since the start, or since `reset_peak`.
        aside: of the bytes alive, those that would be moved away; to be added to.
        peak_beside: as `peak`, without them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.aside = self.peak_beside = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def reset_peak(self) -> None:
        self.peak = self.live
        self.peak_beside = self.live - self.aside

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [*_tensors((args, *kwargs.values()))]
        if any(x.is_meta for x in inputs):
            if func is torch.ops.aten._local_scalar_dense.default:
                return 0
            if func is torch.ops.aten.nonzero.default:
                wide = inputs[0].new_empty((inputs[0].numel(), inputs[0].dim()), dtype=torch.int64)
                self._note(wide.untyped_storage())
                return wide
            if func is torch.ops.aten.index_add_.default:
                return args[0]  # makes nothing, and torch would import its compiler to find out
            if not all(x.is_meta for x in inputs):  # tables of rows have their numbers
                args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
        made = func(*args, **kwargs)
        # A view of what was there before is no new tensor.
        given = {x.untyped_storage()._cdata for x in inputs}
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._known:
                self._note(storage)
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known[key] = weakref.ref(storage, partial(self._freed, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_beside = max(self.peak_beside, self.live - self.aside)

    def _freed(self, key: int, size: int, _: Any) -> None:
        del self._known[key]
        self.live -= size


def _tensors(made: Any) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, (tuple, list)):
        for part in made:
            yield from _tensors(part)
