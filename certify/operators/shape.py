"""Operators that only move coordinates: reshape, permute, slices. Ends move with them, and so does the input's ball."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.registry import Build, Pulled, Value, interval, layer, linear, spelled
from robustbench_lite.certify.rows import Dense, OneHot, Rows
from robustbench_lite.certify.transpose import transposed

__all__: list[str] = []

aten = torch.ops.aten


@spelled(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, aten.flatten.using_ints, aten.view.default)
@spelled(aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
@spelled(aten.unflatten.int, methods=("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"))
def lower_reshape(build: Build, z: Any, *args: Any, **kwargs: Any) -> Node:
    """Bring everything in that keeps the order of the coordinates: only the result's shape matters."""
    return build.apply("reshape", z, shape_after=build.shape)


@layer(nn.Flatten, nn.Unflatten)
def lower_flatten_layer(build: Build, module: nn.Module, z: Node) -> Node:
    """Bring nn.Flatten and nn.Unflatten in."""
    return lower_reshape(build, z)


@spelled(torch.permute, aten.permute.default, methods=("permute",))
def lower_permute(build: Build, z: Any, *dims: Any) -> Node:
    """Bring permutations in that leave the batch in front."""
    order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    rank = len(z.shape) + 1
    order = tuple(d % rank for d in order)
    if order[0] != 0:
        raise build.refuse("a permutation that moves the batch")
    return build.apply("permute", z, dims=order)


@spelled(torch.transpose, torch.swapaxes, aten.transpose.int, methods=("transpose", "swapaxes"))
def lower_transpose(build: Build, z: Any, dim0: int, dim1: int) -> Node:
    """Bring the exchange of two dimensions in, as a permutation."""
    order = list(range(len(z.shape) + 1))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return lower_permute(build, z, order)


@spelled(operator.getitem, methods=("__getitem__",))
def lower_getitem(build: Build, z: Any, index: Any) -> Node:
    """Bring basic indexing in that leaves the batch whole."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is Ellipsis or isinstance(part, (int, slice)) for part in index):
        raise build.refuse("indexing by a tensor or a list")
    if index[0] is not Ellipsis and index[0] not in (slice(None), slice(0, None)):
        raise build.refuse("indexing that cuts the batch")
    return build.apply("index", z, index=index)


@spelled(aten.slice.Tensor)
def lower_slice(build: Build, z: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Node:
    """Bring ATen's slice of one dimension in."""
    dim = dim % (len(z.shape) + 1)
    if dim == 0:
        if start not in (None, 0) or (end is not None and end < 2**62) or step != 1:
            raise build.refuse("indexing that cuts the batch")
        kept: Node = z
        return kept
    return build.apply("index", z, index=(*[slice(None)] * dim, slice(start, end, step)))


@spelled(torch.select, aten.select.int, methods=("select",))
def lower_select(build: Build, z: Any, dim: int, index: int) -> Node:
    """Bring the choice of one entry of a dimension in."""
    dim = dim % (len(z.shape) + 1)
    if dim == 0:
        raise build.refuse("indexing that cuts the batch")
    return build.apply("index", z, index=(*[slice(None)] * dim, index))


def _varying(z: Value) -> Interval:
    if isinstance(z, Tensor):
        raise TypeError("a moved fixed value is no node of its own")
    return z


@interval("reshape")
def interval_reshape(node: Node, z: Value) -> Interval:
    """Return the reshaped box."""
    return _varying(z).images(lambda t: t.reshape(len(t), *node.attributes["shape_after"]))


@interval("permute")
def interval_permute(node: Node, z: Value) -> Interval:
    """Return the permuted box."""
    return _varying(z).images(lambda t: t.permute(node.attributes["dims"]))


@interval("index")
def interval_index(node: Node, z: Value) -> Interval:
    """Return the chosen coordinates of the box."""
    return _varying(z).images(lambda t: t[node.attributes["index"]])


@linear("reshape")
def linear_reshape(node: Node, rows: Rows, z: Interval) -> Pulled:
    """Return the rows in the shape of the operand."""
    shape = tuple(z.lower.shape[1:])
    if isinstance(rows, OneHot):
        return (replace(rows, shape=shape),), None
    return (Dense(rows.dense().values.reshape(len(rows), *shape), rows.owner, shape),), None


@linear("permute")
def linear_permute(node: Node, rows: Rows, z: Interval) -> Pulled:
    """Return the rows in the order of the operand."""
    return (transposed(lambda t: t.permute(node.attributes["dims"]), rows, tuple(z.lower.shape[1:])),), None


@linear("index")
def linear_index(node: Node, rows: Rows, z: Interval) -> Pulled:
    """Return the rows with 0 for the coordinates that were left out."""
    return (transposed(lambda t: t[node.attributes["index"]], rows, tuple(z.lower.shape[1:])),), None
