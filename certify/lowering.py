"""From a torch.fx graph, whichever front end made it, to the intermediate representation.

The trace is walked once. Each call runs on two small batches of different size (shapes that differ tell what depends
on the batch), and the operator files say what it becomes.
"""

from __future__ import annotations

import inspect
import operator
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn

from robustbench_lite.certify.errors import UnsupportedOperator
from robustbench_lite.certify.ir import Graph, Node, Source
from robustbench_lite.certify.operators.registry import FUNCTIONS, LAYERS, METHODS, supported
from robustbench_lite.certify.traces import (
    BATCH_DEPENDENT,
    Seen,
    Trace,
    alias,
    holds,
    invoke,
    is_tensor,
    name_of,
    reads_tensor,
    run,
    source_of,
)

__all__: list[str] = []

QUERIES = {"size", "dim", "numel", "ndimension", "getattr", "len", "sym_size", "sym_numel", "get_device"}
QUERIES |= {"is_floating_point"}  # calls on a tensor that do not read its values


def lower(model: nn.Module, trace: Trace, batches: tuple[Tensor, Tensor]) -> Graph:
    """Return the intermediate representation of a trace.

    Args:
        model: whose parameters the graph will read.
        trace: of its forward, in eval mode.
        batches: example images, batches of two different sizes.

    Raises:
        UnsupportedOperator: a call that no operator file brings in.
        ValueError: the model takes several inputs, or does not return logits (B, K).
    """
    walker = _Walker(model, trace, batches)
    seen = walker.walk(trace.graph, trace.owner, [walker.input()])
    if seen.node is None or len(seen.node.shape) != 1 or not seen.node.varies:
        came = seen.values[0]
        kind = f"shape {tuple(came.shape)}" if isinstance(came, Tensor) else type(came).__name__
        raise ValueError(f"a model must return logits (B, K) that depend on its input; for a batch of 2 it gave {kind}")
    return Graph(tuple(walker.nodes), seen.node.index, walker.constants)


class _Walker:
    """Builds the nodes; offers the operator files what `Build` promises."""

    def __init__(self, model: nn.Module, trace: Trace, batches: tuple[Tensor, Tensor]) -> None:
        self.model, self.trace, self.batches = model, trace, batches
        self.nodes: list[Node] = []
        self.constants: dict[str, Tensor] = {}
        self.named: dict[str, Node] = {}
        self.source = Source("input")
        self.shape: tuple[int, ...] = tuple(batches[0].shape[1:])
        self.layer = ""

    # What operator files use.

    def apply(self, op: str, *operands: Any, shape: tuple[int, ...] | None = None, **attributes: Any) -> Node:
        inputs = [self._operand(value) for value in operands if value is not None]
        varies = op == "input" or any(node.varies for node in inputs)
        place = tuple(node.index for node in inputs)
        node = Node(len(self.nodes), op, place, attributes, self.shape if shape is None else shape, varies, self.source)
        self.nodes.append(node)
        return node

    def parameter(self, name: str) -> Node | None:
        value = getattr(self.trace.owner.get_submodule(self.layer), name)
        return None if value is None else self._named(f"{self.layer}.{name}" if self.layer else name, value)

    def refuse(self, reason: str) -> UnsupportedOperator:
        return UnsupportedOperator(f"{self.source}: {reason}; supported operators: {supported()}")

    # The walk.

    def input(self) -> Seen:
        return Seen(self.batches, self.apply("input"))

    def walk(self, graph: fx.Graph, owner: nn.Module, arguments: list[Seen]) -> Seen:
        env: dict[fx.Node, Seen] = {}
        left = {node: len(node.users) for node in graph.nodes}
        for node in graph.nodes:
            self.source = source_of(node)
            if node.op == "placeholder":
                env[node] = self._placeholder(node, arguments)
            elif node.op == "get_attr":
                env[node] = self._attribute(str(node.target), owner)
            elif node.op == "output":
                return self._output(node, env)
            else:
                env[node] = seen = self._call(node, env, owner)
                alias(env, seen)
            for used in node.all_input_nodes:
                left[used] -= 1
                if left[used] == 0:
                    del env[used]
        raise ValueError("the trace has no output")

    def _placeholder(self, node: fx.Node, arguments: list[Seen]) -> Seen:
        if arguments:
            return arguments.pop(0)
        if not node.args:
            raise ValueError(f"a model must take one input, the images; this one also wants {node.target!r}")
        return Seen((node.args[0], node.args[0]))

    def _output(self, node: fx.Node, env: dict[fx.Node, Seen]) -> Seen:
        result = node.args[0]
        if isinstance(result, fx.Node):
            return env[result]
        if isinstance(result, (tuple, list)) and all(isinstance(part, fx.Node) for part in result):
            parts = tuple(env[part] for part in result if isinstance(part, fx.Node))
            return Seen((tuple(part.values[0] for part in parts), tuple(part.values[1] for part in parts)), parts=parts)
        return Seen((result, result))

    def _attribute(self, name: str, owner: nn.Module) -> Seen:
        value = self.trace.constants[name] if name in self.trace.constants else attrgetter(name)(owner)
        return Seen((value, value), self._named(name, value) if isinstance(value, Tensor) else None)

    def _named(self, name: str, value: Tensor) -> Node:
        if name not in self.named:
            if not is_tensor(self.model, name) or name in self.trace.constants:
                self.constants[name] = value.detach()
            self.named[name] = self.apply("parameter", name=name, shape=tuple(value.shape))
        return self.named[name]

    def _operand(self, value: Any) -> Node:
        if isinstance(value, Node):
            return value
        if isinstance(value, (bool, int, float)):
            return self.apply("literal", value=float(value), shape=())
        raise self.refuse(f"an operand of type {type(value).__name__.strip('_')}")

    def _call(self, node: fx.Node, env: dict[fx.Node, Seen], owner: nn.Module) -> Seen:
        reads = [env[used] for used in node.all_input_nodes]
        name = name_of(node.target)
        if name == "wrap_with_set_grad_enabled":
            inner = env[node.args[1]].values[0]  # type: ignore[index]
            return self.walk(inner.graph, inner, [env[used] for used in node.args[2:]])  # type: ignore[index]
        if node.target is operator.getitem and reads[0].parts:
            return reads[0].parts[node.args[1]]  # type: ignore[index]
        values = (run(node, env, owner, 0), run(node, env, owner, 1))
        varies = any(seen.node is not None and seen.node.varies for seen in reads)
        if not isinstance(values[0], Tensor):
            if varies and values[0] is not None and name not in QUERIES and reads_tensor(reads):
                raise self.refuse(f"{name} is not supported: there is no rule for it")
            return Seen(values)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: env[used].operand)
        if not varies:
            return Seen(values, self._fixed(node, env, values, args, kwargs))
        return Seen(values, self._varying(node, owner, values, args, kwargs))

    def _fixed(self, node: fx.Node, env: dict[fx.Node, Seen], values: Any, args: Any, kwargs: Any) -> Node:
        """Add a call that depends on parameters and constants alone; it runs again at each evaluation."""
        if values[0].shape != values[1].shape or holds(BATCH_DEPENDENT, (args, kwargs)):
            raise self.refuse(f"{name_of(node.target)} makes a tensor that depends on the batch size")
        if node.op == "call_module":
            raise self.refuse("a layer applied to a tensor that does not depend on the input")
        operands = [used for used in node.all_input_nodes if env[used].node is not None]
        static = {used: env[used].values[0] for used in node.all_input_nodes if env[used].node is None}

        def call(*tensors: Tensor) -> Tensor:
            given = static | dict(zip(operands, tensors, strict=True))
            inputs, named = fx.map_arg((node.args, node.kwargs), given.__getitem__)
            result: Tensor = invoke(node, inputs, named)
            return result

        shape = tuple(values[0].shape)
        return self.apply("compute", *(env[used].node for used in operands), call=call, shape=shape)

    def _varying(self, node: fx.Node, owner: nn.Module, values: Any, args: Any, kwargs: Any) -> Node:
        """Add a call that depends on the input, by the operator file that knows it."""
        shapes = tuple(values[0].shape), tuple(values[1].shape)
        sizes = tuple(len(batch) for batch in self.batches)
        if not values[0].ndim or (shapes[0][0], shapes[1][0]) != sizes or shapes[0][1:] != shapes[1][1:]:
            raise self.refuse(f"{name_of(node.target)} mixes the batch with other dimensions: {shapes[0]}")
        self.shape = shapes[0][1:]
        if node.op == "call_module":
            self.layer = str(node.target)
            module = owner.get_submodule(self.layer)
            lowering, args = self._layer_lowering(module), (module, *args)
        else:
            table: Any = FUNCTIONS if node.op == "call_function" else METHODS
            lowering = table.get(node.target)
        if lowering is None:
            raise self.refuse(f"{name_of(node.target)} is not supported: there is no rule for it")
        if holds(BATCH_DEPENDENT, (args, kwargs)) and lowering is not METHODS["view"]:
            raise self.refuse(f"{name_of(node.target)} with an argument that depends on the batch size")
        try:
            inspect.signature(lowering).bind(self, *args, **kwargs)
        except TypeError as error:
            raise self.refuse(f"{name_of(node.target)} is not supported in this form ({error})") from None
        result: Node = lowering(self, *args, **kwargs)
        return result

    def _layer_lowering(self, module: nn.Module) -> Any:
        if module._forward_hooks or module._forward_pre_hooks:
            raise self.refuse("a layer with forward hooks")
        for cls in type(module).__mro__:
            if cls in LAYERS and type(module).forward is cls.forward:
                return LAYERS[cls]
        raise self.refuse(f"{type(module).__name__} is not supported: there is no rule for it")
