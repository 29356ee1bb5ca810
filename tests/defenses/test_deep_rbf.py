from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from robustbench_lite.core.models import ABSTAIN
from robustbench_lite.core.rng import Streams
from robustbench_lite.defenses.base import Batch, Step
from robustbench_lite.defenses.deep_rbf import DeepRBF, DeepRBFTraining
from robustbench_lite.models import create_model
from robustbench_lite.training import train
from tests.defenses.contract_cases import MODEL, blobs

STEP = Step(0, 1, 0)


def net(seed: int = 0) -> nn.Module:
    options = dict(MODEL)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model(options.pop("name"), **options)


def trained(objective: DeepRBFTraining) -> DeepRBF:
    defense = train(
        net(), blobs(), objective, epochs=40, learning_rate=1e-2, device="cpu", calibration=blobs(90, "calibration", 1)
    )
    assert isinstance(defense, DeepRBF)
    return defense


@pytest.mark.parametrize("p", [1, 2])
def test_distances_are_sums_of_powers_of_each_class_map(p: int) -> None:
    defense = DeepRBF(net(), rank=2, p=p).double()
    torch.manual_seed(0)
    for parameter in defense.distances.parameters():
        nn.init.normal_(parameter)
    x = torch.rand(5, 1, 6, 6, dtype=torch.float64)
    logits, score = defense.answer(x)
    features, weight, bias = (t.detach().numpy() for t in (defense.net(x), *defense.distances.parameters()))
    by_hand = [[(np.abs(weight[k].T @ phi + bias[k]) ** p).sum() for k in range(3)] for phi in features]
    assert np.allclose(-logits.detach(), by_hand)
    assert np.allclose(score.detach(), np.min(by_hand, axis=1))


def test_the_loss_by_hand() -> None:
    distances, y = torch.tensor([[1.0, 4.0, 12.0], [11.0, 3.0, 2.0]]), torch.tensor([0, 1])
    hinge = DeepRBFTraining(margin=10, form="hinge").objective(distances, y)
    assert hinge.tolist() == pytest.approx([1 + 6 + 0, 3 + 0 + 8])
    soft = DeepRBFTraining(margin=10, form="soft").objective(distances, y)
    assert soft[0].item() == pytest.approx(1 + math.log1p(math.exp(6)) + math.log1p(math.exp(-2)), rel=1e-5)


@pytest.mark.parametrize("form", ["hinge", "soft"])
def test_negatives_are_pushed_away_from_every_class(form: str) -> None:
    distances = torch.tensor([[2.0, 5.0, 9.0]], requires_grad=True)
    loss = DeepRBFTraining(margin=10, form=form).repulsion(distances)
    (slope,) = torch.autograd.grad(loss.sum(), distances)
    assert (slope < 0).all()  # descent on the loss lets each distance grow


def test_the_negatives_are_a_second_term_of_the_loss() -> None:
    data, objective, model = blobs(12), DeepRBFTraining(form="hinge", negatives=["uniform"]), net()
    state, streams = objective.setup(model, data), Streams.from_generator(None, torch.arange(12))
    batch = Batch(data.images, data.labels, data.indices)
    noise = streams.fork(0).uniform(1, 6, 6)
    clean = objective.objective(state(model(data.images)), data.labels).mean()
    expected = clean + objective.repulsion(state(model(noise))).mean()
    assert torch.allclose(objective.loss(model, batch, STEP, state, streams), expected)
    alone = replace(objective, negatives=()).loss(model, batch, STEP, state, streams)
    assert torch.allclose(alone, clean)


def test_noise_is_refused_after_training_with_it() -> None:
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(200, 1, 6, 6, generator=generator)
    defense = trained(DeepRBFTraining())
    assert (defense.predict(noise) == ABSTAIN).double().mean() > 0.95
    test = blobs(90, "test", 2)
    assert (defense.predict(test.images) == test.labels).double().mean() > 0.8


def test_the_threshold_keeps_the_rate() -> None:
    defense, held_out = trained(DeepRBFTraining(fpr=0.1)), blobs(90, "calibration", 1)
    assert (defense.predict(held_out.images) == ABSTAIN).sum() == 9


def test_around_a_trained_net_it_is_discriminant_analysis() -> None:
    data, test = blobs(300), blobs(200, "test", 2)
    noisy = replace(data, images=(data.images + 0.6 * torch.rand(data.images.shape)).clamp(0, 1))
    model = net().eval()
    defense = DeepRBF(model, rank=3).eval()
    defense.learn(noisy)
    with torch.no_grad():
        features, points = model(noisy.images), model(test.images)
        found = defense.answer(test.images)[0].argmax(dim=1)
    reference = LinearDiscriminantAnalysis(priors=np.full(3, 1 / 3)).fit(features.numpy(), data.labels.numpy())
    assert (found.numpy() == reference.predict(points.numpy())).mean() > 0.97


def test_more_rows_than_features_are_zeros() -> None:
    defense = DeepRBF(net(), rank=7).eval()
    defense.learn(blobs(60))
    assert defense.answer(blobs(10, "test", 2).images)[0].isfinite().all()


def test_the_view_ranks_the_classes_alike_and_does_not_saturate() -> None:
    defense, x = trained(DeepRBFTraining(margin=1000.0)), blobs(12, "test", 2).images.requires_grad_()
    view = defense.attack_view()(x)
    assert torch.equal(view.argsort(dim=1), defense(x).argsort(dim=1))
    loss = nn.functional.cross_entropy(view, view.argmax(dim=1), reduction="sum")
    assert (torch.autograd.grad(loss, x)[0].flatten(1).abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin": 0}, "margin"),
        ({"form": "square"}, "hinge"),
        ({"negatives": ["snow"]}, "snow"),
        ({"negatives": ["uniform", "uniform"]}, "once"),
        ({"negatives": "uniform"}, "list"),
        ({"rank": 0}, "rank"),
        ({"p": 3}, "p must be"),
    ],
)
def test_faults_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepRBFTraining(**settings)  # type: ignore[arg-type]


def test_a_class_without_samples_is_named() -> None:
    with pytest.raises(ValueError, match="class 2"):
        DeepRBF(net()).learn(blobs(60).take(blobs(60).labels < 2))
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        DeepRBF(nn.Conv2d(1, 3, 3))
    with pytest.raises(ValueError, match="2 classes"):
        DeepRBF(nn.Linear(3, 1))
