"""What drawing masks promises besides: determinism, no host sync, compilation, bounded memory, empty inputs."""

from __future__ import annotations

import weakref

import pytest
import torch
from masks_oracle import COMPILED, DRAWN, SIZES, STRIDES, as_flat, drawings, grid_anchors, random_boxes, same
from torch.utils._python_dispatch import TorchDispatchMode


@DRAWN
@pytest.mark.parametrize("name", ["gt", "gaussian", "fine"])
def test_same_bits_in_any_order_and_with_any_threads(name, backend):
    draw, threads = drawings(sizes=SIZES[1:], strides=STRIDES[1:])[name], torch.get_num_threads()
    boxes = [random_boxes(20, 0), random_boxes(15, 1)]
    want = draw(boxes)
    try:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        same(draw([b.flip(0) for b in boxes]), want)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    same(draw(as_flat(boxes), batch_size=2), want)


@DRAWN
@pytest.mark.parametrize("name", ["gt", "gaussian", "fine"])
def test_nothing_to_draw(name, backend):
    draw = drawings()[name]
    zeros = [torch.zeros(2, h, w) for h, w in SIZES]
    same(draw([torch.zeros(0, 4)] * 2), zeros)
    same(draw([torch.zeros(0, 4)] * 2, assign="all"), zeros)
    same(draw(torch.zeros(0, 5), batch_size=2), zeros)
    same(draw([]), [m[:0] for m in zeros])
    same(draw(torch.tensor([[0.0, 0, 0, 30, 30]]), batch_size=0), [m[:0] for m in zeros])
    assert drawings([], [], [])[name]([torch.rand(3, 4)]) == []
    empty = drawings([torch.zeros(0, 4)] * 2, [(0, 5), (5, 0)], [4, 8])[name]
    for assign in ("scale", "all"):
        same(empty([torch.tensor([[-3.0, -3, 30, 30]])], assign=assign), [torch.zeros(1, 0, 5), torch.zeros(1, 5, 0)])


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8])
def test_dtypes_of_boxes(dtype, backend):
    # Small integers are exact in all of them.
    boxes = torch.tensor([[8, 8, 40, 40], [0, 0, 111, 111], [16, 32, 33, 48]])
    for draw in drawings().values():
        same(draw([boxes.to(dtype)]), draw([boxes.float()]))


@DRAWN
def test_masks_are_constants_of_their_own(backend):
    boxes = [random_boxes(5, 0).requires_grad_()]
    for draw in drawings().values():
        masks = draw(boxes)
        assert not any(m.requires_grad for m in masks) and all(m.is_contiguous() for m in masks)
        assert len({m.untyped_storage().data_ptr() for m in masks}) == len(masks)


@DRAWN
@pytest.mark.parametrize("name", ["gt", "gaussian", "fine"])
def test_compiles_whole_and_agrees(name, backend):
    sizes, strides = SIZES[2:], STRIDES[2:]
    draw = drawings(grid_anchors(sizes, strides), sizes, strides)[name]
    compiled = torch.compile(lambda b: draw(b, batch_size=2, base_size=56), fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        flat = as_flat([random_boxes(12, seed), random_boxes(7, seed + 5)])
        same(compiled(flat), draw(flat, batch_size=2, base_size=56))


class Watch(TorchDispatchMode):
    """Fails on what would stop the host or give a shape that depends on data; counts bytes of live tensors."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "is_nonzero",
        "equal",
        "repeat_interleave",
    )

    def __init__(self):
        super().__init__()
        self.live: dict[int, list[int]] = {}
        self.now = self.peak = self.calls = 0

    def _drop(self, key):
        self.live[key][1] -= 1
        if self.live[key][1] == 0:
            self.now -= self.live.pop(key)[0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in self.FORBIDDEN, name
        if name in ("index", "index_put", "index_put_"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1])
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, torch.Tensor) and not any(x is a for a in args):
                storage = x.untyped_storage()
                entry = self.live.setdefault(storage._cdata, [storage.nbytes(), 0])
                self.now += entry[0] if entry[1] == 0 else 0
                entry[1] += 1
                weakref.finalize(x, self._drop, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out


def test_the_watch_sees():
    with pytest.raises(AssertionError), Watch():
        torch.ones(3).sum().item()
    with pytest.raises(AssertionError), Watch():
        torch.ones(3)[torch.ones(3) > 0]
    with Watch() as watch:
        x = torch.ones(1000)
        del x
        torch.ones(500)
    assert watch.peak == 4000


@DRAWN
@pytest.mark.parametrize("assign", ["scale", "all"])
@pytest.mark.parametrize("name", ["gt", "gaussian", "fine"])
def test_no_host_sync_and_calls_do_not_grow_with_boxes(name, assign, backend):
    draw = drawings(sizes=SIZES[3:], strides=STRIDES[3:])[name]
    calls = []
    for count in (2, 90):
        with Watch() as watch:
            draw([random_boxes(count, 0), random_boxes(count, 1)], assign=assign, base_size=56, image_size=(800, 1344))
            draw(torch.zeros(count, 5), assign=assign, batch_size=2)
        calls.append(watch.calls)
    assert calls[0] == calls[1]


@COMPILED
@pytest.mark.parametrize(
    "name, assign, count, megabytes",
    [
        ("gt", "scale", 500, 8),  # a few int32 maps of all levels: 0.7 MB each
        ("gt", "all", 500, 8),
        ("gaussian", "scale", 500, 48),  # a dozen temporaries of a chunk: 2^19 elements of 8 bytes
        ("fine", "scale", 100, 24),  # the same with 4 bytes
    ],
)
def test_memory(name, assign, count, megabytes, backend):
    # Dense maps, one float per box and cell, take 134 MB for 500 boxes at 200 x 336, 27 MB for 100, several times over.
    boxes = [random_boxes(count // 2, 0), random_boxes(count // 2, 1)]
    draw = drawings(sizes=SIZES[:1], strides=STRIDES[:1])[name] if name == "fine" else drawings()[name]
    with Watch() as watch:
        draw(boxes, assign=assign)
    assert watch.peak < megabytes * 2**20
