"""Runs the grid of tests on a real GPU without changing it: ops that take the tests' CPU tensors to the device, as they
lie in memory, call the real op there, and bring its results back.

A view keeps its strides, its offset and so its alignment, because its whole storage travels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def to_gpu(x: Any) -> Any:
    """The same view of the same storage, on the GPU; lists likewise, other values as they are."""
    if isinstance(x, (list, tuple)):
        return [to_gpu(v) for v in x]
    if not isinstance(x, Tensor):
        return x
    whole = torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage())
    return whole.cuda().as_strided(x.size(), x.stride(), x.storage_offset())


def to_cpu(x: Any) -> Any:
    """Results, with the strides that the op gave them."""
    if x is None:
        return None
    if isinstance(x, (list, tuple)):
        return type(x)(to_cpu(v) for v in x)
    out = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    return out.copy_(x)


def copy_back(x: Any, changed: Any) -> None:
    """What an op changed in place on the GPU, into the tensors that it stood for."""
    if isinstance(x, (list, tuple)):
        for one, other in zip(x, changed, strict=True):
            copy_back(one, other)
    else:
        x.detach().copy_(changed)


def remote(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` of the GPU, for tensors of the CPU. What its schema says that it changes is changed."""
    written = [i for i, x in enumerate(op._schema.arguments) if x.alias_info and x.alias_info.is_write]

    def call(*arguments: Any) -> Any:
        there = [to_gpu(x) for x in arguments]
        results = op(*there)
        for i in written:
            copy_back(arguments[i], there[i])
        return to_cpu(results)

    return call
