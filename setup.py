"""Installs kdkernels, with compiled kernels wherever that is possible; it never fails for want of a compiler.

Everything about how the native parts are built is in kdkernels/native/build.py; this file only decides what to build
now and puts the results, and the sources for later, into the wheel.

KDKERNELS_BUILD=0        build nothing now
KDKERNELS_BUILD=require  fail if the CPU kernels cannot be built
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

# pip does not hold [build-system] against the environment under --no-build-isolation, where old ones are common.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"kdkernels: setuptools >= 77 is needed to install, this is {setuptools.__version__}: "
        "pip install --upgrade setuptools pybind11 ninja, or install without --no-build-isolation"
    )
from setuptools.command.bdist_wheel import bdist_wheel

HERE = Path(__file__).resolve().parent


def load_builder():
    # By path: importing the package would import torch, which an isolated build does not have.
    spec = importlib.util.spec_from_file_location("kdkernels_build", HERE / "kdkernels" / "native" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def say(line):
    print(f"kdkernels: {line}", flush=True)


class BuildPyWithKernels(build_py):
    """Copies the Python files, then builds what can be built into kdkernels/native/lib of the wheel."""

    def run(self):
        if not self.editable_mode:
            # What an earlier build left here (other Python, other torch, files since removed) is not part of this one.
            shutil.rmtree(Path(self.build_lib) / "kdkernels", ignore_errors=True)
        super().run()
        wanted = os.environ.get("KDKERNELS_BUILD") or "1"
        if wanted not in ("0", "1", "require"):
            raise SystemExit(f"kdkernels: KDKERNELS_BUILD: expected 0, 1 or require, got {wanted!r}")
        if self.editable_mode or wanted == "0":
            say("nothing compiled now (editable install or KDKERNELS_BUILD=0); kernels are built on first use")
            return
        builder = load_builder()
        target = Path(self.build_lib) / "kdkernels" / "native" / "lib"
        for name, part in (("cpu", "the CPU kernels"), ("python", "the native module")):
            try:
                if builder.obstacle(name) is None:
                    say(f"building {part} ...")
                say(f"built {builder.build(name, target).name}")
                self.distribution.something_built = True
            except (builder.BuildError, OSError) as error:
                if wanted == "require" and name == "cpu":
                    log = getattr(error, "log", "")
                    raise SystemExit(f"kdkernels: KDKERNELS_BUILD=require, but {error}\n{log}") from None
                later = "; built on first use instead, or the PyTorch formulas serve" if name == "cpu" else ""
                say(f"{part} not built: {error}{later}")


class KernelDistribution(Distribution):
    """For one platform if, and only if, something was built for it."""

    something_built = False

    def has_ext_modules(self):
        return self.something_built


class WheelOfWhatWasBuilt(bdist_wheel):
    """Takes its tag from what the build achieved, hence builds before it decides."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.distribution.something_built
        super().run()


setup(
    # The sources travel as kdkernels._csrc, so that what is not built now can be built later.
    packages=[*find_packages(include=["kdkernels", "kdkernels.*"]), "kdkernels._csrc"],
    package_dir={"kdkernels._csrc": "csrc"},
    package_data={"kdkernels._csrc": ["*.cpp", "*/*.cpp", "*/*.h"]},
    cmdclass={"build_py": BuildPyWithKernels, "bdist_wheel": WheelOfWhatWasBuilt},
    distclass=KernelDistribution,
)
