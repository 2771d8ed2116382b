"""Comparisons of several seeds: their statistics against SciPy's, what is trained in which order, and the table."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from runs_parts import TINY
from scipy.stats import ttest_rel

from kdkernels.harness import split, train
from kdkernels.harness.compare import rows
from kdkernels.harness.compare.chart import draw
from kdkernels.harness.compare.summary import Difference, Line, Trained, mean_and_deviation, paired, table
from kdkernels.harness.export import file_of
from kdkernels.harness.job import Job

PARTS = {"teacher": 0.1, "student": 0.3, "losses": 0.1, "separate": 0.2, "distilled": 0.5, "alone": 0.3}
PARTS |= {"memory": 3e6, "memory_alone": 2e6}


def trained(title, seed, score, steps=250):
    return Trained(title, title, "", seed, steps, 1.0, 1.0, 0, score, 2 * score, 0.0, -1.0, -1.0, -1.0)


def group(title, scores):
    return [trained(title, seed, score) for seed, score in enumerate(scores)]


def test_the_interval_is_that_of_a_paired_t_test():
    ours, theirs = [0.21, 0.26, 0.19, 0.30], [0.17, 0.25, 0.20, 0.22]
    found = paired(group("pkd", ours), list(reversed(group("none", theirs))))  # paired by seed, not by place
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.mean == pytest.approx(0.03)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert not found.told and str(found).endswith("no difference")
    clear = paired(group("pkd", [x + 0.1 for x in theirs]), group("none", theirs))
    assert clear.told and str(clear) == "+0.100 [+0.100, +0.100]"


def test_only_seeds_of_both_are_paired_and_one_has_no_interval():
    found = paired(group("pkd", [0.3, 0.4]), [trained("none", 1, 0.1)])
    assert found.mean == pytest.approx(0.3) and math.isnan(found.low) and str(found) == "+0.300"
    assert paired(group("pkd", [0.3]), [trained("none", 4, 0.1)]) is None
    assert mean_and_deviation([0.1, 0.2]) == "0.150 ± 0.071" and mean_and_deviation([0.1]) == "0.100"


def test_the_table_says_what_it_is():
    lines = [
        Line("none", "none", group("none", [0.1, 0.3]), None, None, 250, {"alone": 0.3, "memory_alone": 2e6}),
        Line(
            "pkd",
            "pkd",
            group("pkd", [0.2, 0.3]),
            Difference(0.05, -0.1, 0.2),
            Difference(-0.1, -0.2, -0.05),
            500,
            PARTS,
        ),
    ]
    text = table(trained("teacher", 0, 0.5), lines, "none", 150, "a CPU", ["mimic: no"])
    assert "| teacher | 1 | 0.500 | 1.000 |  |  |" in text
    assert "| `none` | 2 | 0.200 ± 0.141 |" in text
    assert "| +0.050 [-0.100, +0.200] no difference | -0.100 [-0.200, -0.050] (500) |" in text
    assert "| `pkd` | 500 | 1.67 | 100 | 300 | 100 | 3 MB |" in text
    assert "150 validation pictures" in text and "Not trained to the end: mimic: no." in text


def test_the_committed_table_is_that_of_its_trainings():
    """docs/comparisons.md against docs/comparison/compare.csv: every mean, deviation, difference and interval."""
    docs = Path(__file__).parents[1] / "docs"
    kinds = [str, str, str, int, int, float, float, int, *[float] * 6]
    with (docs / "comparison" / "compare.csv").open(encoding="utf-8") as file:
        found = [Trained(*(kind(x) for kind, x in zip(kinds, line))) for line in list(csv.reader(file))[1:]]
    page = (docs / "comparisons.md").read_text(encoding="utf-8")
    of = {title: [x for x in found if x.run == title] for title in dict.fromkeys(x.run for x in found)}
    told = [title for title in of if title != "teacher" and not title.startswith("none, ")]
    assert len(told) == 13
    for title in told:
        text = of[title][0].row
        name = f"`{text}`" if text == title else f"{title}: `{text}`"
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {name} | 3 |")]
        _, _, _, mean_ap, ap50, steps, longer, _ = (cell.strip() for cell in line.split("|"))
        assert mean_ap == mean_and_deviation([x.mean_ap for x in of[title]])
        assert ap50 == mean_and_deviation([x.ap50 for x in of[title]])
        if title == "none":
            continue
        assert steps == str(paired(of[title], of["none"]))
        count = longer[longer.rindex("(") + 1 : -1]
        other = of["none"] if count == "250" else of[f"none, {count} steps"]
        assert longer == f"{paired(of[title], other)} ({count})"
    # What the page and the README say of rows beside the table's own differences.
    inherit = "inherit=fpn/rpn/roi_heads"
    assert not paired(of[f"best+{inherit}"], of["defeat"]).told
    assert not any(paired(of[name], of[f"{name}:preset=published"]).told for name in ("pkd", "defeat", "cwd"))
    means = {title: sum(x.mean_ap for x in of[title]) for title in told}
    assert sorted(means, key=means.get)[-4:] == [inherit, "defeat:preset=published", "defeat", f"best+{inherit}"]


def test_best_is_a_row_of_its_own():
    found = rows(["none", "pkd", "best+inherit=fpn"], "scenes")
    assert [row.title for row in found] == ["none", "pkd", "best+inherit=fpn", "inherit=fpn"]
    assert [row.text for row in found] == [row.title for row in found] and found[2].best and found[0].plain
    assert "weight=2.0" in found[1].options
    with pytest.raises(ValueError, match="no other row has recipes alone"):
        rows(["none", "pkd+inherit=fpn", "best"], "scenes")


def test_rows_that_would_write_the_same_students_are_one_row_twice(tmp_path):
    with pytest.raises(
        ValueError, match="'mimic:adapter=True' is given twice, the other time as 'mimic: adapter=true'"
    ):
        rows(["mimic: adapter=true", "mimic:adapter=True"], "scenes")
    for texts in (["mimic", "mimic"], ["pkd-mimic", "mimic", "mimic"]):
        with pytest.raises(ValueError, match="'mimic' is given twice"):
            rows(texts, "scenes")
    with pytest.raises(ValueError, match="none is the student alone, and joins nothing"):
        rows(["none+pkd"], "scenes")
    with pytest.raises(ValueError, match=r"'best\+best': best is given twice"):
        rows(["none", "pkd", "best+best"], "scenes")
    both = rows(["defeat-proposals", "pkd-mimic"], "scenes")
    assert [row.title for row in both if row.plain] == ["student"]  # of two tables that share it
    assert len(both) == 7  # with the control of the row that inherits
    of_table = ["student", "mimic", "PKD", "PKD, teacher's neck frozen", "inherit=fpn+freeze=fpn"]
    for before, after in ((["none"], []), ([], ["none"]), (["mimic"], []), ([], ["mimic", "none"]), ([], ["cwd"])):
        titles = [row.title for row in rows([*before, "pkd-mimic", *after], "scenes")]
        left = {"student"} if before == ["none"] else {"mimic"} if before else set()
        more = [title for title in after if title == "cwd"]
        assert titles == [*before, *(t for t in of_table[:4] if t not in left), *more, of_table[4]]
    with pytest.raises(ValueError, match="freeze= is given twice; several parts are freeze=fpn/rpn"):
        rows(["pkd+freeze=fpn+freeze=rpn"], "scenes")
    with pytest.raises(ValueError, match="mimic: weight is given twice"):
        rows(["mimic:weight=1, weight=2"], "scenes")
    long = [file_of(tmp_path, "pkd+" * 100 + end) for end in ("a", "b")]
    assert long[0] != long[1] and all(len(path.name) < 200 for path in long)


def compared(tmp_path, monkeypatch, *texts, more=(), code=0, split=lambda self, student, steps=12: dict(PARTS)):
    monkeypatch.setattr(Job, "split", split)
    out = tmp_path / "out"
    argv = [
        *TINY,
        "--steps",
        "4",
        "--compare",
        *texts,
        "--output-dir",
        str(out),
        "--teacher-cache",
        str(tmp_path / "c"),
    ]
    assert train.main([*argv, *more]) == code
    with (out / "compare.csv").open() as file:
        return out, list(csv.DictReader(file))


def test_rows_seeds_equal_time_and_the_best_row(tmp_path, monkeypatch, capsys):
    scores = {"pkd": 0.2, "mimic": 0.3}
    told = Job.student

    def student(self, name, *args, **how):
        made = told(self, name, *args, **how)
        made.run.scores[-1] = (*made.run.scores[-1][:2], scores.get(name.split(",")[0], 0.1), *made.run.scores[-1][3:])
        return made

    monkeypatch.setattr(Job, "student", student)
    texts = ["none", "pkd", "mimic", "best+inherit=fpn"]
    out, lines = compared(tmp_path, monkeypatch, *texts, more=["--seeds", "2", "--seed", "5"])
    # 5 / 3 of the time: 7 steps are the next quarter of 4.
    titles = ["none", "pkd", "mimic", "inherit=fpn", "best+inherit=fpn", "none, 7 steps"]
    assert [(x["run"], x["seed"]) for x in lines[1:]] == [(title, seed) for title in titles for seed in ("5", "6")]
    assert {x["row"] for x in lines if x["run"] == "best+inherit=fpn"} == {"mimic+inherit=fpn"}
    assert [x["steps"] for x in lines[1:]] == ["4"] * 10 + ["7"] * 2
    first, second = (out / "students" / f"none-seed-{seed}.safetensors" for seed in (5, 6))
    assert first.read_bytes() != second.read_bytes()
    printed = capsys.readouterr().out
    assert (out / "compare.md").read_text() in printed + "\n"
    assert "| `mimic` | 2 | 0.300 ± 0.000 |" in printed and "+0.200 [+0.200, +0.200] (7)" in printed
    assert {"differences.png", "detections.png"} <= {path.name for path in out.iterdir()}


def test_a_seed_is_that_of_a_run_by_itself(tmp_path, monkeypatch):
    """What stands in a comparison can be had again by its seed alone; the teacher is the same."""
    how = ["--no-equal-time"]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    both, _ = compared(tmp_path / "a", monkeypatch, "defeat:masks=random", more=[*how, "--seeds", "2"])
    one, _ = compared(tmp_path / "b", monkeypatch, "defeat:masks=random", more=how)
    names = ("defeat-masks=random-seed-0", "defeat-masks=random")
    first, second = ((x / "students" / f"{name}.safetensors").read_bytes() for x, name in zip((both, one), names))
    assert first == second


def test_a_row_that_diverges_is_told_and_the_others_are_trained(tmp_path, monkeypatch, capsys):
    out, lines = compared(tmp_path, monkeypatch, "none", "mimic:weight=1e38", "pkd", code=1)
    assert {x["run"] for x in lines} == {"teacher", "none", "pkd", "none, 7 steps"}
    printed = capsys.readouterr()
    assert "Not trained to the end: mimic:weight=1e38" in printed.out and "--resume" in printed.err
    assert "failed" in {json.loads(line)["kind"] for line in (out / "metrics.jsonl").read_text().splitlines()}


def test_where_no_row_is_the_student_alone_the_first_one_is_the_baseline(tmp_path, monkeypatch):
    out, lines = compared(tmp_path, monkeypatch, "chen2017:hint=none,classes=hard", "chen2017")
    assert len(lines) == 3, "equal ratios: no longer baseline"
    assert "mAP over chen2017:hint=none,classes=hard" in (out / "compare.md").read_text()


def test_differences_are_drawn_where_there_are_some(tmp_path):
    none = Line("none", "none", group("none", [0.1, 0.3]), None, None, 250, None)
    assert not draw(tmp_path / "a.png", [none], "none") and not (tmp_path / "a.png").exists()
    long = none._replace(title="pkd+" * 100, equal_steps=Difference(0.05, -0.1, 0.2))
    assert draw(tmp_path / "a.png", [none, long], "none" * 100) and (tmp_path / "a.png").exists()


def test_the_best_row_as_baseline_is_trained_longer_with_its_recipes(tmp_path, monkeypatch):
    def split(self, student, steps=12):
        assert bool(student.frozen) == student.run.name.startswith("best")
        return {**PARTS, "distilled": PARTS["alone"] * (3.0 if student.run.name.startswith("mimic") else 1.0)}

    out, lines = compared(tmp_path, monkeypatch, "best+freeze=fpn", "mimic:adapter=true", split=split)
    rows = {x["run"]: x["row"] for x in lines if x["run"].startswith("best")}
    assert rows == dict.fromkeys(["best+freeze=fpn", "best+freeze=fpn, 12 steps"], "mimic:adapter=true+freeze=fpn")
    assert (out / "students" / "best+freeze=fpn-12-steps.adapters.safetensors").exists(), "it had the recipe"


def test_where_no_row_can_be_the_best_the_others_are_told(tmp_path, monkeypatch, capsys):
    out, lines = compared(tmp_path, monkeypatch, "mimic:weight=1e38", "best+inherit=fpn", code=1)
    assert {x["run"] for x in lines} == {"teacher", "inherit=fpn"}
    assert "best: none of the rows that it may stand for came to its end" in capsys.readouterr().out
    assert (out / "curves.png").exists()


def test_memory_is_the_most_that_is_held_at_once():
    kept = []

    def step():
        first = torch.ones(1000, 1000)
        kept.append(first.sum())
        del first
        kept.append(torch.ones(500, 1000))

    assert 4_000_000 <= split._peak(step, torch.device("cpu")) < 4_100_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "0", "--compare", "pkd"], "argument --seeds: must be at least 1"),
        (["--seeds", "2"], "argument --seeds: is of --compare"),
        (["--compare", "none", "best"], "argument --compare: 'best': no other row"),
        (["--no-equal-time"], "argument --equal-time: is of --compare"),
        (["--preset", "pkd-coco", "--compare", "none", "--recipe", "pkd"], "argument --compare: does not go with"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, capsys, argv, message):
    assert train.main([*TINY, *argv, "--output-dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
