"""1-nearest neighbour: its answers by scikit-learn, its certificate by sampling and by exact distances."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from robustbench_lite.attacks import PGD, NearestNeighbourAttack
from robustbench_lite.certify.errors import CannotCertify
from robustbench_lite.core.insides import Neighbours
from robustbench_lite.core.results import Status
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses import Deploy, NearestNeighbour, NearestNeighbourCertificate, NoTraining
from robustbench_lite.models import MLP
from robustbench_lite.training import train
from robustbench_lite.zoo import load_defense, save_entry


def plane(n: int = 40, seed: int = 3) -> Dataset:
    """Return points of the unit square, as images (n, 1, 1, 2), of three classes."""
    points = torch.rand(n, 1, 1, 2, generator=torch.Generator().manual_seed(seed))
    labels = (points[:, 0, 0, 0] > 0.45).long() + ((points[:, 0, 0, 1] > 0.6) & (points[:, 0, 0, 0] > 0.45)).long()
    return Dataset("plane", "train", points, labels, torch.arange(n), 3)


def fitted(data: Dataset) -> NearestNeighbour:
    defense = NearestNeighbour(nn.Identity()).eval()
    defense.fit(data)
    return defense


def digits() -> tuple[NearestNeighbour, Tensor, Tensor]:
    test = load_data("digits").head(60)
    return fitted(load_data("digits", split="train")), test.images, test.labels


def test_answers_are_those_of_scikit_learn() -> None:
    train_set, test = load_data("digits", split="train"), load_data("digits")
    search = KNeighborsClassifier(1, algorithm="brute").fit(train_set.images.flatten(1), train_set.labels)
    defense = fitted(train_set)
    assert np.array_equal(defense.predict(test.images).numpy(), search.predict(test.images.flatten(1)))
    assert torch.equal(defense.predict(train_set.images), train_set.labels)
    assert defense(train_set.images).amax(dim=1).max() == 0  # exactly: what is known is at distance 0


def test_logits_are_distances_and_their_gradients_exact() -> None:
    data, defense = plane(), fitted(plane())
    x = torch.rand(8, 1, 1, 2, generator=torch.Generator().manual_seed(1))
    far = torch.cdist(x.flatten(1), data.images.flatten(1))
    for label in range(3):
        assert torch.allclose(defense(x)[:, label], -far[:, data.labels == label].amin(dim=1), atol=1e-6)
    defense = defense.double()
    assert torch.autograd.gradcheck(defense, x.double().requires_grad_())
    known = data.images[:3].double().requires_grad_()  # at distance 0 the slope is 0, not NaN
    assert torch.autograd.grad(defense(known).sum(), known)[0].isfinite().all()


@pytest.mark.parametrize(("norm", "order"), [("l2", 2.0), ("linf", np.inf), ("l1", 1.0)])
def test_no_point_of_a_fine_grid_within_the_radius_has_another_label(norm: str, order: float) -> None:
    defense = fitted(plane()).double()
    steps = torch.linspace(0, 1, 301, dtype=torch.float64)
    space = torch.cartesian_prod(steps, steps)
    answers = defense.predict(space.reshape(-1, 1, 1, 2))
    x = torch.rand(40, 1, 1, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    label = defense.predict(x)
    exact = torch.cdist(x.flatten(1), space, p=order).masked_fill(answers == label.unsqueeze(1), torch.inf).amin(dim=1)
    for witnesses in (1, 3, 50):
        radius = NearestNeighbourCertificate(witnesses).radius(defense, x, label, norm)
        assert (radius <= exact).all()
        assert (radius / exact).median() > 0.6  # and it says something


def test_more_witnesses_never_prove_less_and_one_proves_at_least_half_the_difference() -> None:
    defense, x, _ = digits()
    label, two = defense.predict(x), (-defense(x)).sort(dim=1).values
    half = (two[:, 1] - two[:, 0]).double() / 2
    radii = [NearestNeighbourCertificate(w).radius(defense, x, label, "l2") for w in (1, 2, 8, 32)]
    assert (radii[0] >= half - 1e-5).all()
    assert all((more >= less).all() for less, more in pairwise(radii))
    assert radii[0].mean() > 1.2 * half.mean()
    assert radii[3].mean() > radii[0].mean()


def test_no_attack_succeeds_inside_the_radius_and_the_exact_one_not_far_outside() -> None:
    defense, x, y = digits()
    radius = NearestNeighbourCertificate().radius(defense, x, y, "l2")
    exact = NearestNeighbourAttack()(defense, x, y, Lp("l2", None)).distance
    right = defense.predict(x) == y
    assert (exact >= radius)[right].all()
    assert (exact <= 1.5 * radius)[right].double().mean() > 0.9
    for norm in ("linf", "l1"):
        inside = NearestNeighbourCertificate().radius(defense, x, y, norm)
        assert inside[right].min() > 0
        found = PGD(steps=15, loss="margin")(defense, x[right], y[right], Lp(norm, inside[right] * 0.999))
        assert not found.success.any()


def test_certificates_say_what_was_asked() -> None:
    defense, x, y = digits()
    certifier, wrong = defense.certifiers()[0], (y + 1) % 10
    radius = certifier.radius(defense, x, y, "l2")
    middle = float(radius.median())
    found = certifier(defense, x, y, Lp("l2", middle))
    assert torch.equal(found.status == Status.VERIFIED, radius > middle)
    assert torch.equal(found.certified, (radius > middle) & (found.prediction == y))
    assert not certifier(defense, x, wrong, Lp("l2", middle)).certified[defense.predict(x) == y].any()
    assert certifier.radius(defense, x, wrong, "l2")[defense.predict(x) == y].max() == 0
    assert certifier.radius(defense, x, y, "l2", max_eps=0.1).max() <= 0.1
    assert not certifier.supports(Lp("l0", 3))
    assert not certifier.supports(Lp("l2", None))
    with pytest.raises(CannotCertify, match="Sequential"):
        certifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), x, y, Lp("l2", 0.1))
    with pytest.raises(ValueError, match="witnesses"):
        NearestNeighbourCertificate(0)


def test_the_radius_between_two_images_is_the_closed_form() -> None:
    images = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.9, 0.5, 0.7, 0.3]]).reshape(2, 1, 2, 2)
    defense = fitted(Dataset("two", "train", images, torch.tensor([0, 1]), torch.arange(2), 2))
    x, y = torch.tensor([0.2, 0.2, 0.4, 0.4]).reshape(1, 1, 2, 2), torch.tensor([0])
    lead = (0.49 + 0.09 + 0.09 + 0.01) - (0.01 + 0.01)  # |x - o|^2 - |x - s|^2, with o - s = (0.8, 0.3, 0.4, -0.1)
    for norm, across in (("l2", (0.64 + 0.09 + 0.16 + 0.01) ** 0.5), ("linf", 1.6), ("l1", 0.8)):
        radius = NearestNeighbourCertificate().radius(defense, x, y, norm)
        assert radius.item() == pytest.approx(lead / (2 * across), rel=1e-6)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_an_exact_tie_is_no_proof_however_it_is_rounded(norm: str) -> None:
    generator, x = torch.Generator().manual_seed(0), torch.full((1, 1, 6, 6), 0.3, dtype=torch.float64)
    blank = Dataset("tie", "train", torch.zeros(2, 1, 6, 6), torch.arange(2), torch.arange(2), 2)
    defense = fitted(blank).double()
    for _ in range(20):
        image = torch.rand(36, generator=generator, dtype=torch.float64)
        mixed = image[torch.randperm(36, generator=generator)]  # as far from a grey image
        defense.points = torch.stack([image, mixed])
        assert NearestNeighbourCertificate().radius(defense, x, defense.predict(x), norm).tolist() == [0]


def test_a_twin_with_another_label_is_no_proof() -> None:
    data = plane()
    twins = torch.cat([data.images, data.images[:1]])
    labels = torch.cat([data.labels, (data.labels[:1] + 1) % 3])
    defense = fitted(Dataset("twins", "train", twins, labels, torch.arange(41), 3))
    radius = NearestNeighbourCertificate().radius(defense, data.images[:1], defense.predict(data.images[:1]), "l2")
    assert radius.tolist() == [0]


def test_nothing_is_trained_and_an_entry_of_the_zoo_is_nearly_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_data("digits", split="train").head(200)
    net, objective = MLP(image_size=8, hidden=[4]), Deploy(NoTraining(), NearestNeighbour)
    defense = train(net, data, objective, epochs=0, device="cpu")
    assert isinstance(defense, NearestNeighbour)
    about = {"description": "d", "source": "s", "command": "c", "seed": 0, "epochs": 0, "hours": 0.0, "figures": {}}
    model = {"name": "mlp", "in_channels": 1, "image_size": 8, "num_classes": 10, "hidden": [4]}
    save_entry("digits/mine", defense, data=data, model=model, root=tmp_path, **about)  # type: ignore[arg-type]
    again, x = load_defense("digits/mine", root=tmp_path), load_data("digits").images[:50]
    assert torch.equal(again(x), defense(x))
    assert (tmp_path / "digits/mine/weights.safetensors").stat().st_size < 100
    with pytest.raises(ValueError, match="epochs=0"):
        train(MLP(image_size=8, hidden=[4]), data, objective, epochs=1, device="cpu")


def test_the_first_images_alone_can_be_kept_and_it_has_the_insides_of_neighbours() -> None:
    defense = NearestNeighbour(nn.Identity(), samples=30)
    defense.fit(plane())
    assert isinstance(defense, Neighbours)
    assert [part.shape for part in defense.references] == [(30, 2)]
    assert defense.settings() == {"samples": 30}


def test_faults_are_named() -> None:
    bare = NearestNeighbour(nn.Identity())
    with pytest.raises(ValueError, match="fit"):
        bare(torch.rand(2, 1, 1, 2))
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 1, 1, 2\), got \(2, 1, 2, 1\)"):
        fitted(plane())(torch.rand(2, 1, 2, 1))
    with pytest.raises(ValueError, match="samples"):
        NearestNeighbour(nn.Identity(), samples=0)
    data = plane()
    for count, labels in ((1, torch.zeros(40, dtype=torch.int64)), (4, data.labels)):
        with pytest.raises(ValueError, match="2 classes or more with an image each"):
            bare.fit(Dataset("few", "train", data.images, labels, data.indices, count))


def test_in_float64_it_tells_apart_what_float32_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(40, 1, 28, 28, generator=generator), torch.arange(40) // 20
    defense = NearestNeighbour(nn.Identity()).eval()
    defense.fit(Dataset("noise", "train", images, labels, torch.arange(40), 2))
    defense = defense.double()
    flat = images.double().flatten(1)
    for lead in (-1e-6, 1e-6):  # by how much the squared distances to two images of a class differ, half way
        way = flat[1::2] - flat[0::2]
        x = (flat[0::2] + flat[1::2]) / 2 + lead / 2 * way / way.square().sum(dim=1, keepdim=True)
        far = torch.cdist(x, flat, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = torch.stack([far[:, labels == label].amin(dim=1) for label in (0, 1)], dim=1)
        assert torch.allclose(defense(x.reshape(-1, 1, 28, 28)), -nearest, rtol=0, atol=1e-10)
