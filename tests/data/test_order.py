import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ds_llm.data.order import SampleOrder, micro_batch


@given(st.integers(1, 300), st.integers(0, 2**31), st.integers(0, 5))
def test_every_epoch_is_a_permutation(n, seed, epoch):
    assert sorted(SampleOrder(n, seed).take(epoch * n, n)) == list(range(n))


@given(st.integers(1, 50), st.integers(0, 9), st.integers(0, 200), st.integers(1, 120))
def test_take_does_not_depend_on_how_it_is_cut(n, seed, start, count):
    whole = SampleOrder(n, seed).take(start, count)
    one_by_one = np.concatenate([SampleOrder(n, seed).take(p, 1) for p in range(start, start + count)])
    assert (whole == one_by_one).all()


def test_epochs_and_seeds_differ():
    n = 1000
    first, second, other = SampleOrder(n, 1).take(0, n), SampleOrder(n, 1).take(n, n), SampleOrder(n, 2).take(0, n)
    assert (first != second).mean() > 0.9 and (first != other).mean() > 0.9
    # a shuffled sequence has no memory: neighbours are far apart on average (n/3 for uniform permutations)
    assert abs(np.abs(np.diff(first)).mean() / (n / 3) - 1) < 0.15


@given(st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]), st.integers(0, 100))
def test_the_global_batch_is_the_same_for_every_split(split, start):
    world, micro_steps = split
    order = SampleOrder(40, 7)
    seen = [i for m in range(micro_steps) for r in range(world) for i in micro_batch(order, start, m, r, world, 2)]
    assert seen == list(order.take(start, 24))
