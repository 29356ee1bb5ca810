"""Fast views: faster arithmetic may mislead a search, never a verdict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import PGD, Fast, Square
from robustbench_lite.core.models import predict
from robustbench_lite.core.threats import Lp

THREAT = Lp("linf", 0.1)


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"channels_last": True}, {"compile": True, "backend": "eager"}], ids=str
)
@pytest.mark.parametrize("attack", [PGD(), Square(queries=100)], ids=["pgd", "square"])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at its inputs
def test_successes_are_the_models_own(attack, options, net, images):
    net, images = net.float(), images.float()
    y = predict(net.eval(), images)
    plain, fast = attack(net, images, y, THREAT), attack(net, images, y, THREAT, view=Fast(net, **options))
    assert torch.equal(predict(net, fast.x_adv) != y, fast.success)
    assert (plain.success ^ fast.success).sum() <= 1
    assert plain.success.sum() >= 2


def test_the_fast_mode_is_on(net, images):
    seen = {}
    net.float()[0].register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    x = torch.rand(4, 1, 6, 6).expand(-1, 3, -1, -1)
    narrow = nn.Sequential(nn.Conv2d(3, 1, 1), net)
    narrow[0].register_forward_hook(lambda _, args, __: seen.update(first=args[0]))
    logits = Fast(narrow, dtype=torch.bfloat16, channels_last=True)(x)
    assert seen["out"].dtype == torch.bfloat16
    assert seen["first"].is_contiguous(memory_format=torch.channels_last)
    assert logits.dtype == torch.float32


def test_a_model_with_its_own_predict_is_asked_about_every_candidate(net, images):
    class Cautious(nn.Module):
        def forward(self, x):
            return net(x)

        def predict(self, x):
            top = net(x).softmax(dim=1).max(dim=1)
            return torch.where(top.values > 0.3, top.indices, -1)  # an abstention is an error

    model = Cautious()
    y = predict(net, images)
    plain, fast = (PGD()(model, images, y, THREAT, view=view) for view in (None, Fast(model)))
    assert torch.equal(plain.success, fast.success)


def test_a_view_that_lies_breaks_nothing_and_costs_a_pass_for_each_lie(net, images):
    class Wrong(nn.Module):
        screens = True

        def forward(self, x):
            return -net(x)

    y = predict(net.eval(), images)
    result = PGD(steps=5, random_start=False)(net, images, y, Lp("linf", 1e-6), view=Wrong())
    assert not result.success.any()
    assert (result.forwards == 1 + 2 * 6).all()  # the clean check; five steps and the last point, each a lie


def test_batches_are_filled_to_powers_of_two(net, images):
    seen = []
    net.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    view = Fast(net, compile=True, backend="eager")
    assert torch.allclose(view(images[:5]), net(images[:5]))
    assert seen == [8, 5]
    assert view(images[:0]).shape == (0, 4)


def test_budgets_hold_and_who_cannot_pay_for_the_check_has_not_fallen(net, images):
    y = predict(net.eval(), images)
    for budget in (1, 2, 3, 5):
        result = PGD()(net, images, y, Lp("linf", 0.9), view=Fast(net), max_queries=budget)
        assert result.forwards.max() <= budget
        if budget <= 2:
            assert not result.success.any()
