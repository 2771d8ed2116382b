"""What only a GPU can show: no synchronisation, CUDA graphs, streams, determinism, more than 2^31 elements, memory.

Every test here is marked `gpu`: it skips by itself where there is none.
"""

from __future__ import annotations

import contextlib
import time

import pytest
import torch
from losses import FEATURES, LOSSES, ROWS, Inputs, in_form
from objective_cases import TERMS, inputs_of, with_leaves
from torch import Tensor

import kdkernels as kd

pytestmark = pytest.mark.gpu

ALL = pytest.mark.parametrize("name", LOSSES)
BACKENDS = pytest.mark.parametrize("gpu_backend", ["cuda", "triton"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def on_gpu(inputs: Inputs) -> Inputs:
    """The same inputs, every tensor on the GPU."""

    def move(x):
        if isinstance(x, Tensor):
            return x.cuda()
        if isinstance(x, (list, tuple)):
            return [move(v) for v in x]
        return {k: move(v) for k, v in x.items()} if isinstance(x, dict) else x

    return Inputs(inputs.function, move(inputs.students), move(inputs.others), move(inputs.keywords), inputs.listed)


def step(inputs: Inputs, upstream: float = 0.75) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients; nothing of it reads the device from the host."""
    students = inputs.leaves()
    loss = inputs(*students)
    grads = torch.autograd.grad(loss, students, torch.full_like(loss, upstream))
    return loss.detach(), list(grads)


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ALL
@BACKENDS
@DTYPES
def test_nothing_synchronises(name, gpu_backend, dtype):
    inputs = on_gpu(LOSSES[name].inputs(dtype=dtype, variant="tensors"))
    with kd.use_backend(gpu_backend):
        step(inputs)  # loads or compiles
        with no_synchronisation():
            step(inputs)


@ALL
@BACKENDS
@DTYPES
def test_a_cuda_graph_replays_on_new_data(name, gpu_backend, dtype):
    """Forward and backward captured after one warm-up; replayed, it gives the bits of an eager call."""
    inputs = on_gpu(LOSSES[name].inputs(dtype=dtype, variant="tensors"))
    with kd.use_backend(gpu_backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        students = [s.detach().requires_grad_() for s in inputs.students]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = inputs(*students)
            grads = torch.autograd.grad(loss, students, torch.full_like(loss, 0.75))
        for scale in (1.0, 0.5, -2.0):
            with torch.no_grad():
                for s in students:
                    s.copy_(torch.randn_like(s) * scale)
            graph.replay()
            inputs.students = [s.detach() for s in students]
            expected, expected_grads = step(inputs)
            assert torch.equal(loss, expected)
            assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@ALL
@BACKENDS
def test_a_side_stream(name, gpu_backend):
    """Work is queued on the current stream: it sees what that stream wrote, while the default stream is busy."""
    inputs = on_gpu(LOSSES[name].inputs())
    with kd.use_backend(gpu_backend):
        expected, expected_grads = step(inputs)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        values = [s.clone() for s in inputs.students]
        for s in inputs.students:
            s.zero_()
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # the default stream
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for s, v in zip(inputs.students, values):
                s.copy_(v)
            loss, grads = step(inputs)
        stream.synchronize()
        assert torch.equal(loss, expected)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@ALL
@BACKENDS
@pytest.mark.parametrize("size", ["small", "wide", "many"])
def test_ten_runs_give_the_same_bits(name, gpu_backend, size):
    inputs = on_gpu(LOSSES[name].inputs(size))
    with kd.use_backend(gpu_backend):
        loss, grads = step(inputs)
        for _ in range(9):
            again, grads_again = step(inputs)
            assert torch.equal(loss, again)
            assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


@BACKENDS
def test_more_than_2_to_the_31_elements_of_logits(gpu_backend):
    """16,700 rows of 131,072: the last row's offset needs 64 bits. Judged on a few rows, by themselves."""
    rows, columns = 16_700, 131_072
    student = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    teacher = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    assert student.numel() > 2**31
    student.requires_grad_()
    with kd.use_backend(gpu_backend):
        loss = kd.temperature_kl_loss(student, teacher, reduction="none")
        loss.sum().backward()
        for row in (0, 1, 8191, 16_383, 16_384, rows - 1):
            alone = student.detach()[row : row + 1].clone().requires_grad_()
            expected = kd.temperature_kl_loss(alone, teacher[row : row + 1].clone(), reduction="none")
            expected.sum().backward()
            torch.testing.assert_close(loss[row], expected[0], rtol=1e-5, atol=0)
            torch.testing.assert_close(student.grad[row], alone.grad[0], rtol=1e-2, atol=1e-12)


@BACKENDS
def test_more_than_2_to_the_31_elements_of_features(gpu_backend):
    """One level of 2^31 + 2^26 elements: the loss of the whole is that of its pictures."""
    n, c, h, w = 33, 256, 512, 512
    student = torch.randn(n, c, h, w, device="cuda", dtype=torch.bfloat16)
    teacher = torch.randn(n, c, h, w, device="cuda", dtype=torch.bfloat16)
    assert student.numel() > 2**31
    mask = (torch.rand(n, h, w, device="cuda") < 0.3).float()
    student.requires_grad_()
    with kd.use_backend(gpu_backend):
        loss = kd.masked_mse_loss(student, teacher, mask, normalizer="batch")
        loss.backward()
        total, last = 0.0, None
        for i in range(n):
            last = student.detach()[i : i + 1].clone().requires_grad_()
            one = kd.masked_mse_loss(last, teacher[i : i + 1].clone(), mask[i : i + 1].clone(), normalizer="batch")
            total += one.item() / n
        one.backward()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(student.grad[-1].float(), last.grad[0].float() / n, rtol=2**-7, atol=1e-12)


@BACKENDS
@pytest.mark.parametrize("label", [-1, 80, 2**40, -(2**40)])
def test_labels_out_of_range_read_nothing(gpu_backend, label):
    """The row becomes NaN and the context stays alive; compute-sanitizer watches this test, too."""
    student = torch.randn(6, 80, device="cuda", requires_grad=True)
    target = torch.tensor([1, 2, label, 3, 4, 5], device="cuda")
    with kd.use_backend(gpu_backend):
        loss = kd.soft_cross_entropy_loss(
            student, torch.randn(6, 80, device="cuda"), target=target, hard_weight=0.5, reduction="none"
        )
        loss.sum().backward()
    torch.cuda.synchronize()
    assert loss[2].isnan() and loss[[0, 1, 3, 4, 5]].isfinite().all()


def _peak(function) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("one_pass", [True, False])
def test_no_copy_of_a_feature_map(name, one_pass):
    """The gradient, in the forward (one pass) or the backward, and small change."""
    shape = (4, 256, 100, 152)
    student = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    more = [torch.rand(4, 100, 152, device="cuda")] if name == "masked_mse" else []
    size = student.numel() * student.element_size()
    with kd.use_backend("cuda"):
        LOSSES[name].function(student, teacher, *more, one_pass=one_pass).backward()
        student.grad = None
        losses = []
        forward = _peak(lambda: losses.append(LOSSES[name].function(student, teacher, *more, one_pass=one_pass)))
        assert forward < (size if one_pass else 0) + size / 50
        assert _peak(lambda: losses[0].backward()) < (0 if one_pass else size) + size / 50


@pytest.mark.parametrize("name", [n for n in ROWS if n != "bounded_regression"])
@pytest.mark.parametrize("shape", [(100_000, 80), (4096, 1000), (256, 50257)])
@pytest.mark.parametrize("one_pass", [True, False])
def test_no_copy_of_logits(name, shape, one_pass):
    """At most ten numbers per row and a few megabytes; and the gradient, in the forward (one pass) or the backward."""
    student = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    more = [torch.arange(shape[0], device="cuda") % 3 == 0] if name == "decoupled_kl" else []
    size = student.numel() * student.element_size()
    with kd.use_backend("cuda"):
        LOSSES[name].function(student, teacher, *more, one_pass=one_pass).backward()
        student.grad = None
        losses, few = [], shape[0] * 40 + 2**22
        forward = _peak(lambda: losses.append(LOSSES[name].function(student, teacher, *more, one_pass=one_pass)))
        assert forward < (size if one_pass else 0) + few
        assert _peak(lambda: losses[0].backward()) < (0 if one_pass else size) + few


@ALL
def test_both_backends_agree_with_the_formula_on_the_gpu(name):
    """Without the detour of the grid: public functions on the GPU's own tensors."""
    inputs = on_gpu(LOSSES[name].inputs("wide"))
    with kd.use_backend("reference"):
        expected, expected_grads = step(inputs)
    for backend in ("cuda", "triton", None):
        with kd.use_backend(backend) if backend else contextlib.nullcontext():
            loss, grads = step(inputs)
        torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)
        for a, b in zip(grads, expected_grads, strict=True):
            assert (a - b).abs().max() <= 2e-5 * b.abs().max()


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_whole(name):
    """torch.compile with fullgraph, forward and backward, on the GPU."""
    inputs = in_form(on_gpu(LOSSES[name].inputs()), False)  # as compiled graphs
    expected, expected_grads = step(inputs)
    torch._dynamo.reset()
    function = torch.compile(lambda *students: inputs(*students), fullgraph=True)
    students = inputs.leaves()
    loss = function(*students)
    grads = torch.autograd.grad(loss, students, torch.full_like(loss, 0.75))
    assert torch.equal(loss.detach(), expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@BACKENDS
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_objective_is_captured_without_a_sync(gpu_backend, dtype, drawn):
    """Every term at once, in a graph that is replayed on new data, its boxes too where the step draws the masks."""
    given = inputs_of(dtype=dtype)
    boxes = torch.tensor([[0.0, 4, 4, 60, 50], [1, 20, 0, 130, 78], [-1, 0, 0, 9, 9]])
    if drawn:
        given |= {"masks": None, "boxes": boxes, "strides": [4, 8, 16]}
    given = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.cuda(), given)
    objective = kd.DetectionDistillationLoss(**TERMS, gradient_norms=gpu_backend == "cuda")

    def run(called, leaves):
        result = objective(**called)
        return result.total, torch.autograd.grad(result.total, leaves, torch.full_like(result.total, 0.75))

    with kd.use_backend(gpu_backend):
        called, leaves = with_leaves(given)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(called, leaves)
        torch.cuda.current_stream().wait_stream(stream)
        with no_synchronisation():
            run(called, leaves)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            total, grads = run(called, leaves)
        with torch.no_grad():
            for x in leaves:
                x.copy_(torch.randn_like(x))
            if drawn:
                called["boxes"][:, 1:] -= 8
        graph.replay()
        expected, wanted = run(called, leaves)
    assert torch.equal(total, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def test_host_time_is_printed():
    """Microseconds of host time of forward plus backward at a tiny shape, for the record; nothing is asserted."""
    for name in LOSSES:
        inputs = on_gpu(LOSSES[name].inputs())
        for backend in ("cuda", "triton"):
            with kd.use_backend(backend):
                for _ in range(20):
                    step(inputs)
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(200):
                    step(inputs)
                took = (time.perf_counter() - begin) / 200
                torch.cuda.synchronize()
            print(f"host time {name:20} {backend:7} {took * 1e6:6.1f} us")


def test_the_second_device():
    """Tensors of another device than the current one are served there."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    for name in LOSSES:
        inputs = on_gpu(LOSSES[name].inputs())
        with torch.cuda.device(0):
            expected, _ = step(inputs)
            inputs.students = [s.to("cuda:1") for s in inputs.students]
            inputs.others = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to("cuda:1"), inputs.others)
            inputs.keywords = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to("cuda:1"), inputs.keywords)
            loss, _ = step(inputs)
        assert torch.equal(loss.cpu(), expected.cpu())
