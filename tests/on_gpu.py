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
    if isinstance(x, (list, tuple)):
        return type(x)(to_cpu(v) for v in x)
    out = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    return out.copy_(x)


def remote(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` of the GPU, for tensors of the CPU."""

    def call(*arguments: Any) -> Any:
        return to_cpu(op(*(to_gpu(x) for x in arguments)))

    return call
