"""The CUDA object on any PyTorch: what it registers, needs and shows; and every op on fake GPU tensors.

nvcc builds the object for one architecture, once for these sources, into the cache. No GPU is needed: what it asks of
a PyTorch with CUDA is declared weak, so it loads on a PyTorch without CUDA too, in a process of its own.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from losses import LOSSES, Inputs, op_calls
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import kdkernels as kd
from kdkernels import native, ops
from kdkernels.native import build as builder
from kdkernels.native import cache, cuda

ALL = pytest.mark.parametrize("name", LOSSES)
needs_nvcc = pytest.mark.skipif(builder.obstacle("cuda") is not None, reason=f"{builder.obstacle('cuda')}")


def implemented() -> set[str]:
    """The ops that the registrations of csrc/torch implement for CUDA."""
    files = (builder.source_directory() / "torch").glob("*_cuda.cpp")
    return {name for path in files for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())}


@pytest.fixture(scope="module")
def library() -> Path:
    """The CUDA object for sm_90, from the cache or built now."""
    return cache.obtain("cuda", ["sm_90"])


def tool(name: str, *arguments: str) -> list[str]:
    if shutil.which(name) is None:
        pytest.skip(f"no {name}")
    return subprocess.run([name, *arguments], capture_output=True, text=True, check=True).stdout.splitlines()


# The object.


LOADED = """
import sys, torch, kdkernels
from kdkernels import native, ops
from kdkernels.native import cuda
native._LIB = native.Path(sys.argv[1]).parent
native.gpus = lambda: cuda.Gpus(((9, 0),))
torch.cuda.is_current_stream_capturing = lambda: False
assert native.expected("cuda") and native.status("cuda").state == "unloaded"
assert native.load("cuda"), native.status("cuda").reason
assert native.status("cuda").path == native.Path(sys.argv[1]) and native.prospects("cuda")[0]
print(*(name for name in ops.OPS if native.registered(name, "cuda")))
print(*(name for name in ops.OPS if native.registered(name, "cpu")))
print(kdkernels.backend_info()["masked_mse"]["cuda"])
"""


@needs_nvcc
def test_it_loads_anywhere_and_registers_what_its_sources_say(library):
    command = [sys.executable, "-c", LOADED, str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    registered, on_cpu, told = result.stdout.splitlines()
    assert set(registered.split()) == implemented() and implemented() <= set(ops.OPS)
    assert not on_cpu  # the CPU's kernels are another object's
    assert told.startswith("('cuda', 'built at install for sm_90 with CUDA ")


@needs_nvcc
def test_it_needs_no_particular_cuda(library):
    """The runtime is inside; the rest is asked of PyTorch, weakly."""
    dynamic = tool("readelf", "--dynamic", "--wide", str(library))
    needed = {found[1] for line in dynamic if (found := re.search(r"\(NEEDED\).*\[(.*)\]", line))}
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= needed
    assert not [name for name in needed if re.search("cuda|nv", name)], needed
    assert not [line for line in dynamic if "RUNPATH" in line or "RPATH" in line]  # nothing of this machine
    undefined = [line.split()[-2:] for line in tool("nm", "--dynamic", "--undefined-only", str(library))]
    strong = {name for kind, name in undefined if kind == "U"}
    assert {name for name in strong if "cuda" in name.lower()} == {"aoti_torch_device_type_cuda"}
    assert ["w", "aoti_torch_get_current_cuda_stream"] in undefined
    assert not [name for name in strong if re.search(r"\b_?Z.*(2at|3c10|5torch)", name)]  # the stable ABI is C


@needs_nvcc
def test_it_shows_no_symbol_of_ours_or_of_the_runtime(library):
    """So that no other library can meet ours, nor another copy of the CUDA runtime."""
    lines = tool("nm", "--dynamic", "--demangle", "--defined-only", str(library))
    names = [line.split(" ", 2)[2] for line in lines]
    assert not [name for name in names if re.search(r"kd|cuda|\bcu[A-Z]|fatbin|__nv", name)]


@needs_nvcc
def test_its_record(library):
    record = json.loads(builder.record_of(library).read_text())
    assert record["architectures"] == ["sm_90"] and record["cuda"] == cuda.dotted(cuda.release(cuda.nvcc()))
    assert record["torch_target"] == builder.TORCH_TARGET and builder.intact(library)


@needs_nvcc
@pytest.mark.slow
def test_no_warnings(tmp_path, monkeypatch):
    """On the oldest architecture: the compile gates see to the others."""
    monkeypatch.setattr(builder, "COMMON_FLAGS", [*builder.COMMON_FLAGS, "-Werror"])
    monkeypatch.setattr(builder, "CUDA_FLAGS", [*builder.CUDA_FLAGS, "-Werror=all-warnings", "-Xcompiler=-Werror"])
    monkeypatch.setenv("KDKERNELS_CUDA_ARCHS", "all")
    codes, _ = builder.cuda_architectures(())
    assert codes[0] == "sm_80" and codes[-1].startswith("compute_")
    builder.build("cuda", tmp_path, codes[:1])


# Fake tensors: what torch.compile and torch.export see of the ops.


def fake(mode: FakeTensorMode, tree: object) -> object:
    """The same shapes and strides on a GPU that need not exist."""

    def move(x: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    return pytree.tree_map_only(torch.Tensor, move, tree)


def outlines(tree: object) -> list[tuple]:
    return [(x.shape, x.stride(), x.dtype) for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x.transpose(0, 1).contiguous().transpose(0, 1)


@ALL
@pytest.mark.parametrize("space", ["kdkernels", "kdkernels_triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_results_are_laid_out_like_real_ones(name, space, dtype):
    for variant in ("tensors", "rows"):
        for layout in (torch.Tensor.contiguous, channels_last):
            calls = op_calls(LOSSES[name].inputs(dtype=dtype, variant=variant).to_layout(layout))
            assert [op._opname for op, _, _ in calls] == [name, f"{name}_backward"]
            for op, arguments, real in calls:
                mode = FakeTensorMode()
                with mode:
                    result = getattr(getattr(torch.ops, space), op._opname).default(*fake(mode, arguments))
                assert outlines(result) == outlines(real)
                assert {x.device.type for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)} == {"cuda"}


def draw(name: str, boxes: torch.Tensor) -> list[torch.Tensor]:
    return getattr(kd.masks, name)(boxes, [(13, 17), (7, 9)], [8, 16], batch_size=2)


@pytest.mark.parametrize("name", ["ground_truth_masks", "gaussian_masks"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_fake_masks(name, backend, monkeypatch):
    monkeypatch.setattr(ops, "_obstacle", lambda backend: None)
    boxes, mode = torch.tensor([[0, 3, 5, 90.0, 70.0], [1, 8, 8, 16.0, 24.0]]), FakeTensorMode()
    with mode, kd.use_backend(backend):
        moved = fake(mode, boxes)
        result, graph = draw(name, moved), make_fx(lambda x: draw(name, x))(moved).graph
    assert outlines(result) == outlines(draw(name, boxes))
    assert {x.device.type for x in result} == {"cuda"}
    assert ops_in(graph) == [f"kdkernels{'_triton' * (backend == 'triton')}.{name}.default"]


# Traces on fake GPU tensors.


class Flat(torch.nn.Module):
    """A loss as a function of every tensor in its call."""

    def __init__(self, inputs: Inputs):
        super().__init__()
        self.inputs = inputs
        self.leaves, self.spec = pytree.tree_flatten((inputs.students, inputs.others, inputs.keywords))
        self.places = [i for i, x in enumerate(self.leaves) if isinstance(x, torch.Tensor)]
        self.tensors = [self.leaves[i] for i in self.places]

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        leaves = list(self.leaves)
        for i, x in zip(self.places, tensors):
            leaves[i] = x
        students, others, keywords = pytree.tree_unflatten(leaves, self.spec)
        return Inputs(self.inputs.function, students, others, keywords, self.inputs.listed)(*students)


def traced(how: str, function: Flat, tensors: list[torch.Tensor]) -> torch.fx.Graph:
    if how == "export":
        return torch.export.export(function, tuple(tensors)).graph
    if how == "make_fx":
        return make_fx(function)(*tensors).graph
    if how == "aot":
        return aot_export_joint_simple(lambda *x: (function(*x),), tensors, trace_joint=False).graph
    graphs = []

    def keep(module: torch.fx.GraphModule, examples: object) -> object:
        graphs.append(module.graph)
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=keep)(*tensors)
    return graphs[0]


def ops_in(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if str(node.target).startswith("kdkernels")]


@pytest.fixture
def one_gpu(monkeypatch):
    """Forecasts as on a machine with one H200 and nvcc; nothing may be built or loaded."""

    def forbidden(*_):
        raise AssertionError("a trace built or loaded kernels")

    monkeypatch.setattr(native, "gpus", lambda: cuda.Gpus(((9, 0),), ("NVIDIA H200",), (13, 0)))
    monkeypatch.setattr(native, "prospects", lambda name: (True, "because this test says so"))
    monkeypatch.setattr(native, "_find", forbidden)
    monkeypatch.setitem(native._status, "cuda", native.Status())


@ALL
@pytest.mark.parametrize("how", ["export", "make_fx", "aot", "dynamo"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_traces_hold_the_op(name, how, backend, one_gpu, monkeypatch):
    """Forward only: on a PyTorch without CUDA, autograd takes no GPU tensors, fake ones included."""
    if how in ("make_fx", "aot"):  # they trace what Python does here and now, which would load the kernels
        monkeypatch.setattr(ops, "_obstacle", lambda backend: None)
    elif backend == "triton":
        pytest.importorskip("triton")
    function, mode = Flat(LOSSES[name].inputs(variant="tensors")), FakeTensorMode()
    tensors = fake(mode, function.tensors)
    with mode, kd.use_backend(backend):
        graph = traced(how, function, tensors)
    space = "kdkernels" if backend == "cuda" else "kdkernels_triton"
    assert ops_in(graph) == [f"{space}.{name}.default"]


def test_traces_prefer_cuda_and_do_without_it(one_gpu, monkeypatch):
    """The forecast is asked at each trace, and a failure since the last one changes it."""
    function, mode = Flat(LOSSES["binary_kl"].inputs(variant="tensors")), FakeTensorMode()
    tensors = fake(mode, function.tensors)
    monkeypatch.setattr(ops, "_triton_obstacle", lambda: "there is no Triton in this test")
    with mode:
        assert ops_in(traced("dynamo", function, tensors)) == ["kdkernels.binary_kl.default"]
        monkeypatch.setitem(native.failed, "cuda", True)
        assert ops_in(traced("dynamo", function, tensors)) == []
        monkeypatch.setitem(native.failed, "cuda", False)
        monkeypatch.setattr(native, "gpus", lambda: "torch sees no GPU")
        assert ops_in(traced("export", function, tensors)) == []


@pytest.mark.gpu
@ALL
def test_joint_graphs_hold_both_ops(name):
    inputs = LOSSES[name].inputs(variant="tensors")
    function = Flat(inputs)
    levels = len(inputs.students)
    tensors = [x.to("cuda").requires_grad_(i < levels) for i, x in enumerate(function.tensors)]
    graph = aot_export_joint_simple(lambda *x: (function(*x),), tensors, trace_joint=True).graph
    space = {"cuda": "kdkernels", "triton": "kdkernels_triton"}[ops.backend_for(name, tensors[0], tensors[levels])]
    assert ops_in(graph) == [f"{space}.{name}.default", f"{space}.{name}_backward.default"]
