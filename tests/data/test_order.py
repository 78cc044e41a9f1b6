import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ds_llm.data.order import MixtureOrder, SampleOrder, micro_batch


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


SOURCES = st.lists(st.tuples(st.integers(1, 40), st.floats(0.05, 3)), min_size=1, max_size=4).filter(
    lambda sources: all(round(n * w) for n, w in sources)
)


@given(SOURCES, st.integers(0, 2**31))
def test_every_epoch_of_a_mixture_has_what_the_weights_say(sources, seed):
    counts, weights = zip(*sources, strict=True)
    order, firsts = MixtureOrder(counts, weights, seed), np.cumsum([0, *counts])
    drawn = [round(n * w) for n, w in sources]
    assert order.samples == sum(drawn)
    epochs = [order.take(epoch * order.samples, order.samples) for epoch in range(3)]
    for k, count in enumerate(counts):
        own = [e[(e >= firsts[k]) & (e < firsts[k + 1])] for e in epochs]
        assert [len(e) for e in own] == [drawn[k]] * 3
        seen = np.bincount(np.concatenate(own) - firsts[k], minlength=count)
        assert seen.max() - seen.min() <= 1  # no sample comes again before all have come


@given(SOURCES, st.integers(0, 9), st.integers(0, 200), st.integers(1, 120))
def test_a_mixture_does_not_depend_on_how_it_is_cut(sources, seed, start, count):
    order = MixtureOrder(*zip(*sources, strict=True), seed)
    one_by_one = [
        int(MixtureOrder(*zip(*sources, strict=True), seed).take(p, 1)[0]) for p in range(start, start + count)
    ]
    assert order.take(start, count).tolist() == one_by_one


def test_a_mixture_is_mixed_anew_in_each_epoch():
    order = MixtureOrder([1000, 3000], [1, 0.5], 5)
    first, second = order.take(0, 2500), order.take(2500, 2500)
    assert abs((first[:500] < 1000).mean() - 0.4) < 0.1  # the beginning has the share of the whole
    assert (first != second).mean() > 0.9
    assert set(first[first >= 1000]).isdisjoint(second[second >= 1000])  # the other half of the second source
