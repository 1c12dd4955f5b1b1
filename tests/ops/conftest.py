"""Shared by the tests of the ops."""

import pytest
import torch


@pytest.fixture
def far_rows():
    """Copies rows of fp32 to places more than 2^31 elements into one storage, of which few pages are ever touched."""
    try:
        storage = torch.empty(2**31 + 2**20, dtype=torch.float32)
    except RuntimeError as error:
        pytest.skip(f"8.6 GB of address space cannot be reserved: {error}")
    used = [2**31 + 1]

    def place(row):
        target = storage[used[0] : used[0] + row.numel()]
        used[0] += row.numel() + 1
        return target.copy_(row.flatten()).view(row.shape)

    return place
