"""Frozen models in files. The bug this file must catch: weights that stay in memory after their phase, and a file
that is taken over though it is another model's."""

import sys
from pathlib import Path

import pytest
import torch

from hpsafety.data.groups import pack
from hpsafety.model import mapped
from hpsafety.model.heads import reward_model_from
from hpsafety.model.llama import Llama
from tests.tiny import random_groups, tiny_config, tiny_model


def shell(dtype=torch.float32, **changes):
    with torch.device("meta"):
        return Llama(tiny_config(**changes)).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_in_memory(dtype, tmp_path):
    model, batch, path = tiny_model(dtype=dtype, tied=False), pack(random_groups(5, 2)), tmp_path / "m"
    with torch.no_grad():
        expected = model.logprobs(batch)
    mapped.write(model, path)
    before, parked = path.read_bytes(), shell(dtype, tied=False)
    assert mapped.holds(path, parked)
    parked.weights_file = path
    for _ in range(2):
        with mapped.present(parked, "cpu") as here, torch.no_grad():
            assert torch.equal(here.logprobs(batch), expected)
            assert not any(p.requires_grad for p in here.parameters())
        assert all(p.is_meta for p in parked.parameters())
    assert path.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_pages_leave_the_process(tmp_path):
    """Inside the file is mapped, outside it is not, also after an exception."""
    path, parked = tmp_path / "frozen", shell()
    mapped.write(tiny_model(), path)
    parked.weights_file = path
    maps = Path("/proc/self/maps")
    with pytest.raises(KeyError), mapped.present(parked, "cpu"):
        assert str(path) in maps.read_text()
        raise KeyError
    assert str(path) not in maps.read_text()


def test_a_file_of_another_model_is_not_taken_over(tmp_path):
    path = tmp_path / "frozen"
    assert not mapped.holds(path, shell())
    mapped.write(tiny_model(), path)
    assert mapped.holds(path, shell())
    assert not mapped.holds(path, shell(torch.bfloat16)) and not mapped.holds(path, shell(mlp_width=48))
    assert not mapped.holds(path, mapped.empty(reward_model_from(tiny_model())))
    path.write_bytes(path.read_bytes()[:-1])
    assert not mapped.holds(path, shell())
    assert [p.name for p in tmp_path.iterdir()] == ["frozen"]


def test_a_model_in_memory_is_itself():
    model = tiny_model()
    with mapped.present(model, "cpu") as here:
        assert here is model
    assert not any(p.is_meta for p in model.parameters())


def test_data_begins_where_allocated_memory_would(tmp_path):
    """A product may round otherwise on operands that are aligned otherwise."""
    mapped.write(tiny_model(), tmp_path / "m")
    parked = shell()
    parked.weights_file = tmp_path / "m"
    with mapped.present(parked, "cpu"):
        assert min(p.data_ptr() for p in parked.parameters()) % 64 == 0
