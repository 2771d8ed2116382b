"""The settings of scenes, detectors and training, with the values that the main job uses. Nothing but numbers.

The defaults are for pictures of 160 pixels and two CPU cores; ``kdkernels.harness.flags`` changes what a flag can.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class SceneSettings:
    """What a set of scenes is made of. Sizes are in pixels.

    Attributes:
        image_size: side of the square picture.
        train, val: number of pictures of each split.
        objects: fewest and most digits of a picture.
        side: smallest and largest height of a digit.
        aspect: narrowest and widest stretch of a digit's width.
        max_iou: largest IoU between two boxes of a picture.
        noise: standard deviation of the pixel noise, on a scale of 0 to 1.
        seed: seeds everything but the split of digits and photographs, which is fixed.
    """

    image_size: int = 160
    train: int = 1500
    val: int = 150
    objects: tuple[int, int] = (1, 5)
    side: tuple[int, int] = (24, 64)
    aspect: tuple[float, float] = (0.75, 1.1)
    max_iou: float = 0.05
    noise: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class DetectorSettings:
    """One of torchvision's detectors, for small pictures. Every size in pixels scales with ``image_size``.

    Attributes:
        kind: "faster_rcnn", "retinanet", "fcos" or "ssdlite"; the first three have a ResNet-FPN backbone, the last
            MobileNetV3-large.
        depth, width: ResNet depth, and what the backbone's channels are multiplied with.
        norm: "batch", or "frozen": BatchNorm with constant statistics and factors, for weights that are loaded.
        classes: number of classes without the background.
        image_size: shorter side of the pictures, a multiple of 32. It sets the sizes of anchors only: pictures may have
            any height and width that are multiples of 32.
        channels: channels of each pyramid level.
        hidden, pooled: width of Faster R-CNN's box head, and the side of what it reads of each proposal.
        anchors: sides of the anchors of each level at 160 pixels, finest level first. RetinaNet has each at three
            sizes, a third of an octave apart. FCOS's begin at a quarter of the first one and double with the level.
        ratios: height over width of the anchors.
    """

    kind: str = "faster_rcnn"
    depth: int = 18
    width: float = 0.25
    norm: str = "batch"
    classes: int = 10
    image_size: int = 160
    channels: int = 64
    hidden: int = 128
    pooled: int = 5
    anchors: tuple[float, ...] = (16.0, 32.0, 64.0, 96.0, 128.0)
    ratios: tuple[float, ...] = (0.75, 1.0, 1.5)
    proposals_before_nms: int = 200
    proposals: int = 64
    rpn_batch: int = 64
    box_batch: int = 32
    detections: int = 20

    @property
    def scale(self) -> float:
        """Size of the pictures over the 160 pixels that the numbers above were chosen for."""
        return self.image_size / 160

    @property
    def canonical_scale(self) -> int:
        """Side of the boxes that RoIAlign reads from P4: torchvision's 224 is larger than these pictures."""
        return round(64 * self.scale)


@dataclass(frozen=True)
class TrainSettings:
    """How to train. ``lr`` is reached after ``warmup`` steps and falls along a cosine to ``final`` of itself.

    Attributes:
        batch_size: pictures of one forward, in each process; ``accumulate`` of them are a step.
        optimizer: "adamw", or "sgd" with ``momentum``.
        norm_weight_decay: of normalisation layers; None: that of all.
        warmup_factor: the factor on ``lr`` that the warm-up begins above.
        scheduler: "cosineannealinglr", or "multisteplr": times ``lr_gamma`` at each of ``lr_steps`` (steps, from 0).
        clip: largest norm of the gradient; 0: any.
        amp: None, "bfloat16" or "float16": autocast of forward and losses.
    """

    steps: int = 250
    batch_size: int = 8
    lr: float = 2e-3
    weight_decay: float = 1e-4
    warmup: int = 30
    final: float = 0.02
    clip: float = 10.0
    seed: int = 0
    evaluations: int = 4
    workers: int = 0
    optimizer: str = "adamw"
    momentum: float = 0.9
    norm_weight_decay: float | None = None
    warmup_factor: float = 0.0
    scheduler: str = "cosineannealinglr"
    lr_steps: tuple[int, ...] = ()
    lr_gamma: float = 0.1
    amp: str | None = None
    accumulate: int = 1

    def lasting(self, steps: int) -> TrainSettings:
        """The same over another number of steps: ``lr_steps`` stay where they are in proportion."""
        moved = tuple(round(step * steps / self.steps) for step in self.lr_steps)
        return replace(self, steps=steps, lr_steps=moved)


@dataclass(frozen=True)
class KdSettings:
    """When distillation counts, in steps from 0: not before ``start``, nor from ``stop`` on (None: to the end), and
    less in the ``warmup`` steps after ``start``.
    """

    start: int = 0
    stop: int | None = None
    warmup: int = 0


@dataclass(frozen=True)
class Upkeep:
    """How a training is looked after; nothing here changes what it computes, as long as every loss is finite.

    Attributes:
        checkpoint_every: steps between checkpoints; 0: only before evaluations, at the end, and when asked to stop.
        on_nan: "stop", or "skip": a step whose loss or gradient is not finite changes nothing.
        print_freq: a line in the log every so many steps; None: every few seconds.
    """

    checkpoint_every: int = 500
    on_nan: str = "stop"
    print_freq: int | None = None
