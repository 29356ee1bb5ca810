"""Fast modes: the same model in lower precision, another memory layout, or compiled, with each success decided in full.

Lower precision moves a logit by a part in a hundred, which matters to a verdict but hardly to a gradient's direction.
An attack that is given a `Fast` view asks it everything, and puts to the deployed model only the candidates that fool
the view: what is reported as broken is broken in full precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Fast"]


class Fast(nn.Module):
    """A model computed faster: a `view` for any attack that screens candidates for the model itself.

        PGD()(net, x, y, threat, view=Fast(net, dtype=torch.bfloat16, channels_last=True))

    Args:
        model: images (B, C, H, W) to logits (B, K); shared, not copied.
        dtype: the precision of `torch.autocast`; None: the model's own.
        channels_last: hand images over in the memory layout that convolutions prefer on recent GPUs.
        compile: run the model through `torch.compile`. Batches are filled up to the next power of two, so that the
            shrinking batches of an attack compile a dozen times at most.
        backend: the compiler.

    Attributes:
        screens: True: the oracle takes this view for the model, and checks successes with the model itself.
    """

    screens = True

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        compile: bool = False,  # noqa: A002  (torch's own word)
        backend: str = "inductor",
    ) -> None:
        super().__init__()
        self.model, self.dtype, self.buckets = model, dtype, compile
        self.layout = torch.channels_last if channels_last else torch.preserve_format
        self._run = torch.compile(model, backend=backend, dynamic=False) if compile else model

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, K), in the precision of the images."""
        images, count = x.contiguous(memory_format=self.layout), len(x)
        if self.buckets and count:
            images = nn.functional.pad(images, (0, 0, 0, 0, 0, 0, 0, _bucket(count) - count))
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            logits: Tensor = self._run(images)
        return logits[:count].to(x.dtype)


def _bucket(count: int) -> int:
    return 1 << (count - 1).bit_length()
