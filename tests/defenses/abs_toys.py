"""Generative classifiers for tests: so small that brute force knows the answer, or trained in a second."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustbench_lite.defenses.abs import ABS

__all__ = ["Curved", "Discrete", "around", "explaining"]


class Curved(nn.Module):
    """sigmoid(A_c z + b_c): smooth decoders of a latent of one or two dimensions."""

    def __init__(self, classes: int = 3, latent_size: int = 2, side: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.num_classes, self.latent_size, self.image_shape = classes, latent_size, (1, side, side)
        shape = (classes, side * side)
        self.matrix = nn.Parameter(torch.randn(*shape, latent_size, generator=generator, dtype=torch.float64))
        self.offset = nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        flat = torch.einsum("kpd,nkd->nkp", self.matrix, z) + self.offset
        return flat.sigmoid().view(*z.shape[:2], *self.image_shape)


class Discrete(nn.Module):
    """A few prototypes a class: the interval that a one-dimensional latent lies in says which."""

    prototypes: Tensor
    edges: Tensor

    def __init__(self, classes: int = 3, prototypes: int = 4, pixels: int = 2, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.num_classes, self.latent_size, self.image_shape = classes, 1, (1, 1, pixels)
        values = torch.rand(classes, prototypes, pixels, generator=generator, dtype=torch.float64)
        self.register_buffer("prototypes", values)
        self.register_buffer("edges", torch.linspace(-1.2, 1.2, prototypes - 1, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        index = torch.bucketize(z[..., 0].contiguous(), self.edges)  # (n, K)
        images = self.prototypes[torch.arange(self.num_classes), index] + 0 * z
        return images.view(*z.shape[:2], *self.image_shape)


def around(decoder: nn.Module, cls: type[ABS] = ABS, **settings: Any) -> ABS:
    """A classifier around a decoder."""
    net = nn.Module()
    net.decoder = decoder
    return cls(net, **settings).eval()


def explaining(net: nn.Module) -> nn.Module:
    """Autoencoders that have learned the blobs of the contract battery."""
    from robustbench_lite.defenses.abs_training import ABSTraining
    from robustbench_lite.training import train
    from tests.defenses.contract_cases import blobs

    return train(net, blobs(), ABSTraining(), epochs=60, batch_size=60, learning_rate=1e-2, device="cpu")
