"""The seam between a training loop and `hpsafety profile`: a loop says what it does, a recorder may listen.

    for t in phases.steps(range(100)):          one item per optimiser step (PPO: per iteration)
        phases.work(model, groups, 3)    what the step has to compute, on this rank
        with phases.phase("forward"):           data, forward, backward, optimiser, communication, rollout ...
            ...

Without a recorder each call costs one look at a module variable (under 0.2 us; tests/train/test_phases.py).
A recorder ends the loop with Enough once it has seen what it wants, so that the stage writes no model.
"""

import contextlib
from collections.abc import Iterable, Iterator

_recorder = None
_NOTHING = contextlib.nullcontext()


class Enough(BaseException):
    """The recorder has its steps: the stage is left on the way of an interrupt. Not an Exception, so that no stage's
    `except Exception` holds it up."""


def phase(name: str):
    """A context that marks its body as `name`; phases may nest, the inner one counts."""
    return _NOTHING if _recorder is None else _recorder.phase(name)


def work(model, groups: list, passes: int) -> None:
    """Counts groups that this rank is about to compute; passes: 1 for a forward, 3 with its backward."""
    if _recorder is not None:
        _recorder.work(model, groups, passes)


def steps(items: Iterable) -> Iterable:
    """`items`, each of them marked as one step when a recorder listens."""
    return items if _recorder is None else _recorder.steps(items)


@contextlib.contextmanager
def recorded_by(recorder) -> Iterator[None]:
    """Within, `recorder` hears phase, work and steps."""
    global _recorder
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None
