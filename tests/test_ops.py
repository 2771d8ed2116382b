"""The registered ops themselves: schema, fakes, strides, and that no nonsense makes a kernel touch foreign memory.

The arguments are recorded from the public functions, so that every op is tested with what it is really given.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from losses import FEATURES, LOSSES, ROWS, VARIANTS, Inputs, op_calls
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import kdkernels as kd


def layouts(loss_name: str) -> dict[str, Any]:
    """Layouts of one student that keep its values."""
    if LOSSES[loss_name].features:
        return {
            "channels_last": lambda x: x.to(memory_format=torch.channels_last),
            "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
            "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        }
    return {
        "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        "strided": lambda x: torch.stack([x, x], -1)[..., 0],
        "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        "one row seen often": lambda x: x[:1].expand(x.shape),
    }


def samples(name: str) -> dict[str, Inputs]:
    """A few inputs of one loss, each a different path through the op."""
    loss = LOSSES[name]
    found = {f"{v} {d}": loss.inputs("small", getattr(torch, d), v) for v in VARIANTS for d in ("float32", "bfloat16")}
    found["float64"] = loss.inputs("small", torch.float64, "tensors")
    found |= {key: loss.inputs().to_layout(layout) for key, layout in layouts(name).items()}
    if name == "masked_mse":
        found["no weights"] = Inputs(loss.function, *(lambda i: (i.students, i.others))(loss.inputs()), listed=True)
    elif name == "soft_cross_entropy":
        inputs = loss.inputs()
        found["soft part alone"] = Inputs(loss.function, inputs.students, inputs.others)
    return found


SAMPLES = [(name, key) for name in LOSSES for key in samples(name)]


@pytest.mark.parametrize("name, key", SAMPLES)
def test_opcheck(name, key):
    calls = op_calls(samples(name)[key])
    assert [str(op) for op, _, _ in calls] == [f"kdkernels.{name}.default", f"kdkernels.{name}_backward.default"]
    for op, arguments, _ in calls:
        torch.library.opcheck(op, arguments)


def layout_of(x: Any) -> list[tuple[Any, ...]]:
    return [(t.shape, t.dtype, t.stride(), t.storage_offset()) for t in pytree.tree_leaves(x) if isinstance(t, Tensor)]


@pytest.mark.parametrize("name, key", SAMPLES)
def test_fakes_have_the_real_shapes_dtypes_and_strides(name, key):
    for op, arguments, real in op_calls(samples(name)[key]):
        with FakeTensorMode() as mode:
            fake = op(*pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
        assert layout_of(fake) == layout_of(real)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("key", ["channels_last", "sliced", "strided", "transposed"])
def test_gradients_keep_the_memory_format(name, key):
    if key not in layouts(name):
        pytest.skip("not a layout of this loss")
    inputs = LOSSES[name].inputs().to_layout(layouts(name)[key])
    students = [s.detach().requires_grad_() for s in inputs.students]
    for student, grad in zip(students, torch.autograd.grad(inputs(*students).sum(), students)):
        assert grad.stride() == torch.empty_like(student).stride()
        assert grad.dtype == student.dtype


@pytest.mark.parametrize("name, key", SAMPLES)
def test_fakes_on_a_gpu_that_is_not_there(name, key):
    """A trace for CUDA needs no CUDA: everything comes back there, laid out as on the CPU."""
    for op, arguments, real in op_calls(samples(name)[key]):
        with FakeTensorMode():
            on_gpu = pytree.tree_map_only(
                Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda"), arguments
            )
            fake = op(*on_gpu)
        assert all(x.device.type == "cuda" for x in pytree.tree_leaves(fake))
        assert layout_of(fake) == layout_of(real)


def test_the_raw_ops_are_private():
    """They have no gradient of their own, so nothing public may hand them out."""
    assert not {"ops", "losses", "native", "reference"} & set(kd.__all__)
    for op, arguments, _ in op_calls(LOSSES["binary_kl"].inputs()):
        assert op.name() not in kd.__all__
        assert not any(x.requires_grad for x in pytree.tree_leaves(op(*arguments)))


def replaced(arguments: tuple[Any, ...], path: tuple[int, ...], value: Any) -> list[Any]:
    changed = [list(a) if isinstance(a, (list, tuple)) else a for a in arguments]
    holder = changed
    for index in path[:-1]:
        holder = holder[index]
    holder[path[-1]] = value
    return changed


def tensor_paths(arguments: tuple[Any, ...]) -> list[tuple[tuple[int, ...], Tensor]]:
    found = []
    for i, a in enumerate(arguments):
        if isinstance(a, Tensor):
            found.append(((i,), a))
        elif isinstance(a, (list, tuple)):
            found += [((i, j), x) for j, x in enumerate(a) if isinstance(x, Tensor)]
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_too_small_tensors_are_refused(name):
    """Each tensor in turn loses its last entry along each dimension: no kernel may read or write past its end."""
    for variant in ("tensors", "rows"):
        for op, arguments, _ in op_calls(LOSSES[name].inputs("small", torch.float32, variant)):
            for path, x in tensor_paths(arguments):
                smaller = [x.narrow(d, 0, x.shape[d] - 1).contiguous() for d in range(x.dim())]
                for bad in [*smaller, x.new_empty(0), x.new_empty(2, 3, 1, 1, 1)]:
                    with pytest.raises(RuntimeError):
                        op(*replaced(arguments, path, bad))


@pytest.mark.parametrize("name", LOSSES)
def test_dtypes_without_a_kernel_are_refused(name):
    for op, arguments, _ in op_calls(LOSSES[name].inputs("small", torch.float32, "tensors")):
        for path, x in tensor_paths(arguments):
            for dtype in (torch.int32, torch.complex64):
                with pytest.raises(RuntimeError):
                    op(*replaced(arguments, path, x.to(dtype)))


@pytest.mark.parametrize("name", FEATURES)
def test_lists_of_unequal_length_are_refused(name):
    for op, arguments, _ in op_calls(LOSSES[name].inputs()):
        for i, a in enumerate(arguments):
            if isinstance(a, (list, tuple)):
                with pytest.raises(RuntimeError):
                    op(*replaced(arguments, (i,), list(a)[:-1]))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [-1, 99, 2**31 + 1])
def test_codes_out_of_range_are_refused(name, bad):
    """Reductions, gates, normalisers and level indices travel as integers."""
    for op, arguments, _ in op_calls(LOSSES[name].inputs()):
        schema = op._schema.arguments
        for i, a in enumerate(arguments):
            if schema[i].name in ("reduction", "gate", "normalizer"):
                with pytest.raises(RuntimeError):
                    op(*replaced(arguments, (i,), bad))
            if schema[i].name in ("level_of", "first_channel"):
                with pytest.raises(RuntimeError):
                    op(*replaced(arguments, (i,), [bad] * len(a)))


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_many_dimensions(name):
    """Dimensions that merge are taken, however many."""
    loss = LOSSES[name]
    inputs = loss.inputs("small", variant="rows")
    rows = inputs.students[0].shape[0]
    flat = inputs(*inputs.students)

    def reshaped(x: Any) -> Any:
        if isinstance(x, Tensor) and x.shape[:1] == (rows,):
            return x.view(*(1,) * 12, *x.shape)
        return x

    many = Inputs(
        inputs.function,
        [reshaped(inputs.students[0])],
        [reshaped(x) for x in inputs.others],
        {k: reshaped(v) for k, v in inputs.keywords.items()},
    )
    assert torch.equal(many(*many.students).flatten(), flat)


def test_rows_of_nine_dimensions_that_do_not_merge_are_refused():
    """Refused, not truncated: the kernels walk over eight."""
    student = torch.randn(*(2,) * 9, 5).permute(*reversed(range(9)), 9)
    with pytest.raises(RuntimeError, match="at most 8"):
        torch.ops.kdkernels.temperature_kl.default(student, student, 1.0, None, 1, None, None)
