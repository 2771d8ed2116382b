"""The trainings of published recipes, by the names that ``--preset`` takes: nothing but values of flags.

They are mmdetection's, which the papers trained with: SGD, 16 pictures a step, 12 rounds through the pictures ("1x") or
24 ("2x"), a tenth of the rate after two thirds and after eleven twelfths of them. None has been tried here at that
scale. Their recipes have the published weights. Flags that are given win.
"""

from __future__ import annotations

from typing import Any

_SGD: dict[str, Any] = {
    "opt": "sgd",
    "momentum": 0.9,
    "wd": 1e-4,
    "batch_size": 16,
    "lr": 0.02,
    "lr_scheduler": "multisteplr",
    "lr_gamma": 0.1,
    "lr_warmup_steps": 500,
    "lr_warmup_decay": 1 / 3,
    "clip_grad_norm": 0.0,
}
_1X = {**_SGD, "epochs": 12, "lr_steps": ["8", "11"], "image_size": 800, "max_size": 1333}
_2X = {**_1X, "epochs": 24, "lr_steps": ["16", "22"]}

SCHEDULES: dict[str, dict[str, Any]] = {
    "defeat-coco-frcnn": {**_1X, "recipe": ["defeat"]},
    "defeat-coco-retina": {**_1X, "lr": 0.01, "recipe": ["defeat"]},
    # Its code's only student configuration: the neck alone. mmdetection's VOC: four rounds through three times the
    # pictures, and a tenth of the rate for the last of them.
    "defeat-voc": {
        **_SGD,
        "lr": 0.01,
        "epochs": 12,
        "lr_steps": ["9"],
        "clip_grad_norm": 35.0,
        # 600 and 1000 there; sizes are multiples of 32 here.
        "image_size": 608,
        "max_size": 1000,
        "recipe": ["defeat:head=false,foreground=3,background=12"],
    },
    "pkd-coco": {**_2X, "recipe": ["pkd"]},
    "pkd-coco-retina": {**_2X, "lr": 0.01, "recipe": ["pkd"]},
}
