"""Calls that change nothing in eval mode: dropout, identity, copies, casts between floating types."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.registry import Build, layer, spelled

__all__: list[str] = []

aten = torch.ops.aten


@spelled(F.dropout, F.dropout2d, F.alpha_dropout, torch.dropout)
def lower_dropout(
    build: Build, z: Any, p: float = 0.5, training: bool = True, inplace: bool = False, **kwargs: Any
) -> Node:
    """Bring functional dropout in, where it is switched off."""
    if training and p > 0:
        raise build.refuse("dropout that stays on in eval mode; pass training=self.training")
    kept: Node = z
    return kept


@spelled(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
def lower_aten_dropout(build: Build, z: Any, p: float, train: bool) -> Node:
    """Bring ATen's dropout in, where it is switched off."""
    return lower_dropout(build, z, p, train)


@layer(nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout)
def lower_layer(build: Build, module: nn.Module, z: Node) -> Node:
    """Bring layers in that do nothing in eval mode."""
    return z


@spelled(torch.clone, torch.detach, aten.clone.default, aten.detach.default, aten.detach_.default)
@spelled(aten.contiguous.default, aten.alias.default, methods=("contiguous", "clone", "detach"))
def lower_copy(build: Build, z: Any, **kwargs: Any) -> Node:
    """Bring copies in. Bounds differentiate through `detach`: it changes no value."""
    kept: Node = z
    return kept


@spelled(aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.to.device)
@spelled(methods=("to", "float", "double", "type_as"))
def lower_cast(build: Build, z: Any, *args: Any, **kwargs: Any) -> Node:
    """Bring casts between floating types in; bounds run in one type throughout."""
    kinds = [*args, *kwargs.values()]
    if any(isinstance(kind, torch.dtype) and kind not in (torch.float32, torch.float64) for kind in kinds):
        raise build.refuse("a cast that loses precision")
    kept: Node = z
    return kept
