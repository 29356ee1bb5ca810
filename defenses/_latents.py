"""Search over the latents of class decoders: a fixed set of latents first, then descent."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robustbench_lite.core.checks import version_of

__all__ = ["Decoders", "FixedLatents", "best_fixed", "descend", "draw_latents", "fixed_latents", "within"]

CHUNK = 256  # latents whose images lie together: on MNIST 8 MB
AT_ONCE = 32  # latents decoded at a time: on a CPU three times as fast as 256
BETAS, TINY = (0.7, 0.99), 1e-8


class Decoders(Protocol):
    """A module: one decoder a class, all asked together."""

    num_classes: int
    latent_size: int
    image_shape: tuple[int, ...]

    def __call__(self, z: Tensor) -> Tensor:
        """Return images (n, K, C, H, W) of latents (n, K, d)."""
        ...

    def parameters(self) -> Iterator[Tensor]:
        """Return the parameters."""
        ...

    def buffers(self) -> Iterator[Tensor]:
        """Return the buffers."""
        ...


@dataclass(frozen=True, eq=False)
class FixedLatents:
    """Some latents and what each class makes of them.

    Attributes:
        latents: (n, d).
        images: (n, K, D), flat.
        squares: (n, K), the images' squared lengths.
    """

    latents: Tensor
    images: Tensor
    squares: Tensor


_KEPT: weakref.WeakKeyDictionary[Decoders, tuple[object, list[FixedLatents]]] = weakref.WeakKeyDictionary()


def best_fixed(fixed: list[FixedLatents], seen: Tensor, beta: float) -> Tensor:
    """Return for images (B, C, H, W) and each class the fixed latent of least energy, (B, K, d).

    ||x||^2 - 2 x.G + ||G||^2 is one matrix product for all of them.
    """
    flat = seen.flatten(1)
    best, least = flat.new_zeros(()), flat.new_full((len(flat), fixed[0].squares.shape[1]), torch.inf)
    for part in fixed:
        products = (flat @ part.images.flatten(0, 1).T).view(len(flat), *part.squares.shape)
        offset = part.squares + beta / 2 * part.latents.square().sum(dim=1, keepdim=True)
        value, at = (offset - 2 * products).min(dim=1)
        best = torch.where((value < least)[..., None], part.latents[at], best)
        least = torch.minimum(least, value)
    return best


def within(z: Tensor, radius: float) -> Tensor:
    """Return latents (..., d), those longer than `radius` shortened to it."""
    length: Tensor = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return z * (radius / length.clamp_min(radius))


def draw_latents(count: int, size: int, drop: float, radius: float, seed: int) -> Tensor:
    """Return `count` standard normal latents (n, size), float64, without the least likely, which are the longest.

    Args:
        count: latents drawn.
        size: their dimensions.
        drop: share of them that is left out; one always stays.
        radius: those that are longer are shortened to it.
        seed: of the draw.
    """
    z = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    likeliest = z.norm(dim=1).argsort(stable=True)[: max(1, round(count * (1 - drop)))]
    return within(z[likeliest.sort().values], radius)


@torch.no_grad()
def fixed_latents(decoder: Decoders, count: int, *, drop: float, radius: float, seed: int) -> list[FixedLatents]:
    """Return the latents of `draw_latents` with their images, in chunks.

    They are kept while the decoder lives and its weights stay as they are, beside it and not in it: a weights file and
    a fingerprint can do without what follows from the decoder.
    """
    weights = [*decoder.parameters(), *decoder.buffers()]
    key = (count, drop, radius, seed, [(id(w), version_of(w), w.dtype, w.device) for w in weights])
    kept = _KEPT.get(decoder)
    if kept is not None and kept[0] == key:
        return kept[1]
    z = draw_latents(count, decoder.latent_size, drop, radius, seed)
    like = next((w for w in weights if w.is_floating_point()), z)
    with torch.inference_mode(False):  # for later calls, which may want gradients
        chunks = [_decoded(decoder, part) for part in torch.split(z.to(like.device, like.dtype), CHUNK)]
    _KEPT[decoder] = key, chunks
    return chunks


def _decoded(decoder: Decoders, z: Tensor) -> FixedLatents:
    many = torch.split(z[:, None].expand(-1, decoder.num_classes, -1), AT_ONCE)
    images = torch.cat([decoder(part).flatten(2) for part in many])
    return FixedLatents(z, images, images.square().sum(dim=2))


def descend(
    value: Callable[[Tensor], Tensor], z: Tensor, *, steps: int, learning_rate: float, radius: float
) -> tuple[Tensor, Tensor]:
    """Minimise `value` by Adam, each latent by itself; return the best latents met (n, K, d) and their values (n, K).

    Adam's averages are shorter than usual, (0.7, 0.99): runs of 20 to 50 steps have no time for longer ones.

    Args:
        value: from latents (n, K, d) to values (n, K), entry by entry.
        z: where to start, no longer than `radius`.
        steps: of Adam; the values at steps + 1 points are compared.
        learning_rate: Adam's.
        radius: latents that become longer are shortened to it.
    """
    best, least = z, torch.full(z.shape[:2], torch.inf, dtype=z.dtype, device=z.device)
    first, second = torch.zeros_like(z), torch.zeros_like(z)
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            leaf = z.detach().requires_grad_(step < steps)
            found = value(leaf)
        better = found.detach() < least
        least, best = torch.where(better, found.detach(), least), torch.where(better[..., None], z, best)
        if step == steps:
            break
        (slope,) = torch.autograd.grad(found.sum(), leaf)
        first = BETAS[0] * first + (1 - BETAS[0]) * slope
        second = BETAS[1] * second + (1 - BETAS[1]) * slope.square()
        scale = (second / (1 - BETAS[1] ** (step + 1))).sqrt() + TINY
        z = within(z - learning_rate / (1 - BETAS[0] ** (step + 1)) * first / scale, radius)
    return best, least
