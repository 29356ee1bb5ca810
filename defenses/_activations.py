"""What the layers of a net give, by their names, through hooks that do not outlive a pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor, nn

__all__ = ["activations", "layer_names"]

LOGITS = "logits"  # the name of the net's own output among the layers


def layer_names(net: nn.Module, layers: Sequence[str] | None) -> list[str]:
    """Return the checked names of layers: of submodules, and "logits" for the output; None: every ReLU, and the logits.

    Raises:
        ValueError: no names, a name twice, or one that the net does not have.
    """
    modules = dict(net.named_modules())
    if layers is None:
        relus = [name for name, module in modules.items() if isinstance(module, nn.ReLU)]
        if not relus:
            raise ValueError(f"{type(net).__name__} has no nn.ReLU modules: name the layers=[...] to compare")
        return [*relus, LOGITS]
    if isinstance(layers, str) or not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers must be different names of submodules, at least one, got {layers!r}")
    for name in layers:
        if name != LOGITS and (not name or name not in modules):
            known = ", ".join(name for name in modules if name)
            raise ValueError(f"the net has no layer {name!r}; it has: {known}, and 'logits' for its output")
    return list(layers)


def activations(net: nn.Module, names: Sequence[str], x: Tensor) -> list[Tensor]:
    """Return what the layers of these names give for images (B, C, H, W), each flattened to (B, D).

    Raises:
        RuntimeError: a layer that did not run exactly once, or gave no tensor.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, output: object) -> None:
        if name in found or not isinstance(output, Tensor):
            raise RuntimeError(f"layer {name!r} must give one tensor a pass: choose other layers=[...]")
        found[name] = output.flatten(1).clone()  # a layer that comes next may work in place

    with ExitStack() as hooks:
        modules = dict(net.named_modules())
        for name in names:
            if name != LOGITS:
                handle = modules[name].register_forward_hook(lambda _m, _x, output, name=name: keep(name, output))
                hooks.callback(handle.remove)
        logits = net(x)
    if LOGITS in names:
        keep(LOGITS, logits)
    missing = [name for name in names if name not in found]
    if missing:
        raise RuntimeError(f"layer {missing[0]!r} did not run: choose other layers=[...]")
    return [found[name] for name in names]
