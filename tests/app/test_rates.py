"""`fpr`: a detector's threshold, set on the calibration split."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from robustbench_lite.app import building
from robustbench_lite.core.models import ABSTAIN
from robustbench_lite.data import load_data
from robustbench_lite.defenses import Detector

DIGITS = {"_target_": "robustbench_lite.data.digits.digits", "name": "digits", "split": "test"}


def plain(entry: str, **others: Any) -> dict[str, Any]:
    node = {"_target_": "robustbench_lite.zoo.load_defense", "name": f"digits/{entry}"}
    return {"defense": node, "model": None, "data": DIGITS, "name": None, "limit": None, **others}


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_the_threshold_rejects_that_share_of_the_calibration_split(rate: float) -> None:
    config = plain("deep_rbf", fpr=rate)
    defense = building.model(config)
    assert isinstance(defense, Detector)
    with torch.no_grad():
        rejected = int((defense.predict(load_data("digits", "calibration").images) == ABSTAIN).sum())
    assert rejected == round(200 * rate)
    assert building.row_name(config, defense) == f"digits/deep_rbf, fpr {100 * rate:g} %"


def test_names_without_a_rate() -> None:
    config = plain("standard", fpr=None)
    assert building.row_name(config, building.model(config)) == "digits/standard"
    assert building.row_name({**config, "name": "mine"}, building.model(plain("deep_rbf"))) == "mine"
    assert building.row_name(plain("deep_rbf"), building.model(plain("deep_rbf"))) == "digits/deep_rbf, fpr 5 %"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (plain("standard", fpr=0.05), "SmallCNN rejects none: leave fpr out"),
        (plain("deep_rbf", fpr=1.0), r"in \(0, 1\), got 1.0"),
        (plain("deep_rbf", fpr="5 %"), "got '5 %'"),
        (plain("deep_rbf", fpr=0.001), "needs at least 1000 calibration samples, got 200"),
        (plain("deep_rbf", fpr=0.05, data={"_target_": DIGITS["_target_"]}), "needs a calibration split"),
    ],
)
def test_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        building.model(config)
