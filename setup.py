"""Installs kdkernels, with compiled kernels wherever that is possible; it never fails for want of a compiler.

Everything about how the native parts are built is in kdkernels/native/build.py; this file only decides what to build
now and puts the results, and the sources for later, into the wheel.

KDKERNELS_BUILD=0              build nothing now
KDKERNELS_BUILD=require        fail if the CPU kernels cannot be built, or the CUDA kernels that the next line asks for
KDKERNELS_CUDA_ARCHS="80;90"   build the CUDA kernels for these GPUs, there or not; also "all" and "native"
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
    folder = HERE / "kdkernels" / "native"
    spec = importlib.util.spec_from_file_location(
        "kdkernels_native", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ValueError as error:  # a variable of the environment
        raise SystemExit(f"kdkernels: {error}") from None
    return module.builder, module.cuda


# What serves where a part was not built.
LATER = {
    "cpu": "; built on first use instead, or the PyTorch formulas serve",
    "cuda": "; built on first use on a GPU instead, or Triton serves",
    "python": "",
}


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
        builder, cuda = load_builder()
        target = Path(self.build_lib) / "kdkernels" / "native" / "lib"
        for name, part in (("cpu", "the CPU kernels"), ("cuda", "the CUDA kernels"), ("python", "the native module")):
            required = name == "cpu" or (name == "cuda" and os.environ.get("KDKERNELS_CUDA_ARCHS"))
            architectures = ()
            try:
                if name == "cuda":
                    architectures, why = self.cuda_plan(builder, cuda)
                    part = f"the CUDA kernels for {', '.join(architectures)} ({why})"
                if builder.obstacle(name) is None:
                    say(f"building {part} ...")
                say(f"built {builder.build(name, target, architectures).name}")
                self.distribution.something_built = True
            except (builder.BuildError, OSError) as error:
                if wanted == "require" and required:
                    log = getattr(error, "log", "")
                    raise SystemExit(f"kdkernels: KDKERNELS_BUILD=require, but {error}\n{log}") from None
                say(f"{part} not built: {error}{LATER[name]}")

    @staticmethod
    def cuda_plan(builder, cuda):
        if reason := builder.obstacle("cuda"):
            raise builder.BuildError(reason)
        return builder.cuda_architectures(cuda.capabilities_here(), installing=True)


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
    package_data={"kdkernels._csrc": ["*.h", "*.cpp", "*/*.h", "*/*.cpp", "*/*.cuh", "*/*.cu"]},
    cmdclass={"build_py": BuildPyWithKernels, "bdist_wheel": WheelOfWhatWasBuilt},
    distclass=KernelDistribution,
)
