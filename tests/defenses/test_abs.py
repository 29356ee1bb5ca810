from __future__ import annotations

import copy
import inspect
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save
from torch import Tensor, nn

from robustbench_lite.attacks import FMN, EnvelopeAttack, LatentDescent
from robustbench_lite.core.insides import Generative
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses._latents import draw_latents
from robustbench_lite.defenses.abs import ABS, BinaryABS
from robustbench_lite.evaluation.fingerprint import fingerprint
from robustbench_lite.models import create_model
from tests.defenses.abs_toys import Curved, around


def images(n: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_grid(decoder: Curved, x: Tensor, radius: float, beta: float) -> Tensor:
    """Energies (B, K) by brute force over a grid of latents."""
    axis = torch.linspace(-radius, radius, 241, dtype=torch.float64)
    z = torch.cartesian_prod(*[axis] * decoder.latent_size).view(-1, decoder.latent_size)
    z = z[z.norm(dim=1) <= radius + 1e-12]
    made = decoder(z[:, None].expand(-1, decoder.num_classes, -1)).flatten(2).detach()
    energies = [(made - one.flatten()).square().sum(dim=2) + beta / 2 * z.square().sum(dim=1)[:, None] for one in x]
    return torch.stack([e.amin(dim=0) for e in energies])


@pytest.mark.parametrize(
    ("latent_size", "radius", "beta"), [(1, 5.0, 1.0), (2, 5.0, 0.3), (2, 0.5, 1.0), (1, 1.0, 0.0)]
)
def test_the_inner_search_finds_the_minimum(latent_size: int, radius: float, beta: float) -> None:
    decoder, x = Curved(latent_size=latent_size), images()
    found = around(decoder, latents=200, steps=60, learning_rate=0.1, radius=radius, beta=beta).explain(x)
    expected = by_grid(decoder, x, radius, beta)
    assert (found.energies <= expected + 1e-4).all()
    assert (found.energies >= expected - 0.02).all()  # what lies between two points of the grid
    assert (found.latents.norm(dim=2) <= radius + 1e-9).all()
    away = (decoder(found.latents) - x[:, None]).square().flatten(2).sum(dim=2)
    assert torch.allclose(away + beta / 2 * found.latents.square().sum(dim=2), found.energies)
    assert torch.allclose(
        around(decoder, latents=200, steps=60).reconstruct(x),
        decoder(around(decoder, latents=200, steps=60).explain(x).latents),
    )


def test_more_search_never_explains_worse() -> None:
    decoder, x = Curved(), images()
    energies = [around(decoder, latents=20, steps=steps).explain(x).energies for steps in (0, 1, 5, 20)]
    for shorter, longer in pairwise(energies):
        assert (longer <= shorter + 1e-12).all()


def test_the_fixed_latents_are_normal_without_the_least_likely() -> None:
    z = draw_latents(1000, 8, 0.1, 5.0, 3)
    everything = draw_latents(1000, 8, 0.0, 100.0, 3)
    assert len(z) == 900
    lengths = everything.norm(dim=1).sort().values
    assert z.norm(dim=1).max() <= lengths[899]
    assert abs(everything.mean()) < 0.05 and abs(everything.std() - 1) < 0.05
    assert torch.equal(z, draw_latents(1000, 8, 0.1, 5.0, 3))
    assert not torch.equal(z, draw_latents(1000, 8, 0.1, 5.0, 4))
    assert draw_latents(50, 8, 0.0, 1.0, 0).norm(dim=1).max() <= 1 + 1e-12


def test_gradients_are_those_of_the_minimum_over_latents() -> None:
    model = around(Curved(), latents=300, steps=200, learning_rate=0.05)
    x, h = images(2).requires_grad_(), 1e-4
    logits = model(x)
    steps = h * torch.eye(9, dtype=torch.float64).view(9, 1, 1, 3, 3)
    probes = torch.cat([x.detach() + steps.flatten(0, 1).unsqueeze(1), x.detach() - steps.flatten(0, 1).unsqueeze(1)])
    up, down = model(probes.flatten(0, 1)).view(2, 9, 2, 3)
    differences = (up - down).detach() / (2 * h)  # (9, 2, 3)
    for label in range(3):
        slope = torch.autograd.grad(logits[:, label].sum(), x, retain_graph=True)[0].flatten(1)
        assert torch.allclose(slope.T, differences[..., label], atol=2e-4, rtol=1e-3)


def test_logits_are_scaled_energies_and_the_posterior_flattens_far_away() -> None:
    model, x = around(Curved(), latents=100, scale=3.0, eta=1e-3), images()
    s = -3.0 * model.explain(x).energies
    assert torch.allclose(model(x), s)
    expected = (s.exp() + 1e-3) / (s.exp().sum(dim=1, keepdim=True) + 3e-3)
    assert torch.allclose(model.posterior(x), expected)
    far = model.posterior(torch.full((1, 1, 3, 3), 9.0, dtype=torch.float64))
    assert torch.allclose(far, torch.full_like(far, 1 / 3), atol=1e-6)


@pytest.mark.parametrize("values", [1, 16 * 27, 10**6])  # that descend together: one image, 16 images, all
def test_each_image_is_searched_for_by_itself(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []
    real = ABS._search
    monkeypatch.setattr("robustbench_lite.defenses.abs.CPU_VALUES", values)
    monkeypatch.setattr(ABS, "_search", lambda self, part, *rest: parts.append(len(part)) or real(self, part, *rest))
    model, x = around(Curved(), latents=100), images(40)
    model(x)
    assert parts == {1: [1] * 40, 16 * 27: [16, 16, 8], 10**6: [40]}[values]
    assert torch.allclose(model(x), torch.cat([model(one[None]) for one in x]), atol=1e-9)


def test_what_is_kept_follows_the_weights_and_is_no_part_of_the_model() -> None:
    decoder, x = Curved(), images()
    model = around(decoder, latents=100, steps=0)
    before, name = model(x), fingerprint(model)
    assert fingerprint(model) == name
    assert list(model.state_dict()) == ["decoder.matrix", "decoder.offset"]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        decoder.offset += 1
    fresh = around(copy.deepcopy(decoder), latents=100, steps=0)
    assert torch.equal(model(x), fresh(x))
    assert not torch.allclose(model(x), before)
    assert torch.equal(twin(x), before)
    with torch.inference_mode():
        assert torch.equal(around(decoder, latents=100)(x), around(decoder, latents=100)(x.clone()))
    model.float()
    assert torch.allclose(model(x.float()).double(), fresh(x), atol=1e-2)


def test_the_deployed_weights_are_the_decoders_and_fit_into_the_zoo() -> None:
    model = ABS(create_model("class_vaes"))
    assert all(name.startswith("decoder.") for name in model.state_dict())
    assert len(save(model.state_dict())) < 1_000_000
    assert isinstance(model, Generative)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_its_attacks_break_it_and_none_within_the_better_bound(norm: str) -> None:
    model = around(Curved(), latents=200, steps=10)
    x = images(4).clamp(0.05, 0.95)
    y, threat = model.predict(x), Lp(norm, None)
    distances = torch.stack([attack(model, x, y, threat).distance for attack in model.adaptive_attacks(threat)])
    assert distances.isfinite().any(dim=0).all()
    for bound in model.certifiers():
        if bound.supports(threat):
            estimate = bound(model, x, y, Lp(norm, 0.1)).estimate
            assert estimate is not None
            assert (distances.amin(dim=0) >= estimate * (1 - 1e-3)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_binary_abs_falls_through_its_view_near_the_nearest_cut_image_of_another_answer(norm: str) -> None:
    model, x = around(Curved(), BinaryABS, latents=100, steps=2), images(4).clamp(0.05, 0.95)
    y = model.predict(x)
    cuts = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 9)
    moved = (cuts != (x > 0.5).flatten(1).unsqueeze(1)) * (x.flatten(1) - 0.5).abs().unsqueeze(1)
    far = torch.linalg.vector_norm(moved, ord=torch.inf if norm == "linf" else 2, dim=2)
    exact = far.masked_fill(model.predict(cuts.view(-1, 1, 3, 3)) == y.unsqueeze(1), torch.inf).amin(dim=1)
    attack, threat = FMN(steps=60), Lp(norm, None)
    walked = LatentDescent()(model, x, y, threat, view=model.attack_view()).distance
    found = attack(model, x, y, threat, view=model.attack_view()).distance
    assert (torch.minimum(found, walked) >= exact).all()
    assert found.isfinite().all() and walked.isfinite().all()
    assert (torch.minimum(found, walked) / exact).median() < 2.5
    assert not attack(model, x, y, threat).success.any()  # the gradient of the cut is 0


def test_attacks_are_chosen_by_threat() -> None:
    model = around(Curved())
    for norm, eps in (("linf", 0.1), ("l2", None), ("l1", 2.0), ("l0", 3)):
        assert [type(a) for a in model.adaptive_attacks(Lp(norm, eps))] == [EnvelopeAttack, LatentDescent]
    assert model.adaptive_attacks(RotationTranslation()) == []
    assert around(Curved(), BinaryABS).certifiers() == []


def test_latents_that_follow_start_from_those_before_and_end_no_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustbench_lite.defenses.abs.CPU_VALUES", 16 * 27)  # 16 images of 9 pixels by 3 classes
    model, x = around(Curved(), latents=200, steps=20), images()
    found = model.explain(x)
    moved = (x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)).clamp(0, 1)
    stale = (moved[:, None] - found.images).square().flatten(2).sum(dim=2) + found.latents.square().sum(dim=2) / 2
    few, many = (model.follow(moved, found.latents, steps) for steps in (2, 100))
    assert (few.energies <= stale + 1e-12).all() and (many.energies <= few.energies + 1e-12).all()
    assert torch.allclose(many.energies, model.explain(moved).energies, atol=0.02)
    assert torch.allclose(model.decoder(many.latents), many.images)
    many_images = images(40, seed=2)
    apart = torch.cat([model.follow(one[None], model.explain(one[None]).latents, 3).energies for one in many_images])
    together = model.follow(many_images, model.explain(many_images).latents, 3).energies
    assert torch.allclose(together, apart, atol=1e-9)
    with pytest.raises(ValueError, match="the decoders make images"):
        model.follow(torch.rand(1, 1, 4, 4, dtype=torch.float64), found.latents[:1], 2)


def test_logits_at_an_explanation_have_its_gradient_and_the_cut_that_of_the_identity() -> None:
    x = images().requires_grad_()
    for kind in (ABS, BinaryABS):
        model = around(Curved(), kind, latents=100, scale=3.0)
        found = model.explain(x)
        logits = model.logits_at(x, found)
        assert torch.allclose(logits, model(x))
        slope = torch.autograd.grad(logits[:, 1].sum(), x)[0]
        assert torch.allclose(slope, -6.0 * (model.seen(x.detach()) - found.images[:, 1]))


def test_binary_abs_explains_the_cut_image_and_weighs_by_class() -> None:
    decoder, x = Curved(), images()
    plain = around(decoder, latents=100)
    binary = around(decoder, BinaryABS, latents=100, factors=[1, 0.5, 2])
    assert isinstance(binary, BinaryABS) and binary.settings()["factors"] == [1.0, 0.5, 2.0]
    expected = plain((x > 0.5).double()) * torch.tensor([1, 0.5, 2], dtype=torch.float64)
    assert torch.allclose(binary(x), expected)
    nudged = torch.where(x > 0.5, 0.51, 0.49).double()
    assert torch.equal(binary(nudged), binary(x))
    leaf = x.clone().requires_grad_()
    assert not binary(leaf).requires_grad or not torch.autograd.grad(binary(leaf).sum(), leaf)[0].any()


def test_the_view_of_binary_abs_has_its_logits_and_a_sigmoids_gradient() -> None:
    binary = around(Curved(), BinaryABS, latents=100)
    x = images().requires_grad_()
    logits = binary.attack_view()(x)
    assert torch.equal(logits, binary(x))
    slope = torch.autograd.grad(logits[:, 0].sum(), x)[0]
    cut = (x > 0.5).double()
    inner = -2 * binary.scale * (cut - binary.explain(x).images[:, 0])
    s = (10 * (x - 0.5)).sigmoid()
    assert torch.allclose(slope, inner * 10 * s * (1 - s))


@pytest.mark.parametrize("cls", [ABS, BinaryABS])
def test_its_config_says_what_its_class_does(cls: type[ABS]) -> None:
    name = {ABS: "abs", BinaryABS: "binary_abs"}[cls]
    told = yaml.safe_load((Path(__file__).parents[2] / f"conf/defense/{name}.yaml").read_text())["wrapper"]
    known = {field: value.default for field, value in inspect.signature(cls).parameters.items() if field != "net"}
    assert told == {"_target_": f"robustbench_lite.defenses.{cls.__name__}", "_partial_": True, **known}


@pytest.mark.parametrize(
    "settings",
    [
        {"latents": 0},
        {"steps": -1},
        {"learning_rate": 0.0},
        {"radius": float("nan")},
        {"drop": 1.0},
        {"beta": -1.0},
        {"eta": -1},
    ],
)
def test_bad_settings(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        around(Curved(), **settings)


@pytest.mark.parametrize("cls", [ABS, BinaryABS])
def test_decoders_for_a_single_class_are_refused_at_once(cls: type[ABS]) -> None:
    with pytest.raises(ValueError, match="2 classes, got decoders for 1"):  # `explain` and its bounds are no calls
        around(Curved(classes=1), cls)


def test_bad_nets_images_and_factors() -> None:
    with pytest.raises(TypeError, match="class_vaes"):
        ABS(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="decoders make images"):
        around(Curved())(torch.rand(2, 1, 4, 4))
    for factors in ([1.0, 1.0], [1.0, 0.0, 1.0]):
        with pytest.raises(ValueError, match="factors"):
            around(Curved(), BinaryABS, factors=factors)
