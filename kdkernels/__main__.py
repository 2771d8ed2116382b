"""python -m kdkernels train | bench | info."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path


def _info(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels info", description="Which implementation serves each loss."
    )
    parser.add_argument("--build", action="store_true", help="build now what would be built on first use")
    parser.add_argument(
        "--check",
        nargs="*",
        metavar="LOSS",
        help="test the losses (those named; else all) on every backend that is here, in under a minute: numbers, "
        "speed, and a line for a bug report; exit status 1 if something is wrong",
    )
    options = parser.parse_args(arguments)
    import torch

    import kdkernels as kd
    from kdkernels import native
    from kdkernels.native import cuda

    print(f"kdkernels {kd.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    try:
        from kdkernels.native.lib import _C
    except ImportError:
        print("native module: not built")
    else:
        print(f"native module: {_C.build_info()['compiler']}; this CPU runs {_C.cpu_capability()}")
    here, nvcc = native.gpus(), cuda.nvcc()
    if isinstance(here, str):
        print(f"GPU: {here}")
    else:
        for i, capability in enumerate(here.capabilities):
            print(f"{here.name(i)}: compute capability {cuda.dotted(capability)}")
        print(f"driver: runs CUDA {cuda.dotted(here.driver or ('?',))}, torch is built with CUDA {torch.version.cuda}")
    print(f"nvcc: {cuda.obstacle() or f'{nvcc[0]}, {cuda.version_line(nvcc)}'}")
    if options.build and isinstance(here, str) and os.environ.get("KDKERNELS_CUDA_ARCHS"):
        print(f"CUDA kernels: {native.build_ahead()}")
    print(kd.backend_info(build=options.build), flush=True)
    if options.check is None:
        return 0
    from kdkernels.selfcheck import command, inputs

    if unknown := sorted(set(options.check) - set(inputs.LOSSES)):
        parser.error(f"--check: no loss {unknown[0]!r}; there are {', '.join(inputs.LOSSES)}")
    print()
    return command.check(options.check)


def _train(arguments: list[str]) -> int:
    from kdkernels.harness.train import main

    return main(arguments)


def _bench(arguments: list[str]) -> int:
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    if not (folder / "run.py").is_file():
        print(
            f"python -m kdkernels bench: no benchmarks in {folder.parent}. They live in the repository, not in the "
            "installed package: run this from a checkout, or run its benchmarks/run.py.",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(folder))  # its files import each other, as when one of them is run as a script
    return runpy.run_path(str(folder / "run.py"))["main"](arguments)


COMMANDS = {
    "train": (_train, "distil a detector: with no argument, on small composed scenes, in some minutes"),
    "bench": (_bench, "time the losses against eager PyTorch, torch.compile and Liger (from a checkout)"),
    "info": (_info, "which implementation serves each loss here, and why; with --check, whether it is right"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]][0](arguments[1:])
    lines = ["usage: python -m kdkernels COMMAND [options]", ""]
    lines += [f"  {name:6} {text}" for name, (_, text) in COMMANDS.items()]
    asked = not arguments or arguments[0] in ("-h", "--help")
    if not asked:
        lines.append(f"\nno such command: {arguments[0]}")
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
