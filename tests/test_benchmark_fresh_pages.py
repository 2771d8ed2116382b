"""benchmarks/fresh_pages.py: what it prints, and what it says of options and systems that it cannot serve."""

from __future__ import annotations

import mmap

import pytest
from benchmark_rows import bench  # noqa: F401

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages are asked for on Linux alone")


def test_fresh_pages_are_timed_in_both_sizes(bench, capsys):
    main = bench("fresh_pages").main
    assert main(["--megabytes", "4", "--neighbour", "8", "--pause", "0.01", "--rounds", "2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:6]]
    assert [row[0] for row in rows] == ["small", "small", "huge", "huge"]
    assert all(0 < float(row[-3]) <= float(row[-4]) <= float(row[-2]) for row in rows)
    assert main(["--megabytes", "1", "--neighbour", "1", "--pause", "0", "--rounds", "1"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:-1]] == ["small", "huge"]
    assert main(["--megabytes", str(1 << 42)]) == 2
    assert "so much memory cannot be had" in capsys.readouterr().err
    wrong = (("--megabytes", "0"), ("--neighbour", "-1"), ("--rounds", "0"))
    for option, value in (*wrong, *(("--pause", text) for text in ("-1", "nan", "inf"))):
        with pytest.raises(SystemExit):
            main([option, value])
        assert f"{option}: expected" in capsys.readouterr().err


def test_fresh_pages_without_huge_pages_or_counters(bench, monkeypatch, capsys, tmp_path):
    """A kernel that was built without huge pages knows no such advice."""
    fresh = bench("fresh_pages")
    monkeypatch.setattr(fresh, "VMSTAT", tmp_path / "none")
    assert fresh.compactions() == 0
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)
    assert fresh.main(["--megabytes", "1", "--neighbour", "1", "--pause", "0", "--rounds", "1"]) == 2
    assert "no huge pages" in capsys.readouterr().err
