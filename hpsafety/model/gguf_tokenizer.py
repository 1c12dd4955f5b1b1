"""A tokenizer from a GGUF file's metadata, with the token ids that transformers gives for the same file."""

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from hpsafety.errors import file_error
from hpsafety.model.gguf_file import GGUFFile
from hpsafety.model.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

# How text is cut before byte-pair merging, by tokenizer.ggml.pre; None is GPT-2's own pattern.
# smollm: the model was trained with single digits cut off first, which its merges imply but for white space before a
# digit ("\n\n1"); transformers reads such files with GPT-2's pattern, and ids here equal transformers'.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def read_tokenizer(file: GGUFFile, generation: dict) -> Tokenizer | None:
    """The tokenizer a GGUF describes; None where it has none. InputError for a kind that is not supported."""
    fields = {
        k.removeprefix("tokenizer.ggml."): v
        for k, v in file.metadata.items()
        if k.startswith("tokenizer.ggml.")
    }
    if fields.get("model") in (None, "no_vocab"):
        return None
    if fields["model"] != "gpt2" or fields.get("pre", "default") not in PATTERNS:
        raise file_error(
            file.path,
            f"tokenizer {fields['model']!r} with pre-tokenizer {fields.get('pre')!r} is not supported; gpt2 with "
            f"{', '.join(PATTERNS)} is. Use the Hugging Face directory of this model instead",
        )
    tokens, merges, kinds = (fields.get(name) or [] for name in ("tokens", "merges", "token_type"))
    try:
        backend = _byte_level(
            tokens, [tuple(merge.split(" ")) for merge in merges], PATTERNS[fields.get("pre", "default")]
        )
        _add_tokens(backend, tokens, kinds)
        return Tokenizer(backend, _settings(file, fields, tokens), generation)
    except Exception as error:  # the tokenizers package raises plain Exception
        raise file_error(file.path, f"its tokenizer is damaged ({type(error).__name__}: {error})") from None


def _byte_level(tokens: list[str], merges: list[tuple[str, str]], pattern: str | None) -> Backend:
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise ValueError("a token occurs twice")
    backend = Backend(
        models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="")
    )
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), split])
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: Backend, tokens: list[str], kinds: list[int]) -> None:
    """Control tokens as special, user-defined ones as plain added tokens: both are matched whole in text."""
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        chosen = [token for token, k in zip(tokens, kinds, strict=False) if k == kind]
        add = backend.add_special_tokens if special else backend.add_tokens
        add([AddedToken(token, normalized=False, special=special) for token in chosen])


def _settings(file: GGUFFile, fields: dict, tokens: list[str]) -> dict:
    """What tokenizer_config.json would say."""
    config = {
        "model_max_length": file.metadata.get(f"{file.metadata['general.architecture']}.context_length")
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"{key}_token_id")
        if index is not None:
            config[f"{name}_token"] = tokens[index]
    template = file.metadata.get("tokenizer.chat_template")
    return config | ({"chat_template": template} if template else {})
