"""Noise at the input of a net, or after its first layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from robustbench_lite.certify._sensitivity import layer_of, output_changed

__all__ = ["noise_after"]


def noise_after(
    net: nn.Module, layer: str | int | None, noise: Callable[[Tensor], Tensor]
) -> AbstractContextManager[Any]:
    """Add `noise(t)` to the output t of a layer, or to the net's input where `layer` is None, inside this context.

    Raises:
        ValueError: no module has this name.
    """
    if layer is None:
        return net.register_forward_pre_hook(lambda _, inputs: (inputs[0] + noise(inputs[0]), *inputs[1:]))
    return output_changed(layer_of(net, str(layer)), lambda output: output + noise(output))
