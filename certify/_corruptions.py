"""What is done to an image before the base classifier sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from robustbench_lite.certify._sensitivity import Sensitivity, layer_of, output_changed
from robustbench_lite.certify.noise import Noise
from robustbench_lite.core.models import Model

__all__: list[str] = []


class Corruption(ABC):
    """A random change of an image, drawn into slots of a buffer.

    Attributes:
        sensitivity: as in `Votes`.
    """

    sensitivity: Mapping[str, float] = MappingProxyType({})

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


class LayerNoise(Corruption):
    """Noise on the output of a first, affine layer of the model."""

    def __init__(self, noise: Noise, model: Model, name: str, image: Tensor) -> None:
        measured = Sensitivity(model, name, image)
        self._noise, self._layer, self._shape = noise, layer_of(model, name), measured.shape
        gaussian = {"l2": measured.l2_to_l2, "l1": measured.l1_to_l2}
        self.sensitivity = gaussian if noise.norm == "l2" else {"l1": measured.l1_to_l1}

    def shape(self, image: torch.Size) -> torch.Size:
        """Return the shape of the layer's output."""
        return self._shape

    def write_(self, slots: Tensor, image: Tensor, generator: torch.Generator) -> None:
        """Fill the slots with noise; the image comes later."""
        self._noise.fill_(slots, generator)

    def ask(self, question: Callable[[Tensor], Tensor], slots: Tensor, x: Tensor, owner: Tensor) -> Tensor:
        """Return what `question` says while the layer's output is noisy."""
        with output_changed(self._layer, lambda output: output + slots):
            return question(x[owner])


class RandomPixels(Corruption):
    """Only k random pixels of an image are kept; the others are NULL.

    A pixel v of the range [low, high] is shown as the two values v - low and high - v, in two channels for each one of
    the image; NULL is zero in both, which no pixel is.
    """

    def __init__(self, k: int, bounds: tuple[float, float]) -> None:
        self._k, self._bounds = k, bounds

    def shape(self, image: torch.Size) -> torch.Size:
        """Return (2 C, H, W)."""
        return torch.Size((2 * image[0], *image[1:]))

    def write_(self, slots: Tensor, image: Tensor, generator: torch.Generator) -> None:
        """Fill the slots; the kept pixels are those with the k largest of uniform float64 keys: ties have no weight."""
        keys = torch.empty(len(slots), image[0].numel(), dtype=torch.float64, device=image.device)
        kept = keys.uniform_(generator=generator).topk(self._k, dim=1, sorted=False).indices
        mask = torch.zeros_like(keys, dtype=image.dtype).scatter_(1, kept, 1).reshape(-1, 1, *image.shape[1:])
        low, high = self._bounds
        torch.mul(torch.cat([image - low, high - image]), mask, out=slots)
