"""DeepKNN against an independent search, p-values by hand, and what it refuses."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from robustbench_lite.attacks._neighbours import nearest, squared_distances
from robustbench_lite.core.insides import Neighbours, Rejecting
from robustbench_lite.core.models import ABSTAIN, INVALID, predict
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses import DeepKNN, Deploy, StandardTraining
from robustbench_lite.models import MLP, SmallCNN
from robustbench_lite.training import train
from robustbench_lite.zoo import load_defense, save_entry
from tests.defenses.contract_cases import blobs


def random_net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP(image_size=6, num_classes=3, hidden=[16, 12]).eval()


def noisy(n: int, split: str, seed: int) -> Dataset:
    """Return images that a net mixes up now and then, so that nonconformities vary."""
    data, generator = blobs(n, split, seed), torch.Generator().manual_seed(seed + 100)
    images = (0.45 * data.images + 0.55 * torch.rand(data.images.shape, generator=generator)).clamp(0, 1)
    return Dataset(data.name, split, images, data.labels, data.indices, 3)


def fitted(**settings: Any) -> DeepKNN:
    defense = DeepKNN(random_net(), **{"k": 7, "calibration": 60, **settings})
    defense.fit(noisy(100, "train", 0), noisy(120, "calibration", 1))
    return defense


def activations(net: nn.Module, x: Tensor) -> list[np.ndarray]:
    """Return what the layers of an MLP give, one layer after the other, without hooks."""
    found, out = [], x
    with torch.no_grad():
        for layer in net.children():
            out = layer(out)
            if isinstance(layer, nn.ReLU):
                found.append(out)
    return [a.flatten(1).double().numpy() for a in [*found, out]]


def by_hand(defense: DeepKNN, x: Tensor) -> np.ndarray:
    """Return the nonconformities (B, K) by scikit-learn, from the paper's words."""
    train_set, total = noisy(100, "train", 0), np.zeros((len(x), 3))
    y = train_set.labels.numpy()
    layers = zip(activations(defense.net, train_set.images), activations(defense.net, x), strict=True)
    for reference, query in layers:
        unit = reference / np.linalg.norm(reference, axis=1, keepdims=True)
        asked = query / np.linalg.norm(query, axis=1, keepdims=True)
        search = NearestNeighbors(n_neighbors=defense.k, algorithm="brute").fit(unit - unit.mean(axis=0))
        votes = y[search.kneighbors(asked - unit.mean(axis=0), return_distance=False)]
        total += np.stack([(votes != label).sum(axis=1) for label in range(3)], axis=1)
    return total


def test_the_search_is_that_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, references = (torch.rand(n, 9, generator=generator, dtype=torch.float64) for n in (11, 50))
    distances, rows = NearestNeighbors(n_neighbors=6, algorithm="brute").fit(references).kneighbors(queries)
    for room in (2**24, 120, 1):  # in one block, in blocks of two queries, of one
        monkeypatch.setattr("robustbench_lite.attacks._neighbours.DISTANCES", room)
        found, places = nearest(queries, references, 6)
        assert np.array_equal(places.numpy(), rows)
        assert np.allclose(found.sqrt().numpy(), distances)
    assert torch.allclose(squared_distances(queries, references).sqrt(), torch.cdist(queries, references))
    assert [part.shape for part in nearest(queries[:0], references, 6)] == [(0, 6), (0, 6)]


def test_nonconformities_are_those_of_the_paper() -> None:
    defense, x = fitted(), noisy(60, "test", 2).images
    found = defense.nonconformity(x).numpy()
    assert np.array_equal(found, by_hand(defense, x))
    assert len(np.unique(found)) > 8
    assert np.array_equal(found.sum(axis=1), np.full(60, 2 * 3 * 7))  # a neighbour is of another class for K - 1
    for points, sizes in zip(defense.references, defense.sizes, strict=True):
        assert points.mean(dim=0).abs().max() < 1e-6
        assert torch.allclose(sizes, points.norm(dim=1) ** 2)


def with_scores(scores: list[float], nonconformities: list[list[float]]) -> DeepKNN:
    """Return a defense with these calibration scores that finds these nonconformities, whatever it is asked."""

    class Told(DeepKNN):
        def nonconformity(self, x: Tensor) -> Tensor:
            return torch.tensor(nonconformities)

    told = Told(random_net(), k=2, calibration=len(scores))
    told.scores.copy_(torch.tensor(sorted(scores)))
    told.threshold.fill_(1.0)
    return told


def test_p_values_by_hand() -> None:
    told, x = with_scores([0, 0, 1, 3], [[0, 2, 4], [1, 3, 3], [5, 4, 6]]), torch.zeros(3, 1, 6, 6)
    assert told.p_values(x).tolist() == [[1.0, 0.25, 0.0], [0.5, 0.25, 0.25], [0.0, 0.0, 0.0]]
    assert told.credibility(x).tolist() == [1.0, 0.5, 0.0]
    assert told.confidence(x).tolist() == [0.75, 0.75, 1.0]
    assert told.answer(x)[1].tolist() == [0.0, 0.5, 1.0]


def test_ties_of_p_values_go_to_the_smaller_nonconformity_and_then_to_the_smaller_class() -> None:
    told = with_scores([0, 0, 1, 1], [[5, 4, 6], [6, 6, 3], [6, 5, 5], [1, 0, 1]])
    assert told.p_values(torch.zeros(4, 1, 6, 6))[:3].unique().tolist() == [0.0]
    assert told.predict(torch.zeros(4, 1, 6, 6)).tolist() == [1, 2, 1, 1]


def test_logits_are_ordered_as_p_values_and_then_as_nonconformities() -> None:
    defense, x = fitted(), noisy(200, "test", 3).images
    logits, found, p = defense(x), defense.nonconformity(x), defense.p_values(x)
    assert logits.isfinite().all()
    for a in range(3):
        for b in range(3):
            assert (logits[:, a] > logits[:, b]).equal(found[:, a] < found[:, b])
            assert (p[:, a] >= p[:, b])[logits[:, a] > logits[:, b]].all()


def test_scores_are_nonconformities_of_held_out_samples_for_their_own_labels() -> None:
    defense, held_out = fitted(), noisy(120, "calibration", 1)
    own = defense.nonconformity(held_out.images).gather(1, held_out.labels.unsqueeze(1)).squeeze(1)
    assert torch.equal(defense.scores, own[defense.scored].sort().values)
    assert len(set(defense.scored.tolist())) == 60


def test_trimming_leaves_zeros_out_of_the_count_too() -> None:
    plain, trimmed, x = fitted(), fitted(trim=True), noisy(60, "test", 2).images
    positive = plain.scores[plain.scores > 0]
    assert 0 < len(positive) < 60
    assert torch.equal(trimmed.scores[trimmed.scores >= 0], positive)
    expected = (positive >= plain.nonconformity(x).unsqueeze(2)).sum(dim=2) / len(positive)
    assert torch.allclose(trimmed.p_values(x), expected)
    with pytest.raises(ValueError, match="trim"):
        easy = DeepKNN(random_net(), k=1, layers=["1"], calibration=1, fpr=0.5, trim=True)
        easy.fit(blobs(90), blobs(3, "calibration"))


def test_the_threshold_is_set_by_samples_that_gave_no_score() -> None:
    defense, held_out = fitted(fpr=0.1), noisy(120, "calibration", 1)
    fresh = torch.isin(held_out.indices, defense.scored, invert=True)
    assert fresh.sum() == 60
    scores = 1 - defense.credibility(held_out.images[fresh])
    assert defense.threshold == scores.sort(descending=True).values[6]
    assert 0 < (predict(defense, held_out.images[fresh]) == ABSTAIN).sum() <= 6
    defense.calibrate(held_out, fpr=0.5)
    assert defense.threshold == scores.sort(descending=True).values[30]


def test_p_values_of_fresh_samples_are_no_smaller_than_uniform() -> None:
    defense, data = fitted(), noisy(3000, "test", 5)
    p = defense.p_values(data.images).gather(1, data.labels.unsqueeze(1)).squeeze(1).double()
    for level in (0.1, 0.3, 0.5):  # P(p <= level) <= level, up to the draws of 60 scores and 3,000 samples
        assert (p <= level).double().mean() < level + 3.5 * (level * (1 - level) * (1 / 60 + 1 / 3000)) ** 0.5


def test_hooks_are_gone_after_each_pass_and_after_a_failure() -> None:
    defense = fitted()
    defense(noisy(2, "test", 2).images)
    with pytest.raises(RuntimeError):
        defense(torch.rand(2, 3, 5, 5))
    assert not any(module._forward_hooks for module in defense.modules())


def test_what_is_not_finite_is_invalid() -> None:
    x = torch.stack([torch.full((1, 6, 6), torch.nan), noisy(1, "test", 2).images[0]])
    answers = predict(fitted(), x)
    assert answers[0] == INVALID
    assert answers[1] != INVALID


def test_layers_are_chosen_by_name() -> None:
    defense = fitted(layers=["2", "logits"])
    assert [part.shape for part in defense.references] == [(100, 16), (100, 3)]
    whole = fitted()
    assert torch.equal(defense.references[0], whole.references[0])
    assert torch.equal(defense.references[1], whole.references[2])
    images = DeepKNN(SmallCNN(image_size=8), k=1, calibration=1).embed(torch.rand(2, 1, 8, 8))
    assert [part.shape[1] for part in images] == [256, 128, 100, 10]
    assert all(torch.allclose(part.norm(dim=1), torch.ones(2)) for part in images)


def test_the_first_samples_alone_can_be_kept() -> None:
    assert torch.equal(fitted(samples=40).reference_labels, noisy(100, "train", 0).labels[:40])


def test_it_has_the_insides_that_attacks_look_for() -> None:
    defense, x = fitted(), noisy(4, "test", 2).images.requires_grad_()
    assert isinstance(defense, Neighbours)
    assert isinstance(defense, Rejecting)
    embedded = defense.embed(x)
    assert [part.shape[1:] for part in embedded] == [part.shape[1:] for part in defense.references]
    slope = torch.autograd.grad(torch.cat(embedded, dim=1).square().sum(), x)[0]
    assert slope.abs().flatten(1).amax(dim=1).min() > 0


def test_the_view_mostly_agrees_and_has_gradients() -> None:
    defense, data = fitted(), noisy(200, "test", 6)
    view = defense.attack_view()
    assert (view(data.images).argmax(dim=1) == defense(data.images).argmax(dim=1)).double().mean() > 0.9


def test_double_precision_works() -> None:
    defense, x = fitted(), noisy(20, "test", 2).images
    expected = defense.nonconformity(x)
    assert torch.equal(defense.double().nonconformity(x.double()).float(), expected)
    assert defense.predict(x.double()).shape == (20,)


def test_an_entry_of_the_zoo_brings_its_neighbours_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustbench_lite.zoo.entries.load_data", lambda *_, **__: noisy(100, "train", 0))
    objective = Deploy(StandardTraining(), partial(DeepKNN, k=7, calibration=60))
    held_out, net = noisy(120, "calibration", 1), random_net()
    defense = train(net, noisy(100, "train", 0), objective, epochs=2, device="cpu", calibration=held_out)
    model = {"name": "mlp", "in_channels": 1, "image_size": 6, "num_classes": 3, "hidden": [16, 12]}
    about = {"description": "d", "source": "s", "command": "c", "seed": 0, "epochs": 2, "hours": 0.0, "figures": {}}
    save_entry("blobs/mine", defense, data=noisy(100, "train", 0), model=model, root=tmp_path, **about)  # type: ignore[arg-type]
    again, x = load_defense("blobs/mine", root=tmp_path), noisy(50, "test", 2).images
    assert isinstance(again, DeepKNN)
    assert torch.equal(again(x), defense(x))
    assert torch.equal(again.predict(x), predict(defense, x))
    assert (tmp_path / "blobs/mine/weights.safetensors").stat().st_size < 10_000  # no neighbours in there


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": 2.5}, TypeError, "whole number"),
        ({"k": 8, "calibration": 7}, ValueError, "7 < k = 8"),
        ({"k": 8, "samples": 7}, ValueError, "samples = 7"),
        ({"fpr": 0}, ValueError, "fpr"),
        ({"layers": ["9"]}, ValueError, "no layer '9'; it has: 0, 1"),
        ({"layers": "logits"}, ValueError, "different names"),
        ({"layers": []}, ValueError, "at least one"),
        ({"layers": ["2", "2"]}, ValueError, "different names"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        DeepKNN(random_net(), **settings)


def test_faults_of_samples_are_named() -> None:
    data, held_out = noisy(100, "train", 0), noisy(120, "calibration", 1)
    bare = DeepKNN(random_net(), k=7, calibration=60)
    for ask in (bare, bare.predict, bare.credibility):
        with pytest.raises(ValueError, match="fit"):
            ask(data.images)
    with pytest.raises(ValueError, match="calibration="):
        bare.fit(data, None)
    with pytest.raises(ValueError, match="60 calibration samples for p-values and 20 more for its threshold, got 79"):
        bare.fit(data, held_out.head(79))
    with pytest.raises(ValueError, match="k = 7 neighbours need as many training samples, got 6"):
        bare.fit(data.head(6), held_out)
    one = Dataset("one", "train", data.images, torch.zeros(100, dtype=torch.int64), data.indices, 1)
    with pytest.raises(ValueError, match="2 classes or more, got 1"):
        bare.fit(one, held_out)
    with pytest.raises(ValueError, match=r"no nn.ReLU"):
        DeepKNN(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))
    bare.restore(data)
    with pytest.raises(ValueError, match="fit"):
        bare(data.images)


def test_layers_that_work_in_place_change_nothing() -> None:
    def net(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = (nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Hardtanh(0, 0.1, inplace=inplace), nn.Linear(8, 3))
        return nn.Sequential(*layers)

    x = torch.rand(4, 1, 6, 6)
    with torch.random.fork_rng(devices=[]):
        found = [DeepKNN(net(inplace), k=1, calibration=1).embed(x)[0] for inplace in (False, True)]
    assert torch.equal(*found)


def test_a_layer_that_runs_twice_or_never_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.never, self.last = nn.ReLU(), nn.ReLU(), nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.twice(self.twice(x.flatten(1))))

    for layer, words in (("twice", "one tensor a pass"), ("never", "did not run")):
        with pytest.raises(RuntimeError, match=words):
            DeepKNN(Odd(), layers=[layer], k=1, calibration=1).embed(torch.rand(2, 1, 6, 6))
