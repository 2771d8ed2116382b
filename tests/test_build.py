"""How kernels are built on first use, and how processes share the result: with a tiny library for the real one.

Nothing here touches the user's cache: every test has its own folder, and the library is three empty sources.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdkernels import native
from kdkernels.native import build as builder
from kdkernels.native import cache

pytestmark = pytest.mark.skipif(builder.obstacle("cpu") is not None, reason=f"no build here: {builder.obstacle('cpu')}")

NATIVE = Path(builder.__file__).parent


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A copy of kdkernels/native beside a tiny csrc/, which this process builds too, into a cache of the test."""
    shutil.copytree(NATIVE, tmp_path / "kdkernels" / "native", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    for name in ("cpu/one.cpp", "cpu/capability.cpp", "math/one.h", "torch/one_cpu.cpp", "python.cpp"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("// nothing\n")
    monkeypatch.setattr(builder, "source_directory", lambda: tmp_path / "csrc")
    monkeypatch.setenv("KDKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("MAX_JOBS", raising=False)
    return tmp_path


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def start(house: Path, **environment: str) -> subprocess.Popen:
    """Another process that asks for the kernels of `house`. It imports neither torch nor the rest of the package."""
    code = (
        f"import sys; sys.path.insert(0, {str(house / 'kdkernels')!r})\nfrom native import cache; print(cache.obtain())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(happened) -> None:
    for _ in range(1200):
        if happened():
            return
        time.sleep(0.05)
    pytest.fail("waited a minute in vain")


# What the key of a build depends on.


def test_key_is_that_of_the_sources_wherever_they_lie(house):
    shutil.copytree(house / "csrc", house / "elsewhere")
    assert builder.cache_key(house / "csrc") == builder.cache_key(house / "elsewhere")


@pytest.mark.parametrize("name", ["cpu/one.cpp", "math/one.h", "torch/one_cpu.cpp", "cpu/new.h"])
def test_key_changes_with_every_source(house, name):
    before = builder.cache_key(house / "csrc")
    (house / "csrc" / name).write_text("// something\n")
    assert builder.cache_key(house / "csrc") != before


def test_key_does_not_change_with_what_the_kernels_do_not_contain(house):
    before = builder.cache_key(house / "csrc")
    (house / "csrc" / "python.cpp").write_text("// something\n")
    (house / "csrc" / "cpu" / "notes.txt").write_text("something")
    assert builder.cache_key(house / "csrc") == before


def test_key_changes_with_flags_abi_and_compiler(house, monkeypatch):
    def key():
        return builder.cache_key(house / "csrc")

    keys = [key()]
    for name, value in {
        "COMMON_FLAGS": [*builder.COMMON_FLAGS, "-g"],
        "KERNEL_FLAGS": [],
        "CAPABILITY_FLAGS": {**builder.CAPABILITY_FLAGS, "avx2": ["-mavx2"]},
        "TORCH_TARGET": "0x020b000000000000",
    }.items():
        with monkeypatch.context() as changed:
            changed.setattr(builder, name, value)
            keys.append(key())
    monkeypatch.setenv("CXX", f"{builder.compiler()[0]} -g")
    keys.append(key())
    monkeypatch.setenv("CXX", script(house / "another", 'exec c++ "$@"'))
    keys.append(key())
    assert len(set(keys)) == len(keys)


# Obstacles.


def test_compiler_of_the_environment_is_a_command_with_arguments(monkeypatch):
    monkeypatch.setenv("CXX", "env 'sh' -c")
    assert builder.compiler() == [shutil.which("env"), "sh", "-c"]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"PATH": "/nonexistent", "CXX": None}, "no C++ compiler (g++ or clang++)"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler ('no-such-compiler' of $CXX is not there)"),
        ({"CXX": "g++ 'half a quote"}, "of $CXX is not there"),
    ],
)
def test_obstacle_no_compiler(house, monkeypatch, changes, reason):
    for name, value in changes.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert reason in builder.obstacle("cpu")
    with pytest.raises(builder.BuildError, match="no C"):
        builder.build("cpu", house)


@pytest.mark.parametrize(
    "name, attribute, value, reason",
    [
        ("cpu", "ninja", lambda: None, "no ninja"),
        ("cpu", "torch_directory", lambda: None, "torch is not importable"),
    ],
)
def test_obstacle_no_tool(monkeypatch, name, attribute, value, reason):
    monkeypatch.setattr(builder, attribute, value)
    assert reason in builder.obstacle(name)


def test_obstacle_other_system(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Linux only, this is darwin" in builder.obstacle("cpu")


def test_obstacle_no_pybind11(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pybind11" else find(name))
    assert "no pybind11" in builder.obstacle("python")
    assert builder.obstacle("cpu") is None


# Building once.


def test_built_once_then_found(house, monkeypatch, capfd):
    target = cache.obtain()
    record = json.loads(builder.record_of(target).read_text())
    assert builder.intact(target) and target.parent.name == record["sources_and_flags"]
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines[:1]] == ["kdkernels: building the CPU kernels"] and len(lines) == 2
    assert sorted(path.name for path in target.parent.iterdir()) == ["kdkernels_cpu.json", "kdkernels_cpu.so", "lock"]

    def forbidden(*_):
        raise AssertionError("neither the lock nor a build is needed: the cache may be read-only")

    monkeypatch.setattr(builder, "build", forbidden)
    monkeypatch.setattr(cache, "locked", forbidden)
    assert cache.obtain() == target
    assert capfd.readouterr().err == ""


def test_object_of_other_sources_or_flags_is_not_taken(house, monkeypatch):
    targets = [cache.obtain()]
    (house / "csrc" / "math" / "one.h").write_text("// something\n")
    targets.append(cache.obtain())
    monkeypatch.setattr(builder, "COMMON_FLAGS", [*builder.COMMON_FLAGS, "-g"])
    targets.append(cache.obtain())
    assert len(set(targets)) == 3


def test_relative_destination(house, monkeypatch):
    monkeypatch.chdir(house)
    assert builder.build("cpu", Path("build/lib")) == house / "build" / "lib" / builder.CPU_OBJECT


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "no record", "broken record"])
def test_damaged_object_is_named_and_built_again(house, capfd, damage):
    target = cache.obtain()
    content = target.read_bytes()
    assert len(content) > 5000
    if damage == "no record":
        builder.record_of(target).unlink()
    elif damage == "broken record":
        builder.record_of(target).write_text("[]")
    else:
        bit = content[:4096] + bytes([content[4096] ^ 1]) + content[4097:]
        target.write_bytes({"truncated": content[:4096], "empty": b"", "one bit": bit}[damage])
    assert not builder.intact(target)
    capfd.readouterr()
    assert cache.obtain() == target and builder.intact(target)
    assert f"{target} is damaged; building it again" in capfd.readouterr().err


def test_leftovers_of_a_killed_build_are_removed(house):
    leftover = house / "cache" / builder.cache_key(house / "csrc") / ".build-old"
    leftover.mkdir(parents=True)
    (leftover / "00_one.o").write_text("half")
    assert cache.obtain().exists() and not leftover.exists()


def test_max_jobs_reaches_ninja(house, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    monkeypatch.setattr(builder, "ninja", lambda: script(house / "fake-ninja", f'echo "$@" > {house}/said; exit 1'))
    with pytest.raises(builder.BuildError):
        builder.build("cpu", house)
    assert (house / "said").read_text().split()[-2:] == ["-j", "3"]


# Failing.


@pytest.mark.parametrize(
    "log, line",
    [
        ("FAILED: [code=1] a.o\ng++ -Werror a.cpp\na.cpp:3:1: error: no\nb.cpp:1:1: error: x", "a.cpp:3:1: error: no"),
        ("g++: fatal error: Killed signal terminated\nx", "g++: fatal error: Killed signal terminated"),
        ("FAILED: [code=1] out.so\n/usr/bin/ld: cannot find -ltorch", "/usr/bin/ld: cannot find -ltorch"),
        ("ninja: Entering directory `x'\nFAILED: [code=7] a.o\nfalse -c a.cpp", "[code=7]"),
        ("", "no message"),
    ],
)  # fmt: skip
def test_first_error(log, line):
    assert builder._first_error(log) == line


def test_failing_compiler_is_one_line_with_the_first_error_and_a_log(house):
    (house / "csrc" / "cpu" / "one.cpp").write_text("int f( { }\n")
    with pytest.raises(builder.BuildError) as caught:
        cache.obtain()
    folder = house / "cache" / builder.cache_key(house / "csrc")
    assert "one.cpp:1:" in str(caught.value) and " error: " in str(caught.value) and "\n" not in str(caught.value)
    assert str(folder / "failed.log") in str(caught.value) and "int f(" in (folder / "failed.log").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["failed.log", "lock"]


def test_failing_link_leaves_no_object(house, monkeypatch):
    linking = 'case "$*" in *-shared*) set -- "$@" -lno-such-library;; esac; exec c++ "$@"'
    monkeypatch.setenv("CXX", script(house / "linking", linking))
    with pytest.raises(builder.BuildError, match="cannot find -lno-such-library"):
        builder.build("cpu", house / "out")
    assert list((house / "out").iterdir()) == []


def test_sources_edited_during_the_build_give_no_object(house, monkeypatch):
    header = house / "csrc" / "math" / "one.h"
    monkeypatch.setenv("CXX", script(house / "editing", f'echo "// more" >> {header}; exec c++ "$@"'))
    with pytest.raises(builder.SourcesChanged):
        cache.obtain()
    assert list((house / "cache").glob("*/*.so")) == []


def test_sources_edited_once_are_built_again(house, monkeypatch):
    header = house / "csrc" / "math" / "one.h"
    once = f'grep -q more {header} || echo "// more" > {header}; exec c++ "$@"'
    monkeypatch.setenv("CXX", script(house / "editing", once))
    target = cache.obtain()
    assert builder.intact(target) and target.parent.name == builder.cache_key(house / "csrc")


# Processes that share a cache.


def held_compiler(house: Path) -> str:
    """A compiler that notes each call, then waits for a file called `go`."""
    text = f'echo call >> {house}/calls; while [ ! -e {house}/go ]; do sleep 0.05; done; exec c++ "$@"'
    return script(house / "held", text)


def test_two_processes_at_once_build_once(house):
    cxx = held_compiler(house)
    first = start(house, CXX=cxx)
    wait_until((house / "calls").exists)
    second = start(house, CXX=cxx)
    waiting = second.stderr.readline()
    (house / "go").touch()
    outputs = [process.communicate() for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert "another process is building" in waiting and "building the CPU kernels (" not in outputs[1][1]
    assert outputs[0][0] == outputs[1][0] and builder.intact(Path(outputs[0][0].strip()))
    objects = len(builder.cpu_library(house / "csrc", Path()).objects)
    # Each object, the link, and `--version` for the record: once.
    assert len((house / "calls").read_text().splitlines()) == objects + 2


def test_a_killed_builder_blocks_nobody(house):
    cxx = held_compiler(house)
    first = start(house, CXX=cxx)
    try:
        wait_until((house / "calls").exists)
        first.kill()
        first.wait()
        # Its compilers still hang in the same folder, as orphans do.
        second = start(house, CXX=cxx)
        assert "building the CPU kernels" in second.stderr.readline()
        (house / "go").touch()
        out, err = second.communicate()
        assert second.returncode == 0 and builder.intact(Path(out.strip())), err
    finally:
        (house / "go").touch()
        try:
            os.killpg(first.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        first.stdout.close()
        first.stderr.close()


def test_a_file_system_without_locks(house, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert builder.intact(cache.obtain())


# The real sources.


def test_native_module(tmp_path):
    path = builder.build("python", tmp_path)
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.build_info()) == {"compiler", "cxx_standard", "pybind11"}
    assert module.cpu_capability() in native.CAPABILITIES
    if native.status("cpu").state == "loaded":
        assert module.cpu_capability() == native.best_cpu_capability()


@pytest.mark.slow
def test_no_warnings(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "COMMON_FLAGS", [*builder.COMMON_FLAGS, "-Werror"])
    builder.build("cpu", tmp_path)
    builder.build("python", tmp_path)
