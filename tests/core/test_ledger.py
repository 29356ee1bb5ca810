"""What samples have spent, booked late and in full."""

from __future__ import annotations

import pytest
import torch

from robustbench_lite.core.ledger import Ledger


def test_payments_add_up_whatever_the_order_of_rows():
    ledger = Ledger(4, torch.device("cpu"))
    some, others = torch.tensor([0, 2]), torch.tensor([2, 2, 3])
    for rows, forwards, backwards in [(some, 1, 0), (some, 2, 1), (others, 1, 0), (some, 1, 1), (some.clone(), 5, 0)]:
        ledger.pay(rows, forwards, backwards)
    assert ledger.forwards.tolist() == [9, 0, 11, 1]
    assert ledger.backwards.tolist() == [2, 0, 2, 0]
    ledger.pay(others, 1)
    assert ledger.forwards.tolist() == [9, 0, 13, 2]


def test_rows_in_inference_mode_are_booked_at_once():
    ledger = Ledger(3, torch.device("cpu"))
    with torch.inference_mode():
        rows = torch.tensor([0, 1])
        ledger.pay(rows, 1)
        rows += 1
    assert ledger.forwards.tolist() == [1, 1, 0]


def test_rows_changed_before_they_are_booked_are_refused():
    ledger, rows = Ledger(3, torch.device("cpu")), torch.tensor([0, 1])
    ledger.pay(rows, 1)
    rows += 1
    with pytest.raises(ValueError, match="changed in place"):
        ledger.pay(rows, 1)
