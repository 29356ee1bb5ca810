"""Names of images by their content: records are addressed by them, so they must never change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor

__all__ = ["hash_images", "hash_slice"]

DIGITS = 16  # 64 bits: two of a million images share a name with probability 3e-8


def hash_images(images: Tensor) -> list[str]:
    """Return one name an image: 16 hex digits of sha256 over ``"CxHxW:"`` and its little-endian float32 bytes.

    Args:
        images: (N, C, H, W); other floating types are converted to float32 first. A name depends on nothing but its
            own image: not on the label, the batch, or the device.
    """
    shape = "x".join(map(str, images.shape[1:])).encode() + b":"
    pixels = images.detach().cpu().float().contiguous().numpy().astype("<f4", copy=False)
    return [hashlib.sha256(shape + memoryview(image).cast("B")).hexdigest()[:DIGITS] for image in pixels]


def hash_slice(sample_hashes: Iterable[str], labels: Iterable[int]) -> str:
    """Return the name of a slice of data, 16 hex digits, from its images' names and labels in their order."""
    lines = "".join(f"{name} {label}\n" for name, label in zip(sample_hashes, labels, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()[:DIGITS]
