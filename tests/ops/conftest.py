"""Fixtures of the op tests."""

import pytest
import torch


@pytest.fixture
def threads():
    """Sets the number of threads; the old one comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def far_hidden():
    """fp32 storage of more than 2^31 elements (8.6 GB of address space), of which no page has been touched."""
    try:
        return torch.empty(2**31 + 2**20, dtype=torch.float32)
    except RuntimeError as error:
        pytest.skip(f"8.6 GB of address space cannot be reserved: {error}")


@pytest.fixture
def far_rows(far_hidden):
    """Copies fp32 rows to places more than 2^31 elements into one storage."""
    used = [2**31 + 1]

    def place(row):
        target = far_hidden[used[0] : used[0] + row.numel()]
        used[0] += row.numel() + 1
        return target.copy_(row)

    return place
