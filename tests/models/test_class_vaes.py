from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from robustbench_lite.models import create_model
from robustbench_lite.models.class_vaes import ClassVAEs

SHAPES = [(1, 28), (3, 32), (1, 16), (1, 8), (2, (5, 7))]


def vaes(channels: int = 1, size: int | tuple[int, int] = 28, classes: int = 3) -> ClassVAEs:
    torch.manual_seed(0)
    net = ClassVAEs(channels, size, classes, latent_size=4)
    for name, buffer in net.named_buffers():  # statistics that folding can get wrong
        buffer.uniform_(0.5, 2) if name.endswith("var") else buffer.normal_()
    for name, parameter in net.named_parameters():
        if name.endswith(("gain", "shift")):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return net.double()


def alone(layers: nn.ModuleList, label: int, training: bool) -> nn.Sequential:
    """One class's layers as PyTorch's own."""
    made: list[nn.Module] = []
    for layer in layers:
        build, ends = nn.Conv2d, (layer.weight.shape[2], layer.weight.shape[1])
        if layer.transposed:
            build, ends = nn.ConvTranspose2d, ends[::-1]
        inputs, outputs = ends
        made.append(build(inputs, outputs, layer.weight.shape[3], stride=layer.stride))
        made[-1].weight.data, made[-1].bias.data = layer.weight.data[label].clone(), layer.bias.data[label].clone()
        if not layer.last:
            norm = nn.BatchNorm2d(outputs)
            norm.weight.data, norm.bias.data = layer.gain.data[label].clone(), layer.shift.data[label].clone()
            norm.running_mean.copy_(layer.running_mean[label])
            norm.running_var.copy_(layer.running_var[label])
            made += [norm, nn.ELU()]
    return nn.Sequential(*made).double().train(training)


@pytest.mark.parametrize(("channels", "size"), SHAPES)
@torch.no_grad()
def test_every_class_is_a_net_of_plain_layers(channels: int, size: int | tuple[int, int]) -> None:
    net = vaes(channels, size).eval()
    shape = net.decoder.image_shape
    z, x = torch.randn(5, 3, 4).double(), torch.rand(5, *shape).double()
    images, (mean, log_variance) = net.decoder(z), net.encoder(x)
    assert images.shape == (5, 3, *shape)
    for label in range(3):
        expected = alone(net.decoder.layers, label, False)(z[:, label, :, None, None]).sigmoid().view(5, *shape)
        assert torch.allclose(images[:, label], expected, atol=1e-12)
        assert torch.allclose(net.decode(z[:, label], label), expected, atol=1e-12)
        h = x.flatten(1)[:, :, None, None] if net.encoder.dense else x
        parts = torch.cat([mean[:, label], log_variance[:, label]], dim=1)
        assert torch.allclose(alone(net.encoder.layers, label, False)(h).flatten(1), parts, atol=1e-12)
        assert torch.allclose(torch.cat(net.encode(x, label), dim=1), parts, atol=1e-12)


@torch.no_grad()
def test_in_training_a_class_is_normalised_by_its_own_images() -> None:
    net = vaes().train()
    z = torch.randn(6, 4).double()
    plain = alone(net.decoder.layers, 1, True)
    before = [layer.running_mean.clone() for layer in net.decoder.layers if not layer.last]
    assert torch.allclose(net.decode(z, 1), plain(z[:, :, None, None]).sigmoid(), atol=1e-12)
    norms = [layer for layer in plain if isinstance(layer, nn.BatchNorm2d)]
    layers = [layer for layer in net.decoder.layers if not layer.last]
    for layer, norm, old in zip(layers, norms, before, strict=True):
        assert torch.allclose(layer.running_mean[1], norm.running_mean)
        assert torch.allclose(layer.running_var[1], norm.running_var)
        assert torch.equal(layer.running_mean[[0, 2]], old[[0, 2]])


def test_one_image_of_a_class_can_be_learned_from() -> None:
    assert vaes(1, 8).train().decode(torch.zeros(1, 4).double(), 0).isfinite().all()


@torch.no_grad()
def test_logits_are_energies_at_the_encoders_means() -> None:
    net = vaes(1, 8).eval()
    x = torch.rand(4, 1, 8, 8).double()
    for label in range(3):
        mean, _ = net.encode(x, label)
        away = (net.decode(mean, label) - x).flatten(1).norm(dim=1) ** 2
        assert torch.allclose(net(x)[:, label], -away - mean.norm(dim=1) ** 2 / 2)


def test_counts_and_bad_sizes() -> None:
    net = create_model("class_vaes")
    floats = [sum(v.numel() for v in part.state_dict().values()) for part in (net.decoder, net.encoder)]
    assert floats == [238_730, 618_720]
    with pytest.raises(ValueError, match="latent_size"):
        ClassVAEs(latent_size=0)


def published(folder: Path) -> ClassVAEs:
    """Schott et al.'s own nets in these classes."""
    net = ClassVAEs().eval()
    state = net.state_dict()
    names = {"weight": "conv_{}.weight", "bias": "conv_{}.bias", "gain": "bn_{}.weight", "shift": "bn_{}.bias"}
    names |= {"running_mean": "bn_{}.running_mean", "running_var": "bn_{}.running_var"}
    for label in range(10):
        theirs = torch.load(folder / f"ABS_{label}.net", weights_only=True, map_location="cpu")
        for key, value in state.items():
            part, _, layer, name = key.split(".")
            value[label] = theirs[f"{part.capitalize()}.{names[name].format(layer)}"]
    return net


@pytest.mark.slow
@torch.no_grad()
def test_published_nets_fit(shared_data: Path) -> None:
    from robustbench_lite.data import load_data

    data = load_data("mnist", data_dir=shared_data).head(500)
    net = published(shared_data / "nets" / "abs")
    assert (net(data.images).argmax(dim=1) == data.labels).double().mean() > 0.95
