"""Transformations in front of a net: what they compute, and that whoever knows them breaks them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from robustbench_lite.attacks import PGD, RandomNoise
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.defenses import JPEG, BitDepth, PixelDeflection, RandomResizePad
from robustbench_lite.defenses.pixel_deflection import denoised, haar, inverse_haar, shrunk
from robustbench_lite.zoo import load_defense


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_bit_depth_leaves_the_nearest_of_its_levels() -> None:
    x = images(2, 1, 8, 8)
    for bits in (1, 2, 8):
        found, levels = BitDepth(nn.Identity(), bits).transform(x), torch.linspace(0, 1, 2**bits)
        assert torch.allclose(levels[(x.unsqueeze(-1) - levels).abs().argmin(dim=-1)], found, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_what_pillow_makes_of_each_image(channels: int) -> None:
    x = images(3, channels, 16, 8)
    found = JPEG(nn.Identity(), quality=30).transform(x)
    for image, ours in zip(x, found, strict=True):
        pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, format="jpeg", quality=30)
        theirs = np.array(Image.open(file)).reshape(16, 8, channels)
        assert torch.equal((255 * ours).round().byte().permute(1, 2, 0), torch.from_numpy(theirs))
    assert 0 < (found - x).abs().mean() < 0.3


def test_resizing_shrinks_the_image_and_puts_it_somewhere_whole() -> None:
    x = torch.ones(400, 1, 12, 10)
    defense = RandomResizePad(nn.Identity(), shrink=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = defense.transform(x)
    rows, columns = (found.amax(dim=(1, axis)) > 0.5 for axis in (3, 2))
    lost = 12 - rows.sum(dim=1)
    assert torch.equal(lost, 10 - columns.sum(dim=1))
    assert set(lost.tolist()) == {0, 1, 2, 3}
    places = {(int(k), int(row.int().argmax())) for k, row in zip(lost, rows, strict=True)}
    assert places == {(k, place) for k in range(4) for place in range(k + 1)}
    assert torch.allclose(found[lost == 0], x[:1].expand(int((lost == 0).sum()), -1, -1, -1), atol=1e-5)


def test_what_is_not_shrunk_is_not_changed_and_the_rest_is_bilinear() -> None:
    x = images(300, 1, 9, 9)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        marked = RandomResizePad(nn.Identity(), shrink=1).transform(torch.cat([x, torch.ones_like(x)], dim=1))
    for image, before in zip(marked, x, strict=True):
        inside = image[1] > 0.5
        side = int(inside.any(dim=0).sum())
        smaller = F.interpolate(before[None], size=(side, side), mode="bilinear", align_corners=False)[0, 0]
        assert torch.allclose(image[0][inside].reshape(side, side)[1:-1, 1:-1], smaller[1:-1, 1:-1], atol=1e-5)


def test_deflection_puts_neighbours_in_the_place_of_pixels() -> None:
    x = torch.arange(400.0).reshape(1, 1, 20, 20).expand(50, 1, 20, 20) / 400
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = PixelDeflection(nn.Identity(), deflections=5, window=2, wavelet_sigma=0).deflected(x)
    changed = found != x
    assert (changed.flatten(1).sum(dim=1) <= 5).all()
    assert changed.flatten(1).sum(dim=1).double().mean() > 4
    source = (found * 400).round().long()
    place = torch.arange(400).reshape(1, 1, 20, 20)
    for offsets in (source // 20 - place // 20, source % 20 - place % 20):
        assert offsets[changed].unique().tolist() == [-2, -1, 0, 1, 2]  # type: ignore[no-untyped-call]


def test_the_wavelets_are_orthonormal_and_invert() -> None:
    x = images(2, 3, 8, 6).double()
    smooth, details = haar(x)
    assert torch.allclose(inverse_haar(smooth, details), x)
    assert torch.allclose(smooth.square().sum() + details.square().sum(), x.square().sum())
    assert (haar(torch.ones(1, 1, 4, 4))[1] == 0).all()


def test_denoising_removes_noise_and_nothing_where_there_is_none() -> None:
    x = images(2, 1, 13, 10)
    assert torch.allclose(denoised(x, 0.0), x, atol=1e-6)
    flat = torch.full((20, 1, 32, 32), 0.5)
    noise = 0.04 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    assert (denoised(flat + noise, 0.04) - flat).square().mean() < 0.5 * noise.square().mean()
    steps = flat.clone()
    steps[..., 16:] = 0.9
    assert torch.allclose(denoised(steps, 0.01), steps, atol=0.01)


def test_the_threshold_of_a_band_is_the_noise_variance_over_the_deviation_of_its_signal() -> None:
    bands = torch.tensor([[0.3, -0.5], [0.05, 0.6], [0.1, -0.1]], dtype=torch.float64).reshape(3, 1, 1, 1, 2)
    # Mean squares 0.17 and 0.18125, less 0.04 of noise: thresholds 0.04 / sqrt(0.13) and 0.04 / sqrt(0.14125).
    expected = torch.tensor([[0.18906, -0.38906], [0.0, 0.49357], [0.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(shrunk(bands, 0.2).reshape(3, 2), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BitDepth(nn.Identity(), 0), "bits"),
        (lambda: JPEG(nn.Identity(), 96), "quality"),
        (lambda: JPEG(nn.Identity()).transform(torch.rand(1, 2, 8, 8)), "1 or 3"),
        (lambda: RandomResizePad(nn.Identity(), 0), "shrink"),
        (lambda: RandomResizePad(nn.Identity(), 8).transform(torch.rand(1, 1, 8, 8)), "leaves nothing"),
        (lambda: PixelDeflection(nn.Identity(), deflections=0), "deflections"),
        (lambda: PixelDeflection(nn.Identity(), wavelet_sigma=-1.0), "wavelet_sigma"),
    ],
)
def test_settings_out_of_range_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("wrap", [lambda net: BitDepth(net, 2), lambda net: JPEG(net, 50)])
def test_without_the_stand_in_gradients_lie_and_with_it_the_defense_falls(wrap) -> None:
    data, defense = load_data("digits").head(100), wrap(load_defense("digits/standard")).eval()
    right = defense(data.images).argmax(dim=1) == data.labels
    attack, threat = PGD(steps=40, loss="margin"), Lp("linf", 0.2)
    naive = attack(defense, data.images, data.labels, threat).success
    knowing = attack(defense, data.images, data.labels, threat, view=defense.attack_view()).success
    assert right.double().mean() > 0.9
    assert naive.double().mean() < 0.7  # noise and the random start alone
    assert knowing.double().mean() > 0.9


@pytest.mark.parametrize("name", ["random_resize_pad", "pixel_deflection"])
def test_averaged_over_its_draws_a_random_transformation_falls(name: str) -> None:
    data, defense = load_data("digits").head(50), load_defense(f"digits/{name}").eval()
    threat = Lp("linf", 0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noise = RandomNoise()(defense, data.images, data.labels, threat).success
        found = PGD(steps=20, loss="margin")(defense, data.images, data.labels, threat, view=defense.attack_view(10))
        fresh = torch.stack([defense(found.x_adv).argmax(dim=1) == data.labels for _ in range(20)])
    assert noise.double().mean() < 0.4
    assert found.success.double().mean() > 0.9
    assert fresh.double().mean() < 0.2  # on draws that the attack has not seen
