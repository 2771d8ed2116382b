"""The README's code works when pasted, and its test command is the one that is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_code_works_when_pasted():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        run = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "masked_mse" in run.stdout  # the table of backend_info


def test_the_named_functions_exist():
    import kdkernels as kd

    for name in re.findall(r"`(?:kd\.)?(?:masks\.)?(\w+)\(", README):
        owner = kd.masks if name.endswith("_masks") else kd
        assert hasattr(owner, name), name


def test_there_is_one_test_command_between_the_markers():
    inside = re.search(r"<!-- test-command -->\n```\n(.*?)\n```\n<!-- /test-command -->", README, re.S)
    assert inside and inside[1].count("\n") == 0 and "pytest" in inside[1]


def test_the_page_on_training_names_every_recipe_and_table():
    pytest.importorskip("torchvision")
    from kdkernels.harness.compare import TABLES
    from kdkernels.harness.recipes import RECIPES

    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    assert re.findall(r"^\| `([a-z0-9-]+)` \|", page[page.index("## Recipes") :], re.M) == list(RECIPES)
    assert set(re.findall(r"`((?:defeat|chen2017|pkd)-[a-z]+)`", page)) == set(TABLES)
