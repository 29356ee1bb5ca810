"""What front ends find, and how one call of a trace is run and read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from robustbench_lite.certify.ir import Node, Source

__all__: list[str] = []


@dataclass(frozen=True)
class Trace:
    """What a front end found: a graph, the module its names refer to, and the tensors it made itself."""

    graph: fx.Graph
    owner: nn.Module
    constants: dict[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """The result of one call: its values on the two batches, and its node where it is a tensor."""

    values: tuple[Any, Any]
    node: Node | None = None
    parts: tuple[Seen, ...] = ()

    @property
    def operand(self) -> Any:
        """What a lowering gets to see: a node, a static value, or a mark that the batch size is in it."""
        if self.node is not None:
            return self.node
        return self.values[0] if _same(*self.values) else BATCH_DEPENDENT


class _BatchDependent:
    """Stands for a number that changes with the batch size."""


BATCH_DEPENDENT = _BatchDependent()


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def invoke(node: fx.Node, args: Any, kwargs: Any, owner: nn.Module | None = None) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_module" and owner is not None:
        return owner.get_submodule(str(node.target))(*args, **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def run(node: fx.Node, env: dict[fx.Node, Seen], owner: nn.Module, batch: int) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: env[used].values[batch])
    return invoke(node, args, kwargs, owner)


def alias(env: dict[fx.Node, Seen], seen: Seen) -> None:
    """Let every name of a tensor that was changed in place mean its new value."""
    if isinstance(seen.values[0], Tensor):
        for other, before in env.items():
            if before.values[0] is seen.values[0]:
                env[other] = seen


def name_of(target: Any) -> str:
    return target if isinstance(target, str) else str(getattr(target, "__name__", target)).removesuffix(".int")


def reads_tensor(reads: list[Seen]) -> bool:
    return any(isinstance(seen.values[0], Tensor) for seen in reads)


def holds(mark: object, arguments: Any) -> bool:
    if isinstance(arguments, (tuple, list)):
        return any(holds(mark, part) for part in arguments)
    if isinstance(arguments, dict):
        return any(holds(mark, part) for part in arguments.values())
    return arguments is mark


def is_tensor(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(attrgetter(name)(model), Tensor)
    except AttributeError:
        return False


def source_of(node: fx.Node) -> Source:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, cls = stack[-1] if stack else ("", "")
    path = re.sub(r"^(L\['self'\]\.?|L__self__\.?)", "", str(path))
    cls = cls.__name__ if isinstance(cls, type) else str(cls).rsplit(".", 1)[-1]
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or node.stack_trace or "")
    own = [(file, line) for file, line in frames if "/torch/" not in file]
    line = f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else ""
    return Source(node.name, f"{path!r} ({cls})" if path else "", line)
