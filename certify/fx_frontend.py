"""The first front end: torch.fx, symbolic tracing with torch.nn's layers as leaves. Fast, and keeps names."""

from __future__ import annotations

from torch import Tensor, fx, nn

from robustbench_lite.certify.traces import Trace

__all__: list[str] = []


class _Tracer(fx.Tracer):
    record_stack_traces = True


def trace(model: nn.Module) -> Trace:
    """Return the trace of a model, which is left as it was.

    torch.fx parks constants of the forward as attributes of the model: they are taken off again.

    Raises:
        Exception: whatever stops torch.fx; data-dependent control flow does.
    """
    before = set(vars(model))
    try:
        graph = _Tracer().trace(model)
    finally:
        parked = {name: vars(model).pop(name) for name in set(vars(model)) - before}
    return Trace(graph, model, {name: value for name, value in parked.items() if isinstance(value, Tensor)})
