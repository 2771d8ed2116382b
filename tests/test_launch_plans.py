"""Plans of the CUDA kernels that form loss and gradient of features in one pass, for every architecture, from the
native module: no GPU takes part. The launches follow the same plans (test_one_pass_cuda.py counts them).
"""

from __future__ import annotations

import importlib.util

import pytest

from kdkernels.native import build as builder

COCO = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
SHARED_BYTES = {75: 65536, 80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
ARCHITECTURES = (80, 86, 90, 100, 120)


@pytest.fixture(scope="module")
def feature_plan(tmp_path_factory):
    if builder.obstacle("python"):
        pytest.skip(builder.obstacle("python"))
    path = builder.build("python", tmp_path_factory.mktemp("module"))
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.feature_plan


def coco(batch: int, channels: int = 256) -> list[tuple[int, int, int, int]]:
    return [(batch, channels, h, w) for h, w in COCO]


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
def test_a_pyramid_of_planes_is_three_launches(capability, dtype, batch, feature_plan):
    levels = coco(batch)
    plans = feature_plan(levels, dtype=dtype, capability=capability)
    assert {p["launches"] for p in plans} == {3} and {p["kernel"] for p in plans} == {"planes"}
    assert len({p["cluster"] for p in plans}) == 1 and len({p["threads"] for p in plans}) == 1
    for (n, c, h, w), p in zip(levels, plans, strict=True):
        assert p["blocks"] % p["cluster"] == 0 and p["cluster"] % p["blocks_per_channel"] == 0
        assert p["blocks"] * p["channels_per_block"] >= c * p["blocks_per_channel"]
        assert p["shared_bytes"] <= SHARED_BYTES[capability] and p["threads"] <= 512
        bytes_of_channel = 2 * n * h * w * (4 if dtype == "float32" else 2)
        if p["transfers"] == 3:
            assert p["bytes_on_chip"] >= bytes_of_channel
        else:
            assert 3 < p["transfers"] < 5 and p["bytes_on_chip"] < 1.01 * bytes_of_channel
            again = 1 - p["bytes_on_chip"] / bytes_of_channel
            assert p["transfers"] == pytest.approx(3 + 2 * again, abs=0.1)  # lines have a vector to spare
            assert p["blocks_per_channel"] == (8 if capability >= 90 else 1)
    if batch <= 4:
        assert plans[-1]["transfers"] == 3 and plans[-1]["channels_per_block"] > 1


def test_clusters_are_for_architectures_that_have_them(feature_plan):
    for capability in ARCHITECTURES:
        largest = max(p["cluster"] for p in feature_plan(coco(4), capability=capability))
        assert largest == (8 if capability >= 90 else 1)


@pytest.mark.parametrize("capability", [90, 100])
def test_the_largest_level_in_bfloat16(capability, feature_plan):
    """200 x 336: 1,050 KB of student and teacher per channel at batch 4, in eight blocks of up to 227 KB."""

    def first(batch):
        return feature_plan(coco(batch), capability=capability)[0]

    assert (first(1)["cluster"], first(2)["cluster"]) == (4, 8)
    for batch in (1, 2):  # two blocks at once have room on a multiprocessor
        assert first(batch)["transfers"] == 3 and first(batch)["shared_bytes"] <= 113 * 1024
        assert first(batch)["threads"] == 256
    four = first(4)
    assert four["cluster"] == four["blocks_per_channel"] == 8 and four["transfers"] == 3 and four["threads"] == 512
    assert four["bytes_on_chip"] >= 4 * 200 * 336 * 4 and 8 * four["shared_bytes"] <= 1816 * 1024
    eight = first(8)  # 2,100 KB: eight blocks hold 86 %, and the rest is read again
    assert eight["cluster"] == 8 and 3.2 < eight["transfers"] < 3.4 and eight["shared_bytes"] > 226 * 1024
    sixteen = first(16)  # less than half would fit: two blocks at once instead
    assert sixteen["cluster"] == 8 and 4.5 < sixteen["transfers"] < 4.7 and sixteen["threads"] == 256


def test_small_levels_share_blocks_in_a_launch_of_clusters(feature_plan):
    plans = feature_plan(coco(2), capability=90)
    assert [p["blocks_per_channel"] for p in plans] == [8, 2, 1, 1, 1]
    assert [p["channels_per_block"] for p in plans] == [1, 1, 1, 1, 4]
    assert [p["blocks"] for p in plans] == [2048, 512, 256, 256, 64]


def test_masked_mse_alone_is_three_launches_and_three_transfers(feature_plan):
    for channels_last in (False, True):
        for capability in ARCHITECTURES:
            plans = feature_plan(coco(2), capability=capability, pearson=False, channels_last=channels_last)
            assert {(p["kernel"], p["transfers"], p["launches"], p["cluster"]) for p in plans} == {("tiles", 3, 3, 1)}


def test_pearson_alone_needs_no_counts(feature_plan):
    assert {p["launches"] for p in feature_plan(coco(2), masked_mse=False)} == {2}


def test_channels_last_reads_twice(feature_plan):
    plans = feature_plan(coco(2), channels_last=True)
    assert {(p["kernel"], p["transfers"], p["launches"]) for p in plans} == {("pixels", 5, 5)}


def test_a_level_without_pearson_rides_with_the_others(feature_plan):
    """Four levels of one loss and five of the other: still three launches, and the fifth level is read once."""
    plans = feature_plan(coco(2), pearson=[0, 1, 2, 3])
    assert {p["launches"] for p in plans} == {3} and {p["kernel"] for p in plans} == {"planes"}
    assert plans[4]["transfers"] == 3 and plans[4]["bytes_on_chip"] == 0
    assert {p["kernel"] for p in feature_plan(coco(2), pearson=[0], channels_last=True)} == {"pixels", "tiles"}


def test_empty_levels_have_no_blocks(feature_plan):
    plans = feature_plan([(2, 8, 0, 5), (2, 8, 4, 5)])
    assert (plans[0]["kernel"], plans[0]["blocks"]) == ("none", 0) and plans[1]["blocks"] > 0


def test_more_levels_than_a_table_holds(feature_plan):
    assert feature_plan([(1, 8, 4, 5)] * 13)[0]["launches"] == 5


def test_a_dtype_without_kernels(feature_plan):
    with pytest.raises(ValueError, match="float64"):
        feature_plan(coco(1), dtype="float64")
