"""Triton's interpreter without what it does over and over: the same results in a third of the time.

Triton 3.9 searches the whole language for what it replaces each time that a kernel calls a
function of its own, which takes 44 % of the time of our kernels; and it computes whether every
sum and product of integers overflows, for an assertion that is off (15 %). Of what is left it
takes two fifths to describe shapes and types anew for each value, and to broadcast blocks to the
shape that they have.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def hasten() -> None:
    """For this process, from now on."""
    launch = interpreter.GridExecutor.__call__
    patched: set[frozenset[str]] = set()  # in the launch that runs, for which modules

    @functools.cache
    def language(fn: Any) -> frozenset[str]:
        """What a function knows of the language decides what is replaced for it."""
        modules = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
        return frozenset(module.__name__ for module in modules if module in (tl, tl.core))

    def call_kernel(self: Any, *arguments: Any, **named: Any) -> Any:
        patched.clear()  # a launch takes its replacements back when it ends
        return launch(self, *arguments, **named)

    def call_function(self: Any, *arguments: Any, **named: Any) -> Any:
        if language(self.fn) not in patched:
            patched.add(language(self.fn))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **named)

    _describe_once()
    interpreter.GridExecutor.__call__ = call_kernel
    interpreter.InterpretedFunction.__call__ = call_function
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)


def _describe_once() -> None:
    """Values of one shape share its description, and types of one name theirs."""
    core = tl.core
    describe, describe_block = core.tensor.__init__, core.block_type.__init__
    broadcast = TritonSemantic.broadcast_impl_value
    shapes: dict[Any, tuple[Any, Any]] = {}
    blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    dtypes: dict[str, Any] = {}
    as_numpy = interpreter._get_np_dtype

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = type.sizes if type.is_block() else ()
        if sizes not in shapes:
            describe(self, handle, type)
            shapes[sizes] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[sizes]

    def make_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size if type(size) is int else size.value for size in shape])
        if (element_ty.name, sizes) not in blocks:
            describe_block(self, element_ty, shape)
            self.sizes = sizes
            blocks[element_ty.name, sizes] = dict(self.__dict__)
        self.__dict__.update(blocks[element_ty.name, sizes])

    def in_numpy(type: Any) -> Any:
        if type.name not in dtypes:
            dtypes[type.name] = as_numpy(type)
        return dtypes[type.name]

    def broadcast_both(self: Any, left: Any, right: Any) -> Any:
        if left.type.is_block() and right.type.is_block() and left.type.sizes == right.type.sizes:
            return left, right
        return broadcast(self, left, right)

    core.tensor.__init__ = make_tensor
    core.block_type.__init__ = make_block
    interpreter._get_np_dtype = in_numpy
    TritonSemantic.broadcast_impl_value = broadcast_both
