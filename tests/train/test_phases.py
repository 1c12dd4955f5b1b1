"""The seam of hpsafety profile costs nothing when nobody listens, and a recorder hears what the loop says.

One bug this file must catch: a seam that opens a record_function although nobody listens.
"""

import time

import pytest

from hpsafety.train import phases
from tests.tiny import random_groups, tiny_model


class Recorder:
    def __init__(self):
        self.heard = []

    def phase(self, name):
        self.heard.append(name)
        return phases._NOTHING

    def work(self, model, groups, passes):
        self.heard.append(passes)

    def steps(self, items):
        for item in items:
            yield item
            raise phases.Enough


def test_off_is_the_same_object_and_takes_under_a_microsecond():
    items = range(3)
    assert phases.steps(items) is items
    assert phases.phase("forward") is phases.phase("backward")
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(1000):
            with phases.phase("forward"):
                pass
        best = min(best, (time.perf_counter() - start) / 1000)
    assert best < 1e-6, f"{best * 1e9:.0f} ns"


def test_a_recorder_hears_everything_and_is_gone_after():
    recorder = Recorder()
    with pytest.raises(phases.Enough), phases.recorded_by(recorder):
        for _ in phases.steps(range(9)):
            phases.work(tiny_model(), random_groups(1), 3)
            with phases.phase("forward"):
                pass
    assert recorder.heard == [3, "forward"]
    phases.work(None, [], 3)
    assert phases.steps("ab") == "ab" and len(recorder.heard) == 2


def test_enough_passes_a_stage_that_catches_exceptions():
    with pytest.raises(phases.Enough):
        try:
            raise phases.Enough
        except Exception:  # noqa: BLE001  what a stage might do
            pass
