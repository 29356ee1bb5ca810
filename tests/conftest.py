"""Shared by all tests: one thread, tiny nets, and the folder of real data that not every machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

torch.set_num_threads(1)  # tiny nets: threads cost more than they bring

SHARED = Path(os.environ.get("RBL_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with mnist.npz and nets/, from RBL_DATA or beside the checkout; the test skips where there is none."""
    if not (SHARED / "mnist.npz").exists():
        pytest.skip("real data not found: set RBL_DATA to a folder with mnist.npz and nets/")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def tiny_net(seed: int = 0, channels: int = 1, size: int = 6, classes: int = 4) -> nn.Module:
    """A random convolutional net, float64, in train mode, for images (B, channels, size, size)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * size * size, classes),
        )
    return net.double()


@pytest.fixture
def net() -> nn.Module:
    return tiny_net()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(12, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
