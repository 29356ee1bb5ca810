"""The second front end: torch.export, which follows what torch.fx cannot (no_grad blocks, shapes in control flow)."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from torch import Tensor, nn

from robustbench_lite.certify.traces import Trace

__all__: list[str] = []


def trace(model: nn.Module, batch: Tensor) -> Trace:
    """Return the trace of a model on a batch of at least two images; the size of the batch stays open.

    Raises:
        Exception: whatever stops torch.export; data-dependent control flow does.
    """
    with _quiet():
        open_batch = ({0: torch.export.Dim("batch", min=2)},)
        program = torch.export.export(model, (batch,), dynamic_shapes=open_batch, strict=False)
        unguarded = "check_guards" in inspect.signature(program.module).parameters
        owner = program.module(check_guards=False) if unguarded else program.module()
    graph = owner.graph
    if program.call_spec.out_spec is not None and program.call_spec.out_spec.is_leaf():
        output = next(node for node in graph.nodes if node.op == "output")
        if isinstance(output.args[0], (tuple, list)):
            output.args = (output.args[0][0],)
    return Trace(graph, owner, {})


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back torch.export's warnings about itself, and what it dumps before an error that we report."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = logger.disabled
    try:
        logger.disabled = True
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before
