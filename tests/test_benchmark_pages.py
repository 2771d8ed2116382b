"""Pages made from benchmark rows: README, docs/benchmarks.md, pictures, the web page.

Rows are made up, except in the first test, which holds the committed pages against the committed rows.
"""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from benchmark_rows import FOLDER, ROOT, bench, case, row, save  # noqa: F401


@pytest.mark.skipif(not FOLDER.is_dir(), reason="benchmarks/ is not beside these tests")
def test_the_committed_pages_agree_with_the_committed_rows():
    """Without tabulate, which the README's test command does not install, and without matplotlib and torch."""
    block = "import sys, runpy; sys.argv = ['pages.py', '--check']; sys.path.insert(0, 'benchmarks')\n"
    block += "for name in ('matplotlib', 'torch', 'tabulate'): sys.modules[name] = None\n"
    block += "runpy.run_path('benchmarks/pages.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"run python benchmarks/pages.py\n{done.stdout}{done.stderr}"


@pytest.fixture
def pages_of(bench, tmp_path):
    """A copy of the pages that agrees with its rows: root and rows."""
    pages = bench("pages")
    paths = [path for path in (FOLDER / "results").glob("*.csv") if pages.has_rows(path)]
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "docs" / "pictures", tmp_path / "docs" / "pictures")
    machines = pages.read(paths)
    assert pages.problems(tmp_path, machines) == []
    return tmp_path, machines


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_check_sees_an_altered_digit(bench, pages_of, name):
    root, machines = pages_of
    text = (root / name).read_text()
    line = next(line for line in text.splitlines() if line.startswith("| whole objective") and "float32" in line)
    at = max(i for i, letter in enumerate(line) if letter.isdigit())
    altered = line[:at] + str((int(line[at]) + 1) % 10) + line[at + 1 :]
    (root / name).write_text(text.replace(line, altered))
    wrong = bench("pages").problems(root, machines)
    assert len(wrong) == 1 and wrong[0].startswith(name) and altered in wrong[0]


def test_check_sees_altered_rows_and_missing_pictures(bench, pages_of):
    root, machines = pages_of
    changed = {
        name: [r | ({"ms_p50": "9.87e5"} if i == 0 else {}) for i, r in enumerate(rows)]
        for name, rows in machines.items()
    }
    assert any("docs/benchmarks.md disagrees" in text for text in bench("pages").problems(root, changed))
    picture = next((root / "docs" / "pictures" / next(iter(machines))).glob("*.png"))
    picture.unlink()
    assert bench("pages").problems(root, machines) == [f"docs/pictures/{picture.parent.name}/{picture.name} is missing"]


def test_markers_are_needed(bench):
    pages = bench("pages")
    assert pages.between(f"a\n{pages.BEGIN}old\n{pages.END}\nb", "new\n") == f"a\n{pages.BEGIN}new\n{pages.END}\nb"
    for text in ("", pages.BEGIN, pages.END + pages.BEGIN, pages.BEGIN * 2 + pages.END):
        with pytest.raises(ValueError, match="README"):
            pages.between(text, "new\n")


def test_every_defeat_is_found(bench):
    defeats, group = bench("publish.defeats"), bench("publish.cases").group

    def kinds(rows):
        return [(d.kind, d.peer, d.overlaps) for d in defeats.find(group(rows))]

    assert kinds(case()) == []
    assert kinds(case(ours=3.0)) == []  # as fast is not faster
    assert kinds(case(ours=3.01)) == [("both", "compiled default", True)]
    assert kinds(case(ours=4.0)) == [("both", "compiled default", False)]
    assert kinds(case() + case(ours=11, mode="no_grad")) == [
        ("no_grad", "eager", False),
        ("no_grad", "compiled default", False),
    ]
    liger = row("liger", 0.5, setting="kl")
    assert kinds([*case(), liger]) == [("both", "liger kl", False)]
    ours = row("ours", 1.0, setting="avx512")
    assert kinds([ours, row("ours", 5.0, setting="base"), row("eager", 2.0)]) == []  # only the widest is judged
    assert kinds([row("ours", 9.0, setting="avx2, two passes"), *case()]) == []  # another way is not the default one
    assert kinds([row("eager", 2.0), row("compiled", 1.0)]) == []

    def of(dtype="float32", **theirs):
        return kinds([row("ours", 1, loss_error=3e-7, dtype=dtype), row("eager", 2, dtype=dtype, **theirs)])

    errors = {"loss_error": 3e-7, "gradient_error": 1e-8}
    assert of(**errors, forward_peak_bytes=4001) == []
    assert of(**errors, forward_peak_bytes=3999) == [("peak memory", "eager", False)]
    assert of(**errors, forward_kept_bytes=0) == [("kept memory", "eager", False)]
    assert of(loss_error=2.5e-7) == [] and of(loss_error=2e-7) == [("loss error", "eager", False)]
    assert of("bfloat16", loss_error=2e-7) == [("loss error", "eager", False)]  # a loss is float32
    wide = [row("ours", 1, dtype="bfloat16", gradient_error=9e-3), row("eager", 2, dtype="bfloat16")]
    assert kinds(wide) == [("gradient error", "eager", False)]
    assert kinds([wide[0] | {"gradient_error": "3e-3"}, wide[1]]) == []


def test_a_defeat_needs_a_reason(bench, pages_of):
    pages, root = bench("pages"), pages_of[0]
    rows = {"made-up": case(ours=4.0)}
    wrong = pages.problems(root, rows, {})
    assert not any("no row needs" in text for text in wrong)
    assert "pearson/both/compiled" in wrong[-1] and "no reason" in wrong[-1]
    assert any("no reason" in text for text in pages.problems(root, rows, {"pearson/both/compiled": ""}))
    *_, missing, one, other = pages.problems(root, rows, {"pearson/both/eager": "x", "pearson/forward": "x"})
    assert "no reason" in missing and "no row needs 'pearson/both/eager'" in one and "'pearson/forward'" in other
    reasons = {"pearson/both": "broad", "pearson/both/compiled/float32/2x8x4x4": "narrow"}
    assert not any("no reason" in text for text in pages.problems(root, rows, reasons))
    defeat = bench("publish.defeats").find(bench("publish.cases").group(rows["made-up"]))[0]
    assert defeat.reason(reasons) == "narrow"
    page = pages.texts(root, rows, reasons)[0][root / "docs/benchmarks.md"]
    line = "| Pearson | 2x8x4x4 | float32 | forward + backward | compiled default | 4.00 ms | 3.00 ms | 1.33 | - |"
    assert line in page[page.index("**Why:** narrow\n") : page.index("## Where another way")]


def test_the_cost_of_a_call_explains_small_cases_alone(bench, pages_of):
    pages, reasons, call = bench("pages"), {"pearson/both": bench("publish.reasons").CALL}, "fixed cost of a call"
    for ours, accepted in ((4.0, True), (6.1, False)):
        rows = {"made-up": case(ours=3.0, shape="1") + case(ours=ours, shape="9")}
        wrong = [
            text for text in pages.problems(pages_of[0], rows, reasons) if call in text and "disagrees" not in text
        ]
        assert len(wrong) == (0 if accepted else 1) and all("9" in x and "2.0 times" in x for x in wrong)


def test_medians_whose_spreads_overlap_are_counted(bench):
    undecided, group = bench("publish.defeats").undecided, bench("publish.cases").group
    assert [undecided(group(case(ours=x))[0]) for x in (1.0, 2.95, 3.0, 3.05, 4.0)] == [False, True, True, True, False]
    assert not undecided(group([row("ours", 1.0)])[0]) and not undecided(group([row("eager", 1.0)])[0])
    cases = group(case() + case(ours=3.0, shape="9"))
    text = bench("publish.document").markdown(bench("publish.chapters")._summary(cases, "p"), "p")
    assert "In 1 of these 2 cases" in " ".join(text.split())


def test_a_case_without_peers_says_so(bench):
    line, group = bench("publish.tables").case_line, bench("publish.cases").group
    assert "no peer is here" in line(group([row("ours", 1.0)])[0]) and "no peer" not in line(group(case())[0])


def test_devices_do_not_mix(bench, tmp_path, capsys):
    """A newer measurement on another machine does not hide an older one, and no page shows both as one machine's."""
    read, both = bench("report").read, case() + case(cpu="another", date="2027-01-01T00")
    path = save(tmp_path / "both.csv", both)
    assert len(read(path)) == 6
    assert bench("publish.chapters").setting(both).startswith("made up and another, ")
    with pytest.raises(SystemExit):
        bench("pages").main([str(path), "--html", str(tmp_path / "o")])
    assert "rows of 2 devices" in capsys.readouterr().err
    (tmp_path / "a").mkdir()
    same = [str(save(folder / "one.csv", case())) for folder in (tmp_path, tmp_path / "a")]
    with pytest.raises(SystemExit):
        bench("pages").main([*same, "--html", str(tmp_path / "o")])
    assert "another file is called one" in capsys.readouterr().err


def test_cells_that_are_no_numbers_count_as_empty(bench, tmp_path, capsys):
    number = bench("publish.cases").number
    assert [number({"a": x}, "a") for x in ("1.5", "nan", "inf", "-inf", "fast", "", None)] == [1.5] + 6 * [None]
    odd = save(tmp_path / "odd.csv", case(load="high", floor_touched_ms="inf", date="2026-01-02"))
    assert bench("guard").main([str(odd), str(odd)]) == 0 and bench("report").main([str(odd)]) == 0
    assert "load" not in capsys.readouterr().out


def test_other_ways_that_are_faster_are_listed(bench):
    rows = [*case(), row("ours", 0.5, setting="avx2, two passes"), row("ours", 2.0, setting="base")]
    found = bench("publish.defeats").other_ways(bench("publish.cases").group(rows))
    assert [name for _, name in found] == ["ours avx2, two passes"]


def test_headline_is_a_range_over_the_default_set(bench):
    tables, group = bench("publish.tables"), bench("publish.cases").group
    rows = case(eager=10.0, bytes=100, set="default") + case(eager=2.5, shape="9", bytes=900, set="default")
    line = tables.headline(group(rows)).body
    assert len(line) == 1
    assert line[0][:6] == ["Pearson", "float32", "2", "2.50 - 10.0", "3.00", "-"]
    assert line[0][6:8] == ["9", "1.00 (0.980 - 1.02)"] and line[0][8] == "50.0 % / 200 %"
    kl = tables.headline(group(case(loss="temperature_kl"))).body[0]
    assert kl[5] == "- (needs a GPU)"
    liger = [*case(loss="temperature_kl"), row("liger", 4.0, loss="temperature_kl")]
    assert tables.headline(group(liger)).body[0][5] == "4.00"
    chapters = bench("publish.chapters")
    scaled = rows + case(eager=0.1, shape="7", set="scaling")
    text = bench("publish.document").markdown(chapters.readme({"m": scaled}, "docs/benchmarks.md"), "p")
    assert (
        "2.50 - 10.0" in text
        and "0.100 - 10.0" not in text
        and "least factor over eager is 0.100." in " ".join(text.split())
    )


def test_a_disturbed_case_is_told(bench):
    """A copy of 4 MB that takes 9 ms where the run's own goes at 25 GB/s; a call's own cost is no disturbance."""
    group, line = bench("publish.cases").group, bench("publish.tables").case_line

    def told(ms, speed):
        (one,) = group(case(floor_touched_ms=ms, floor_gb_per_s=speed, copy_gb_per_s=25))
        assert ("disturbed" in line(one)) == one.disturbed
        return one.disturbed

    assert told(9, 0.5) and not told(0.3, 15) and not told(0.4, 0.01) and not told(400, 10) and not told(9, "")
    assert not group(case())[0].disturbed  # older files do not say


def test_figures_and_sizes(bench):
    tables = bench("publish.tables")
    shown = [tables.figures(x) for x in (0.09691, 6.2, 19, 62.74, 99.96, 4368.4, None)]
    assert shown == ["0.0969", "6.20", "19.0", "62.7", "100", "4368", "-"]
    assert [tables.size(x) for x in (12, 6150, 31129652, 1.47e9, None)] == [
        "12 B",
        "6.15 KB",
        "31.1 MB",
        "1.47 GB",
        "-",
    ]


def scaling_rows():
    return [
        r
        for step in range(6)
        for dtype in ("float32", "bfloat16")
        for r in case(
            0.02 + 0.01 * 8**step,
            0.1 + 0.1 * 8**step,
            0.2 + 0.03 * 8**step,
            shape=f"{8**step}x4",
            dtype=dtype,
            bytes=3000 * 8**step,
            floor_touched_ms=0.003 * 8**step,
            floor_fresh_ms=0.009 * 8**step,
            set="scaling" if step else "default",
        )
    ]


def test_pictures_are_drawn(bench, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    plots, group = bench("publish.plots"), bench("publish.cases").group
    cases = group(scaling_rows())
    found = plots.ladders(cases)
    assert [len(steps) for steps in found["pearson"].values()] == [5, 5]  # the scaling set alone
    assert plots.ladders(cases[:4]) == {}
    plots.scaling("pearson", found["pearson"], tmp_path / "scaling.png")
    plots.overview(cases, tmp_path / "overview.png")
    for path in tmp_path.iterdir():
        picture = Image.open(path).convert("RGB")
        # Blue of ours, vermilion of eager and yellow of the compiler are all there, within the palette's rounding.
        colours = {colour for _, colour in picture.getcolors(1 << 20)}
        for wanted in ((0, 114, 178), (213, 94, 0), (230, 159, 0)):
            assert any(max(abs(a - b) for a, b in zip(c, wanted)) < 12 for c in colours), (path, wanted)
        assert picture.width >= 600 and path.stat().st_size < 150_000


class Reader(HTMLParser):
    """Collects what a page would ask of the network, and its cells."""

    def __init__(self):
        super().__init__()
        self.asked, self.pictures, self.open, self.cells = [], [], [], 0

    def handle_starttag(self, tag, attributes):
        self.cells += tag == "td"
        for name, value in attributes:
            if name == "src" and value.startswith("data:image/png;base64,"):
                self.pictures.append(base64.b64decode(value.partition(",")[2]))
            elif name in ("src", "href") and not value.startswith("#"):
                self.asked.append(value)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_web_page_is_whole_and_alone(bench, tmp_path):
    pytest.importorskip("matplotlib")
    rows = scaling_rows()
    rows[0]["command"] = "run.py --csv <a&b>.csv"
    assert bench("pages").main(["--html", str(tmp_path / "out"), str(save(tmp_path / "x.csv", rows))]) == 0
    text = (tmp_path / "out" / "index.html").read_text()
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [] and reader.asked == [] and "url(" not in text and "<script" not in text
    assert len(reader.pictures) == 2 and all(x.startswith(b"\x89PNG") for x in reader.pictures)
    assert "python benchmarks/run.py --csv &lt;a&amp;b&gt;.csv" in text and "<code>torch.compile</code>" in text
    assert reader.cells > 12 * 3 * 10 and "8x4, float32" in text


def test_a_run_writes_its_web_page(bench, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = ["--quick", "--skip-tests", "--threads", "1", "--providers", "eager", "--dtype", "float32"]
    assert bench("harness").main([bench("pearson").BENCHMARK], [*options, "--report", str(tmp_path / "out")]) == 0
    assert "pearson, 2x8x12x20, float32" in (tmp_path / "out" / "index.html").read_text()


def test_wrong_files_are_told(bench, tmp_path, capsys):
    other = save(tmp_path / "other.csv", [{"a": "1"}])
    for module in ("pages", "guard"):
        for path, why in ((other, "has no rows of benchmarks"), (tmp_path / "none.csv", "is not a file")):
            with pytest.raises(SystemExit):
                bench(module).main([str(path), *(["--html", str(tmp_path / "o")] if module == "pages" else [])])
            assert why in capsys.readouterr().err
    bare, cut = save(tmp_path / "bare.csv", case()), save(tmp_path / "cut.csv", case())
    bare.write_text(bare.read_text().splitlines()[0] + "\n")
    cut.write_text(cut.read_text()[:-30])
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for path, why in ((bare, "no rows"), (cut, "row 3 has fewer cells"), (tmp_path / "binary.csv", "binary.csv")):
        for module, options in (("pages", ["--html", str(tmp_path / "o")]), ("guard", []), ("report", [])):
            with pytest.raises(SystemExit):
                bench(module).main([str(path), *options])
            assert why in (said := capsys.readouterr().err) or (path.name == "binary.csv" and "decode" in said)
    with pytest.raises(SystemExit):
        bench("report").main([str(other)])
    assert "has no column loss, shape" in capsys.readouterr().err
    needed = save(tmp_path / "needed.csv", [{c: r[c] for c in bench("publish.cases").NEEDED} for r in case()])
    assert len(bench("report").read(needed)) == 3
    with pytest.raises(SystemExit):
        bench("pages").main([str(save(tmp_path / "x.csv", case()))])
    assert "with --html only" in capsys.readouterr().err
