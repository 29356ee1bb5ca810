"""The gradient that an attack wants and training never does: that of a net's first convolution, on a CPU.

PyTorch's kernel for it is made for many input channels. Of an image's few, a matrix product and the sum of overlapping
patches give the same gradient, up to rounding, in a fifth to all of the time. The convolution itself, and so
every answer of the model, is left to PyTorch. `benchmarks/first_layer.py` has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import fold
from torch.overrides import TorchFunctionMode

__all__ = ["image_gradients"]

CHANNELS = 3  # of the input, at most: with more the two ways come to take the same time
VALUES = 1 << 20  # patches at a time: 4 MiB in float32 stay in the cache, whatever the batch


def image_gradients(images: Tensor) -> AbstractContextManager[object]:
    """Return a context in which a net's convolutions of few channels, if frozen, have the faster gradient."""
    wanted = images.requires_grad and images.device.type == "cpu" and torch.is_grad_enabled()
    return _ImageGradients() if wanted else nullcontext()


class _ImageGradients(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d and not kwargs and _suits(*args):
            return _Convolution.apply(*args[:6])
        return func(*args, **(kwargs or {}))


def _suits(*args: Any) -> bool:
    """Say whether these are all arguments of a convolution whose gradient is sought for the input alone."""
    if len(args) != 7 or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    x, weight, bias, *geometry, groups = args
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    plain = type(x) is Tensor and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    few = groups == 1 and weight.shape[1] <= CHANNELS and all(isinstance(pair, tuple) for pair in geometry)
    return x.requires_grad and frozen and plain and few and x.ndim == 4 and x.dtype == weight.dtype


class _Convolution(torch.autograd.Function):
    """`torch.conv2d` by another gradient for its input, which can be differentiated in its turn."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Tensor:
        return torch.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *ctx.geometry = inputs
        ctx.size = tuple(x.shape[2:])
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        sliding = _Sliding(ctx.size, tuple(weight.shape[2:]), *ctx.geometry)
        kernels, places = weight.flatten(1).t(), gradient.shape[2] * gradient.shape[3]
        parts = torch.split(gradient, max(1, VALUES // max(1, len(kernels) * places)))
        images = [sliding.sum(kernels @ part.flatten(2), part.shape[2:]) for part in parts]
        return torch.cat(images), None, None, None, None, None


@dataclass(frozen=True)
class _Sliding:
    """How patches lie on an image: sizes of both, and a convolution's stride, padding and dilation, (2,) each."""

    image: tuple[int, ...]
    patch: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def sum(self, patches: Tensor, places: Sequence[int]) -> Tensor:
        """Return images (n, C, H, W): the sums of patches (n, C * kh * kw, h * w) at h by w places."""
        if self.stride != (1, 1):
            return fold(patches, self.image, self.patch, self.dilation, self.padding, self.stride)
        tall, wide = ((n - 1) * step for n, step in zip(self.patch, self.dilation, strict=True))
        spread = patches.reshape(len(patches), -1, *self.patch, *places)
        whole = patches.new_zeros(*spread.shape[:2], places[0] + tall, places[1] + wide)
        for i, j in product(*(range(n) for n in self.patch)):  # a shift for each pixel of the patch
            top, left = i * self.dilation[0], j * self.dilation[1]
            whole[:, :, top : top + places[0], left : left + places[1]] += spread[:, :, i, j]
        return whole[:, :, *(slice(pad, pad + size) for pad, size in zip(self.padding, self.image, strict=True))]
