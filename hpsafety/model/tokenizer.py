"""Text to token ids and back, on the `tokenizers` package alone; what transformers reads from the same files."""

import functools
import hashlib
import json
from pathlib import Path

from tokenizers import Tokenizer as Backend

from hpsafety.errors import file_error
from hpsafety.model.jsonfile import dump_json, read_json

# Tokens that end a turn in chat templates that spell them out; templates that write eos_token end it with eos.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>")


class Tokenizer:
    """One vocabulary with its special tokens and chat template.

    backend     tokenizers.Tokenizer; truncation and padding are switched off
    config      tokenizer_config.json: bos_token, eos_token, pad_token, chat_template ...
    generation  generation_config.json, for ids that end a response; may be empty
    """

    def __init__(self, backend: Backend, config: dict | None = None, generation: dict | None = None):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._config, self._generation = dict(config or {}), dict(generation or {})
        generation = self._generation
        self.chat_template: str | None = _template(self._config.get("chat_template"))
        self.bos_token, self.bos_id = self._special("bos", generation)
        self.eos_token, self.eos_id = self._special("eos", generation)
        self.pad_token, self.pad_id = self._special("pad", generation)
        if self.pad_id is None:
            self.pad_token, self.pad_id = self.eos_token, self.eos_id
        self.end_of_turn_id: int | None = self._end_of_turn()
        stops = [self.end_of_turn_id, self.eos_id, *_ids(generation.get("eos_token_id"))]
        self.stop_ids: tuple[int, ...] = tuple(sorted({i for i in stops if i is not None}))

    def _special(self, name: str, generation: dict) -> tuple[str | None, int | None]:
        token = self._config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        index = self._backend.token_to_id(token) if isinstance(token, str) else None
        if index is None:
            index = next(iter(_ids(generation.get(f"{name}_token_id"))), None)
            token = None if index is None else self._backend.id_to_token(index)
        return token, index

    def _end_of_turn(self) -> int | None:
        for token in END_OF_TURN:
            if token in (self.chat_template or "") and self._backend.token_to_id(token) is not None:
                return self._backend.token_to_id(token)
        return self.eos_id

    def __len__(self) -> int:
        """Size of the vocabulary, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def num_needed(self) -> int:
        """Embedding rows a model needs: the plain vocabulary and the stops; an added token nobody uses needs none."""
        plain = self._backend.get_vocab_size(with_added_tokens=False)
        return max([plain, *(i + 1 for i in (self.bos_id, *self.stop_ids) if i is not None)])

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that are control, never text: tokens flagged special, and bos, eos, pad and the stops."""
        flagged = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        known = {self.bos_id, self.eos_id, self.pad_id, *self.stop_ids} - {None}
        return frozenset(flagged | known)

    @functools.cached_property
    def _plain(self) -> Backend:
        """A second backend that reads special tokens as characters; a flag on the first would be shared by threads."""
        tree = json.loads(self._backend.to_str())
        for token in tree["added_tokens"]:
            token["special"] = token["special"] or token["id"] in self.special_ids
        plain = Backend.from_str(json.dumps(tree))
        plain.encode_special_tokens = True
        return plain

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens spelled in the text become their ids, and nothing is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of text from outside: "<|im_end|>" in it is ten characters, never the control token."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text that begins a document: behind bos where the tokenizer puts one by itself."""
        return self._bos + self.encode_plain(text)

    @functools.cached_property
    def _bos(self) -> list[int]:
        first = self._backend.encode("a", add_special_tokens=True).ids[:1]
        return first if first == [self.bos_id] else []

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Text of token ids; special tokens are left out unless skip_special is False."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token(self, index: int) -> str | None:
        """The vocabulary's spelling of an id."""
        return self._backend.id_to_token(index)

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry, None where there is none."""
        return self._backend.token_to_id(token)

    @functools.cached_property
    def vocab_hash(self) -> str:
        """sha256 of the serialised tokenizer: equal hashes encode alike."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def with_pad(self, index: int) -> "Tokenizer":
        """The same tokenizer with another pad token."""
        config = self._config | {"pad_token": self.token(index)}
        return Tokenizer(self._backend, config, self._generation | {"pad_token_id": index})

    def files(self) -> dict[str, str]:
        """tokenizer.json and tokenizer_config.json as text, for a saved model; the same text every time."""
        config = {k: v for k, v in self._config.items() if k not in ("auto_map", "chat_template")}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config.setdefault("clean_up_tokenization_spaces", False)
        for name, token in (("bos", self.bos_token), ("eos", self.eos_token), ("pad", self.pad_token)):
            if token is not None and not config.get(f"{name}_token"):
                config[f"{name}_token"] = token
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return {
            "tokenizer.json": self._backend.to_str(pretty=True),
            "tokenizer_config.json": dump_json(config),
        }


def _ids(value) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if type(i) is int]


def _template(value) -> str | None:
    """The chat template: a string, or the one called "default" of a list of named ones."""
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def load_tokenizer(directory, generation: dict | None = None) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory; None where it has no tokenizer.json.

    Raises InputError for a file that is broken, and for a vocabulary in sentencepiece form only.
    """
    directory = Path(directory)
    path, template = directory / "tokenizer.json", directory / "chat_template.jinja"
    if not path.is_file():
        for other in ("tokenizer.model", "vocab.json", "spiece.model"):
            if (directory / other).is_file():
                raise file_error(
                    directory / other, "only tokenizer.json is read; save the tokenizer in that form"
                )
        return None
    try:
        backend = Backend.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the package raises plain Exception
        raise file_error(path, f"no readable tokenizer: {error}") from None
    settings = directory / "tokenizer_config.json"
    config = read_json(settings) if settings.is_file() else {}
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    return Tokenizer(backend, config, generation)
