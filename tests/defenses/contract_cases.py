"""One small, fitted specimen of each wrapper, for the contract battery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses.abs import ABS, BinaryABS
from robustbench_lite.defenses.base import Wrapper
from robustbench_lite.defenses.bit_depth import BitDepth
from robustbench_lite.defenses.deep_knn import DeepKNN
from robustbench_lite.defenses.deep_rbf import DeepRBF
from robustbench_lite.defenses.dustbin import Dustbin
from robustbench_lite.defenses.gaussian_process_head import GaussianProcessHead
from robustbench_lite.defenses.input_noise import InputNoise
from robustbench_lite.defenses.jpeg import JPEG
from robustbench_lite.defenses.nearest_neighbour import NearestNeighbour
from robustbench_lite.defenses.pixel_deflection import PixelDeflection
from robustbench_lite.defenses.pixel_dp_classifier import PixelDPClassifier
from robustbench_lite.defenses.random_resize_pad import RandomResizePad
from robustbench_lite.defenses.smoothed_classifier import SmoothedClassifier
from robustbench_lite.defenses.weight_noise import WeightNoise
from tests.defenses.abs_toys import explaining

__all__ = ["CASES", "Case", "bare", "blobs", "fitted"]

MODEL: dict[str, Any] = {"name": "mlp", "in_channels": 1, "image_size": 6, "num_classes": 3, "hidden": [16]}

VAES: dict[str, Any] = {"name": "class_vaes", "in_channels": 1, "image_size": 6, "num_classes": 3, "latent_size": 2}


@dataclass(frozen=True)
class Case:
    """How to make a specimen.

    Attributes:
        make: the wrapper around a net.
        model: config of the net (`_target_` or `name`, and arguments); images are (1, 6, 6), classes three.
        prepare: what the net must learn that `StandardTraining` does not teach it, before it is wrapped.
        calibrated: whether `fit` must be given calibration samples.
        few: the most calibration samples that are too few; None: any number will do.
    """

    make: Callable[[nn.Module], Wrapper]
    model: dict[str, Any] = field(default_factory=lambda: dict(MODEL))
    prepare: Callable[[nn.Module], nn.Module] = lambda net: net
    calibrated: bool = False
    few: int | None = None


CASES: dict[str, Case] = {}
"""By class name; a test sees to it that no public wrapper is missing."""


def blobs(n: int = 120, split: str = "train", seed: int = 0) -> Dataset:
    """Return images of three classes, each a bright square in a corner of its own, under noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = 0.2 * torch.rand(n, 1, 6, 6, generator=generator)
    for label, (row, column) in enumerate(((0, 0), (0, 3), (3, 1))):
        x[y == label, :, row : row + 3, column : column + 3] += 0.6
    return Dataset("blobs", split, x, y, torch.arange(n), 3)


def bare(name: str, num_classes: int = 3) -> Wrapper:
    """Return a wrapper around an untrained net, not fitted, in eval mode."""
    from robustbench_lite.zoo.entries import _build

    case = CASES[name]
    return case.make(_build({**case.model, "num_classes": num_classes})).eval()


def fitted(name: str) -> Wrapper:
    """Return the specimen of a wrapper, around a net that tells the blobs apart, in eval mode."""
    from robustbench_lite.defenses import Deploy, StandardTraining
    from robustbench_lite.training import train
    from robustbench_lite.zoo.entries import _build

    case = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _build(case.model)
    objective = Deploy(StandardTraining(), lambda net: case.make(case.prepare(net)))
    calibration = blobs(90, "calibration", seed=1) if case.calibrated else None
    defense = train(net, blobs(), objective, epochs=20, learning_rate=1e-2, device="cpu", calibration=calibration)
    assert isinstance(defense, Wrapper)
    return defense


CASES["SmoothedClassifier"] = Case(lambda net: SmoothedClassifier(net, 0.2, n=1000, draws=100))
CASES["PixelDPClassifier"] = Case(lambda net: PixelDPClassifier(net, 0.3, layer="1", n=1000, draws=500))
CASES["InputNoise"] = Case(lambda net: InputNoise(net, 0.2))
CASES["WeightNoise"] = Case(lambda net: WeightNoise(net, 0.1))
CASES["DeepKNN"] = Case(lambda net: DeepKNN(net, k=10, calibration=60), calibrated=True, few=79)
CASES["BitDepth"] = Case(lambda net: BitDepth(net, 4))
CASES["JPEG"] = Case(lambda net: JPEG(net, 75))
CASES["RandomResizePad"] = Case(lambda net: RandomResizePad(net, 1))
CASES["PixelDeflection"] = Case(lambda net: PixelDeflection(net, 5, 1))
CASES["NearestNeighbour"] = Case(NearestNeighbour)
CASES["DeepRBF"] = Case(DeepRBF, calibrated=True, few=19)
CASES["Dustbin"] = Case(Dustbin, calibrated=True, few=19)
CASES["GaussianProcessHead"] = Case(lambda net: GaussianProcessHead(net, size=60), calibrated=True, few=19)
CASES["ABS"] = Case(lambda net: ABS(net, latents=50, steps=2), model=VAES, prepare=explaining)
CASES["BinaryABS"] = Case(lambda net: BinaryABS(net, latents=50, steps=2), model=VAES, prepare=explaining)
