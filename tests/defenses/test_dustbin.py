from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustbench_lite.core.models import ABSTAIN, frozen
from robustbench_lite.core.rng import Streams
from robustbench_lite.defenses._out_distribution import KINDS, out_of_distribution
from robustbench_lite.defenses.base import Batch, Step
from robustbench_lite.defenses.dustbin import Dustbin, DustbinTraining
from robustbench_lite.models import create_model
from robustbench_lite.training import train
from tests.defenses.contract_cases import MODEL, blobs

STEP = Step(0, 1, 0)


def net(seed: int = 0) -> nn.Module:
    options = dict(MODEL)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model(options.pop("name"), **options)


def batch_of(count: int = 12, **changes: torch.Tensor) -> Batch:
    data = blobs(count)
    return Batch(changes.get("x", data.images), changes.get("y", data.labels), data.indices)


def streams_of(count: int = 12) -> Streams:
    return Streams.from_generator(None, torch.arange(count))


def widened(model: nn.Module, row: nn.Linear) -> nn.Module:
    """The same function as one net with K + 1 outputs."""
    last = list(model.children())[-1]
    whole = nn.Linear(last.in_features, last.out_features + 1)
    whole.weight.data = torch.cat([last.weight.data, row.weight.data])
    whole.bias.data = torch.cat([last.bias.data, row.bias.data])
    return nn.Sequential(*list(model.children())[:-1], whole)


def test_the_loss_is_that_of_a_net_with_one_more_output() -> None:
    model, objective, batch = net(), DustbinTraining(kinds=["uniform"], weight=0.5), batch_of()
    row = objective.setup(model, blobs(12))
    nn.init.normal_(row.weight)
    noise = streams_of().fork(0).uniform(1, 6, 6)
    whole = widened(model, row)
    extra = torch.full_like(batch.y, 3)
    expected = F.cross_entropy(whole(batch.x), batch.y) + 0.5 * F.cross_entropy(whole(noise), extra)
    assert torch.allclose(objective.loss(model, batch, STEP, row, streams_of()), expected)


def test_the_score_is_how_far_the_extra_output_is_above_the_others() -> None:
    defense, x = Dustbin(net()), blobs(12).images
    nn.init.normal_(defense.row.weight)
    nn.init.ones_(defense.row.bias)
    whole = widened(defense.net, defense.row)(x)
    logits, score = defense.answer(x)
    assert torch.allclose(logits, whole[:, :3])
    assert torch.allclose(score, whole[:, 3] - whole[:, :3].max(dim=1).values, atol=1e-6)


def test_the_threshold_0_is_the_rule_of_the_original() -> None:
    defense = train(
        net(), blobs(), DustbinTraining(), epochs=30, learning_rate=1e-2, device="cpu",
        calibration=blobs(90, "calibration", 1),
    )  # fmt: skip
    assert isinstance(defense, Dustbin)
    test, noise = blobs(90, "test", 2), torch.rand(100, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    assert (defense.predict(test.images) == test.labels).double().mean() > 0.8
    assert (defense.predict(noise) == ABSTAIN).double().mean() > 0.9
    assert (defense.predict(blobs(90, "calibration", 1).images) == ABSTAIN).sum() == 4  # 5 % of 90
    defense.threshold.zero_()
    whole, x = widened(defense.net, defense.row), torch.cat([test.images, noise])
    answers = whole(x).argmax(dim=1)
    assert torch.equal(defense.predict(x), torch.where(answers == 3, ABSTAIN, answers))
    assert len(answers.unique()) == 4


def test_the_row_learned_alone_is_the_best_one() -> None:
    model, data = net(), blobs()
    with frozen(model), torch.no_grad():
        defense = Dustbin(model, kinds=["uniform", "mixes"])
        logits, features, outside = defense._with_outsiders(data)
        defense.learn(data)

        def loss(row: nn.Linear) -> float:
            spread = features.std(dim=0)
            extra = (features @ row.weight.double().mT + row.bias.double()).squeeze(1)
            target = torch.where(outside, 3, logits.argmax(dim=1))
            value = F.cross_entropy(torch.cat([logits, extra[:, None]], dim=1), target)
            norm = (row.weight.double() * spread).square().sum() + row.bias.double().square().sum()
            return float(value + 1e-3 * norm)

        best = loss(defense.row)
        for entry in (features.std(dim=0) > 1e-3).nonzero().flatten().tolist():
            for change in (-0.05, 0.05):
                defense.row.weight[0, entry] += change
                assert loss(defense.row) > best
                defense.row.weight[0, entry] -= change


def test_a_row_that_was_trained_is_kept() -> None:
    defense = Dustbin(net())
    nn.init.ones_(defense.row.weight)
    defense.learn(blobs())
    assert (defense.row.weight == 1).all()


@pytest.mark.parametrize("kind", ["pixels", "blocks"])
def test_shuffled_images_have_the_pixels_of_the_image(kind: str) -> None:
    batch = batch_of(x=torch.rand(12, 3, 8, 8))
    made = KINDS[kind](batch, streams_of())
    assert torch.equal(made.flatten(2).sort(dim=2).values, batch.x.flatten(2).sort(dim=2).values)
    assert not torch.equal(made, batch.x)
    grey = batch_of(x=torch.rand(12, 1, 8, 8).expand(-1, 3, -1, -1))
    same = KINDS[kind](grey, streams_of())
    assert torch.equal(same[:, 0], same[:, 2])  # channels move together


def test_blocks_stay_whole() -> None:
    x = torch.rand(1, 1, 8, 12)
    made = KINDS["blocks"](batch_of(1, x=x), streams_of(1))
    before, after = ({tuple(c) for c in i.unfold(2, 2, 2).unfold(3, 3, 3).reshape(16, 6).tolist()} for i in (x, made))
    assert before == after
    assert len(before) == 16


def test_blocks_of_odd_images_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks"):
        KINDS["blocks"](batch_of(x=torch.rand(12, 1, 11, 11)), streams_of())


def test_mixes_are_convex_and_of_different_classes() -> None:
    y = torch.arange(12) % 3
    x = y.reshape(-1, 1, 1, 1).expand(-1, 1, 6, 6) / 2.0
    made = KINDS["mixes"](batch_of(x=x, y=y), streams_of())
    value = made[:, 0, 0, 0]
    assert (made == value.reshape(-1, 1, 1, 1)).all()
    pure = x[:, 0, 0, 0]
    share = (value - pure).abs()  # of the way to a neighbour at distance 0.5 or 1
    assert (((share >= 0.2) & (share <= 0.3)) | ((share >= 0.4) & (share <= 0.6))).all()


def test_without_another_class_the_partner_is_noise() -> None:
    made = KINDS["mixes"](batch_of(x=torch.zeros(12, 1, 6, 6), y=torch.zeros(12, dtype=torch.int64)), streams_of())
    assert made.std() > 0.1
    assert made.max() <= 0.6


def test_each_source_serves_its_share_and_no_sample_looks_at_its_neighbours() -> None:
    data = blobs(300)
    batch, streams = Batch(data.images, data.labels, data.indices), Streams.from_generator(None, data.indices)
    others = replace(data, images=torch.full_like(data.images, 0.123))
    made = out_of_distribution(batch, ["uniform", "pixels"], streams, others)
    assert (made == 0.123).flatten(1).all(dim=1).double().mean() == pytest.approx(1 / 3, abs=0.1)
    half = Batch(data.images[::2], data.labels[::2], data.indices[::2])
    again = out_of_distribution(half, ["uniform", "pixels"], Streams.from_generator(None, data.indices[::2]), others)
    assert torch.equal(again, made[::2])


def test_another_data_set_alone_will_do_if_it_fits() -> None:
    objective = DustbinTraining(kinds=[], others=blobs(20, seed=9))
    assert objective.setup(net(), blobs()).weight.shape == (1, 16)
    defense = train(net(), blobs(), objective, epochs=1, device="cpu", calibration=blobs(90, "calibration", 1))
    assert isinstance(defense, Dustbin)
    assert defense.settings()["kinds"] == []  # a card tells no kind of image that it never saw
    again = Dustbin(net(), **defense.settings())
    again.load_state_dict(defense.state_dict())
    assert torch.equal(again.eval()(blobs(9).images), defense(blobs(9).images))
    odd = replace(blobs(20), images=torch.rand(20, 1, 5, 5))
    with pytest.raises(ValueError, match=r"\(1, 6, 6\)"):
        DustbinTraining(others=odd).setup(net(), blobs())


def test_faults_are_named() -> None:
    with pytest.raises(ValueError, match="kinds"):
        DustbinTraining(kinds=[])
    with pytest.raises(ValueError, match="kinds"):
        Dustbin(net(), kinds=[]).learn(blobs())
    with pytest.raises(ValueError, match="snow"):
        Dustbin(net(), kinds=["snow"])
    with pytest.raises(ValueError, match="weight"):
        DustbinTraining(weight=0)
    with pytest.raises(ValueError, match="calibration"):
        train(net(), blobs(), DustbinTraining(), epochs=0, device="cpu")


def test_a_net_that_changes_its_logits_has_no_last_layer_to_widen() -> None:
    with pytest.raises(ValueError, match="logits"):
        Dustbin(nn.Sequential(net(), nn.Softmax(dim=1))).answer(torch.rand(2, 1, 6, 6))
