"""JPEG compression in front of a net."""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from robustbench_lite.defenses.transformed import Transformed

__all__ = ["JPEG"]

MODES = {1: "L", 3: "RGB"}


class JPEG(Transformed):
    """Store each image as JPEG and read it back, by Pillow.

    Source: Dziugaite, Ghahramani, Roy, "A study of the effect of JPG compression on adversarial images", 2016,
    arXiv:1608.00853; Guo, Rana, Cisse, van der Maaten, "Countering Adversarial Images using Input Transformations",
    2018, arXiv:1711.00117.
    Broken by: the identity as stand-in (Athalye, Carlini and Wagner 2018, arXiv:1802.00420).

    Args:
        net: images (B, C, H, W) with one or three channels to logits.
        quality: of the compression, 1 (coarse) to 95.

    Raises:
        ValueError: quality out of range; at the call, another number of channels.
    """

    def __init__(self, net: nn.Module, quality: int = 75) -> None:
        super().__init__(net)
        if not isinstance(quality, int) or not 1 <= quality <= 95:
            raise ValueError(f"quality must be a whole number from 1 to 95, got {quality!r}")
        self.quality = quality

    def transform(self, x: Tensor) -> Tensor:
        """Return what is left of the images, in their dtype; computed on the CPU, image by image."""
        if x.ndim != 4 or x.shape[1] not in MODES:
            raise ValueError(f"JPEG knows images (B, 1 or 3, H, W), got shape {tuple(x.shape)}")
        pixels = (255 * x.detach()).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        if not len(pixels):
            return x
        found = torch.from_numpy(np.stack([self._compressed(image) for image in pixels])).permute(0, 3, 1, 2)
        return found.to(x.device, x.dtype) / 255

    def _compressed(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        channels = pixels.shape[2]
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels, MODES[channels]).save(
            file, "JPEG", quality=self.quality
        )
        return np.asarray(Image.open(file)).reshape(pixels.shape)
