"""The features of a net: what goes into its last linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["embed", "embed_all", "last_linear"]

CHUNK = 500  # images a pass


def last_linear(net: nn.Module) -> nn.Linear:
    """Return the linear layer whose output are the logits.

    Raises:
        ValueError: the net has no linear layer, or it has fewer than two classes.
    """
    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"{type(net).__name__} has no nn.Linear: its features are read before the last one")
    if layers[-1].out_features < 2:
        raise ValueError(f"a classifier has at least 2 classes, got a net with {layers[-1].out_features}")
    return layers[-1]


def embed(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (B, K) and the features (B, D) of images (B, C, H, W), differentiable.

    Raises:
        ValueError: the logits are not the output of the net's last linear layer.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0], output))

    handle = last_linear(net).register_forward_hook(keep)
    try:
        logits = net(x)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0][1] is not logits or seen[0][0].ndim != 2:
        raise ValueError(f"the last nn.Linear of {type(net).__name__} must give its logits, from features (B, D)")
    return logits, seen[0][0]


@torch.no_grad()
def embed_all(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (N, K) and features (N, D) of many images, in chunks, on the device of the net."""
    place = last_linear(net).weight.device
    parts = [embed(net, part.to(place)) for part in torch.split(images, CHUNK)]
    return torch.cat([logits for logits, _ in parts]), torch.cat([features for _, features in parts])
