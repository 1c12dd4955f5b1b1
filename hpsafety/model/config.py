"""The shape of a Llama-family model, and Hugging Face's config.json for it, both ways."""

import math
from dataclasses import dataclass

from hpsafety.errors import file_error

MODEL_TYPES = ("llama", "qwen2")
ROPE_TYPES = {  # our rope_type -> the fields it needs
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
SUPPORTED = "model types llama and qwen2; rope types default, linear and llama3; activation silu"
_SIZES = (
    "vocab_size",
    "width",
    "mlp_width",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_positions",
)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and options of a model; a ValueError names the first one that cannot be.

    rope_scaling  None, {"rope_type": "linear", "factor"} or {"rope_type": "llama3", "factor", "low_freq_factor",
                  "high_freq_factor", "original_max_position_embeddings"}
    """

    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int  # tokens of context
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    tied: bool = False  # the head is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    model_type: str = "llama"
    init_std: float = 0.02  # of fresh weights

    def __post_init__(self):
        for name in _SIZES:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        for name in ("norm_eps", "rope_theta", "init_std"):
            if not _positive(getattr(self, name)):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)!r}")
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type {self.model_type!r} is not known; hpsafety supports {SUPPORTED}")
        biases = (self.qkv_bias, self.o_bias, self.mlp_bias)
        if self.model_type == "qwen2" and biases != (True, False, False):
            raise ValueError("qwen2 has a bias on q, k and v and on nothing else")
        if self.model_type == "llama" and self.qkv_bias != self.o_bias:
            raise ValueError("llama has biases on all of q, k, v and o, or on none")
        _check_scaling(self.rope_scaling)


def _positive(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _check_scaling(scaling: dict | None) -> None:
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope type {kind!r} is not known; hpsafety supports {SUPPORTED}")
    for name in ROPE_TYPES[kind]:
        if not _positive(scaling.get(name)):
            raise ValueError(f"rope scaling {kind} needs a positive {name}, got {scaling.get(name)!r}")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError("rope scaling llama3 needs high_freq_factor > low_freq_factor")


def _read_rope(config: dict) -> tuple[float, dict | None]:
    """(theta, scaling) from `rope_parameters` or from `rope_theta` with `rope_scaling`; the dicts win, as there."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    both = {**(config.get("rope_parameters") or {}), **rope} if isinstance(rope, dict) else None
    if both is None or any(isinstance(value, dict) for value in both.values()):
        raise ValueError("rope parameters must be one plain object")
    theta = both.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if both.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ValueError("partial_rotary_factor is not supported")
    if kind in (None, "default"):
        return theta, None
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope type {kind!r} is not known; hpsafety supports {SUPPORTED}")
    scaling = {"rope_type": kind} | {name: rope.get(name) for name in ROPE_TYPES[kind]}
    if kind == "llama3" and scaling["original_max_position_embeddings"] is None:
        scaling["original_max_position_embeddings"] = config.get("max_position_embeddings")
    return theta, scaling


def _check_supported(config: dict) -> None:
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type {kind!r} is not known; hpsafety supports {SUPPORTED}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not known; hpsafety supports {SUPPORTED}")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise ValueError("sliding-window attention is not supported; full attention in every layer is")
    if config.get("quantization_config"):
        raise ValueError("quantised safetensors are not supported; fp32, fp16 and bf16 are, and GGUF files")


def from_hf(config: dict, where="config.json") -> LlamaConfig:
    """LlamaConfig of a parsed config.json. `where` stands in messages. InputError for what is not supported."""
    try:
        _check_supported(config)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        ):
            if type(config.get(name)) is not int or config[name] < 1:
                raise ValueError(
                    f"field {name!r} must be a whole number of at least 1, got {config.get(name)!r}"
                )
        width, heads = config["hidden_size"], config["num_attention_heads"]
        if config.get("head_dim") is None and width % heads:
            raise ValueError(
                f"hidden_size {width} is no multiple of num_attention_heads {heads}; give head_dim"
            )
        theta, scaling = _read_rope(config)
        qwen = config["model_type"] == "qwen2"
        attention_bias = bool(config.get("attention_bias", False)) and not qwen
        return LlamaConfig(
            vocab_size=config["vocab_size"],
            width=width,
            mlp_width=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=heads
            if config.get("num_key_value_heads") is None
            else config["num_key_value_heads"],
            head_dim=width // heads if config.get("head_dim") is None else config["head_dim"],
            max_positions=config.get("max_position_embeddings", 32_768 if qwen else 2048),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=qwen or attention_bias,
            o_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)) and not qwen,
            model_type=config["model_type"],
            init_std=config.get("initializer_range", 0.02) or 0.02,
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise file_error(where, str(error)) from None


def to_hf(config: LlamaConfig, dtype: str, ids: dict, overrides: dict | None = None) -> dict:
    """The config.json that transformers 4 and 5 and vLLM read; rope in both forms.

    dtype      "float32", "bfloat16" or "float16": the saved tensors'
    ids        bos_token_id, eos_token_id, pad_token_id: int, list of int or None
    overrides  fields of another head, as {"architectures": ["LlamaForSequenceClassification"]}
    """
    rope = config.rope_scaling or {"rope_type": "default"}
    fields = {
        "architectures": ["Qwen2ForCausalLM" if config.model_type == "qwen2" else "LlamaForCausalLM"],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling and dict(config.rope_scaling),
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if config.model_type == "llama":
        fields |= {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}
    else:
        fields |= {"use_sliding_window": False}
    fields |= {name: ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return dict(sorted((fields | (overrides or {})).items()))
