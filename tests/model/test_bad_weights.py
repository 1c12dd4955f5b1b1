"""Directories that are no model, or damaged: one clear line each (issue: bad input)."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpsafety.errors import InputError
from hpsafety.model.io import load_model, save_model
from tests.model.test_io import saved, states_equal
from tests.tiny import tiny_model


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path)


def damage(folder, name, value):
    def change(tensors):
        tensors[name].view(-1)[3] = value

    rewrite(folder, change)


def truncate(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


def lie_about_offsets(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["model.norm.weight"]["data_offsets"] = [0, 1 << 40]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def edit(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def to_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def index_of(folder, weight_map):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


Q0 = "model.layers.0.self_attn.q_proj.weight"
BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json:1: not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: expected a JSON object"),
    "model type": (lambda f: edit(f, "config.json", model_type="gpt2"), "supports model types llama and qwen2"),
    "truncated data": (lambda f: truncate(f, -100), "truncated or corrupt safetensors"),
    "truncated header": (lambda f: truncate(f, 40), "truncated or corrupt safetensors"),
    "empty file": (lambda f: truncate(f, 0), "truncated or corrupt safetensors"),
    "offsets": (lie_about_offsets, "truncated or corrupt safetensors"),
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(Q0) is None), f"tensor {Q0!r} is missing (1 of"),
    "unexpected tensor": (lambda f: rewrite(f, lambda t: t.update(w=t[Q0] * 1)), "unexpected tensor 'w'"),
    "wrong shape": (lambda f: rewrite(f, lambda t: t.update({Q0: t[Q0][:-1] * 1})),
                    "has shape (23, 24), expected (24, 24)"),
    "NaN": (lambda f: damage(f, "model.norm.weight", float("nan")), "'model.norm.weight' holds NaN or infinity"),
    "infinity": (lambda f: damage(f, Q0, float("-inf")), f"{Q0!r} holds NaN or infinity"),
    "integers": (lambda f: rewrite(f, lambda t: t.update({Q0: t[Q0].to(torch.int8)})), "expected a float dtype"),
    "pickle only": (to_pickle, "pytorch_model.bin: weights in pickle form are not read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors and no"),
    "missing shard": (lambda f: index_of(f, {Q0: "model-1.safetensors"}), "model-1.safetensors: no such file"),
    "shard elsewhere": (lambda f: index_of(f, {Q0: "../x.safetensors"}), "without a folder"),
    "empty index": (lambda f: index_of(f, {}), '"weight_map" must map'),
    "no generation": (lambda f: (f / "generation_config.json").write_text("x"), "generation_config.json:1: not valid"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_directory_is_one_clear_line(case, tmp_path):
    _, folder = saved(tmp_path)
    change, expected = BAD[case]
    change(folder)
    with pytest.raises(InputError) as error:
        load_model(folder)
    text = str(error.value)
    assert expected in text and str(folder) in text and "\n" not in text


@pytest.mark.parametrize("path", ["nowhere", "no/such/dir", "nowhere.gguf", "/nowhere/at/all", ""])
def test_missing_path(path):
    with pytest.raises(InputError, match="no such file or directory"):
        load_model(path)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(InputError, match="expected a Hugging Face directory or a .gguf file"):
        load_model(tmp_path / "x.txt")
    with pytest.raises(InputError, match="a file is in the way"):
        save_model(tiny_model(), tmp_path / "x.txt")


def test_tied_head_and_rotary_tables_of_older_files_are_ignored(tmp_path):
    model, folder = saved(tmp_path)
    rewrite(
        folder,
        lambda t: t.update(
            {
                "lm_head.weight": t["model.embed_tokens.weight"] * 1,
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
            }
        ),
    )
    assert states_equal(load_model(folder).state_dict(), model.state_dict())
