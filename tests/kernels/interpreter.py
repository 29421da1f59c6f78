"""Triton's interpreter without what it does over and over: the same results in half the time.

Triton 3.9 searches the whole language for what it replaces each time that a kernel calls a
function of its own, which takes 44 % of the time of our kernels; and it computes whether every
sum and product of integers overflows, for an assertion that is off (15 %).
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any

import triton.language as tl
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

    interpreter.GridExecutor.__call__ = call_kernel
    interpreter.InterpretedFunction.__call__ = call_function
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)
