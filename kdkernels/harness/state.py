"""What a training is between two steps, beside its number: weights, optimiser, scaler, random states, and its record.

Only taking that apart for a checkpoint and putting it back lives here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from .processes import ALONE, Processes


@dataclass
class State:
    """The parts of a training that a checkpoint holds.

    modules: by name; the student's, and the distillation's, whose parameters are its adapters.
    generators: by name; the recipes' own. Each process has its own.
    """

    modules: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)
    processes: Processes = ALONE

    def content(self, run: dict[str, Any], *, finished: bool = False) -> dict[str, Any]:
        """What to save, beside ``run``, the record so far. A finished training needs its weights alone.

        All processes call it together.
        """
        found: dict[str, Any] = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "run": run,
        }
        if not finished:
            random_states = self.processes.gathered(
                {"global": random_state(), "own": {name: g.get_state() for name, g in self.generators.items()}}
            )
            found |= {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random": random_states,
            }
        return found

    def load(self, content: Mapping[str, Any]) -> None:
        """Become what ``content`` says."""
        for name, module in self.modules.items():
            module.load_state_dict(content["modules"][name])
        if "optimizer" not in content:
            return
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        own = content["random"][self.processes.rank]
        for name, generator in self.generators.items():
            generator.set_state(own["own"][name])
        set_random_state(own["global"])


def seed_all(seed: int) -> None:
    """Seed every global generator: torch's, numpy's and Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The states of all global generators, in types that ``torch.load`` reads without running code."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
