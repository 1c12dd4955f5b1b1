"""bench/end_to_end/distill.py: both contenders do the same work.

The bug this file must catch: a teacher that reads another prompt in one of them.
"""

import dataclasses

import pytest

from bench.end_to_end.common import Settings, needed_flops, preprompt
from hpsafety.model.io import save_model
from tests.tiny import tiny_model


@pytest.fixture
def settings(tmp_path):
    save_model(tiny_model(seed=6, init_std=0.5, max_positions=2048), str(tmp_path / "m"))
    return Settings(
        model=str(tmp_path / "m"), work="distill", groups=6, k=2, batch=3, preprompt_tokens=9, prompt_tokens=20,
        response_tokens=12, spread=0.3, tokens_per_batch=200, peer_tokens_per_batch=150, lr=1e-3,
    )  # fmt: skip


def test_contenders_agree(settings):
    """Every step's loss, so the updates agree too; without the preprompt there is nothing to learn."""
    pytest.importorskip("transformers")
    from bench.end_to_end import distill_hpsafety, distill_transformers

    ours, plain = (module.run(settings).values for module in (distill_hpsafety, distill_transformers))
    assert len(ours) == 2 and ours == pytest.approx(plain, rel=1e-4) and ours[0] > 1e-2
    same = dataclasses.replace(settings, preprompt_tokens=0)
    assert abs(distill_hpsafety.run(same).values[0]) < 1e-5


def test_needed_work_counts_the_teacher(settings):
    """Three passes of the student and one of the teacher, whose prompts are longer by the preprompt."""
    sft = dataclasses.replace(settings, work="sft")
    student, without = needed_flops(sft) / 3, needed_flops(dataclasses.replace(settings, preprompt_tokens=0))
    assert without == pytest.approx(4 * student) and needed_flops(settings) > without
    assert len(preprompt(settings)) == 9
