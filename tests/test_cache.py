"""Where kernels built on first use are kept: never in a folder that others could fill, never in a home made up."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from kdkernels.native import build as builder
from kdkernels.native import cache

pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="nothing is built on this system")


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No cache named, no home, and an empty folder for temporary files."""
    for name in ("KDKERNELS_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "no-home"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    return tmp_path


def test_cache_in_the_home(nowhere):
    (nowhere / "no-home").mkdir()
    assert cache.directory() == nowhere / "no-home" / ".cache" / "kdkernels"


def test_cache_that_the_environment_names(nowhere, monkeypatch):
    monkeypatch.setenv("KDKERNELS_CACHE_DIR", str(nowhere / "a" / "b"))
    assert cache.directory() == nowhere / "a" / "b"
    monkeypatch.setenv("KDKERNELS_CACHE_DIR", "/proc/nowhere")
    with pytest.raises(builder.BuildError, match="KDKERNELS_CACHE_DIR=/proc/nowhere cannot be used"):
        cache.directory()


@pytest.mark.parametrize("home", ["absent", "relative", "file"])
def test_private_folder_where_there_is_no_home(nowhere, monkeypatch, home):
    monkeypatch.chdir(nowhere)
    if home == "relative":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    if home == "file":
        (nowhere / "no-home").write_text("")
    folder = cache.directory()
    assert folder == nowhere / "temporary" / f"kdkernels-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not (nowhere / "relative").exists() and not (nowhere / "no-home").is_dir()


def test_private_folder_where_the_home_may_not_be_looked_into(nowhere):
    home = nowhere / "no-home"
    home.mkdir(mode=0o000)
    if os.getuid() != 0:
        assert cache.directory().parent == nowhere / "temporary"
        return
    # Root looks into everything: somebody else asks, from a copy that he may read.
    user, shared = 65534, Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        shutil.copytree(Path(builder.__file__).parent, shared / "native")
        code = f"import sys; sys.path.insert(0, {str(shared)!r}); from native import cache; print(cache._home_cache())"
        for path in (shared, *shared.rglob("*")):
            path.chmod(0o755)
        environment = {**os.environ, "HOME": str(shared / "closed")}
        (shared / "closed").mkdir(mode=0o000)
        python = shutil.which("python3", path="/usr/bin:/bin")
        if python is None:
            pytest.skip("no Python that another user may run")
        result = subprocess.run([python, "-c", code], env=environment, user=user, capture_output=True, text=True)
        assert result.stdout == "None\n", result.stderr
    finally:
        shutil.rmtree(shared)


@pytest.mark.parametrize("trap", ["link", "group may write", "anybody may write", "a stranger's", "file"])
def test_folder_that_others_could_fill_is_refused(nowhere, monkeypatch, trap):
    folder = nowhere / "temporary" / f"kdkernels-{os.getuid()}"
    if trap == "link":
        (nowhere / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(nowhere / "elsewhere")
    elif trap == "file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod({"group may write": 0o770, "anybody may write": 0o707}.get(trap, 0o700))
    if trap == "a stranger's":
        uid = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)
        folder.rename(nowhere / "temporary" / f"kdkernels-{uid + 1}")
    kept = []
    monkeypatch.setattr("atexit.register", lambda *call, **_: kept.append(call))
    own = cache.directory()
    assert own.parent == nowhere / "temporary" and own.name not in (f"kdkernels-{os.getuid()}", folder.name)
    assert [call[1] for call in kept] == [own]  # removed when the process ends
