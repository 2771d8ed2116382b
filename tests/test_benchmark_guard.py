"""The regression guard on made-up rows: what it names, what it lets pass, and what it refuses to judge."""

from __future__ import annotations

import pytest
from benchmark_rows import bench, case, row, save  # noqa: F401

OLD = {"ours": 1.0, "eager": 10.0, "compiled": 3.0}
GUARDED = {
    "the same": (OLD, 0),
    "all of it slower": ({k: 2 * v for k, v in OLD.items()} | {"floor_touched_ms": 1.0}, 0),
    "ours slower": (OLD | {"ours": 1.5}, 1),
    "ours slower within the spreads": (OLD | {"ours": 1.05}, 0),
    "ours faster": (OLD | {"ours": 0.5}, 0),
    "ours slower and noisy": (OLD | {"ours": (0.9, 1.5, 2.5)}, 0),
    "only eager faster": (OLD | {"eager": 5.0}, 0),
    "only the copy faster": (OLD | {"floor_touched_ms": 0.25}, 0),
    "all peers faster, the copy too": ({"ours": 1.0, "eager": 6, "compiled": 2, "floor_touched_ms": 0.3}, 1),
}


@pytest.mark.parametrize("name", GUARDED)
def test_guard(bench, tmp_path, capsys, name):
    changed, status = GUARDED[name]
    old, new = save(tmp_path / "old.csv", case(**OLD)), save(tmp_path / "new.csv", case(**changed))
    assert bench("guard").main([str(new), str(old)]) == status
    out = capsys.readouterr().out
    assert ("slower: pearson, 2x8x4x4, float32, 2 threads: ours avx2, forward + backward" in out) == bool(status)
    assert ("faster: pearson" in out) == (name == "ours faster")
    assert "1 rows of ours compared with old.csv" in out
    if name == "ours slower":
        # Both ratios and both spreads.
        assert "over eager 0.100 (0.0961 - 0.104) -> 0.150 (0.144 - 0.156), x 1.50" in out
        assert "copy 2.00" in out and "compiled 0.333" in out


def test_guard_judges_every_mode_and_way(bench, tmp_path, capsys):
    def rows(slow):
        return case(mode="forward") + [row("ours", slow, setting="base", mode="forward")] + case()

    files = [str(save(tmp_path / f"{i}.csv", rows(ms))) for i, ms in enumerate((2.0, 1.0))]
    assert bench("guard").main(files) == 1
    out = capsys.readouterr().out
    assert out.count("slower: ") == 1 and "ours base, forward:" in out and "3 rows" in out


def test_guard_lists_what_is_missing(bench, tmp_path, capsys):
    old = save(tmp_path / "old.csv", [*case(), row("ours", 1.0, setting="base"), *case(shape="9x9")])
    new = save(tmp_path / "new.csv", case() + case(dtype="bfloat16"))
    assert bench("guard").main([str(new), str(old)]) == 0
    out = capsys.readouterr().out
    assert "only in the new file: pearson, 2x8x4x4, bfloat16, 2 threads\n" in out
    assert "only in the committed file: pearson, 9x9, float32, 2 threads\n" in out
    assert "only in the committed file: pearson, 2x8x4x4, float32, 2 threads: ours base\n" in out


def test_guard_refuses_what_it_cannot_judge(bench, tmp_path, capsys):
    guard, old = bench("guard"), save(tmp_path / "old.csv", case())
    with pytest.raises(SystemExit):
        guard.main([str(save(tmp_path / "a.csv", case(cpu="another"))), str(old)])
    assert "another" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        guard.main([str(save(tmp_path / "b.csv", case(cpu="nobody's machine")))])
    assert "no rows of nobody's machine" in capsys.readouterr().err
    alone = [row("ours", 1.0, setting="avx2", floor_touched_ms="")]
    assert guard.main([str(save(tmp_path / "c.csv", alone)), str(old)]) == 2
    said = capsys.readouterr()
    assert "no baseline in both: pearson" in said.out and "no row of ours" in said.err


def test_guard_tells_what_has_no_time(bench, tmp_path, capsys):
    """A row whose time is no number, and a mode that one file alone has, are not passed over."""
    old = save(tmp_path / "old.csv", case())
    broken = row("ours", 1.0, setting="avx2") | {"ms_p50": "nan"}
    new = save(tmp_path / "new.csv", [broken, *case()[1:], *case(dtype="bfloat16")])
    assert bench("guard").main([str(new), str(save(tmp_path / "both.csv", case() + case(dtype="bfloat16")))]) == 0
    assert "no time or no baseline in both: pearson, 2x8x4x4, float32, 2 threads: ours avx2" in capsys.readouterr().out
    new = save(tmp_path / "new.csv", case() + case(mode="forward"))
    assert bench("guard").main([str(new), str(old)]) == 0
    assert "no baseline in both: pearson, 2x8x4x4, float32, 2 threads: ours avx2, forward\n" in capsys.readouterr().out
