"""Graphs of models: traced by the first front end that can, checked against the model, kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robustbench_lite.certify import export_frontend, fx_frontend
from robustbench_lite.certify.errors import UnsupportedOperator
from robustbench_lite.certify.forward import answer
from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Graph
from robustbench_lite.certify.lowering import lower
from robustbench_lite.certify.operators import registry
from robustbench_lite.certify.precision import full_precision
from robustbench_lite.certify.propagate import propagate
from robustbench_lite.certify.traces import Trace

__all__ = ["graph_of"]


_INTERNAL = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, type(None))


class _Seen:
    """What a trace may have read of a module besides its tensors: plain attributes, and how many hooks."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, weakref.ref(module)
        attributes = vars(module)
        self.size, self.hooks = len(attributes), _hooks(module)
        # Of what cannot change it is enough to see that it is the same object.
        self.fixed = [(k, v) for k, v in attributes.items() if k not in _INTERNAL and _is_fixed(v)]
        self.others = [(k, _snapshot(v)) for k, v in attributes.items() if k not in _INTERNAL and not _is_fixed(v)]

    def fits(self, name: str, module: nn.Module) -> bool:
        """Say whether it is the same module in the same place, and nothing of that has changed."""
        attributes = vars(module)
        return (
            self.module() is module
            and self.name == name
            and self.size == len(attributes)
            and self.hooks == _hooks(module)
            and all(attributes.get(key, self) is value for key, value in self.fixed)
            and all(key in attributes and _snapshot(attributes[key]) == value for key, value in self.others)
        )


@dataclass(frozen=True)
class _Kept:
    graphs: dict[tuple[int, ...], Graph]
    modules: list[_Seen]

    def fits(self, model: nn.Module) -> bool:
        now = list(model.named_modules())
        return len(now) == len(self.modules) and all(
            seen.fits(name, module) for (name, module), seen in zip(now, self.modules, strict=True)
        )


def _hooks(module: nn.Module) -> tuple[int, int]:
    return len(module._forward_hooks), len(module._forward_pre_hooks)


def _is_fixed(value: object) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_fixed, value)))


def _snapshot(value: object) -> object:
    """Return a copy of numbers, text and containers of them; `...` stands for anything else."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return [_snapshot(part) for part in value]
    if isinstance(value, Mapping):
        return [(_snapshot(key), _snapshot(part)) for key, part in value.items()]
    return ...


_KEPT: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def graph_of(model: nn.Module, x: Tensor, *, recheck: bool = False) -> Graph:
    """Return the graph of a model's forward in eval mode, for images of the shape of `x`.

    Traced by torch.fx, else by torch.export, and compared with the model on two inputs: a graph that computes something
    else is refused. Kept for each model and image shape until a submodule is exchanged or one of its plain attributes
    (a stride, a flag, a list or dict of numbers) changes; parameters are not kept, they are read at each evaluation.

    Args:
        model: an nn.Module from images (B, C, H, W) to logits (B, K).
        x: images, of which the shape counts, and one as an example.
        recheck: whether to compare a kept graph with the model once more, and to trace anew where they disagree: a
            forward may read state that no attribute shows (an object, a global). Certifiers ask for it.

    Raises:
        TypeError: not an nn.Module.
        UnsupportedOperator: an operator without a rule, or control flow that depends on the input's values.
        ValueError: several inputs, no logits (B, K), or a model that changes its input in place.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"bounds need an nn.Module, whose layers can be read; got {type(model).__name__}")
    model = uncompiled(model)
    kept = _KEPT.get(model)
    if kept is None or not kept.fits(model):
        kept = _KEPT[model] = _Kept({}, [_Seen(name, module) for name, module in model.named_modules()])
    shape = tuple(x.shape[1:])
    if recheck and shape in kept.graphs and not _agrees(kept.graphs[shape], model, x):
        kept.graphs.clear()
    if shape in kept.graphs:
        return kept.graphs[shape]
    graph = trace(model, x)
    if graph.checked:
        kept.graphs[shape] = graph
    return graph


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that torch.compile wrapped, whose parameters are the same; any other module itself."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def trace(model: nn.Module, x: Tensor, front_ends: tuple[str, ...] = ("fx", "export")) -> Graph:
    """Trace a model anew; see `graph_of`. Its modes are as before afterwards."""
    errors: list[UnsupportedOperator] = []
    with torch.no_grad(), _evaluating(model), full_precision(x.device):
        two, three = _examples(model, x)
        expected = answer(model, two)
        if not isinstance(expected, Tensor) or expected.ndim != 2 or len(expected) != 2:
            came = tuple(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
            raise ValueError(f"a model must return logits of shape (B, K); for a batch of 2 it returned {came}")
        for front_end in front_ends:
            try:
                graph = lower(model, _FRONT_ENDS[front_end](model, two), (two.clone(), three.clone()))
                return replace(graph, checked=_check(graph, model, two, expected))
            except UnsupportedOperator as error:
                errors.append(error)
    raise next((error for error in errors if not isinstance(error, _Untraceable)), errors[0])


class _Untraceable(UnsupportedOperator):
    """A front end could not follow the forward."""


def _traced(name: str, front_end: Callable[[nn.Module, Tensor], Trace]) -> Callable[[nn.Module, Tensor], Trace]:
    def attempt(model: nn.Module, x: Tensor) -> Trace:
        try:
            return front_end(model, x)
        except Exception as error:  # tracers raise anything; what they say is passed on
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise _Untraceable(
                f"{type(model).__name__}.forward cannot be traced ({name}: {reason}){_line(error)}: bounds need a "
                "forward whose control flow does not depend on the values of its input; "
                f"supported operators: {registry.supported()}"
            ) from error

    return attempt


_FRONT_ENDS = {
    "fx": _traced("torch.fx", lambda model, x: fx_frontend.trace(model)),
    "export": _traced("torch.export", export_frontend.trace),
}


def _line(error: BaseException) -> str:
    """Return where in the user's code a tracer gave up: the deepest frame outside torch and this package."""
    place, frame = "", error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        package = frame.tb_frame.f_globals.get("__name__", "").split(".")[0]
        if package not in ("torch", "robustbench_lite", "contextlib", "sympy"):
            place = f" at {code.co_filename}:{frame.tb_lineno} in {code.co_name}"
        frame = frame.tb_next
    return place


def _examples(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return batches of two and of three images: the first given one, and random ones in its range."""
    like = next((p for p in model.parameters() if p.is_floating_point()), x)
    first = x[:1].detach().to(like)
    noise = torch.rand((2, *x.shape[1:]), generator=torch.Generator().manual_seed(0)).to(like)
    low, high = (first.amin(), first.amax()) if first.numel() else (0.0, 1.0)
    span = high - low if high > low else 1.0
    three = torch.cat([first, low + span * noise]) if len(first) else low + span * torch.cat([noise, noise[:1]])
    return three[:2].clone(), three


def _check(graph: Graph, model: nn.Module, x: Tensor, expected: Tensor) -> bool:
    """Refuse a graph that does not compute what the model computes; say whether finite logits could tell."""
    point = propagate(graph, model, Interval(x, x))
    if not (expected.isfinite().all() and point.lower.isfinite().all()):
        return False  # the caller meets the NaN itself, and can say more
    gap = float(torch.maximum((point.lower - expected).abs(), (point.upper - expected).abs()).max())
    if gap > 1e-3 * max(1.0, float(expected.abs().max())):
        raise UnsupportedOperator(
            f"the trace of {type(model).__name__} computes something else than the model (they differ by {gap:.3g} on "
            "one input): its forward is stochastic, keeps a state, or changes tensors in place behind a view"
        )
    return True


def _agrees(graph: Graph, model: nn.Module, x: Tensor) -> bool:
    """Say whether a kept graph still computes what the model computes."""
    with torch.no_grad(), _evaluating(model), full_precision(x.device):
        two, _ = _examples(model, x)
        expected = answer(model, two)
        try:
            return _check(graph, model, two, expected)
        except Exception:  # an outdated graph fails in any way; tracing the model anew tells what is the matter
            return False


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
