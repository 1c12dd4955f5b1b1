"""The page allocator (design section 7). The bug this file must catch: a page with two owners, or given back early."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpsafety.config import memory_bytes
from hpsafety.errors import InputError
from hpsafety.rollout.kv_cache import PageCache, free_memory, make_cache, page_bytes
from hpsafety.rollout.sampler import Settings
from tests.tiny import tiny_config, tiny_model


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.sampled_from("THR"), st.integers(0, 9)), max_size=60))
def test_any_sequence_of_takes_holds_and_releases(num_pages, actions):
    """Against a model that counts holders: no page has two owners, none is lost, and a full cache refuses."""
    cache = PageCache(tiny_config(), num_pages, 2, torch.float32, "cpu")
    runs: list[list[int]] = []  # one entry per holder
    for action, number in actions:
        if action == "T":
            if number > cache.num_free:
                with pytest.raises(IndexError):
                    cache.take(number)
                continue
            pages = cache.take(number)
            assert len(set(pages)) == number and not set(pages) & {p for run in runs for p in run}
            runs.append(pages)
        elif runs and action == "H":
            runs.append(runs[number % len(runs)])
            cache.hold(runs[-1])
        elif runs:
            cache.release(runs.pop(number % len(runs)))
        held = Counter(page for run in runs for page in run)
        assert cache.num_free == num_pages - len(held)
        assert cache.taken - cache.returned == len(held) <= cache.most_used
    for run in runs:
        cache.release(run)
    assert cache.num_free == num_pages and cache.taken == cache.returned


def test_a_page_released_too_often_is_seen():
    cache = PageCache(tiny_config(), 2, 4, torch.float32, "cpu")
    pages = cache.take(1)
    cache.release(pages)
    with pytest.raises(AssertionError, match="held by nobody"):
        cache.release(pages)
    with pytest.raises(AssertionError, match="held by nobody"):
        cache.hold(pages)


def test_slots():
    cache = PageCache(tiny_config(), 9, 4, torch.float32, "cpu")
    assert cache.slots([7, 2, 5], 9).tolist() == [28, 29, 30, 31, 8, 9, 10, 11, 20]
    assert [cache.pages_for(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_memory_given_in_bytes_is_kept_to():
    model = tiny_model()
    each = page_bytes(model.config, 16, torch.float32)
    cache = make_cache(model, Settings(kv_memory=10 * each + each // 2))
    assert cache.num_pages == 10
    held = cache.k.untyped_storage().nbytes() + cache.v.untyped_storage().nbytes()
    assert held == 10 * each
    with pytest.raises(InputError, match="--kv-memory of 100 bytes holds not one page"):
        make_cache(model, Settings(kv_memory=100))


def test_default_memory_is_bounded():
    """A quarter of what is free, and never more than the batch can use."""
    model = tiny_model()
    cache = make_cache(model, Settings(max_batch=2))
    assert cache.num_pages == 3 * (128 // 16 + 1)
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize(
    "text, number",
    [
        ("512MB", 2**29), ("2GB", 2**31), ("1.5G", 3 * 2**29), ("64 MiB", 2**26), ("1000", 1000), ("3kb", 3072),
        ("1T", 2**40), ("0", None), ("GB", None), ("-1GB", None), ("2 GBs", None), ("nan", None),
        ("1e9", None), ("", None),
    ],
)  # fmt: skip
def test_sizes(text, number):
    assert memory_bytes(text) == number
