"""One variational autoencoder a class, all classes in one pass: grouped convolutions over stacked weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.models.layers import sides

__all__ = ["ClassDecoder", "ClassEncoder", "ClassVAEs"]

EVERY = slice(None)
MOMENTUM, VARIANCE_FLOOR = 0.1, 1e-5  # of the batch normalisations, PyTorch's


class _Layer(NamedTuple):
    """Of a decoder the convolution is transposed. The last layer has neither normalisation nor activation."""

    maps: int
    kernel: int
    stride: int


class _ClassLayer(nn.Module):
    """A convolution for each of K classes, with batch normalisation and ELU unless it is the last.

    Weights carry the class in front. In eval mode the normalisation is folded into them, which halves the passes over
    the activations; in train mode each class is normalised by its own images in the batch.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, classes: int, inputs: int, layer: _Layer, *, transposed: bool, last: bool) -> None:
        super().__init__()
        self.stride, self.transposed, self.last = layer.stride, transposed, last
        ends = (inputs, layer.maps) if transposed else (layer.maps, inputs)
        self.weight = nn.Parameter(torch.empty(classes, *ends, layer.kernel, layer.kernel))
        self.bias = nn.Parameter(torch.empty(classes, layer.maps))
        bound = 1 / math.sqrt(inputs * layer.kernel**2)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        if not last:
            self.gain = nn.Parameter(torch.ones(classes, layer.maps))
            self.shift = nn.Parameter(torch.zeros(classes, layer.maps))
            self.register_buffer("running_mean", torch.zeros(classes, layer.maps))
            self.register_buffer("running_var", torch.ones(classes, layer.maps))

    def forward(self, h: Tensor, part: slice = EVERY) -> Tensor:
        """Return (n, k * maps, H', W') for (n, k * inputs, H, W): the k classes of `part`, one after the other."""
        weight, bias = self.weight[part], self.bias[part]
        if self.last:
            return self._convolve(h, weight, bias)
        if not self.training:
            scale = self.gain[part] * (self.running_var[part] + VARIANCE_FLOOR).rsqrt()
            weight = weight * (scale[:, None, :, None, None] if self.transposed else scale[:, :, None, None, None])
            bias = (bias - self.running_mean[part]) * scale + self.shift[part]
            return F.elu(self._convolve(h, weight, bias))
        h = self._convolve(h, weight, bias)
        statistics = self.running_mean[part].view(-1), self.running_var[part].view(-1)
        gain, shift = self.gain[part].reshape(-1), self.shift[part].reshape(-1)
        own = h.numel() > h.shape[1]  # a single value has no statistics of its own
        return F.elu(F.batch_norm(h, *statistics, gain, shift, own, MOMENTUM, VARIANCE_FLOOR))

    def _convolve(self, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if h.shape[2:] == (1, 1) and (self.transposed or weight.shape[3:] == (1, 1)):
            return _multiply(h, weight if self.transposed else weight.transpose(1, 2), bias)
        convolve = F.conv_transpose2d if self.transposed else F.conv2d
        return convolve(h, weight.flatten(0, 1), bias.flatten(), stride=self.stride, groups=len(weight))


def _multiply(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the convolution of single pixels h (n, K * inputs, 1, 1), as a matrix product, which takes less time.

    Args:
        h: what comes in.
        weight: (K, inputs, maps, H', W').
        bias: (K, maps).
    """
    rows = h.reshape(len(h), *weight.shape[:2]).transpose(0, 1)
    offset = bias[:, :, None, None].expand(-1, -1, *weight.shape[3:]).flatten(1)
    out = torch.baddbmm(offset.unsqueeze(1), rows, weight.flatten(2))
    return out.transpose(0, 1).reshape(len(h), -1, *weight.shape[3:])


class ClassEncoder(nn.Module):
    """For each class, from images to means and log-variances of latents.

    Args:
        num_classes: K.
        image_shape: (C, H, W).
        latent_size: d.
    """

    def __init__(self, num_classes: int, image_shape: Sequence[int], latent_size: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.num_classes, self.dense = num_classes, not _convolutional(height, width)
        inputs = channels * height * width if self.dense else channels
        last = 1 if self.dense else ((height - 8) // 2 + 1 - 3) // 2 + 1  # what is left of a side
        layers = [_Layer(64, 1, 1)] if self.dense else [_Layer(32, 5, 1), _Layer(32, 4, 2), _Layer(64, 3, 2)]
        self.layers = _stack(num_classes, inputs, [*layers, _Layer(2 * latent_size, last, 1)], transposed=False)

    def forward(self, x: Tensor, part: slice = EVERY) -> tuple[Tensor, Tensor]:
        """Return means and log-variances, each (n, k, d), for images (n, C, H, W), by the k classes of `part`."""
        count = len(range(*part.indices(self.num_classes)))
        h = (x.flatten(1)[:, :, None, None] if self.dense else x).repeat(1, count, 1, 1)
        for layer in self.layers:
            h = layer(h, part)
        mean, log_variance = h.view(len(x), count, -1).chunk(2, dim=2)
        return mean, log_variance


class ClassDecoder(nn.Module):
    """For each class, from latents to images in [0, 1].

    Args:
        num_classes: K.
        image_shape: (C, H, W).
        latent_size: d.
    """

    def __init__(self, num_classes: int, image_shape: Sequence[int], latent_size: int) -> None:
        super().__init__()
        channels, height, width = self.image_shape = tuple(image_shape)
        self.num_classes, self.latent_size = num_classes, latent_size
        if _convolutional(height, width):
            layers = [_Layer(32, height // 4 - 3, 1), _Layer(16, 5, 2), _Layer(16, 5, 2), _Layer(channels, 4, 1)]
        else:
            layers = [_Layer(32, 1, 1), _Layer(64, 1, 1), _Layer(channels * height * width, 1, 1)]
        self.layers = _stack(num_classes, latent_size, layers, transposed=True)

    def forward(self, z: Tensor, part: slice = EVERY) -> Tensor:
        """Return images (n, k, C, H, W) of latents (n, k, d), by the k classes of `part`."""
        h = z.reshape(len(z), -1, 1, 1)
        for layer in self.layers:
            h = layer(h, part)
        return h.sigmoid().view(*z.shape[:2], *self.image_shape)


class ClassVAEs(nn.Module):
    """One variational autoencoder for each class.

    Square images whose side is a multiple of 4 and at least 16: encoder convolutions 5x5x32, 4x4x32 stride 2, 3x3x64
    stride 2, then one over all that is left; decoder transposed convolutions 4x4x32, 5x5x16 stride 2, 5x5x16 stride 2,
    4x4 (at 28; the first kernel grows with the image); batch normalisation and ELU in between, a sigmoid at the end.
    At 28 a class has 23,873 floats in its decoder and 61,872 in its encoder. Other images: dense layers, encoder 64,
    decoder 32, 64.

    Source: Schott, Rauber, Bethge, Brendel, "Towards the First Adversarially Robust Neural Network Model on MNIST",
    2018, arXiv:1805.09190; sizes from its published nets. Departure: the classes' weights are stacked in one tensor a
    layer, the class in front.

    Args:
        in_channels: channels of the images.
        image_size: H = W, or (H, W).
        num_classes: number of autoencoders K.
        latent_size: dimensions d of the latent space.

    Attributes:
        encoder: `ClassEncoder`.
        decoder: `ClassDecoder`, all that analysis by synthesis needs.

    Raises:
        ValueError: no class, or no latent dimension.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int | Sequence[int] = 28,
        num_classes: int = 10,
        latent_size: int = 8,
    ) -> None:
        super().__init__()
        if num_classes < 1 or latent_size < 1:
            raise ValueError(f"num_classes and latent_size must be at least 1, got {num_classes} and {latent_size}")
        shape = (in_channels, *sides(image_size, 1, "ClassVAEs"))
        self.encoder = ClassEncoder(num_classes, shape, latent_size)
        self.decoder = ClassDecoder(num_classes, shape, latent_size)

    def encode(self, x: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """Return means and log-variances, each (n, d), of images (n, C, H, W) by the encoder of one class."""
        mean, log_variance = self.encoder(x, slice(label, label + 1))
        return mean[:, 0], log_variance[:, 0]

    def decode(self, z: Tensor, label: int) -> Tensor:
        """Return images (n, C, H, W) of latents (n, d) by the decoder of one class."""
        images: Tensor = self.decoder(z[:, None], slice(label, label + 1))
        return images[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K): for each class -(||x - G(z)||^2 + ||z||^2 / 2) at the mean z that its encoder names."""
        mean, _ = self.encoder(x)
        away = (self.decoder(mean) - x[:, None]).square().flatten(2).sum(dim=2)
        energy: Tensor = away + mean.square().sum(dim=2) / 2
        return -energy


def _convolutional(height: int, width: int) -> bool:
    return height == width and height >= 16 and height % 4 == 0


def _stack(classes: int, inputs: int, layers: list[_Layer], *, transposed: bool) -> nn.ModuleList:
    widths = [inputs, *(layer.maps for layer in layers)]
    return nn.ModuleList(
        _ClassLayer(classes, before, layer, transposed=transposed, last=number == len(layers) - 1)
        for number, (before, layer) in enumerate(zip(widths[:-1], layers, strict=True))
    )
