"""A run that is interrupted at a place a test chooses."""

import pytest


def stop_at(count: int, module, name: str, run, monkeypatch) -> None:
    """Calls run(); module.name works `count` times and is interrupted at the next call."""
    real, calls = getattr(module, name), []

    def counted(*args):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, counted)
        with pytest.raises(KeyboardInterrupt):
            run()
