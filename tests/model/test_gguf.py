"""GGUF in (design section 4): every format, row order, rope, tokenizer, damage. smollm2 is in test_smollm2.py."""

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from hpsafety.errors import InputError
from hpsafety.model.gguf_file import open_gguf
from hpsafety.model.gguf_io import read_config, read_gguf
from hpsafety.model.io import load_model
from hpsafety.model.names import hf_names, split
from tests.tiny import tiny_config, tiny_model

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    stem, _, ending = name.rpartition(".")
    if stem in GGUF_NAMES:
        return f"{GGUF_NAMES[stem]}.{ending}"
    _, _, layer, stem = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[stem]}.{ending}"


def permute(weights: np.ndarray, n_head: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    halves = weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(path, model, kind=Kind.F32, extra=None, metadata=None, skip=()):
    """A file as llama.cpp's converter writes it: norms and biases F32, matrices in `kind`."""
    c = model.config
    writer = gguf.GGUFWriter(path, c.model_type)
    writer.add_block_count(c.num_layers)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.mlp_width)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    for key, (add, value) in (metadata or {}).items():
        getattr(writer, add)(key, value)
    state = model.state_dict()
    for name, place in hf_names(c).items():
        tensor = split(state[place.parameter], place).float().numpy()
        if c.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
            tensor = permute(tensor, c.num_heads if ".q_proj." in name else c.num_kv_heads)
        if gguf_name(name) in skip:
            continue
        if tensor.ndim > 1 and kind is not Kind.F32:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(tensor))
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SHAPES = {
    "tied": {},
    "untied": {"tied": False},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qwen2": {"qkv_bias": True, "model_type": "qwen2"},
    "gqa1_wide_heads": {"num_kv_heads": 4, "head_dim": 10},
}


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, generator=generator)
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_layout_is_undone(name, tmp_path):
    """Written with llama.cpp's names and row order, the model comes back bit for bit, config and all."""
    model = randomise(tiny_model(**SHAPES[name]))
    again = load_model(write_gguf(tmp_path / "m.gguf", model))
    state = again.state_dict()
    assert {n: torch.equal(t, state[n]) for n, t in model.state_dict().items()} == dict.fromkeys(state, True)
    assert vars(again.config) | {"init_std": 0} == vars(model.config) | {"init_std": 0}
    assert again.tokenizer is None


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
def test_formats_with_a_quantiser(kind, tmp_path):
    """Each matrix is within its format's step of the original, and equals what gguf's own reader gives."""
    model = randomise(tiny_model(width=64, mlp_width=96, head_dim=16))
    path = write_gguf(tmp_path / "m.gguf", model, kind)
    file = open_gguf(path)
    step = {Kind.F32: 0.0, Kind.F16: 2e-3, Kind.BF16: 2e-2, Kind.Q8_0: 2e-2, Kind.Q4_0: 0.7, Kind.Q4_1: 0.4}[
        kind
    ]
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(file.read(tensor.name).numpy(), expected), tensor.name
    difference = (load_model(path).embed - model.embed).abs().max()
    assert difference <= step and (difference > 0) == (kind is not Kind.F32)


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_K])
def test_formats_against_transformers_decoder(kind, tmp_path):
    """Random blocks, longer than one read chunk: equal to transformers' independent decoder in torch."""
    dequant = pytest.importorskip("transformers.integrations.gguf.dequant")
    values, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = 70, 4096
    blocks = np.random.default_rng(0).integers(0, 256, (rows * columns // values, size), np.uint8)
    scale = np.random.default_rng(1).normal(size=(len(blocks), 2)).astype(np.float16).view(np.uint8)
    places = {Kind.Q6_K: [208], Kind.Q8_0: [0], Kind.Q4_0: [0]}.get(
        kind, [0, 2]
    )  # where a block keeps fp16 numbers
    for i, at in enumerate(places):
        blocks[:, at : at + 2] = scale[:, 2 * i : 2 * i + 2]
    data = blocks.reshape(rows, -1)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = open_gguf(tmp_path / "m.gguf").read("x")
    theirs = dequant.dequantize(torch.from_numpy(data), int(kind)).view(rows, columns)
    assert ours.shape == (rows, columns) and ours.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)


def llama3_factors(base, dim, factor, low=1.0, high=4.0, original=8192) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors."""
    out = []
    for frequency in 1.0 / (base ** (np.arange(0, dim, 2, dtype=np.float32) / dim)):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recovered(factor, tmp_path):
    model = tiny_model(head_dim=64, rope_theta=5e5)
    factors = llama3_factors(5e5, 64, factor)
    assert 1 < len(set(factors.tolist())) and factors.max() == factor
    path = write_gguf(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": factors})
    assert read_config(open_gguf(path)).rope_scaling == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    ones = write_gguf(tmp_path / "1.gguf", model, extra={"rope_freqs.weight": np.ones(32, np.float32)})
    assert read_config(open_gguf(ones)).rope_scaling is None
    other = llama3_factors(5e5, 64, factor, original=4096)
    path = write_gguf(tmp_path / "2.gguf", model, extra={"rope_freqs.weight": other})
    with pytest.raises(InputError, match="rope_freqs.weight is no llama3 scaling"):
        load_model(path)


def test_linear_rope_and_defaults(tmp_path):
    linear = {
        "llama.rope.scaling.type": ("add_string", "linear"),
        "llama.rope.scaling.factor": ("add_float32", 4.0),
    }
    config = read_config(open_gguf(write_gguf(tmp_path / "m.gguf", tiny_model(), metadata=linear)))
    assert config.rope_scaling == {"rope_type": "linear", "factor": 4.0} and config.norm_eps == 1e-5


def header(path, text=b"GGUF", version=3, tensors=0, fields=1, rest=b""):
    path.write_bytes(text + struct.pack("<IQQ", version, tensors, fields) + rest)


def key(name: bytes, kind: int) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind)


BAD = {
    "empty": (lambda p: p.write_bytes(b""), "truncated or corrupt GGUF"),
    "no magic": (lambda p: header(p, b"GGML" * 2), "it does not start with GGUF"),
    "version": (lambda p: header(p, version=1), "GGUF version 1 is not supported"),
    "big-endian": (lambda p: header(p, version=3 << 24), "is not supported; little-endian"),
    "endless string": (lambda p: header(p, rest=struct.pack("<Q", 1 << 62)), "it ends within its header"),
    "endless array": (lambda p: header(p, rest=key(b"a", 9) + struct.pack("<IQ", 5, 1 << 60)), "it ends within"),
    "endless strings": (lambda p: header(p, rest=key(b"a", 9) + struct.pack("<IQ", 8, 1 << 60)), "it ends within"),
    "nested arrays": (lambda p: header(p, rest=key(b"a", 9) + struct.pack("<IQ", 9, 1) * 5000), "truncated or corrupt"),
    "value kind": (lambda p: header(p, rest=key(b"a", 99) + b"12345678"), "truncated or corrupt GGUF"),
    "key is no text": (lambda p: header(p, rest=key(b"\xff\xfe", 4) + b"1234"), "truncated or corrupt GGUF"),
    "tensor kind": (
        lambda p: header(p, tensors=1, fields=0, rest=struct.pack("<QcIQIQ", 1, b"x", 1, 32, 999, 0)),
        "truncated or corrupt GGUF",
    ),
    "row of half blocks": (
        lambda p: header(p, tensors=1, fields=0, rest=struct.pack("<QcIQIQ", 1, b"x", 1, 33, 8, 0)),
        "no multiple of Q8_0's block of 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_damaged_header_is_one_clear_line(case, tmp_path):
    make, expected = BAD[case]
    make(tmp_path / "m.gguf")
    with pytest.raises(InputError) as error:
        load_model(tmp_path / "m.gguf")
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'm.gguf'}: ") and expected in text and "\n" not in text


def test_every_truncation_is_an_input_error(tmp_path):
    """Cut anywhere, a file is an InputError: never another exception, never a model."""
    data = write_gguf(tmp_path / "m.gguf", tiny_model(num_layers=1)).read_bytes()
    for size in [*range(0, 900, 7), *range(900, len(data), len(data) // 40), len(data) - 40]:
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(InputError):
            load_model(tmp_path / "cut.gguf")


def test_flipped_header_bytes_never_crash(tmp_path):
    """One wrong byte in the header: an InputError, or a file that still makes sense."""
    data = write_gguf(tmp_path / "m.gguf", tiny_model(num_layers=1)).read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for at in rng.integers(0, 1400, 300):
        broken = bytearray(data)
        broken[at] ^= int(rng.integers(1, 256))
        (tmp_path / "bad.gguf").write_bytes(broken)
        try:
            load_model(tmp_path / "bad.gguf")
        except InputError:
            refused += 1
    assert refused > 150


GPT2 = {"tokenizer.ggml.model": ("add_string", "gpt2")}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"skip": ["blk.1.attn_q.weight"]}, "tensor 'model.layers.1.self_attn.q_proj.weight' is missing"),
        ({"extra": {"blk.0.ffn_gate_exps.weight": np.ones(4, np.float32)}}, "unexpected tensor 'blk.0.ffn_gate_exps"),
        ({"metadata": {"llama.rope.scaling.type": ("add_string", "yarn")}}, "rope scaling 'yarn' is not supported"),
        ({"metadata": {"llama.expert_count": ("add_uint32", 8)}}, "mixtures of experts"),
        ({"metadata": {"llama.rope.dimension_count": ("add_uint32", 2)}}, "sizes of a head must be equal"),
        ({"metadata": {"tokenizer.ggml.model": ("add_string", "llama")}}, "tokenizer 'llama' with pre-tokenizer None"),
        ({"metadata": GPT2 | {"tokenizer.ggml.pre": ("add_string", "mars")}}, "'mars'"),
        ({"metadata": GPT2 | {"tokenizer.ggml.eos_token_id": ("add_uint32", 5)}}, "its tokenizer is damaged"),
    ],
)  # fmt: skip
def test_unsupported_content(changes, expected, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model(), **changes)
    with pytest.raises(InputError) as error:
        load_model(path)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_nan_and_shape_and_architecture(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.blocks[1].down[2, 3] = torch.nan
    with pytest.raises(InputError, match=r"'model.layers.1.mlp.down_proj.weight' holds NaN"):
        load_model(write_gguf(tmp_path / "n.gguf", model))
    path = tmp_path / "s.gguf"
    write_gguf(path, tiny_model())
    path.write_bytes(path.read_bytes().replace(struct.pack("<II", 4, 40), struct.pack("<II", 4, 41), 1))
    with pytest.raises(InputError, match=r"has shape \(40, 24\), expected \(41, 24\)"):
        load_model(path)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        InputError, match="architecture 'falcon' is not known; hpsafety supports model types llama"
    ):
        load_model(tmp_path / "a.gguf")


def test_read_gguf_streams(tmp_path):
    """Weights are read when asked for: a config does not touch them."""
    path = write_gguf(tmp_path / "m.gguf", tiny_model())
    config, weights, _, generation = read_gguf(path)
    assert config.width == tiny_config().width and generation == {}
    path.unlink()
    with pytest.raises(FileNotFoundError):
        next(weights)
