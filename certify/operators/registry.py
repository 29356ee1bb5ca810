"""The tables that operators enter themselves into, and what their functions look like.

An operator file has up to four parts, each under its decorator:

- `spelled(...)`: how torch functions, tensor methods and ATen overloads are brought into the representation;
- `layer(...)`: the same for a torch.nn class;
- `interval(...)`: the rule of interval bounds;
- `lines(...)`: for an activation, the lines that linear bounds put in its place; or
- `linear(...)`: for any other operator, how rows of coefficients over its value become rows over its operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar

from torch import Tensor, nn

from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.lines import Lines
from robustbench_lite.certify.rows import Rows

__all__ = [
    "FUNCTIONS",
    "INTERVAL",
    "LAYERS",
    "LINEAR",
    "LINES",
    "METHODS",
    "WANTED",
    "Build",
    "Pulled",
    "Value",
    "interval",
    "layer",
    "linear",
    "lines",
    "spelled",
    "supported",
]

Value: TypeAlias = Interval | Tensor
Pulled: TypeAlias = tuple[tuple[Rows | None, ...], Tensor | None]  # rows over each operand, None if fixed; shift (N,)


class Build(Protocol):
    """What a front end offers to the function that lowers one call."""

    shape: tuple[int, ...]  # of the call's result, without the batch

    def apply(self, op: str, *operands: Any, shape: tuple[int, ...] | None = None, **attributes: Any) -> Node:
        """Add a node; numbers among the operands become literals, None stays out."""

    def parameter(self, name: str) -> Node | None:
        """Return the node of a tensor of the layer being lowered; None where the layer has None there."""

    def refuse(self, reason: str) -> Exception:
        """Return the error that says why this call is unsupported."""


Lowering: TypeAlias = Callable[..., Node]
Rule: TypeAlias = Callable[..., Interval]
L = TypeVar("L", bound=Callable[..., Node])
R = TypeVar("R", bound=Callable[..., Interval])
LineRule: TypeAlias = Callable[[Node, Interval], Lines]
Want: TypeAlias = Callable[[Node, Interval], Tensor]
P = TypeVar("P", bound=Callable[..., Pulled])

FUNCTIONS: dict[Any, Lowering] = {}  # called as lowering(build, *args, **kwargs), as the torch function would be
METHODS: dict[str, Lowering] = {}
LAYERS: dict[type[nn.Module], Lowering] = {}  # called as lowering(build, module, input)
INTERVAL: dict[str, Rule] = {}  # called as rule(node, *values)
LINES: dict[str, LineRule] = {}  # called as rule(node, box of the operand)
LINEAR: dict[str, Callable[..., Pulled]] = {}  # called as rule(node, rows, *values)
WANTED: dict[str, Want] = {}  # called as rule(node, box of the operand)


def spelled(*functions: Any, methods: tuple[str, ...] = ()) -> Callable[[L], L]:
    """Register a lowering for these functions and for the tensor methods of these names."""

    def register(lowering: L) -> L:
        FUNCTIONS.update(dict.fromkeys(functions, lowering))
        METHODS.update(dict.fromkeys(methods, lowering))
        return lowering

    return register


def layer(*classes: type[nn.Module]) -> Callable[[L], L]:
    """Register a lowering for these torch.nn classes."""

    def register(lowering: L) -> L:
        LAYERS.update(dict.fromkeys(classes, lowering))
        return lowering

    return register


def interval(op: str) -> Callable[[R], R]:
    """Register the interval rule of an operator."""

    def register(rule: R) -> R:
        if op in INTERVAL:
            raise ValueError(f"two interval rules for {op!r}")
        INTERVAL[op] = rule
        return rule

    return register


def lines(op: str) -> Callable[[LineRule], LineRule]:
    """Register the lines around an activation: a function of the node and the box of its operand."""

    def register(rule: LineRule) -> LineRule:
        if op in LINES:
            raise ValueError(f"two line rules for {op!r}")
        LINES[op] = rule
        return rule

    return register


def linear(op: str, wanted: Want | None = None) -> Callable[[P], P]:
    """Register how rows over an operator's value become rows over its operands, a lower bound of them, and a shift.

    Args:
        op: name of the operator.
        wanted: for an operator that is not affine, where it gains from a tighter box of its operand: bool (B, ...).
    """

    def register(rule: P) -> P:
        if op in LINEAR:
            raise ValueError(f"two linear rules for {op!r}")
        LINEAR[op] = rule
        if wanted is not None:
            WANTED[op] = wanted
        return rule

    return register


def supported() -> str:
    """Return the names of all operators, for error messages."""
    return ", ".join(sorted(INTERVAL))
