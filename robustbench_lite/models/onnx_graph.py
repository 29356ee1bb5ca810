"""ONNX graphs made fit for onnx2torch, and its PyTorch graphs made fit for tracing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["free_batch", "lowered", "with_plain_reshapes"]

OPSET = 17  # the newest whose operators onnx2torch 1.5.15 knows; of later ones it lacks Reshape, Identity, ReduceMean
_NEWER = {"allowzero": 0, "noop_with_empty_axes": 0}  # attributes at their defaults, which older versions do not have


def lowered(proto: ModelProto) -> ModelProto:
    """Return the net in the newest version of ONNX's operators that onnx2torch knows; as it is where that cannot be."""
    from onnx import checker, version_converter

    for node in proto.graph.node:
        plain = [a for a in node.attribute if a.name not in _NEWER or a.i != _NEWER[a.name]]
        if node.op_type == "Reshape" and 0 not in (_constants(proto).get(node.input[1]) or [0]):
            plain = [a for a in plain if a.name != "allowzero"]  # says nothing where no size is zero
        del node.attribute[:]
        node.attribute.extend(plain)
    _without_identities(proto)
    if all(entry.domain or entry.version <= OPSET for entry in proto.opset_import):
        return proto
    try:
        older = version_converter.convert_version(proto, OPSET)
        checker.check_model(older)
    except (RuntimeError, checker.ValidationError, version_converter.ConvertError):
        return proto  # onnx2torch names the operator that it does not know
    return older


def free_batch(proto: ModelProto) -> ModelProto:
    """Return the net with a batch of any size, where it was exported for a fixed one.

    Sizes of reshapes that repeat the fixed batch become "as it comes". What else depends on it is not found here.
    """
    from onnx import helper

    held = {weight.name for weight in proto.graph.initializer}
    (given,) = (value for value in proto.graph.input if value.name not in held)
    batch = given.type.tensor_type.shape.dim[0].dim_value
    if not batch:
        return proto
    constants = _constants(proto)
    for node in _on_the_way(proto, given.name):
        sizes = constants.get(node.input[1]) if node.op_type == "Reshape" else None
        if sizes and sizes[0] == batch:
            name = f"{node.output[0]}_shape_of_any_batch"
            proto.graph.initializer.append(helper.make_tensor(name, 7, [len(sizes)], [0, *sizes[1:]]))  # 7: int64
            node.input[1] = name
    for value in (given, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del proto.graph.value_info[:]  # shapes inside, told for the fixed batch
    return proto


def with_plain_reshapes(net: fx.GraphModule, x: Tensor) -> fx.GraphModule:
    """Return onnx2torch's net with reshapes that neither branch on a shape nor compute one, so that it can be traced.

    Args:
        net: in eval mode; it is changed.
        x: inputs, at least 2.

    Raises:
        RuntimeError: the net cannot run on them.
    """
    from onnx2torch.node_converters.reshape import OnnxReshape

    whole, fewer = _Shapes(net), _Shapes(net)
    with torch.no_grad():
        whole.run(x)
        fewer.run(x[:1])
    for node in list(net.graph.nodes):
        if node.op != "call_module" or not isinstance(net.get_submodule(str(node.target)), OnnxReshape):
            continue
        before, after = whole.of.get(node.args[0]), whole.of[node]
        of_each = before is not None and before[0] == after[0] == len(x) and fewer.of[node] == (1, *after[1:])
        if of_each:
            with net.graph.inserting_before(node):
                last = len(after) == 2
                plain = net.graph.call_method("flatten", (node.args[0], 1)) if last else net.graph.call_method(
                    "reshape", (node.args[0], -1, *after[1:])
                )  # fmt: skip
            node.replace_all_uses_with(plain)
            net.graph.erase_node(node)
    net.graph.eliminate_dead_code()
    net.delete_all_unused_submodules()
    net.recompile()
    return net


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of what each node gives."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self.of: dict[Any, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.of[n] = tuple(result.shape)
        return result


def _without_identities(proto: ModelProto) -> None:
    """Let nodes that share a weight name it directly: onnx2torch looks for weights among the initializers alone."""
    weights = {weight.name for weight in proto.graph.initializer}
    ends = {value.name for value in proto.graph.output}
    copies = [n for n in proto.graph.node if n.op_type == "Identity" and n.input[0] in weights]
    original = {node.output[0]: node.input[0] for node in copies if node.output[0] not in ends}
    for node in list(proto.graph.node):
        if node.op_type == "Identity" and node.output[0] in original:
            proto.graph.node.remove(node)
        for place, name in enumerate(node.input):
            node.input[place] = original.get(name, name)


def _constants(proto: ModelProto) -> dict[str, list[int]]:
    """Return the whole numbers that the graph holds as constant vectors, by name."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    kept = {name: tensor for name, tensor in tensors.items() if tensor.data_type == 7 and len(tensor.dims) == 1}
    return {name: [int(size) for size in numpy_helper.to_array(tensor)] for name, tensor in kept.items()}


def _on_the_way(proto: ModelProto, name: str) -> Iterator[NodeProto]:
    """Yield the nodes whose first argument depends on the input."""
    reached = {name}
    for node in proto.graph.node:  # ONNX orders them so that each comes after what it needs
        if reached.intersection(node.input):
            reached.update(node.output)
            if node.input[0] in reached:
                yield node
