"""Tiny runs, and ways to end one: what the tests of resuming and of several processes share. No test lives here."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

TINY = [
    *("--quick", "--teacher-steps", "2", "-b", "2", "--image-size", "64", "--device", "cpu"),
    *("--model", "faster_rcnn:width=0.125,channels=32", "--teacher-model", "faster_rcnn:width=0.125,channels=32"),
]
#: Recipes that draw from generators of their own, one with adapters.
ROWS = ["none", "defeat:masks=random,rows=subneg+noisy-teacher", "pkd:adapter=true"]
COMPARE = [*TINY, "--steps", "4", "--compare", *ROWS, "--no-equal-time", "--checkpoint-every", "1"]


def weights(folder: Path) -> dict[str, Any]:
    """Every tensor of the students and adapters that a run has left."""
    from safetensors.torch import load_file

    return {f"{path.name}/{key}": x for path in sorted(folder.glob("students/*")) for key, x in load_file(path).items()}


def steps(folder: Path) -> list[tuple[str, int, float, dict]]:
    """What the records say of each step, without the times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(e["run"], e["step"], e["loss"], e["losses"]) for e in lines if e["kind"] == "step"]


def child(argv: list[str], how: str, after: float) -> None:
    """A run in a process of its own that kills itself, by ``how``: "time" (``after`` so many seconds), "write" (in the
    middle of a checkpoint's content), "rename" (before it has its name), "record" (after a step), each of them at the
    ``after``-th occasion; or "never".
    """
    import torch

    from kdkernels.harness import checkpoint, progress, train

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    left = [after]

    def now() -> bool:
        left[0] -= 1
        return left[0] < 0

    save, replace, record = torch.save, os.replace, progress.Progress.record

    def torn(content: Any, file: Any) -> None:
        save(content, file)
        if now():
            file.flush()
            os.ftruncate(file.fileno(), file.tell() // 2)
            kill()

    def unnamed(*names: Any) -> None:
        if now():
            kill()
        replace(*names)

    def recorded(self: Any, **entry: Any) -> None:
        record(self, **entry)
        if entry["kind"] == "step" and now():
            kill()

    if how == "time":
        threading.Timer(after, kill).start()
    elif how == "write":
        torch.save = torn
    elif how == "rename":
        checkpoint.os.replace = unnamed
    elif how == "record":
        progress.Progress.record = recorded
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    code = train.main(argv)
    os._exit(code)


def leader(argv: list[str]) -> None:
    """A run in a process group of its own."""
    from kdkernels.harness import train

    os.setsid()
    os._exit(train.main(argv))


def moments(count: int, longest: float, seed: int) -> list[tuple[str, float]]:
    """Random ways and times to die."""
    draw = random.Random(seed)
    ways = {"write": 3, "rename": 4, "record": 3}
    return [
        (how, float(draw.randrange(ways[how])) if how in ways else draw.uniform(0.2, 0.6 * longest))
        for how in (draw.choice(["time", "time", *ways]) for _ in range(count))
    ]


def together(target: Any, count: int, *args: Any, timeout: float = 120) -> list[int | None]:
    """Run ``target(rank, *args)`` in so many processes that find each other as under ``torchrun``; their exit codes."""
    context = processes_context()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [context.Process(target=_one, args=(target, rank, count, port, args)) for rank in range(count)]
    for process in started:
        process.start()
    end = time.monotonic() + timeout
    for process in started:
        process.join(max(0.1, end - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        if process.is_alive():
            process.kill()
    return codes


def _one(target: Any, rank: int, count: int, port: int, args: Any) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in where.items()})
    target(rank, *args)


def processes_context() -> Any:
    """Processes that are forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    modules = ["kdkernels.harness.job", "kdkernels.harness.train", "torchvision.models.detection", "sklearn.datasets"]
    context.set_forkserver_preload([*modules, "matplotlib.pyplot", "faster_coco_eval"])
    return context
