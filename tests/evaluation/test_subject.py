"""The subject: which model is evaluated, and in which precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.evaluation.subject import Subject
from tests.defenses.contract_cases import blobs, fitted


def test_a_head_in_float64_behind_a_float32_net_is_evaluated_as_it_is() -> None:
    head = fitted("GaussianProcessHead")
    subject = Subject.of(head, None, "cpu", "auto")
    assert subject.precision == "float32"
    assert subject.model is head


class Mixed(nn.Module):
    """Parameters of one dtype, and buffers of several."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 16, dtype=dtype))
        for kind in (torch.float16, torch.float32, torch.float64, torch.int64):
            self.register_buffer(str(kind).removeprefix("torch."), torch.ones(3, dtype=kind))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


@pytest.mark.parametrize(
    ("own", "precision"), [(torch.float32, "float64"), (torch.float64, "float32"), (torch.float16, "float32")]
)
def test_another_precision_converts_a_copy_and_the_buffers_of_the_parameters_dtype(
    own: torch.dtype, precision: str
) -> None:
    model, wanted = Mixed(own), getattr(torch, precision)
    moved = Subject.of(model, None, "cpu", precision).model
    assert isinstance(moved, Mixed)
    assert moved(torch.ones(1, 1, 4, 4, dtype=wanted)).dtype == moved.weight.dtype == wanted
    for name, buffer in model.named_buffers():
        assert moved.get_buffer(name).dtype == (wanted if buffer.dtype == own else buffer.dtype)
        assert str(buffer.dtype) == f"torch.{name}"
    assert model.weight.dtype == own


def test_without_parameters_the_buffers_follow_the_precision() -> None:
    model = fitted("NearestNeighbour")
    assert Subject.of(model, None, "cpu", "auto").model is model
    double = Subject.of(model, None, "cpu", "float64")
    assert double.model(double.images(blobs(4).images)).dtype == torch.float64
