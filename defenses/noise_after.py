"""Noise at the input of a net, or after its first layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["named_layer", "noise_after"]


def named_layer(net: nn.Module, name: str | int) -> nn.Module:
    """Return the module of this name, or of this number in a `Sequential`.

    Raises:
        ValueError: no module has it.
    """
    named: dict[str, nn.Module] = dict(net.named_modules())
    if str(name) not in named or name == "":
        raise ValueError(f"no layer {name!r}; the net has {', '.join(layer for layer in named if layer)}")
    return named[str(name)]


@contextmanager
def noise_after(net: nn.Module, layer: str | int | None, noise: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Add `noise(t)` to the output t of a layer, or to the net's input where `layer` is None, inside this context.

    Raises:
        ValueError: no module has this name.
    """
    if layer is None:
        handle = net.register_forward_pre_hook(lambda _, inputs: (inputs[0] + noise(inputs[0]), *inputs[1:]))
    else:
        handle = named_layer(net, layer).register_forward_hook(lambda _, __, output: output + noise(output))
    try:
        yield
    finally:
        handle.remove()
