"""The one training loop, its schedules and its augmentation."""

from robustbench_lite.training.augment import CropFlip
from robustbench_lite.training.loop import train
from robustbench_lite.training.schedules import Constant, Cosine, OneCycle, Steps

__all__ = ["Constant", "Cosine", "CropFlip", "OneCycle", "Steps", "train"]
