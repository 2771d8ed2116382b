"""ResNet-FPN backbones of any depth and width, from torchvision's blocks. Only backbones and necks live here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ..settings import DetectorSettings

BLOCKS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
NORMS: dict[str, Callable[..., nn.Module]] = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}


class NarrowResNet(nn.Sequential):
    """torchvision's ResNet stages from its own blocks at any width, without the classifier, randomly initialised.

    At width 1 names and shapes are those of torchvision's ResNet of that depth, but for ``fc``: its state dict loads.
    """

    def __init__(self, depth: int, width: float, norm: str = "batch") -> None:
        block, counts = BLOCKS[depth]
        layer_norm = NORMS[norm]
        stem = max(8, round(64 * width))
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False),
            bn1=layer_norm(stem),
            relu=nn.ReLU(inplace=True),
            maxpool=nn.MaxPool2d(3, stride=2, padding=1),
        )
        channels = stem
        stage_channels = []
        for stage, count in enumerate(counts):
            planes = stem * 2**stage
            blocks = []
            for index in range(count):
                stride = 2 if index == 0 and stage > 0 else 1
                outside = planes * block.expansion
                shortcut = None
                if stride != 1 or channels != outside:
                    shortcut = nn.Sequential(conv1x1(channels, outside, stride), layer_norm(outside))
                blocks.append(block(channels, planes, stride, shortcut, norm_layer=layer_norm))
                channels = outside
            layers[f"layer{stage + 1}"] = nn.Sequential(*blocks)
            stage_channels.append(channels)
        super().__init__(layers)
        self.stage_channels = stage_channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet_fpn(settings: DetectorSettings, first: int) -> BackboneWithFPN:
    """A ResNet with a feature pyramid from stage ``first``: P2 to P6 where it is 1, P3 to P7 where it is 2.

    P6 of the first is torchvision's subsampled P5; P6 and P7 of the second are its two convolutions on P5. The returned
    module has ``stage_channels``, the channels of the stages that the pyramid reads.

    Raises:
        ValueError: unknown depth or norm, a width or number of channels that is not positive, or ``image_size`` not a
            positive multiple of 32.
    """
    check(settings)
    body = NarrowResNet(settings.depth, settings.width, settings.norm)
    names = {f"layer{stage}": str(stage - first) for stage in range(first, 5)}
    inside = body.stage_channels[first - 1 :]
    extra = None if first == 1 else LastLevelP6P7(settings.channels, settings.channels)
    backbone = BackboneWithFPN(body, names, inside, settings.channels, extra)
    backbone.stage_channels = inside
    return backbone


def check(settings: DetectorSettings) -> None:
    """Raise the ValueError of the first setting of a backbone that cannot be built."""
    if settings.depth not in BLOCKS:
        raise ValueError(f"depth must be one of {sorted(BLOCKS)}, got {settings.depth}")
    if settings.norm not in NORMS:
        raise ValueError(f"norm must be one of {sorted(NORMS)}, got {settings.norm!r}")
    if not 0 < settings.width < float("inf"):
        raise ValueError(f"width must be a positive number, got {settings.width}")
    if settings.channels < 1:
        raise ValueError(f"channels must be at least 1, got {settings.channels}")
    if settings.classes < 1:
        raise ValueError(f"classes must be at least 1, got {settings.classes}")
    if settings.image_size % 32 or settings.image_size <= 0:
        raise ValueError(f"image_size must be a positive multiple of 32, got {settings.image_size}")


def mobile_norm(norm: str) -> Callable[..., nn.Module]:
    """The norm of torchvision's SSDLite, or its frozen form."""
    if norm == "frozen":
        return partial(FrozenBatchNorm2d, eps=0.001)
    return partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
