"""A small pipeline on a tiny model."""

from pathlib import Path

import pytest

from hpsafety import cli
from tests.stages.conftest import save_chat_model

ROOT = Path(__file__).resolve().parent.parent.parent
TOML = """
[pipeline]
title = "tiny"
out = "{out}"
device = "cpu"
precision = "fp32"

[[stage]]
name = "rows"
run = "select"
data = ["{{demo}}/train.jsonl"]
model = "{model}"
tokens = 3000

[[stage]]
name = "pairs"
run = "select"
record = "preference"
data = ["{{demo}}/preferences.jsonl"]
model = "{model}"
tokens = 6000
shares = [1, 1]
valid = 4

[[stage]]
name = "sft"
run = "sft"
model = "{model}"
data = ["{{rows}}/rows.jsonl"]
batch = 2
epochs = 1
lr = 1e-3
checkpoint_every = 2

[[stage]]
name = "rm"
run = "reward"
kind = "safety"
model = "{{sft}}/model"
data = ["{{pairs}}/rows.jsonl"]
batch = 4
steps = 2
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return save_chat_model(folder, seed=2, max_positions=2048)


@pytest.fixture
def file(tmp_path, model):
    path = tmp_path / "tiny.toml"
    path.write_text(TOML.format(out=tmp_path / "out", model=model))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory, model):
    """A pipeline that has ended: its file, in a folder that a test may copy."""
    folder = tmp_path_factory.mktemp("done")
    path = folder / "tiny.toml"
    path.write_text(TOML.format(out=folder / "out", model=model))
    assert cli.main(["pipeline", str(path)]) == 0
    return path
