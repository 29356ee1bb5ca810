"""Linear bounds as a library: what is refused and how, derivatives, and models left as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.certify import CROWN, CROWNIBP, AlphaCROWN, Cascade, UnsupportedOperator, bounds
from robustbench_lite.certify.slopes import Ascent
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp

METHODS = ("crown_ibp", "crown", "alpha_crown")
CERTIFIERS = (CROWNIBP, CROWN, AlphaCROWN, Cascade)
X = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2])
THREAT = Lp("linf", 0.1)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    head = nn.Linear(8, 3)
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), head)


@pytest.mark.parametrize("certifier", CERTIFIERS)
def test_certifiers_refuse_threats_they_cannot_bound(certifier):
    for threat in (RotationTranslation(degrees=10, pixels=1), Lp("l2", None)):
        assert not certifier().supports(threat)
        with pytest.raises(ValueError, match="does not support"):
            certifier()(small_net(), X, Y, threat)
    for norm in ("linf", "l2", "l1", "l0"):
        assert certifier().supports(Lp(norm, 1.0))


@pytest.mark.parametrize("method", METHODS)
def test_bounds_refuse_threats_they_cannot_start_from(method):
    with pytest.raises(ValueError, match="linf, l2, l1, l0"):
        bounds(small_net(), RotationTranslation(degrees=10, pixels=1), method, x=X)
    with pytest.raises(ValueError, match="eps"):
        bounds(small_net(), Lp("l1", None), method, x=X)
    with pytest.raises(ValueError, match=r"lower must not exceed upper; at \(0, 0, 0, 0\)"):
        bounds(small_net(), (X + 0.1, X), method)
    with pytest.raises(ValueError, match="finite"):
        bounds(small_net(), (X, X + float("inf")), method)


@pytest.mark.parametrize(("wrong", "meant"), [("crwn", "crown"), ("alpha-crown", "alpha_crown"), ("CROWN", "crown")])
def test_unknown_methods_are_told_what_they_may_mean(wrong, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        bounds(small_net(), THREAT, wrong, x=X)


@pytest.mark.parametrize("method", ["ibp", *METHODS])
def test_memory_budgets_start_at_a_byte(method):
    for budget in (0, -1):
        with pytest.raises(ValueError, match="memory_budget"):
            bounds(small_net(), THREAT, method, x=X, memory_budget=budget)


@pytest.mark.parametrize("certifier", CERTIFIERS)
def test_memory_budgets_of_certifiers_start_at_a_byte(certifier):
    with pytest.raises(ValueError, match="memory_budget"):
        certifier(memory_budget=0)


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"step_size": 0.0}, {"step_size": float("nan")}, {"tolerance": -1.0}]
)
def test_hyper_parameters_out_of_range(options):
    for certifier in (AlphaCROWN, Cascade):
        with pytest.raises(ValueError, match=next(iter(options))):
            certifier(**options)


def test_coefficients_of_interval_bounds_do_not_exist():
    with pytest.raises(ValueError, match="return_linear"):
        bounds(small_net(), THREAT, "ibp", return_linear=True, x=X)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 2, 3), (1, 2, 3)])
def test_wrong_specifications(method, shape):
    with pytest.raises(ValueError, match=r"C must have shape \(S, 3\) or \(3, S, 3\)"):
        bounds(small_net(), THREAT, method, torch.zeros(shape), x=X)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_and_an_empty_specification(method):
    for found, shape in (
        (bounds(small_net(), THREAT, method, torch.zeros(0, 3), True, X), (3, 0)),
        (bounds(small_net(), THREAT, method, None, True, X[:0]), (0, 3)),
    ):
        assert tuple(found[0].shape) == tuple(found[1].shape) == tuple(found[2].lower_shift.shape) == shape


@pytest.mark.parametrize("certifier", CERTIFIERS)
def test_an_empty_batch_has_an_empty_certificate(certifier):
    assert certifier()(small_net(), X[:0], Y[:0], THREAT).margins.shape == (0, 3)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x.flatten(1))
        if h.sum() > 0:  # the line to name
            h = 2 * h
        return h


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.layer((x + z).flatten(1))


@pytest.mark.parametrize("method", METHODS)
def test_models_without_bounds(method):
    with pytest.raises(ValueError, match=r"test_linear_arguments\.py:\d+ in forward"):
        bounds(Branching(), THREAT, method, x=X)
    with pytest.raises((ValueError, TypeError), match=r"TwoInputs|several inputs"):
        bounds(TwoInputs(), THREAT, method, x=X)
    mixing = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(UnsupportedOperator, match="running statistics"):
        bounds(mixing, THREAT, method, x=X)
    broken = small_net()
    broken[0].weight.data[0, 0, 1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"'0\.weight'"):
        bounds(broken, THREAT, method, x=X)


@pytest.mark.parametrize("certifier", CERTIFIERS)
def test_models_without_margins(certifier):
    with pytest.raises(ValueError, match="at least 2 logits"):
        certifier()(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), X, Y * 0, THREAT)
    broken = small_net()
    broken[0].weight.data[0, 0, 1, 1] = float("nan")
    certificate = certifier()(broken, X, Y, THREAT)
    assert not certificate.certified.any() and not certificate.radius.any()


def test_nan_in_a_weight_that_few_rows_meet_never_certifies():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 3))
    net[3].weight.data[2, 1] = float("inf")
    for certifier in CERTIFIERS:
        assert not certifier()(net, X, net(X).argmax(1), THREAT).certified.any()


@pytest.mark.parametrize("method", METHODS)
def test_inference_mode_changes_nothing(method):
    net = small_net()
    expected = bounds(net, THREAT, method, x=X)
    with torch.inference_mode():
        found = bounds(net, THREAT, method, x=X)
        with_own_images = bounds(net, THREAT, method, x=X.clone())
    for side in (0, 1):
        torch.testing.assert_close(found[side], expected[side].detach())
        torch.testing.assert_close(with_own_images[side], expected[side].detach())


@pytest.mark.parametrize("certifier", CERTIFIERS)
def test_inference_mode_changes_no_certificate(certifier):
    net = small_net()
    expected = certifier()(net, X, Y, THREAT).margins
    with torch.inference_mode():
        torch.testing.assert_close(certifier()(net, X, Y, THREAT).margins, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_left_as_it_was_and_read_as_it_is(method):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(8, 3))
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[5].bias.grad = torch.ones(3)
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    before = bounds(net, THREAT, method, x=X)[0]
    assert [module.training for module in net.modules()] == modes
    assert not net[0].weight.requires_grad and net[0].weight.grad is None
    assert [p.grad is None for p in net.parameters()].count(False) == 1 and net[5].bias.grad.tolist() == [1, 1, 1]
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    with torch.no_grad():
        net[5].bias += 1
        torch.testing.assert_close(bounds(net, THREAT, method, x=X)[0], before + 1)
        net[1].running_mean += 0.3
        net.eval()
        torch.testing.assert_close(bounds(net, (X, X), method)[0], net(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_modules_have_the_bounds_of_what_was_compiled(method):
    net = small_net()
    for plain, compiled in zip(
        bounds(net, THREAT, method, x=X), bounds(torch.compile(net), THREAT, method, x=X), strict=True
    ):
        assert torch.equal(plain, compiled)


# Derivatives.

SMOOTH = ["mlp", "leaky_relu", "conv_stride", "conv_groups", "max_pool", "avg_pool", "residual", "normalized", "mixed"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*SMOOTH, "elu", "softplus", "sigmoid", "arctan", "gelu", "gelu_tanh", "silu"])
def test_gradients_agree_with_finite_differences(name, method, make_net, images, monkeypatch):
    net = make_net(name)
    C = torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64)
    x = 0.2 + 0.6 * images[:1]
    if method == "alpha_crown":  # bounds say that they hold the slopes fixed
        slopes = Ascent(steps=2).best_slopes
        kept: list[dict[int, Tensor]] = []

        def best_slopes(self, net, rows):
            kept[:] = kept or [slopes(net, rows)]
            return kept[0]

        monkeypatch.setattr(Ascent, "best_slopes", best_slopes)
    weights = [p for p in net.parameters() if p.ndim > 1][:2]

    def in_parameters(*_weights: Tensor) -> Tensor:
        return torch.cat([torch.cat(bounds(net, Lp(norm, 0.05), method, C, x=x)) for norm in ("linf", "l2", "l1")])

    def in_box(lower: Tensor, upper: Tensor) -> Tensor:
        return torch.cat(bounds(net, (lower, upper), method, C))

    box = (x - 0.03).requires_grad_(), (x + 0.04).requires_grad_()
    assert torch.autograd.gradcheck(in_box, box, fast_mode=True)
    kept = []
    if method == "alpha_crown":
        return  # other norms would need other slopes
    assert torch.autograd.gradcheck(in_parameters, weights, fast_mode=True)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_stay_finite_where_boxes_are_points(method, make_net, images):
    for name in ("mlp", "max_pool", "softplus", "sigmoid", "gelu", "elu"):
        net = make_net(name)
        for threat in (Lp("linf", 0.0), Lp("l2", 0.0), Lp("l1", 0.0), Lp("l0", 0.0), Lp("l2", 1e-3)):
            x = images[:2].clone().requires_grad_()
            total = sum(bound.sum() for bound in bounds(net, threat, method, x=x))
            gradients = torch.autograd.grad(total, [x, *net.parameters()])
            assert all(g.isfinite().all() for g in gradients), (name, threat.norm)


def test_crown_ibp_trains_a_certified_net():
    torch.manual_seed(0)
    x = torch.rand(64, 1, 4, 4)
    y = (x[:, 0, 0, 0] > 0.5).long()
    x[:, 0, 0, 0] = y * 0.8 + 0.1
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    C = torch.tensor([[1.0, -1.0]]) * (1 - 2 * y).reshape(-1, 1, 1)
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    before = CROWNIBP()(net, x, y, Lp("linf", 0.2)).certified.sum()
    for _ in range(60):
        lower, _ = bounds(net, Lp("linf", 0.2), "crown_ibp", C, x=x)
        optimiser.zero_grad()
        nn.functional.softplus(-lower).mean().backward()
        optimiser.step()
    assert before < 32
    assert CROWNIBP()(net, x, y, Lp("linf", 0.2)).certified.all()
