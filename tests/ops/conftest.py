"""Fixtures of all op tests."""

import pytest
import torch


@pytest.fixture
def threads():
    """Sets the number of threads; the old one comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
