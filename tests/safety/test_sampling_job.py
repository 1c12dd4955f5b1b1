"""Whether a stopped job on lines goes on or begins anew."""

from types import SimpleNamespace

import pytest

from hpsafety.safety import sampling_job


@pytest.mark.parametrize("bound, total, kept", [(0.0, 10, True), (1e-3, 10, False), (1e-3, 10_000, True)])
def test_neighbours_that_change_words_are_not_exchanged(bound, total, kept, monkeypatch, tmp_path):
    """DATA-5: a short job ends with the bytes of an uninterrupted one, also where products depend on the batch."""
    monkeypatch.setattr(sampling_job, "row_bound", lambda model: bound)
    job = SimpleNamespace(total=total, part=tmp_path)
    assert sampling_job.goes_on(job, None, True) is kept
    assert sampling_job.goes_on(job, None, False) is False
