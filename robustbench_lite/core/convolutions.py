"""The gradient that an attack wants and training never does: that of a net's first convolution, on a CPU.

PyTorch's kernels for it are made for many input channels. Of an image's one to three, a matrix product and the sum of
overlapping patches give the same gradient in float32, up to rounding, mostly in a third to two thirds of the time. The
convolution itself, and so the model's answer, is left to PyTorch. `benchmarks/first_layer.py` has the figures.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional
from torch.nn.grad import conv2d_input

__all__ = ["image_gradients"]

CHANNELS = 3  # of the input, at most: with more the two ways come to take the same time
IMAGES, WORK = 8, 50_000  # at least, of a batch and of values in its patches: fewer are not worth a call
SHIFTS = 25  # pixels of a kernel that slides by one, at most
VALUES = 1 << 20  # in patches at a time: 4 MiB stay in the cache, whatever the batch


class _Questions(threading.local):
    """Whether this thread asks a net for gradients just now."""

    asking = False


_questions = _Questions()
_lock, _count, _conv2d = threading.Lock(), 0, functional.conv2d


@contextmanager
def image_gradients(images: Tensor) -> Iterator[None]:
    """Give a net's convolutions of few channels, if frozen, the faster gradient while it is asked about `images`.

    Until the last question of any thread is answered, `torch.nn.functional.conv2d` is a function that looks whether
    its own thread is asking. A `TorchFunctionMode` would see each operation of the net, and each would take longer.
    """
    if images.device.type != "cpu" or not torch.is_grad_enabled():
        yield
        return
    before = _questions.asking
    _enter()
    try:
        _questions.asking = True
        yield
    finally:
        _questions.asking = before
        _leave()


def _enter() -> None:
    global _count, _conv2d
    with _lock:
        if _count == 0:
            _conv2d, functional.conv2d = functional.conv2d, _convolve
        _count += 1


def _leave() -> None:
    global _count
    with _lock:
        _count -= 1
        if _count == 0 and functional.conv2d is _convolve:
            functional.conv2d = _conv2d


def _convolve(*args: Any, **kwargs: Any) -> Any:
    """Do what `conv2d` does, with the other gradient where it is asked for, suits and pays."""
    if torch.compiler.is_compiling() or kwargs or len(args) != 7 or not _questions.asking:
        return _conv2d(*args, **kwargs)
    return _Convolution.apply(*args[:5]) if _suits(*args) and _pays(*args) else _conv2d(*args)


def _suits(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any) -> bool:
    """Say whether this is a plain convolution of few channels whose gradient is sought for the images alone."""
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter) and x.ndim == 4 and x.device.type == "cpu"
    if not plain or weight.shape[1] > CHANNELS or not x.dtype == weight.dtype == torch.float32:
        return False
    if torch.is_autocast_enabled("cpu") or _mapped(x) or unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        return False
    pairs = all(isinstance(pair, tuple) and len(pair) == 2 for pair in (stride, padding, dilation))
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    return x.requires_grad and torch.is_grad_enabled() and frozen and pairs and dilation == (1, 1) and groups == 1


def _pays(x: Tensor, weight: Tensor, bias: Any, stride: tuple[int, int], *rest: Any) -> bool:
    """Say whether the other way is worth it."""
    patch, places = math.prod(weight.shape[1:]), x.shape[2] * x.shape[3] // math.prod(stride)
    few = stride != (1, 1) or math.prod(weight.shape[2:]) <= SHIFTS
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
            return functional.fold(patches, tuple(sides), self.patch, 1, self.padding, self.stride)
        spread = patches.reshape(len(patches), channels, *self.patch, *places)
        tall, wide = (place + side - 1 for place, side in zip(places, self.patch, strict=True))
        whole = patches.new_zeros(len(patches), channels, tall, wide)
        for i, j in product(*(range(side) for side in self.patch)):  # a shift for each pixel of the patch
            whole[:, :, i : i + places[0], j : j + places[1]] += spread[:, :, i, j]
        return whole[:, :, *(slice(pad, pad + side) for pad, side in zip(self.padding, sides, strict=True))]
