"""Bases are orthonormal, and the DCT is scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch

from robustbench_lite.attacks import DCT, Pixels, Tiles

BASES = [Pixels(), DCT(1.0), DCT(0.25), DCT(1e-3), Tiles(1), Tiles(3), Tiles(50)]
SHAPES = [(1, 6, 6), (3, 5, 8)]


@pytest.mark.parametrize("basis", BASES, ids=repr)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_is_an_isometry_and_encode_its_transpose(basis, shape):
    m = basis.size(shape)
    atoms = basis.decode(torch.eye(m, dtype=torch.float64), shape)
    assert atoms.shape == (m, *shape)
    flat = atoms.flatten(1)
    assert torch.allclose(flat @ flat.T, torch.eye(m, dtype=torch.float64), atol=1e-12)
    images = torch.rand(2, 4, *shape, dtype=torch.float64)
    assert torch.allclose(basis.encode(images), images.flatten(-3) @ flat.T, atol=1e-12)
    projected = basis.project(images)
    assert torch.allclose(basis.project(projected), projected, atol=1e-12)
    assert torch.allclose(((images - projected).flatten(-3) @ flat.T), torch.zeros(2, 4, m).double(), atol=1e-12)


@pytest.mark.parametrize(
    ("fraction", "side", "kept"), [(1.0, 8, 8), (0.25, 8, 2), (0.3, 10, 3), (0.26, 8, 3), (0.01, 8, 1)]
)
def test_the_dct_keeps_the_lowest_frequencies_of_scipys(fraction, side, kept):
    rng = np.random.default_rng(0)
    block = np.zeros((3, side, side))
    block[:, :kept, :kept] = rng.normal(size=(3, kept, kept))
    expected = scipy.fft.idctn(block, axes=(1, 2), norm="ortho")
    basis = DCT(fraction)
    assert basis.size((3, side, side)) == 3 * kept * kept
    decoded = basis.decode(torch.from_numpy(block[:, :kept, :kept].reshape(-1)), (3, side, side))
    assert np.allclose(decoded.numpy(), expected, atol=1e-12)


def test_tiles_are_constant_squares_cut_at_the_edge():
    atoms = Tiles(2).decode(torch.eye(6, dtype=torch.float64), (1, 4, 5))
    corner = atoms[5, 0]
    assert (corner[2:, 4:] == corner[2, 4]).all()
    assert (corner != 0).sum() == 2


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
        DCT(0)
    with pytest.raises(ValueError, match="side must be a whole number"):
        Tiles(0)
