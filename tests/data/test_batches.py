"""Data order, micro-batches and subsets (SFT-3, SFT-6, SFT-7)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpsafety.data import batches
from hpsafety.data.groups import PromptGroup

MODEL = {"num_layers": 2, "width": 8, "mlp_width": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
MODEL["vocab_size"] = 32


def group(prompt, *responses, train=None):
    return PromptGroup([1] * prompt, [[2] * length for length in responses], train)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), max_size=30), st.integers(1, 50))
def test_sft3_micro_batches_hold_whole_groups_within_the_budget(sizes, budget):
    """SFT-3: each group once, full but for groups that no longer fit, longest first, none cut."""
    result = batches.micro_batches([group(size - 1, 1) for size in sizes], budget)
    assert sorted(index for batch in result for index in batch) == list(range(len(sizes)))
    totals = [sum(sizes[i] for i in batch) for batch in result]
    for position, (batch, total) in enumerate(zip(result, totals, strict=True)):
        lengths = [sizes[i] for i in batch]
        assert lengths == sorted(lengths, reverse=True)
        assert total <= budget or len(batch) == 1
        for later in result[position + 1 :]:  # first fit: nothing in a later batch would have fitted here
            assert all(total + sizes[i] > budget for i in later)


def test_micro_batches_of_an_oversized_group_and_ties():
    sizes = [5, 90, 5, 5]
    assert batches.micro_batches([group(s - 1, 1) for s in sizes], 10) == [[1], [0, 2], [3]]
    with pytest.raises(ValueError, match="at least 1"):
        batches.micro_batches([], 0)


def test_sft3_long_examples_are_dropped_and_counted_never_cut():
    """SFT-3: the limit is prompt + longest response, not the whole group."""
    groups = [group(6, 4), group(6, 5), group(6, 4, 4, 4), group(6, 1, 5)]
    before = [(list(g.prompt), [list(r) for r in g.responses]) for g in groups]
    assert batches.drop_long(groups, 10) == ([0, 2], 2)
    assert [(list(g.prompt), [list(r) for r in g.responses]) for g in groups] == before
    assert batches.drop_long(groups, 3) == ([], 4)


def test_predicted_flops_by_hand():
    tokens, pairs, trained = 3 + 2 + 4, 6 + (6 + 3) + (12 + 10), 6
    layer = 2 * tokens * (8 * 16 + 2 * 8 * 8 + 16 * 8 + 3 * 8 * 16) + 4 * 16 * pairs
    assert batches.predicted_flops(group(3, 2, 4), **MODEL) == 2 * layer + 2 * 8 * 32 * trained
    masked = group(3, 2, train=[[False, True]])
    saved = batches.predicted_flops(group(3, 2), **MODEL) - batches.predicted_flops(masked, **MODEL)
    assert saved == 2 * 8 * 32


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 100), max_size=40), st.integers(1, 6))
def test_balance_assigns_each_item_once_and_evenly(costs, num_ranks):
    ranks = batches.balance(costs, num_ranks)
    assert len(ranks) == num_ranks and sorted(i for rank in ranks for i in rank) == list(range(len(costs)))
    loads = [sum(costs[i] for i in rank) for rank in ranks]
    assert max(loads) - min(loads) <= max(costs, default=0)
    assert ranks == batches.balance(costs, num_ranks)


def test_balance_breaks_ties_by_index():
    assert batches.balance([1, 1, 1, 1, 1], 2) == [[0, 2, 4], [1, 3]]
    assert batches.balance([], 2) == [[], []]


def test_sft6_epochs_visit_every_item_once_in_their_own_order():
    """SFT-6: two epochs see each item exactly twice."""
    first, second = (batches.epoch_order(50, epoch, seed=3) for epoch in (0, 1))
    assert sorted([*first, *second]) == sorted(list(range(50)) * 2)
    assert not np.array_equal(first, second)
    assert np.array_equal(first, batches.epoch_order(50, 0, seed=3))
    assert not np.array_equal(first, batches.epoch_order(50, 0, seed=4))


def test_no_step_spans_two_passes():
    assert batches.step_slices(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert batches.step_slices(3, 64) == [slice(0, 3)]
    assert batches.step_slices(8, 4) == [slice(0, 4), slice(4, 8)]
    assert batches.step_slices(0, 4) == []


@pytest.mark.parametrize("num_items", [0, 1, 7, 205])
def test_sft7_subsets_are_nested(num_items):
    """SFT-7: for one seed a smaller safety fraction is part of every larger one."""
    fractions = [0, 0.01, 0.10, 0.25, 0.50, 1]
    subsets = [batches.nested_subset(num_items, fraction, seed=5).tolist() for fraction in fractions]
    assert subsets[0] == [] and subsets[-1] == list(range(num_items))
    for small, large, fraction in zip(subsets, subsets[1:], fractions[1:], strict=False):
        assert set(small) <= set(large) and large == sorted(large)
        assert abs(len(large) - fraction * num_items) <= 0.5
    if num_items == 205:
        assert batches.nested_subset(num_items, 0.5, seed=6).tolist() != subsets[4]


def test_nested_subset_refuses_a_fraction_outside_zero_and_one():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        batches.nested_subset(10, 1.5, seed=0)
