"""Random resizing and padding in front of a net."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.attacks.eot import EOT
from robustbench_lite.defenses.transformed import Transformed

__all__ = ["RandomResizePad"]


class RandomResizePad(Transformed):
    """Shrink each image by a random number of pixels, and put it at a random place on black.

    Each sample has a size and a place of its own, drawn from torch's global generator at each call.

    Source: Xie, Wang, Zhang, Ren, Yuille, "Mitigating Adversarial Effects Through Randomization", ICLR 2018,
    arXiv:1711.01991.
    Departure: they enlarge (299 to at most 331 pixels), which needs a net for larger images; here the image shrinks and
    the net keeps its size. Bilinear in both cases.
    Broken by: averaging over draws (Athalye, Carlini and Wagner 2018, arXiv:1802.00420); it is differentiable.

    Args:
        net: images (B, C, H, W) to logits.
        shrink: most pixels that an image loses on a side.

    Raises:
        ValueError: shrink below 1; at the call, an image that is not larger than it.
    """

    stochastic: ClassVar[bool] = True

    def __init__(self, net: nn.Module, shrink: int = 3) -> None:
        super().__init__(net)
        if not isinstance(shrink, int) or shrink < 1:
            raise ValueError(f"shrink must be a whole number of pixels, at least 1, got {shrink!r}")
        self.shrink = shrink

    def transform(self, x: Tensor) -> Tensor:
        """Return the images, smaller and moved."""
        side = torch.tensor([x.shape[3], x.shape[2]], device=x.device, dtype=x.dtype)  # x first, as grids have it
        if self.shrink >= min(x.shape[2:]):
            raise ValueError(f"shrink = {self.shrink} leaves nothing of images of {tuple(x.shape[2:])} pixels")
        lost = torch.randint(self.shrink + 1, (len(x), 1), device=x.device)
        corner = (torch.rand(len(x), 2, device=x.device) * (lost + 1)).floor()  # of 0 .. lost, in x and y
        kept = (side - lost) / side
        # Grid coordinates run from -1 to 1 over a side; the image's middle goes to the middle of its new place.
        middle = (2 * corner + (side - lost)) / side - 1
        turn = torch.diag_embed(1 / kept)
        grid = F.affine_grid(
            torch.cat([turn, (-middle / kept).unsqueeze(2)], dim=2), list(x.shape), align_corners=False
        )
        return F.grid_sample(x, grid, align_corners=False)

    def attack_view(self, samples: int = 1) -> nn.Module:
        """Return the average over draws; the transformation has gradients of its own."""
        return EOT(self, samples)
