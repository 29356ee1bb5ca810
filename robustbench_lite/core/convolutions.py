"""The gradient that an attack wants and training never does: that of a net's first convolution, on a CPU.

PyTorch's kernels for it are made for many input channels. Of an image's one to three, a matrix product and the sum of
overlapping patches give the same gradient in float32, up to rounding, mostly in a third to two thirds of the time. The
convolution itself, and so the model's answer, is left to PyTorch. `benchmarks/first_layer.py` has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.functional import fold
from torch.nn.grad import conv2d_input

__all__ = ["image_gradients"]

CHANNELS = 3  # of the input, at most: with more the two ways come to take the same time
IMAGES, WORK = 8, 50_000  # at least, of a batch and of values in its patches: fewer are not worth a call
SHIFTS = 25  # pixels of a kernel that slides by one, at most
VALUES = 1 << 20  # in patches at a time: 4 MiB stay in the cache, whatever the batch


@contextmanager
def image_gradients(model: Any) -> Iterator[None]:
    """Give a net's convolutions of few channels, if frozen, the faster gradient; what is no module passes through."""
    parts = _plain_convolutions(model) if isinstance(model, nn.Module) else []
    for part in parts:
        part._conv_forward = partial(_convolve, part)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for part in parts:
            del part._conv_forward


def _plain_convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """Return the convolutions to take over: PyTorch's own, in a net that is not compiled, not taken over already."""
    parts = list(model.modules())
    if any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts):
        return []
    return [part for part in parts if isinstance(part, nn.Conv2d) and _plain(part)]


def _plain(part: nn.Conv2d) -> bool:
    pairs = all(isinstance(pair, tuple) and len(pair) == 2 for pair in (part.stride, part.padding))
    simple = part.dilation == (1, 1) and part.groups == 1 and part.padding_mode == "zeros"
    own = getattr(part._conv_forward, "__func__", None) is nn.Conv2d._conv_forward
    return part.in_channels <= CHANNELS and pairs and simple and own


def _convolve(part: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Do what `part` does, with the other gradient where it suits and pays."""
    if torch.is_grad_enabled() and _suits(x, weight, bias) and _pays(x, weight, *part.stride):
        return cast(Tensor, _Convolution.apply(x, weight, bias, part.stride, part.padding))
    return cast(Tensor, nn.Conv2d._conv_forward(part, x, weight, bias))


def _suits(x: Any, weight: Any, bias: Any) -> bool:
    """Say whether the gradient is sought for the images alone, and nothing else is asked of it."""
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter) and x.ndim == 4 and x.device.type == "cpu"
    if not plain or not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling() or _mapped(x) or unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        return False
    return x.requires_grad and not weight.requires_grad and (bias is None or not bias.requires_grad)


def _pays(x: Tensor, weight: Tensor, down: int, across: int) -> bool:
    """Say whether the other way is worth it."""
    patch, places = math.prod(weight.shape[1:]), x.shape[2] * x.shape[3] // (down * across)
    few = down * across > 1 or math.prod(weight.shape[2:]) <= SHIFTS
    return few and len(x) >= IMAGES and len(x) * places * patch >= WORK


def _mapped(tensor: Tensor) -> bool:
    """Say whether a transform of torch.func, or a batched gradient, is under way: they know PyTorch's own alone."""
    functorch = torch._C._functorch
    return functorch.maybe_current_level() is not None or functorch.is_legacy_batchedtensor(tensor)


class _Convolution(torch.autograd.Function):
    """`torch.conv2d` with another gradient for its input, which can be differentiated in its turn."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.stride, ctx.padding = stride, padding
        ctx.save_for_backward(x, weight)  # as PyTorch does: a checkpoint runs its convolution again, and compares
        return torch.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if _mapped(gradient):
            slope = conv2d_input(x.shape, weight, gradient, ctx.stride, ctx.padding)  # type: ignore[no-untyped-call]
        else:
            sliding = _Sliding(tuple(x.shape[1:]), tuple(weight.shape[2:]), ctx.stride, ctx.padding)
            kernels, places = weight.flatten(1).t(), gradient.shape[2] * gradient.shape[3]
            parts = torch.split(gradient, max(1, VALUES // (len(kernels) * places)))
            slope = torch.cat([sliding.sum(kernels @ part.flatten(2), part.shape[2:]) for part in parts])
        return slope, None, None, None, None


@dataclass(frozen=True)
class _Sliding:
    """How patches lie on an image: sizes (C, H, W) of the image and (kh, kw) of a patch, stride and padding."""

    image: tuple[int, ...]
    patch: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def sum(self, patches: Tensor, places: Sequence[int]) -> Tensor:
        """Return images (n, C, H, W): the sums of patches (n, C * kh * kw, h * w) at h by w places."""
        channels, *sides = self.image
        if self.stride != (1, 1):
            return fold(patches, tuple(sides), self.patch, 1, self.padding, self.stride)
        spread = patches.reshape(len(patches), channels, *self.patch, *places)
        tall, wide = (place + side - 1 for place, side in zip(places, self.patch, strict=True))
        whole = patches.new_zeros(len(patches), channels, tall, wide)
        for i, j in product(*(range(side) for side in self.patch)):  # a shift for each pixel of the patch
            whole[:, :, i : i + places[0], j : j + places[1]] += spread[:, :, i, j]
        return whole[:, :, *(slice(pad, pad + side) for pad, side in zip(self.padding, sides, strict=True))]
