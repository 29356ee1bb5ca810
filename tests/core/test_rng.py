from __future__ import annotations

import torch
from scipy import stats

from robustbench_lite.core.rng import Streams


def make(indices, seed=0):
    return Streams.from_generator(torch.Generator().manual_seed(seed), torch.tensor(indices))


def test_a_sample_draws_the_same_whatever_its_neighbours():
    together, alone = make([5, 9, 7]), make([9])
    assert torch.equal(together.normal(2, 3)[1], alone.normal(2, 3)[0])
    kept = together.take(torch.tensor([1]))
    assert torch.equal(kept.uniform(4)[0], alone.uniform(4)[0])
    masked = together.take(torch.tensor([False, True, False]))
    assert torch.equal(masked.integers(10, 4)[0], alone.integers(10, 4)[0])


def test_seed_index_and_label_each_matter():
    base = make([0, 1]).normal(8)
    assert not torch.equal(base[0], base[1])
    assert not torch.equal(base, make([0, 1], seed=1).normal(8))
    forked = make([0, 1]).fork(0)
    assert not torch.equal(base, forked.normal(8))
    assert torch.equal(make([0, 1]).fork(3).normal(8), make([0, 1]).fork(3).normal(8))
    assert not torch.equal(make([0, 1]).fork(3).normal(8), make([0, 1]).fork(4).normal(8))


def test_default_generator_is_seed_zero_and_global_state_is_untouched():
    before = torch.get_rng_state()
    first = Streams.from_generator(None, torch.arange(3)).uniform(2)
    assert torch.equal(first, Streams.from_generator(torch.Generator().manual_seed(0), torch.arange(3)).uniform(2))
    assert torch.equal(before, torch.get_rng_state())


def test_each_call_takes_one_draw_from_the_generator():
    generator = torch.Generator().manual_seed(3)
    Streams.from_generator(generator, torch.arange(100))
    reference = torch.Generator().manual_seed(3)
    torch.randint(0, 2**63 - 1, (), generator=reference)
    assert torch.equal(generator.get_state(), reference.get_state())


def test_streams_look_independent_across_neighbouring_indices():
    values = make(list(range(3000))).uniform(1).flatten().numpy()
    assert stats.kstest(values, "uniform").pvalue > 1e-3
