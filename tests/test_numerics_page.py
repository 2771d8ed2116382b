"""docs/numerics.md is what benchmarks/results/numerics.csv says, and the code is as exact as both say.

Only a small part is computed again (`python benchmarks/numerics.py` does all). Errors are bounded, not compared:
another processor or compiler rounds otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def numerics():
    """benchmarks/numerics.py, under another name than that of the tests' own numerics.py."""
    if not FOLDER.is_dir():
        pytest.skip("benchmarks/ is not beside these tests")
    before, path = set(sys.modules), list(sys.path)
    spec = importlib.util.spec_from_file_location("numerics_page", FOLDER / "numerics.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if FOLDER in Path(getattr(sys.modules[name], "__file__", None) or ".").parents:
            del sys.modules[name]


@pytest.fixture(scope="module")
def who(numerics):
    """Our own backends on this machine, by name."""
    found, missing = numerics.providers.available()
    assert "cpu base" not in missing, missing
    return {p.name: p for p in found if p.name in numerics.providers.OURS}


@pytest.fixture(scope="module")
def kept(numerics):
    return numerics.table.read(numerics.CSV)


def test_the_page_is_that_of_the_rows(numerics, capsys):
    assert numerics.main(["--check"]) == 0, capsys.readouterr().out


def _altered(numerics, tmp_path, change):
    """What --check says of copies that `change` has altered: (text of the CSV, text of the page) -> both."""
    texts = change(numerics.CSV.read_text(), numerics.PAGE.read_text())
    paths = [tmp_path / "rows.csv", tmp_path / "page.md"]
    for path, text in zip(paths, texts):
        path.write_text(text)
    return numerics.check(*paths)


def test_an_altered_digit_is_seen(numerics, tmp_path):
    def on_the_page(rows, page):
        at = page.index("e-08", page.index("## pearson"))
        return rows, page[: at + 3] + "9" + page[at + 4 :]

    def in_the_rows(rows, page):
        old = rows.splitlines()[5]
        fields = old.split(",")
        fields[4] = "1.23e-01"
        return rows.replace(old, ",".join(fields)), page

    for change in (on_the_page, in_the_rows):
        (problem,) = _altered(numerics, tmp_path, change)
        assert "page.md, line" in problem


def test_a_missing_cell_and_a_missing_page_are_seen(numerics, tmp_path):
    def without(rows, page):
        lines = rows.splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("pearson,ordinary,float32,triton")), page

    (problem,) = _altered(numerics, tmp_path, without)
    assert "no row for pearson, ordinary, float32, triton" in problem
    assert numerics.check(page_path=tmp_path / "none.md") != []
    assert "other columns" in _altered(numerics, tmp_path, lambda rows, page: ("loss,input\n", page))[0]


def test_a_file_that_is_cut_off_or_empty_is_named(numerics, tmp_path, capsys):
    def said(change):
        (problem,) = _altered(numerics, tmp_path, lambda rows, page: (change(rows), page))
        with pytest.raises(SystemExit):
            numerics.main(["--page-only", "--csv", str(tmp_path / "rows.csv"), "--page", str(tmp_path / "page.md")])
        assert problem in capsys.readouterr().err
        return problem

    assert "has no rows" in said(lambda rows: rows.splitlines()[0] + "\n")
    assert "row 1 has None for its" in said(lambda rows: "\n".join([rows.splitlines()[0], "pearson,ordinary,float32"]))
    assert "row 1 has '1e-x'" in said(lambda rows: "\n".join([rows.splitlines()[0], "a,b,c,d,1e-x,0,0,0,1,,,,,,"]))
    with pytest.raises(SystemExit):
        numerics.main(["--csv", str(tmp_path / "none" / "x.csv")])
    assert "--csv: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cpu base", "cpu avx2", "cpu avx512", "formula", "cuda", "triton"])
def test_the_code_is_as_exact_as_the_rows_say(name, numerics, who, kept):
    """A part of the table again, on what this machine has."""
    if name not in who:
        pytest.skip(f"{name} does not run here")
    cells = numerics.quick_cells()
    if name == "triton":  # whose interpreter is slow
        cells = [(case, dtype) for case, dtype in cells if case.name in ("ordinary", "huge")]
    found = numerics.compute(cells, [who[name]])
    assert {row["provider"] for row in found} == {name, numerics.table.ROUNDED}
    assert {row["loss"] for row in found} == set(numerics.table.CASES)
    assert numerics.table.drift(kept, found, [name]) == []


def _mutant(numerics, who, kept, change):
    """What is said of the CPU's kernels when `change` has been at their loss."""
    cells = [(c, d) for c, d in numerics.quick_cells() if c.name == "ordinary"]
    provider = numerics.providers.Provider(
        "cpu base", lambda *x: change(who["cpu base"].function(*x)), who["cpu base"].here
    )
    return cells, numerics.table.drift(kept, numerics.compute(cells, [provider]), ["cpu base"])


def test_a_kernel_that_errs_by_a_thousandth_is_seen(numerics, who, kept):
    cells, problems = _mutant(numerics, who, kept, lambda loss: loss * 1.001)
    assert sum("value error" in p for p in problems) == len(cells)
    # A thousandth of a gradient shows in float32; bfloat16's own rounding is larger.
    wide = [case.loss for case, dtype in cells if dtype == "float32"]
    assert {p.split(",")[0] for p in problems if "gradient error" in p and "float32" in p} == set(wide)


def test_a_kernel_that_is_not_finite_is_seen(numerics, who, kept):
    cells, problems = _mutant(numerics, who, kept, lambda loss: loss * float("nan"))
    assert sum("1 wrong, 0 kept (value)" in p for p in problems) == len(cells)
    assert sum("kept (gradient)" in p for p in problems) == len(cells)


def test_the_rows_of_ours_are_finite_where_float64_is(numerics, kept):
    """The library's promise, which the CPU's kernels keep everywhere. The others, which sum in float32, may overflow
    beside the largest finite numbers, and then only where the eager formula does, too.
    """
    wrong = {
        tuple(row[c] for c in numerics.table.KEY)
        for row in kept
        if int(row["value_wrong"]) + int(row["gradient_wrong"]) and row["provider"] != numerics.table.EAGER64
    }
    ours = [key for key in wrong if key[-1] in numerics.providers.OURS]
    assert all(key[1] in ("huge", "largest") and not key[-1].startswith("cpu ") for key in ours), ours
    assert {(*key[:-1], numerics.providers.EAGER) for key in ours} <= wrong


def test_what_counts_as_an_error(numerics):
    """Errors are over what the result's dtype can hold; the rest is counted."""
    errors, inf = numerics.table._errors, float("inf")
    exact = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    assert errors(torch.tensor([1.0, 2.0, 5.0]), exact, torch.float32) == (0.25, 0)
    assert errors(torch.tensor([1.0, float("nan"), 4.0]), exact, torch.float32) == (inf, 1)
    large = torch.tensor([1.0, 1e300, -inf], dtype=torch.float64)
    assert errors(torch.tensor([1.0, inf, -inf]), large, torch.float32) == (0.0, 0)
    assert errors(torch.tensor([1.0, 3.0, inf]), large, torch.float32) == (0.0, 2)
    assert errors(torch.zeros(0), torch.zeros(0).double(), torch.float32) == (0.0, 0)


def test_verdicts(numerics):
    """More, equal, less, other: by factors of two above what rounding makes of the exact answer."""
    page, table = numerics.page, numerics.table

    def row(error, wrong=0):
        return {"dtype": "float32", "value_error": str(error), "value_wrong": str(wrong)}

    def verdict(ours, eager, rounded=0.0, eager64=0.0):
        group = {"triton": row(*ours), "eager": row(*eager), table.ROUNDED: row(rounded), table.EAGER64: row(eager64)}
        return page.verdict(group, "triton", "eager", "value")

    assert verdict((1e-5,), (3e-5,)) == "more" and verdict((3e-5,), (1e-5,)) == "less"
    assert verdict((1e-5,), (1.9e-5,)) == verdict((1.9e-5,), (1e-5,)) == "equal"
    assert verdict((5e-8,), (0.0,)) == "equal" and verdict((3e-5,), (1e-5,), rounded=2e-5) == "equal"
    assert verdict((1e-5,), (0.0, 1)) == "more" and verdict((0.0, 1), (1e-5,)) == "less"
    assert verdict((1e-5,), (3e-5,), eager64=1e-3) == "other"
