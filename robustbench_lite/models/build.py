"""Models by name, or any `nn.Module` by its dotted path."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from robustbench_lite.core import registry
from robustbench_lite.models.weights import load_weights

__all__ = ["create_model", "load_model", "shape_options"]


def create_model(
    name: str,
    *,
    in_channels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    **options: Any,
) -> nn.Module:
    """Return a model of `conf/model` by name.

    Args:
        name: the name of a file in `conf/model`: "mlp", "small_cnn", "lenet", "preact_resnet18" ...
        in_channels: channels of the images; default that of the file, as for the next two.
        image_size: H = W, or (H, W). A net that takes images of any size takes no notice of it.
        num_classes: number of logits.
        weights: a file to load; the model is then in eval mode.
        options: further arguments of the model, such as `hidden` or `width`.

    Raises:
        ValueError: an unknown name, or a value that the model refuses.
        TypeError: an option that the model does not have.
    """
    config = registry.load("model", name)
    target = str(config.pop("_target_"))
    shape = shape_options(target, in_channels=in_channels, image_size=image_size, num_classes=num_classes)
    return load_model(target, **{**config, **shape, **options, **({"weights": weights} if weights else {})})


def load_model(target: str, *, weights: str | Path | None = None, **options: Any) -> nn.Module:
    """Return the `nn.Module` that a dotted path names, the user's own included.

    >>> load_model("robustbench_lite.models.MLP", hidden=[32], image_size=8)[1]
    Linear(in_features=64, out_features=32, bias=True)

    Args:
        target: a class, or a function that returns a model, such as "my.module.Net".
        weights: a file that `load_weights` reads; the model is then in eval mode.
        options: arguments of the class or function.

    Raises:
        ImportError: nothing of that name.
        TypeError: an argument it does not take, or what comes back is no `nn.Module`.
        FileNotFoundError: no file of weights.
        ValueError: weights that do not fit.
    """
    build = registry.resolve(target)
    known = _parameters(build)
    unknown = [option for option in options if known is not None and option not in known]
    if unknown:
        raise TypeError(f"{target} takes no {', '.join(unknown)}; it takes: {', '.join(known or ()) or 'nothing'}")
    model = build(**options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{target} must give a torch.nn.Module, got {type(model).__name__}")
    if weights:
        load_weights(model, weights)
        model.eval()
    return model


def shape_options(
    target: str,
    *,
    in_channels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
) -> dict[str, Any]:
    """Return those of the three that are given and that the class or function names as arguments of its own.

    Nets differ in what they must know of the data: a convolutional net with a mean at its end has no `image_size`.
    """
    shape = {"in_channels": in_channels, "image_size": image_size, "num_classes": num_classes}
    named = inspect.signature(registry.resolve(target)).parameters
    return {key: value for key, value in shape.items() if value is not None and key in named}


def _parameters(build: Any) -> list[str] | None:
    """Return the names of the arguments of a class or function; None if it takes any."""
    parameters = inspect.signature(build).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
