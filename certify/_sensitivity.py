"""How far the output of a first, affine layer moves when the input moves by 1: operator norms, from above."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_lite.certify.errors import CannotCertify
from robustbench_lite.core.models import Model, own_predict

__all__: list[str] = []

MOST_VALUES = 2**27  # of the layer's matrix, 1 GiB in float64
CHUNK = 256  # unit vectors at a time
AFFINE = 1e-9  # of the largest output: float64 rounding of an affine map stays below
PROBES = 16  # pairs of images that get the same output of the layer
WIDENING = 1 + 1e-9  # covers the rounding of the eigenvalue


def layer_of(model: Model, name: str) -> nn.Module:
    """Return the module of this name.

    Raises:
        TypeError: the model has no layers to name.
        ValueError: no module has this name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"noise after a layer needs an nn.Module with named layers, got {type(model).__name__}")
    named: dict[str, nn.Module] = dict(model.named_modules())
    if not name or name not in named:
        raise ValueError(f"no layer {name!r}; the model has {', '.join(n for n in named if n)}")
    return named[name]


@contextmanager
def output_changed(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the layer's output by `change(output)` while the context lasts."""
    handle = layer.register_forward_hook(lambda module, inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


class _Reached(Exception):  # noqa: N818  (it ends a forward pass, and is no error)
    """The layer has been run."""


class Sensitivity:
    """What lies between the input of a model and the output of one of its layers, as a matrix.

    Every column is the change of the layer's output by one unit of one input value, in float64. The l2 norm is the root
    of the largest eigenvalue of the Gram matrix, exact but for rounding, which is added; a power iteration would come
    from below, and the norm of a reshaped kernel ignores how windows overlap.

    Args:
        model: in eval mode.
        name: of the layer.
        image: (1, C, H, W), for shape, dtype and device.

    Attributes:
        shape: of the layer's output, without the batch.
        l2_to_l2: largest singular value.
        l1_to_l2: largest l2 norm of a column.
        l1_to_l1: largest l1 norm of a column.

    Raises:
        TypeError: the model has no layers to name.
        ValueError: no such layer.
        CannotCertify: it does not depend on the input in an affine way, the input can bypass it, or it is too large for
            its matrix.
    """

    @torch.no_grad()
    def __init__(self, model: Model, name: str, image: Tensor) -> None:
        layer_of(model, name)
        self._model, self._name = copy.deepcopy(model), name
        if isinstance(self._model, nn.Module):
            self._model.double()
        zero = torch.zeros_like(image, dtype=torch.float64)
        offset = self._output(zero)
        self.shape = offset.shape[1:]
        if offset.numel() * zero.numel() > MOST_VALUES:
            raise CannotCertify(
                f"layer {name!r} maps {zero.numel()} values to {offset.numel()}: too many for its exact norm; add the "
                "noise to the input (layer=None)"
            )
        matrix = self._matrix(zero, offset)
        self._check_affine(matrix, zero, offset)
        self._check_bypass(zero)
        if not bool(matrix.any()):
            raise CannotCertify(f"layer {name!r} does not depend on the input")
        lengths = torch.linalg.vector_norm(matrix, dim=1)
        gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
        self.l2_to_l2 = float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt()) * WIDENING
        self.l1_to_l2 = float(lengths.max()) * WIDENING
        self.l1_to_l1 = float(matrix.abs().sum(dim=1).max()) * WIDENING

    def _output(self, x: Tensor) -> Tensor:
        """Return the layer's output (B, *shape); the forward pass ends there."""
        seen: list[Tensor] = []

        def stop(output: Tensor) -> Tensor:
            seen.append(output)
            raise _Reached

        try:
            with output_changed(layer_of(self._model, self._name), stop):
                self._model(x)
        except _Reached:
            return seen[0]
        raise CannotCertify(f"the model's forward pass does not run layer {self._name!r}")

    def _matrix(self, zero: Tensor, offset: Tensor) -> Tensor:
        """Return the columns (values of the input, values of the output)."""
        unit = torch.eye(zero.numel(), dtype=torch.float64, device=zero.device)
        parts = (self._output(part.reshape(-1, *zero.shape[1:])) - offset for part in torch.split(unit, CHUNK))
        return torch.cat([part.flatten(1) for part in parts])

    def _check_affine(self, matrix: Tensor, zero: Tensor, offset: Tensor) -> None:
        source = torch.Generator().manual_seed(0)
        x = (torch.randn(16, *zero.shape[1:], generator=source, dtype=torch.float64) * 3).to(zero.device)
        found, expected = self._output(x).flatten(1), x.flatten(1) @ matrix + offset.flatten(1)
        if not bool(((found - expected).abs() <= AFFINE * expected.abs().max()).all()):
            others = ", ".join(affine_layers(self._model, zero)) or "none"
            raise CannotCertify(
                f"layer {self._name!r} is no affine function of the input, so its sensitivity is not known; of the "
                f"model's layers these are affine: {others}; noise can also be added to the input (layer=None)"
            )

    def _check_bypass(self, zero: Tensor) -> None:
        """Check that the model sees the input through the noisy layer alone, and through one call of it.

        Pairs of different images get the same output of the layer, of its own sizes and from a tenth to ten times its
        spread around them: the answers have to be the same.
        """
        source = torch.Generator().manual_seed(1)
        x = torch.randn(2 * PROBES, *zero.shape[1:], generator=source, dtype=torch.float64)
        x[::2] = x[::2].sigmoid()
        x = x.to(zero.device)
        outputs = self._output(x)
        spread = (outputs - outputs.mean(0)).abs().amax()
        noise = torch.randn(PROBES, *self.shape, generator=source, dtype=torch.float64).to(zero.device)
        sizes = torch.logspace(-1, 1, PROBES, dtype=torch.float64, device=zero.device)
        fixed = outputs[::2] + spread * noise * sizes.reshape(-1, *[1] * len(self.shape))
        calls: list[Any] = []

        def fix(output: Tensor) -> Tensor:
            calls.append(output)
            return fixed.repeat_interleave(2, dim=0)

        own = own_predict(self._model)
        for ask in (self._model,) if own is None else (self._model, own):
            calls.clear()
            with output_changed(layer_of(self._model, self._name), fix):
                answers = ask(x).double()
            moved = (answers[::2] - answers[1::2]).abs().max()
            if len(calls) != 1 or not bool(moved <= AFFINE * answers.abs().max()):
                raise CannotCertify(
                    f"the input reaches the answer by another way than one call of layer {self._name!r}"
                )


def affine_layers(model: Model, zero: Tensor) -> list[str]:
    """Return the names of the layers that answer a sum of images by a sum, as they are called.

    Args:
        model: a copy in float64, which is spoilt.
        zero: the image (1, C, H, W) of zeros.
    """
    if not isinstance(model, nn.Module):
        return []
    seen: dict[str, list[Any]] = {}

    def record(name: str, output: Any) -> None:
        seen.setdefault(name, []).append(output.clone() if isinstance(output, Tensor) else output)

    for name, layer in model.named_modules():
        layer.register_forward_hook(lambda _, __, output, name=name: record(name, output))
    source = torch.Generator().manual_seed(2)
    one, other = torch.randn(2, *zero.shape, generator=source, dtype=torch.float64).to(zero.device)
    model(torch.cat([one, other, one + other, zero]))
    return [name for name, outputs in seen.items() if name and len(outputs) == 1 and _additive(outputs[0])]


def _additive(output: Any) -> bool:
    if not isinstance(output, Tensor) or len(output) != 4:
        return False
    one, other, both, zero = output.double()
    return bool((one + other - both - zero).abs().max() <= AFFINE * output.abs().max())
