"""config.json in and out (design section 4): both rope forms, defaults, and what is refused."""

import pytest

from hpsafety.errors import InputError
from hpsafety.model.config import LlamaConfig, from_hf, to_hf

BASE = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_defaults_are_transformers():
    config = from_hf(BASE)
    assert (config.head_dim, config.num_kv_heads, config.rope_theta, config.rope_scaling) == (
        8,
        2,
        10_000.0,
        None,
    )
    assert not (config.tied or config.qkv_bias or config.o_bias or config.mlp_bias)
    alone = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
    assert (from_hf(alone).num_kv_heads, from_hf(alone).norm_eps) == (6, 1e-6)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"rope_parameters": LLAMA3, "rope_theta": 5e5},
        {"rope_scaling": LLAMA3, "rope_theta": 5e5},
        {
            "rope_scaling": {**{k: v for k, v in LLAMA3.items() if k != "rope_type"}, "type": "llama3"},
            "rope_theta": 5e5,
        },
        {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_theta": 5e5},
    ],
)
def test_both_rope_forms_are_read(rope):
    config = from_hf(BASE | rope)
    assert config.rope_theta == 5e5 and config.rope_scaling == LLAMA3


def test_linear_and_default_rope():
    linear = from_hf(BASE | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert linear.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    assert (
        from_hf(BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}).rope_scaling is None
    )
    assert from_hf(BASE | {"rope_scaling": None, "rope_theta": 7.0}).rope_theta == 7.0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "head_dim": 16},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_scaling": LLAMA3, "rope_theta": 5e5},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"model_type": "qwen2"},
    ],
)
def test_written_config_reads_back_here_and_in_transformers(changes):
    """Both rope forms are written, each alone gives the same config, and transformers agrees on every field."""
    config = from_hf(BASE | changes)
    written = to_hf(config, "float32", {"eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0})
    assert from_hf(written) == config
    old = {k: v for k, v in written.items() if k != "rope_parameters"}
    new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}
    assert from_hf(old) == config == from_hf(new)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**written)
    assert from_hf(theirs.to_dict()) == config
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert (theirs.eos_token_id, theirs.pad_token_id) == (2, 0)


def test_qwen2_has_qkv_bias_only():
    config = from_hf(BASE | {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False})
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            {"model_type": "mixtral"},
            "model_type 'mixtral' is not known; hpsafety supports model types llama and qwen2",
        ),
        ({"model_type": None}, "supports model types"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not known"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope type 'dynamic' is not known"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs a positive low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one plain object"),
        ({"rope_scaling": "linear"}, "one plain object"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding-window"),
        ({"num_key_value_heads": 4}, "no multiple of num_kv_heads 4"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "no multiple of num_attention_heads 5"),
        ({"head_dim": 7}, "must be even"),
        ({"hidden_size": "48"}, "field 'hidden_size' must be a whole number"),
        ({"vocab_size": None}, "field 'vocab_size'"),
        ({"num_hidden_layers": 0}, "field 'num_hidden_layers'"),
        ({"rms_norm_eps": -1}, "norm_eps must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number"),
        ({"max_position_embeddings": 2.5}, "max_positions must be a whole number"),
        ({"quantization_config": {"bits": 4}}, "quantised safetensors"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_refused_with_one_line(changes, expected):
    with pytest.raises(InputError) as error:
        from_hf(BASE | changes, "here/config.json")
    text = str(error.value)
    assert text.startswith("here/config.json: ") and expected in text and "\n" not in text


def test_a_config_that_cannot_be_is_a_value_error():
    sizes = dict(vocab_size=9, width=8, mlp_width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4)
    with pytest.raises(ValueError, match="qwen2 has a bias"):
        LlamaConfig(**sizes, max_positions=8, model_type="qwen2")
    with pytest.raises(ValueError, match="all of q, k, v and o"):
        LlamaConfig(**sizes, max_positions=8, qkv_bias=True)
