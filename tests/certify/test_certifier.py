"""IBP as a certifier: what a certificate says, on whose word, and how radii are found."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks import RandomNoise
from robustbench_lite.certify import IBP, CannotCertify, Certifier, bounds
from robustbench_lite.core.models import ABSTAIN, INVALID
from robustbench_lite.core.results import Status
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses import Wrapper


def halfspace() -> nn.Module:
    """Two logits, z_1 - z_0 = sum(x) - 8 over sixteen pixels: every radius is known in closed form."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    net[1].weight.data = torch.stack([-torch.ones(16), torch.ones(16)]) / 2
    net[1].bias.data = torch.tensor([4.0, -4.0])
    return net


def flat(*values: float) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()


X, Y = flat(0.6, 0.4, 0.7, 0.6), torch.tensor([1, 0, 0, 1])  # the third label is wrong
DISTANCE = {"linf": 0.1, "l2": 0.4, "l1": 1.6}  # of the first image; 0.1 * 16^(1/p)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_what_a_certificate_says(norm):
    net, eps = halfspace(), 1.5 * DISTANCE[norm]
    certificate = IBP()(net, X, Y, Lp(norm, eps))
    assert certificate.prediction.tolist() == [1, 0, 1, 1]
    assert certificate.status.tolist() == [Status.UNKNOWN, Status.UNKNOWN, Status.VERIFIED, Status.UNKNOWN]
    assert certificate.certified.tolist() == [False] * 4  # the one that is verified predicts the wrong label
    assert certificate.radius.tolist() == [0, 0, eps, 0]
    margin = (eps / DISTANCE[norm]) * 1.6  # the reach of the threat in the margin
    expected = torch.tensor([1.6 - margin, 1.6 - margin, -3.2 - margin, 1.6 - margin], dtype=torch.float64)
    torch.testing.assert_close(certificate.margins[range(4), 1 - Y], expected, rtol=0, atol=1e-5)
    assert certificate.margins[range(4), Y].isposinf().all()
    assert (certificate.kind, certificate.confidence, certificate.samples.tolist()) == ("deterministic", 1.0, [0] * 4)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_radius_is_the_closed_form_from_below_and_verified(norm):
    net = halfspace()
    radius = IBP().radius(net, X, Y, norm, tolerance=1e-5)
    known = torch.tensor([1, 1, 0, 1], dtype=torch.float64) * DISTANCE[norm]
    assert (radius <= known + 1e-6).all()
    assert (radius >= known - 1e-5 - 1e-6).all()
    assert IBP()(net, X, Y, Lp(norm, radius)).certified.tolist() == [True, True, False, True]
    assert not IBP()(net, X, Y, Lp(norm, radius + 1.1e-5)).certified.any()


def test_radius_stops_at_max_eps_and_refuses_nonsense():
    assert IBP().radius(halfspace(), X, Y, "linf", max_eps=0.05).tolist() == [0.05, 0.05, 0, 0.05]
    with pytest.raises(ValueError, match="positive"):
        IBP().radius(halfspace(), X, Y, "linf", tolerance=0)
    with pytest.raises(ValueError, match="linff"):
        IBP().radius(halfspace(), X, Y, "linff")


def test_one_eps_a_sample_and_chunks_change_nothing():
    eps = torch.tensor([0.05, 0.2, 0.05, 0.09])
    whole = IBP()(halfspace(), X, Y, Lp("linf", eps))
    assert whole.certified.tolist() == [True, False, False, True]
    torch.testing.assert_close(whole.radius, eps.double() * torch.tensor([1, 0, 1, 1]))
    for size in (1, 3):
        cut = IBP()(halfspace(), X, Y, Lp("linf", eps), batch_size=size)
        for name in ("status", "certified", "radius", "prediction", "margins", "samples"):
            torch.testing.assert_close(getattr(cut, name), getattr(whole, name))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_another_number_of_eps_than_of_images_is_refused(count):
    with pytest.raises(ValueError, match=f"one value for each of the 4 images, got {count}"):
        IBP()(halfspace(), X, Y, Lp("linf", torch.full((count,), 0.01)))


def test_an_empty_batch_has_an_empty_certificate():
    certificate = IBP()(halfspace(), X[:0], Y[:0], Lp("linf", 0.1))
    assert certificate.status.shape == (0,)
    assert certificate.margins.shape == (0, 2)


def test_the_decision_is_made_in_float64():
    """In float32 the logits near 1e4 tie, so the prediction is 0; in real numbers 1 is ahead by 2e-5."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    net[1].weight.data = torch.full((2, 16), 1e3)
    net[1].bias.data = torch.tensor([0.0, 2e-5])
    certificate = IBP()(net, flat(0.625), torch.tensor([0]), Lp("linf", 0.1))
    assert certificate.margins[0, 1].item() == pytest.approx(-2e-5, rel=1e-3)
    assert certificate.status.item() == Status.UNKNOWN


def test_a_model_is_left_as_it_was():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(8, 2))
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[4].bias.grad = torch.ones(2)
    modes = [module.training for module in net.modules()]
    values = {name: value.clone() for name, value in net.state_dict().items()}
    IBP()(net, X, Y, Lp("l2", 0.1))
    IBP().radius(net, X, Y, "linf", tolerance=0.1)
    assert [module.training for module in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, True, True]
    assert [p.grad is None for p in net.parameters()] == [True] * 5 + [False]
    assert net[4].bias.grad.tolist() == [1, 1]
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())


def test_non_finite_logits_are_invalid_and_unknown():
    net = halfspace()
    net[1].weight.data[0, 0] = float("nan")
    certificate = IBP()(net, X, Y, Lp("linf", 0.01))
    assert certificate.prediction.tolist() == [INVALID] * 4
    assert certificate.status.tolist() == [Status.UNKNOWN] * 4
    assert not certificate.certified.any()
    assert not certificate.radius.any()


class Deployed(Wrapper):
    """The halfspace as a defense, by default with the largest logit as its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = halfspace()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class SwitchesAtHalf(Deployed):
    """Answers another class where the first pixel exceeds 0.5: none of the logits tells."""

    def predict(self, x: Tensor) -> Tensor:
        return torch.where(x[:, 0, 0, 0] > 0.5, 1 - super().predict(x), super().predict(x))


class Abstains(Deployed):
    def predict(self, x: Tensor) -> Tensor:
        return torch.where(x[:, 0, 0, 0] < 0.5, ABSTAIN, super().predict(x))


def test_nothing_is_proven_about_a_model_that_decides_by_itself():
    model, x, threat = SwitchesAtHalf(), flat(0.7, 0.3), Lp("linf", 0.01)
    x[:, :, 0, 0] = 0.499  # within the threat of the switch
    y = model.predict(x)
    assert RandomNoise(50)(model, x, y, threat).success.all()
    certificate = IBP()(model, x, y, threat, batch_size=1)
    assert certificate.prediction.tolist() == y.tolist() == [1, 0]
    assert certificate.status.tolist() == [Status.UNKNOWN] * 2
    assert not certificate.certified.any()
    assert not certificate.radius.any()
    assert certificate.margins is None
    assert not IBP().radius(model, x, y, "linf", tolerance=0.1).any()


def test_abstentions_of_a_model_are_seen():
    certificate = IBP()(Abstains(), X, Y, Lp("linf", 0.01))
    assert certificate.prediction.tolist() == [1, ABSTAIN, 1, 1]
    assert certificate.status.tolist() == [Status.UNKNOWN, Status.ABSTAINED, Status.UNKNOWN, Status.UNKNOWN]


def test_a_wrapper_that_answers_the_largest_logit_is_certified_like_its_net():
    threat = Lp("linf", 0.05)
    wrapped, plain = IBP()(Deployed(), X, Y, threat), IBP()(halfspace(), X, Y, threat)
    assert plain.certified.any()
    for name in ("status", "certified", "radius", "prediction", "margins"):
        torch.testing.assert_close(getattr(wrapped, name), getattr(plain, name))


def test_labels_of_another_form_are_refused():
    class Probabilities(Deployed):
        def predict(self, x: Tensor) -> Tensor:
            return self(x).softmax(1)

    with pytest.raises(TypeError, match="predict must return int64"):
        IBP()(Probabilities(), X, Y, Lp("linf", 0.01))


class InPlace(Deployed):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.1
        return self.net(x)


class InPlacePredict(Deployed):
    def predict(self, x: Tensor) -> Tensor:
        return super().predict(x.mul_(2))


@pytest.mark.parametrize("kind", [InPlace, InPlacePredict])
@pytest.mark.parametrize("inference", [False, True])
def test_a_model_that_changes_its_input_is_refused_and_the_images_stay(kind, inference):
    with torch.inference_mode(inference):
        x = X.clone()
        for _ in range(2):
            with pytest.raises(ValueError, match="changes its input in place"):
                IBP()(kind(), x, Y, Lp("linf", 0.01))
        assert torch.equal(x, X)
        assert IBP()(Deployed(), x, Y, Lp("linf", 0.01)).certified.any()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("eps", [0.0, 1e-7, 0.01])
def test_images_within_the_tolerance_of_the_check_are_certified(norm, eps):
    x = torch.cat([flat(1.0), flat(0.0)])
    outside = x + torch.tensor([5e-7, -5e-7]).reshape(2, 1, 1, 1)
    y = torch.tensor([1, 0])
    slack, plain = IBP()(halfspace(), outside, y, Lp(norm, eps)), IBP()(halfspace(), x, y, Lp(norm, eps))
    assert slack.certified.all()
    torch.testing.assert_close(slack.margins, plain.margins, atol=1e-4, rtol=0)
    lower, upper = bounds(halfspace(), Lp(norm, eps), x=outside)
    assert (lower <= upper + 1e-6).all()


class Mixed(nn.Module):
    """A constant net and a steep one; how much of the second counts is state that `where` keeps."""

    def __init__(self, where) -> None:
        super().__init__()
        self.flat, self.steep, self.mix = nn.Linear(16, 2), nn.Linear(16, 2), where
        for layer, value in ((self.flat, 0.0), (self.steep, 30.0)):
            layer.weight.data = torch.stack([-torch.full((16,), value), torch.full((16,), value)])
        self.flat.bias.data, self.steep.bias.data = torch.tensor([0.0, 3.0]), torch.tensor([240.0, -240.0])

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1)
        share = self.mix.share if isinstance(self.mix, SimpleNamespace) else self.mix["share"][0]
        return self.flat(h) + share * torch.tanh(self.steep(h))


def set_object(mix):
    mix.share = 9.0


def set_list(mix):
    mix["share"][0] = 9.0


@pytest.mark.parametrize(
    ("where", "change"), [(SimpleNamespace(share=0.0), set_object), ({"share": [0.0], "other": object()}, set_list)]
)
def test_a_certificate_is_about_the_model_as_it_is_now(where, change):
    model, x, y, threat = Mixed(where).eval(), flat(0.51, 0.55), torch.tensor([1, 1]), Lp("linf", 0.2)
    assert IBP()(model, x, y, threat).certified.all()
    assert IBP()(model, x[:, :, :, :].clone(), y, threat).certified.all()
    change(where)
    assert RandomNoise(1)(model, x, y, Lp("linf", 0.0)).success.logical_not().all()  # the clean images are right
    assert (model(x - 0.2).argmax(1) == 0).all()
    assert not IBP()(model, x, y, threat).certified.any()
    torch.testing.assert_close(bounds(model, (x, x))[0], model(x))  # what the certifier traced is what bounds use


def test_what_a_certifier_refuses():
    net, threat = halfspace(), Lp("linf", 0.1)
    with pytest.raises(ValueError, match="does not support"):
        IBP()(net, X, Y, Lp("l0", 2))
    with pytest.raises(ValueError, match="divide by 255"):
        IBP()(net, X * 255, Y, threat)
    with pytest.raises(ValueError, match=r"labels must be in 0 \.\. 1"):
        IBP()(net, X, Y + 1, threat)
    with pytest.raises(ValueError, match="at least 2 logits"):
        IBP()(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), X, Y * 0, threat)
    with pytest.raises(ValueError, match="float64"):
        IBP()(net, X.double(), Y, threat)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        IBP()(lambda x: x.flatten(1), X, Y, threat)
    with pytest.raises(ValueError, match="indices"):
        IBP()(net, X, Y, threat, indices=torch.arange(3))
    with pytest.raises(ValueError, match="tolerance"):
        IBP(tolerance=-1.0)
    net.stochastic = True
    with pytest.raises(CannotCertify, match="stochastic"):  # a table prints n/a
        IBP()(net, X, Y, threat)


def test_no_prediction_changes_inside_a_certified_ball(make_net, threat_points, images):
    generator = torch.Generator().manual_seed(0)
    found = 0
    for name in ("mlp", "conv_stride", "normalized", "residual", "gelu"):
        net = make_net(name)
        y = net(images).argmax(1)
        for norm in ("linf", "l2", "l1"):
            radius = IBP().radius(net, images, y, norm, tolerance=1e-3)
            found += int((radius > 0).sum())
            for image, label, eps in zip(images, y, radius.tolist(), strict=True):
                assert (net(threat_points(image, norm, eps, 500, generator)).argmax(1) == label).all()
    assert found > 30


def test_margins_are_the_bounds_of_the_labels_specification(make_net, images):
    net = make_net("conv_stride")
    y = torch.tensor([0, 1, 2, 0, 1])
    certificate = IBP()(net, images, y, Lp("l2", 0.1))
    unit = torch.eye(3, dtype=torch.float64)
    lower, _ = bounds(net, Lp("l2", 0.1), C=unit[y][:, None] - unit, x=images)
    others = ~unit[y].bool()
    torch.testing.assert_close(certificate.margins[others], lower[others])


def test_a_certifier_of_ones_own_gets_chunks_and_streams():
    @dataclass(frozen=True)
    class Fair(Certifier):
        kind = "probabilistic"

        def supports(self, threat):
            return True

        def run(self, model, x, y, threat, streams):
            plain = IBP().run(model, x, y, threat, streams)
            return type(plain)(**{**vars(plain), "kind": self.kind, "estimate": streams.uniform()})

    whole = Fair()(halfspace(), X, Y, Lp("linf", 0.1), generator=torch.Generator().manual_seed(5))
    cut = Fair()(halfspace(), X, Y, Lp("linf", 0.1), generator=torch.Generator().manual_seed(5), batch_size=3)
    assert torch.equal(whole.estimate, cut.estimate)
    assert cut.kind == "probabilistic"
    assert cut.counterexample is None
