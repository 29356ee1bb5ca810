"""Architectures: from images (B, C, H, W) in [0, 1] to logits (B, K). They need only torch."""

from __future__ import annotations

from robustbench_lite.models.build import create_model, load_model, shape_options
from robustbench_lite.models.layers import Normalize
from robustbench_lite.models.lenet import LeNet
from robustbench_lite.models.mlp import MLP
from robustbench_lite.models.preact_resnet import PreActResNet18
from robustbench_lite.models.small_cnn import SmallCNN
from robustbench_lite.models.weights import load_weights, read_weights, save_weights
from robustbench_lite.models.wide_resnet import WideResNet

__all__ = [
    "MLP",
    "LeNet",
    "Normalize",
    "PreActResNet18",
    "SmallCNN",
    "WideResNet",
    "create_model",
    "load_model",
    "load_weights",
    "read_weights",
    "save_weights",
    "shape_options",
]
