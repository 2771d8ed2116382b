"""Installs kdkernels, with compiled kernels wherever that is possible; it never fails for want of a compiler.

Everything about how the native parts are built is in kdkernels/native/build.py; this file only decides what to build
now and puts the results, and the sources for later, into the wheel.

KDKERNELS_BUILD=0        build nothing now
KDKERNELS_BUILD=require  fail if the CPU kernels cannot be built
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


def load_builder():
    # By path: importing the package would import torch, which an isolated build does not have.
    spec = importlib.util.spec_from_file_location("kdkernels_build", HERE / "kdkernels" / "native" / "build.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildPyWithKernels(build_py):
    """Copies the Python files, then builds what can be built into kdkernels/native/lib of the wheel."""

    def run(self):
        super().run()
        if self.editable_mode:
            print("kdkernels: editable install, kernels are built on first use")
            return
        wanted = os.environ.get("KDKERNELS_BUILD", "1")
        if wanted == "0":
            print("kdkernels: KDKERNELS_BUILD=0, kernels are built on first use")
            return
        builder = load_builder()
        target = Path(self.build_lib) / "kdkernels" / "native" / "lib"
        for name in ("cpu", "python"):
            try:
                print(f"kdkernels: built {builder.build(name, target).name}")
            except builder.BuildError as error:
                if wanted == "require" and name == "cpu":
                    raise SystemExit(f"kdkernels: KDKERNELS_BUILD=require, but {error}\n{error.log}") from None
                later = "; built on first use instead, or the PyTorch formulas serve" if name == "cpu" else ""
                print(f"kdkernels: {name} not built: {error}{later}")

    def has_native(self):
        return (Path(self.build_lib) / "kdkernels" / "native" / "lib").is_dir()


class KernelDistribution(Distribution):
    """Marks the wheel as made for one platform if, and only if, something was built for it."""

    def has_ext_modules(self):
        if os.environ.get("KDKERNELS_BUILD") == "0":
            return False
        builder = load_builder()
        return builder.obstacle("cpu") is None or builder.obstacle("python") is None


setup(cmdclass={"build_py": BuildPyWithKernels}, distclass=KernelDistribution)
