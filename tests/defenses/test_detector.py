from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.core.insides import Rejecting
from robustbench_lite.core.models import ABSTAIN, INVALID, predict, rejects
from robustbench_lite.defenses import Deploy, Detector, StandardTraining
from robustbench_lite.models import create_model
from robustbench_lite.training import train
from tests.defenses.contract_cases import MODEL, blobs


class Bright(Detector):
    """Suspects bright images."""

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), x.flatten(1).mean(dim=1)


def net() -> nn.Module:
    options = dict(MODEL)
    return create_model(options.pop("name"), **options).eval()


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.1, 0.5])
def test_at_most_the_rate_of_held_out_images_is_rejected_and_one_more_would_be_too_many(fpr: float) -> None:
    detector, held_out = Bright(net(), fpr), blobs(150, "calibration", seed=1)
    detector.fit(blobs(), held_out)
    refused = (predict(detector, held_out.images) == ABSTAIN).sum()
    assert refused == int(fpr * 150)


def test_what_is_above_the_threshold_is_refused_and_what_is_not_finite_is_invalid() -> None:
    detector = Bright(net())
    detector.fit(blobs(), blobs(90, "calibration", seed=1))
    assert rejects(detector)
    assert isinstance(detector, Rejecting)
    x = torch.stack([torch.zeros(1, 6, 6), torch.ones(1, 6, 6), torch.full((1, 6, 6), torch.nan)])
    answers = predict(detector, x).tolist()
    assert answers[0] >= 0
    assert answers[1:] == [ABSTAIN, INVALID]


def test_other_rates_can_be_tried() -> None:
    detector, held_out = Bright(net()), blobs(90, "calibration", seed=1)
    detector.calibrate(held_out, fpr=0.1)
    assert (predict(detector, held_out.images) == ABSTAIN).sum() == 9
    assert detector.settings() == {"fpr": 0.05}


def test_faults_are_named() -> None:
    with pytest.raises(ValueError, match="fpr"):
        Bright(net(), fpr=0)
    for ask in (Bright(net()), Bright(net()).predict):
        with pytest.raises(ValueError, match="fit"):
            ask(blobs(2).images)
    with pytest.raises(ValueError, match="calibration"):
        Bright(net()).fit(blobs(), None)
    with pytest.raises(ValueError, match="at least 20 calibration samples, got 19"):
        Bright(net(), fpr=0.05).fit(blobs(), blobs(19, "calibration"))


def test_deploy_trains_wraps_and_fits() -> None:
    objective = Deploy(StandardTraining(), partial(Bright, fpr=0.1))
    held_out = blobs(90, "calibration", seed=1)
    detector = train(net(), blobs(), objective, epochs=20, learning_rate=1e-2, device="cpu", calibration=held_out)
    assert isinstance(detector, Bright)
    assert not detector.training
    assert (detector(blobs().images).argmax(dim=1) == blobs().labels).double().mean() > 0.95
    assert not detector.threshold.isnan()


def test_deploy_wants_a_wrapper() -> None:
    with pytest.raises(TypeError, match="Wrapper"):
        train(net(), blobs(), Deploy(StandardTraining(), nn.Sequential), epochs=0, device="cpu")  # type: ignore[arg-type]
