"""Decoding by bucket. The bug this file must catch: a row that stands for no sequence writes into a page that is held.

There is no GPU here, so a graph is stood in for by a replay that runs the step again on the buffers and fills the same
output: what a captured graph does, but for the capture itself (bench/gpu_check.sh runs that).
"""

import pytest
import torch

from hpsafety.rollout import graphs
from hpsafety.rollout.engine import Engine, Request
from hpsafety.rollout.sampler import Settings
from tests.rollout.test_engine import requests_for, some_prompts
from tests.tiny import tiny_model


class Stand:
    """Counts captures and replays."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, step, pool):
        out = step().clone()
        self.captures += 1

        def replay():
            self.replays += 1
            out.copy_(step())

        return replay, out


def run(model, requests, stand=None, **changes):
    values = {"max_new_tokens": 12, "temperature": 1.1, "top_p": 0.9, "seed": 7, "stop": frozenset([3, 9])}
    engine = Engine(model, Settings(**(values | changes)), capture=stand)
    rollouts = sorted(engine.rollouts(requests), key=lambda r: (r.prompt_index, r.sample_index))
    assert engine.cache.num_free == engine.cache.num_pages
    return [(r.tokens, r.logprobs, r.finish) for r in rollouts], engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_buckets_change_no_bit(dtype, batch_invariant):
    model = tiny_model(seed=4, dtype=dtype)
    requests = requests_for(some_prompts(14), k=3)
    for changes in ({}, {"max_batch": 5}, {"page_size": 4, "max_batch": 9}):
        changes |= {"batch_invariant": batch_invariant}
        stand = Stand()
        plain, _ = run(model, requests, **changes)
        bucketed, engine = run(model, requests, stand, **changes)
        assert bucketed == plain
        assert 1 <= stand.captures == len(engine.graphs._captured) < stand.replays


def test_rows_of_an_earlier_step_become_idle_again():
    """A large batch shrinks to one sequence inside its bucket's neighbours; pages that were freed and taken by others
    are not written by the rows that left."""
    model = tiny_model(seed=4)
    requests = [Request([1 + i, 2, 3], 4, i) for i in range(6)]
    stand = Stand()
    settings = {"max_batch": 16, "page_size": 2, "kv_memory": None, "stop": frozenset(range(0, 67, 5))}
    assert run(model, requests, stand, **settings)[0] == run(model, requests, **settings)[0]


def test_a_weight_that_changes_is_seen():
    """Graphs read weights in place."""
    model = tiny_model(seed=4)
    stand = Stand()
    engine = Engine(model, Settings(max_new_tokens=6, temperature=0.0), capture=stand)
    before = [r.tokens for r in engine.rollouts([Request([5, 6], 2, 0)])]
    with torch.no_grad():
        model.embed.mul_(-1.5)
    after = [r.tokens for r in engine.rollouts([Request([5, 6], 2, 0)])]
    captured, fresh = stand.captures, Engine(model, Settings(max_new_tokens=6, temperature=0.0))
    assert after == [r.tokens for r in fresh.rollouts([Request([5, 6], 2, 0)])] != before
    assert captured == 1


@pytest.mark.parametrize(
    "sequences, bucket", [(1, 1), (2, 2), (3, 4), (5, 8), (65, 96), (512, 512), (513, None)]
)
def test_buckets(sequences, bucket):
    assert graphs.bucket_of(sequences) == bucket


@pytest.mark.parametrize("pages, width", [(1, 1), (2, 2), (3, 4), (9, 16), (16, 16)])
def test_prompt_tables_grow_by_powers_of_two(pages, width):
    assert graphs.prompt_pages_bucket(pages) == width
