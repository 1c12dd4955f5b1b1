"""Llama and Qwen2 models in GGUF files: config, weights under Hugging Face names, tokenizer."""

import re
from collections.abc import Iterator

import torch

from hpsafety.errors import file_error
from hpsafety.model.config import SUPPORTED, LlamaConfig
from hpsafety.model.gguf_file import GGUFFile, open_gguf
from hpsafety.model.gguf_tokenizer import read_tokenizer
from hpsafety.model.rope import inverse_frequencies
from hpsafety.model.tokenizer import Tokenizer

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQS = "rope_freqs.weight"  # the factors by which llama3 scaling divides each frequency
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_gguf(path) -> tuple[LlamaConfig, Iterator[tuple[str, torch.Tensor]], Tokenizer | None, dict]:
    """(config, stream of (Hugging Face name, fp32 tensor), tokenizer, generation) of a .gguf file.

    Raises InputError for a file that is damaged, an architecture, rope or tokenizer that is not supported.
    """
    file = open_gguf(path)
    config = read_config(file)
    keys = {
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "padding_token_id": "pad_token_id",
    }
    ids = {ours: file.metadata.get(f"tokenizer.ggml.{theirs}") for theirs, ours in keys.items()}
    generation = {name: index for name, index in ids.items() if index is not None}
    return config, read_weights(file, config), read_tokenizer(file, generation), generation


def read_config(file: GGUFFile) -> LlamaConfig:
    """LlamaConfig from the metadata; biases and a tied head show by which tensors there are."""
    arch = file.metadata.get("general.architecture")
    if arch not in ("llama", "qwen2"):
        raise file_error(file.path, f"architecture {arch!r} is not known; hpsafety supports {SUPPORTED}")

    def field(name, default=None):
        value = file.metadata.get(f"{arch}.{name}", default)
        if value is None:
            raise file_error(file.path, f"metadata {arch}.{name} is missing")
        return value

    if field("expert_count", 0):
        raise file_error(file.path, "mixtures of experts are not supported")
    heads, width = field("attention.head_count"), field("embedding_length")
    embed, first = file.tensors.get("token_embd.weight"), "blk.0."
    try:
        head_dim = field("attention.key_length", field("rope.dimension_count", width // heads))
        if (
            field("rope.dimension_count", head_dim) != head_dim
            or field("attention.value_length", head_dim) != head_dim
        ):
            raise ValueError("rotary, key and value sizes of a head must be equal")
        config = dict(
            vocab_size=embed.shape[0] if embed else field("vocab_size"),
            width=width,
            mlp_width=field("feed_forward_length"),
            num_layers=field("block_count"),
            num_heads=heads,
            num_kv_heads=field("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_positions=field("context_length"),
            norm_eps=_shortest(field("attention.layer_norm_rms_epsilon")),
            rope_theta=_shortest(field("rope.freq_base", 10_000.0)),
            tied="output.weight" not in file.tensors,
            qkv_bias=f"{first}attn_q.bias" in file.tensors,
            o_bias=f"{first}attn_output.bias" in file.tensors,
            mlp_bias=f"{first}ffn_gate.bias" in file.tensors,
            model_type=arch,
        )
        return LlamaConfig(**config, rope_scaling=_read_scaling(file, LlamaConfig(**config), field))
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise file_error(file.path, str(error)) from None


def _shortest(value: float) -> float:
    """The shortest decimal that is this fp32: metadata holds fp32, so 1e-5 comes as 9.999999747378752e-06."""
    return (
        float(format(value, ".7g"))
        if torch.tensor(float(format(value, ".7g"))) == torch.tensor(value)
        else value
    )


def _read_scaling(file: GGUFFile, config: LlamaConfig, field) -> dict | None:
    kind = field("rope.scaling.type", "none")
    if kind == "linear" and field("rope.scaling.factor", 1.0) != 1.0:
        return {"rope_type": "linear", "factor": field("rope.scaling.factor")}
    if kind not in ("none", "linear"):
        raise ValueError(f"rope scaling {kind!r} is not supported; hpsafety supports {SUPPORTED}")
    if ROPE_FREQS not in file.tensors:
        return None
    return _recover_llama3(file.read(ROPE_FREQS).double(), config)


def _recover_llama3(factors: torch.Tensor, config: LlamaConfig) -> dict | None:
    """The llama3 scaling whose table of factors this is. Only the largest factor varies between released models; a
    table that the release's other constants do not reproduce is an error rather than a guess."""
    if torch.all(factors == 1):
        return None
    scaling = {"rope_type": "llama3", "factor": _shortest(float(factors.max()))} | _LLAMA3
    plain = inverse_frequencies(config).double()
    scaled = inverse_frequencies(LlamaConfig(**vars(config) | {"rope_scaling": scaling})).double()
    if factors.shape != plain.shape or not torch.allclose(plain / scaled, factors, rtol=1e-4):
        raise ValueError(
            f"{ROPE_FREQS} is no llama3 scaling with {_LLAMA3}; use the Hugging Face directory instead"
        )
    return scaling


def _hf_name(name: str) -> str | None:
    """Hugging Face's name of a GGUF tensor; its own name where there is none, so that it is reported as unexpected."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
    return _WHOLE.get(name, name)


def read_weights(file: GGUFFile, config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, fp32 tensor) of every tensor, in file order.

    llama.cpp interleaves the two halves of each q and k head of the llama architecture for its rotary kernel; that is
    undone here. Its qwen2 keeps Hugging Face's order.
    """
    heads = (
        {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if config.model_type == "llama" else {}
    )
    for name in file.tensors:
        if name == ROPE_FREQS:
            continue
        hf_name, tensor = _hf_name(name), file.read(name)
        count = heads.get(hf_name.split(".")[-2]) if hf_name.startswith("model.layers.") else None
        if count is not None and tensor.shape[0] == count * config.head_dim:
            tensor = (
                tensor.unflatten(0, (count, config.head_dim // 2, 2)).transpose(1, 2).reshape(tensor.shape)
            )
        yield hf_name, tensor
