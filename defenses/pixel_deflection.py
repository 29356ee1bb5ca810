"""Pixel deflection in front of a net."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.defenses.transformed import Transformed

__all__ = ["PixelDeflection"]


class PixelDeflection(Transformed):
    """Replace random pixels by random neighbours, then denoise: soft thresholds on Haar wavelet coefficients.

    Source: Prakash, Moran, Garber, DiLillo, Storer, "Deflecting Adversarial Attacks with Pixel Deflection", CVPR 2018,
    arXiv:1801.08926 (200 deflections within 10 pixels, sigma 0.04, on images of 224 pixels).
    Departures: no activation map, every pixel is as likely to be replaced (the map spares the object; the published
    break leaves it out as well); all replacements read the image as it came. Thresholds are BayesShrink's (Chang, Yu,
    Vetterli 2000).
    Broken by: the identity as stand-in, averaged over draws (Athalye and Carlini 2018, arXiv:1804.03286).

    Args:
        net: images (B, C, H, W) to logits.
        deflections: values replaced in each channel.
        window: furthest neighbour, in pixels along each axis.
        wavelet_sigma: standard deviation of the noise that the wavelets are to remove; 0: none is removed.

    Raises:
        ValueError: a setting out of range.
    """

    stochastic: ClassVar[bool] = True

    def __init__(self, net: nn.Module, deflections: int = 20, window: int = 3, wavelet_sigma: float = 0.04) -> None:
        super().__init__(net)
        if deflections < 1 or window < 1 or not 0 <= wavelet_sigma < math.inf:
            raise ValueError(
                "need deflections >= 1, window >= 1 and wavelet_sigma >= 0, got "
                f"{deflections}, {window} and {wavelet_sigma:g}"
            )
        self.deflections, self.window, self.wavelet_sigma = deflections, window, wavelet_sigma

    def transform(self, x: Tensor) -> Tensor:
        """Return the images, deflected and denoised."""
        return denoised(self.deflected(x), self.wavelet_sigma)

    def deflected(self, x: Tensor) -> Tensor:
        """Return the images (B, C, H, W) with some values replaced by neighbours."""
        count, channels, height, width = x.shape
        draws = (count, channels, self.deflections)
        row, column = (torch.randint(side, draws, device=x.device) for side in (height, width))
        down, right = (torch.randint(-self.window, self.window + 1, draws, device=x.device) for _ in range(2))
        source = (row + down).clamp(0, height - 1) * width + (column + right).clamp(0, width - 1)
        flat = x.flatten(2)
        return flat.scatter(2, row * width + column, flat.gather(2, source)).reshape(x.shape)


def denoised(x: Tensor, sigma: float) -> Tensor:
    """Return images (B, C, H, W) without what Gaussian noise of this deviation would leave in their wavelets.

    Soft thresholds sigma^2 / deviation of the signal, one for each image, channel and band of an orthonormal Haar
    transform of max(1, log2(side) - 3) levels.
    """
    height, width = x.shape[2:]
    levels = max(1, int(math.log2(min(height, width))) - 3)
    block = 2**levels
    padded = F.pad(x, (0, -width % block, 0, -height % block), mode="replicate")
    bands, smooth = [], padded
    for _ in range(levels):
        smooth, details = haar(smooth)
        bands.append(shrunk(details, sigma))
    for details in reversed(bands):
        smooth = inverse_haar(smooth, details)
    return smooth[..., :height, :width]


def haar(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return one level of the orthonormal Haar transform: means (B, C, H/2, W/2), details (3, B, C, H/2, W/2)."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return (a + b + c + d) / 2, torch.stack([a - b + c - d, a + b - c - d, a - b - c + d]) / 2


def inverse_haar(smooth: Tensor, details: Tensor) -> Tensor:
    """Return the images that `haar` took apart."""
    across, along, diagonal = details
    top = torch.stack([smooth + across + along + diagonal, smooth - across + along - diagonal], dim=-1)
    bottom = torch.stack([smooth + across - along - diagonal, smooth - across - along + diagonal], dim=-1)
    return torch.stack([top.flatten(-2), bottom.flatten(-2)], dim=-2).flatten(-3, -2) / 2


def shrunk(details: Tensor, sigma: float) -> Tensor:
    """Return coefficients (3, B, C, h, w) moved towards 0 by BayesShrink's threshold; 0 where all is noise."""
    signal = (details.square().mean(dim=(-2, -1), keepdim=True) - sigma**2).clamp_min(0).sqrt()
    threshold = sigma**2 / signal  # infinite where the band holds no more than the noise
    kept = (details.abs() - threshold).clamp_min(0) * details.sign()
    return torch.where(signal > 0, kept, torch.zeros_like(details) if sigma > 0 else details)
