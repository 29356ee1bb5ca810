from __future__ import annotations

import pytest
import torch
from torch import nn

from robustbench_lite.core.rng import Streams
from robustbench_lite.data import load_data
from robustbench_lite.defenses.abs import ABS
from robustbench_lite.defenses.abs_training import ABSTraining
from robustbench_lite.defenses.base import Batch, Step
from robustbench_lite.defenses.deploy import Deploy
from robustbench_lite.models.class_vaes import ClassVAEs
from robustbench_lite.training import train

STEP = Step(0, 10, 0)


def batch(labels: list[int]) -> Batch:
    x = torch.rand(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    return Batch(x, torch.tensor(labels), torch.arange(len(labels)) + 7)


def vaes() -> ClassVAEs:
    torch.manual_seed(0)
    return ClassVAEs(1, 8, 3, latent_size=4).double().eval()


def streams(b: Batch) -> Streams:
    return Streams.from_generator(None, b.indices)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_loss_is_squared_error_plus_weighted_divergence(beta: float) -> None:
    net, b = vaes().requires_grad_(False), batch([2, 0, 2, 1, 0])
    noise, total = streams(b).normal(4, dtype=torch.float64), 0.0
    for row, label in enumerate(b.y.tolist()):
        mean, log_variance = net.encode(b.x[row : row + 1], label)
        q = torch.distributions.Normal(mean, (log_variance / 2).exp())
        divergence = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum()
        image = net.decode(mean + q.stddev * noise[row], label)
        total += float((image - b.x[row]).square().sum() + beta * divergence)
    loss = ABSTraining(beta).loss(net, b, STEP, None, streams(b))
    assert float(loss) == pytest.approx(total / 5)


def test_a_class_learns_from_its_own_images_alone() -> None:
    net, b = vaes(), batch([2, 0, 2])
    ABSTraining().loss(net, b, STEP, None, streams(b)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        moved = parameter.grad.flatten(1).abs().sum(dim=1) > 0
        assert moved.tolist() == [True, False, True], name


def test_trained_and_deployed_it_tells_digits_apart() -> None:
    data, test = load_data("digits", "train").head(300), load_data("digits").head(100)
    torch.manual_seed(0)
    net = ClassVAEs(1, 8, latent_size=4)

    def deploy(trained: nn.Module) -> ABS:
        return ABS(trained, latents=300, steps=5)

    defense = train(net, data, Deploy(ABSTraining(), deploy), epochs=60, batch_size=100, learning_rate=1e-2)
    assert isinstance(defense, ABS)
    assert not defense.training
    assert (defense.predict(test.images) == test.labels).double().mean() > 0.75


def test_bad_settings_and_nets() -> None:
    with pytest.raises(ValueError, match="beta"):
        ABSTraining(-1.0)
    with pytest.raises(TypeError, match="class_vaes"):
        ABSTraining().setup(nn.Linear(3, 3), load_data("digits", "train"))
