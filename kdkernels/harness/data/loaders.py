"""Batches: the order in which training sees pictures, and what crosses to the device. Nothing about where they lie."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

from .files import Undecodable
from .geometry import PADDING, mirrored, stacked
from .problems import DataError

Batch = tuple[Tensor, list[dict]]


def collate(samples: list[tuple[Tensor, dict]]) -> Batch:
    """Stack the pictures, padded to the largest (grey, a multiple of 32 pixels); keep the targets as a list."""
    return stacked([picture for picture, _ in samples]), [dict(target) for _, target in samples]


def to_device(pictures: Tensor, targets: list[dict], device: torch.device) -> Batch:
    """Move a batch, and turn its pictures into float32 in [0, 1]."""
    moved = [{**t, "boxes": t["boxes"].to(device), "labels": t["labels"].to(device)} for t in targets]
    return pictures.to(device).float() / 255, moved


def training_batches(
    pictures: Dataset,
    steps: int,
    batch_size: int,
    seed: int,
    workers: int = 0,
    first: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Exactly ``steps`` batches in a seeded order: one permutation of the pictures after the other.

    The same at any number of workers. ``first`` leaves out so many of the batches, without reading them: a run that
    goes on after step k gets what it would have got. ``share`` is this process's number and how many there are: each
    takes its batch in turn of the same order, so that together they see what one would with larger batches. Pictures
    that cannot be decoded are counted in the set's ``problems``.
    """
    order = torch.Generator().manual_seed(seed)
    draws = RandomSampler(pictures, num_samples=steps * batch_size * share[1], generator=order)
    sampler = _Draws(draws, first * batch_size * share[1], batch_size, share)
    # The loader draws its workers' base seed from this generator; without one it would move the global state.
    seeds = torch.Generator().manual_seed(seed)
    drawn = _Drawn(pictures, seed)
    loader = DataLoader(drawn, batch_size, sampler=sampler, num_workers=workers, collate_fn=collate, generator=seeds)
    return _counted(_started(loader), pictures)


def evaluation_batches(
    pictures: Dataset, batch_size: int, workers: int = 0, limit: int | None = None
) -> Iterator[Batch]:
    """All pictures once, in order, or the first ``limit``.

    One that cannot be decoded is a grey picture without objects whose target has ``undecodable`` True.
    """
    once = _Once(pictures, len(pictures) if limit is None else min(limit, len(pictures)))
    loader = DataLoader(once, batch_size, num_workers=workers, collate_fn=collate)
    return _counted(_started(loader), pictures)


def _started(loader: DataLoader) -> Iterator[Batch]:
    """The loader's batches, from workers that SIGTERM does not end: batch systems send it to every process of a job,
    and the parent's last step needs its pictures. They end with the parent.
    """
    if not loader.num_workers or not hasattr(signal, "pthread_sigmask"):
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # which they inherit
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _counted(batches: Iterator[Batch], pictures: Any) -> Iterator[Batch]:
    """The batches; what workers have found wrong is counted here, in the parent."""
    for images, targets in batches:
        for target in targets:
            for finding in target.pop("findings", ()):
                pictures.problems.meet(finding)
        yield images, targets


class _Draws(Sampler):
    """Pairs of the number of a draw and the picture drawn, without the first ``skip``; of ``share``'s batches alone."""

    def __init__(self, sampler: RandomSampler, skip: int, batch_size: int, share: tuple[int, int]) -> None:
        self.sampler, self.skip, self.batch_size, self.share = sampler, skip, batch_size, share

    def __len__(self) -> int:
        return max(0, len(self.sampler) - self.skip) // self.share[1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        mine, count = self.share
        drawn = ((draw, index) for draw, index in enumerate(self.sampler) if draw >= self.skip)
        return ((draw, index) for draw, index in drawn if draw // self.batch_size % count == mine)


class _Drawn(Dataset):
    """Pictures by draw: whether one is mirrored follows from seed and draw alone, whichever process reads it."""

    def __init__(self, pictures: Any, seed: int) -> None:
        self.pictures, self.seed, self.hflip = pictures, seed, getattr(pictures, "hflip", 0.0)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict]:
        draw, index = key
        picture, target = self.pictures[index]
        if self.hflip and np.random.default_rng([self.seed, draw]).random() < self.hflip:
            return mirrored(picture, target)
        return picture, target


class _Once(Dataset):
    """The first pictures; one that cannot be decoded is not replaced, or another would be scored twice."""

    def __init__(self, pictures: Any, count: int) -> None:
        self.pictures, self.count = pictures, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        if not hasattr(self.pictures, "read"):
            return self.pictures[index]
        try:
            return self.pictures.read(index)
        except Undecodable as error:
            if self.pictures.on_bad == "refuse":
                raise DataError(str(error)) from error
            side = self.pictures.size.square or self.pictures.size.shorter
            target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
            more = {"image_id": self.pictures.ids[index], "scale": (1.0, 1.0), "size": (side, side)}
            picture = torch.full((3, side, side), PADDING, dtype=torch.uint8)
            return picture, {**target, **more, "undecodable": True, "findings": [error.finding]}
