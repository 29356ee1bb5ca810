"""What the nets here are made of: normalisation inside the model, and a `Sequential` that survives slicing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Layers", "Normalize", "normalization", "sides"]


class Normalize(nn.Module):
    """Subtract `mean` and divide by `std`, channel by channel: the first layer of a net that was trained so.

    Attacks and certificates work on images in [0, 1], hence normalisation belongs inside the model:
    ``nn.Sequential(Normalize(mean, std), net)``, or the options `mean` and `std` of a net of this package. Both values
    are buffers of the state dict: two nets that differ in nothing else are different nets.

    Args:
        mean: one value a channel, in the units of the images in [0, 1].
        std: one positive value a channel.

    Raises:
        ValueError: lengths that differ, or a standard deviation that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not len(mean):
            raise ValueError(f"mean and std need one value a channel each, got {len(mean)} and {len(std)}")
        if not all(value > 0 for value in std):
            raise ValueError(f"std must be > 0 in every channel, got {list(std)}")
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return images (B, C, H, W), normalised."""
        return (x - self.mean) / self.std


class Layers(nn.Sequential):
    """A `Sequential` with a constructor of its own: its slices are plain `Sequential`s of the same layers.

    Args:
        layers: keys of the state dict are their numbers.
        normalize: comes first, under the name "normalize", so that it does not move the numbers.
    """

    def __init__(self, *layers: nn.Module, normalize: Normalize | None) -> None:
        named = {} if normalize is None else {"normalize": normalize}
        super().__init__(OrderedDict([*named.items(), *((str(k), layer) for k, layer in enumerate(layers))]))

    def __getitem__(self, index: slice | int) -> Any:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


def normalization(mean: Sequence[float] | None, std: Sequence[float] | None, in_channels: int) -> Normalize | None:
    """Return the layer for a net's options `mean` and `std`: None where both are None.

    Raises:
        ValueError: only one is given, or not one value a channel.
    """
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError("mean and std go together: give both or neither")
    if len(mean) != in_channels:
        raise ValueError(f"mean and std need {in_channels} values, one a channel, got {len(mean)}")
    return Normalize(mean, std)


def sides(image_size: int | Sequence[int], least: int, net: str) -> tuple[int, int]:
    """Return (H, W) of an image size given as one number or two.

    Raises:
        ValueError: a side smaller than the `least` the net can take.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < least:
        raise ValueError(f"{net} needs images of at least {least}x{least}, got image_size {image_size}")
    return int(height), int(width)
