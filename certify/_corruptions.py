"""What is done to an image before the base classifier sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from robustbench_lite.certify.noise import Noise

__all__: list[str] = []


class Corruption(ABC):
    """A random change of an image, drawn into slots of a buffer."""

    def shape(self, image: torch.Size) -> torch.Size:
        """Return the shape of one slot, for images of shape (C, H, W)."""
        return image

    @abstractmethod
    def write_(self, slots: Tensor, image: Tensor, generator: torch.Generator) -> None:
        """Fill all `slots` (n, *shape) for one image (C, H, W)."""

    def ask(self, question: Callable[[Tensor], Tensor], slots: Tensor, x: Tensor, owner: Tensor) -> Tensor:
        """Return what `question`, the model or its labels, says of slots (n, *shape) of the images `x[owner]`."""
        return question(slots)


class AddedNoise(Corruption):
    """Noise on every value of the image. It is not cut to the image range: the proofs need that."""

    def __init__(self, noise: Noise) -> None:
        self._noise = noise

    def write_(self, slots: Tensor, image: Tensor, generator: torch.Generator) -> None:
        """Fill the slots with noise around the image."""
        self._noise.fill_(slots, generator)
        slots += image
