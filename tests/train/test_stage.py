"""What every stage does around its own work."""

from types import SimpleNamespace

from hpsafety.train import distributed, stage


def test_out_is_written_only_when_every_rank_has_looked_at_it(monkeypatch):
    """A rank that looks late would find files without a manifest, and refuse them."""
    order = []
    monkeypatch.setattr(distributed, "barrier", lambda world: order.append("barrier"))
    stage.begin(SimpleNamespace(open=lambda: order.append("open")), "", {}, SimpleNamespace(is_main=False))
    assert order == ["barrier", "open", "barrier"]
