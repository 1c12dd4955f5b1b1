"""Shapes of models and sizes of data that a plan reckons with: counted where they are on the disk, else followed from
the stage that will write them, else as the file's [plan] table says."""

import dataclasses
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hpsafety.data.chat import encode_prompt, encode_response
from hpsafety.data.selection import kind_of
from hpsafety.data.sources import raw_rows
from hpsafety.errors import InputError, file_error
from hpsafety.flags import nearest
from hpsafety.model.config import LlamaConfig
from hpsafety.model.io import SMOLLM2, describe_model
from hpsafety.pipeline_file import Pipeline, Stage, references
from hpsafety.pipeline_state import values_of

READ = 20_000  # rows of a file that are looked at
COUNTED = 200  # rows of a file whose tokens are counted, evenly spread; the others are taken to be like them
CHARACTERS = 4  # of a token, where there is no tokenizer to ask


def llama2(width: int, mlp_width: int, num_layers: int, num_heads: int, num_kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32_000, width=width, mlp_width=mlp_width, num_layers=num_layers, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=128, max_positions=4096, norm_eps=1e-5,
    )  # fmt: skip


SHAPES = {
    "llama2-7b": llama2(4096, 11008, 32, 32, 32),
    "llama2-13b": llama2(5120, 13824, 40, 40, 40),
    "llama2-70b": llama2(8192, 28672, 80, 64, 8),
}


@dataclass(frozen=True)
class Rows:
    """Records: how many, mean tokens of a prompt and of an answer, bytes on the disk; the share of safety rows."""

    count: int
    prompt: float
    answer: float
    safety: float = 0.5
    size: int = 0
    assumed: bool = False

    def __add__(self, other: "Rows") -> "Rows":
        n = max(1, self.count + other.count)

        def mean(name: str) -> float:
            return (self.count * getattr(self, name) + other.count * getattr(other, name)) / n

        return Rows(
            self.count + other.count, mean("prompt"), mean("answer"), mean("safety"), self.size + other.size,
            self.assumed or other.assumed,
        )  # fmt: skip


UNKNOWN = Rows(1000, 100, 100, assumed=True)  # what a stage will find, and nobody says anything of


class Sizes:
    """What is known of a pipeline's models and data. plan: the file's [plan] table."""

    def __init__(self, pipeline: Pipeline):
        self.file, self.stages = pipeline.file, {stage.name: stage for stage in pipeline.stages}
        self.plan = checked_plan(pipeline.file, pipeline.plan)
        self.rows: dict[str, Rows] = {}
        self.models: dict[str, tuple] = {}

    # ---- models ----

    def shape(self, raw: str, path: str) -> LlamaConfig:
        """The shape of a model: as written in the file, and the path that it means."""
        named = self.plan["models"].get(raw)
        refs = references(raw)
        if named is not None:
            return SHAPES[named]
        if path == SMOLLM2 or Path(path).exists():
            return self.described(path)[0]
        if refs and refs[0] in self.stages:
            return self.shape(*trained_from(self.stages[refs[0]]))
        if self.plan["shape"] is not None:
            return SHAPES[self.plan["shape"]]
        try:
            return self.described(path)[0]
        except InputError as error:
            raise file_error(self.file, f"{error}; for a plan without it say its shape in [plan]") from None

    def of(self, stage: Stage, field: str) -> LlamaConfig | None:
        """The shape of the model in a field of a stage; None where the field names none."""
        raw, path = getattr(stage.raw, field, None), getattr(stage.cfg, field, None)
        return self.shape(raw, path) if raw else None

    def tokenizer(self, stage: Stage):
        """The tokenizer of a stage's model, or of the model it goes back to; None where none is on the disk."""
        if not getattr(stage.raw, "model", None):
            return None
        raw, path = stage.raw.model, stage.cfg.model
        while not Path(path).exists() and path != SMOLLM2:
            refs = references(raw)
            if not refs or refs[0] not in self.stages:
                return None
            raw, path = trained_from(self.stages[refs[0]])
        return self.described(path)[1]

    def described(self, path: str) -> tuple:
        """(config, tokenizer or None) of a model on the disk, read once."""
        if path not in self.models:
            self.models[path] = describe_model(path)
        return self.models[path]

    # ---- data ----

    def data(self, stage: Stage, field: str = "data") -> Rows:
        """All files of a stage's field together."""
        found = [self.one(stage, raw, path) for _, raw, path in values_of(stage, (field,))]
        total = Rows(0, 0, 0)
        for rows in found:
            total += rows
        return total

    def one(self, stage: Stage, raw: str, path: str) -> Rows:
        if raw not in self.rows:
            self.rows[raw] = self.find(stage, raw, path)
        return self.rows[raw]

    def find(self, stage: Stage, raw: str, path: str) -> Rows:
        told = self.plan["data"].get(raw)
        if told is not None:
            return Rows(assumed=True, **told)
        refs = [ref for ref in references(raw) if ref in self.stages]
        if refs and not Path(path).is_file():
            maker = self.stages[refs[0]]
            return self.selection(maker) if maker.run == "select" else UNKNOWN
        if Path(path).exists() and stage.run == "audit":  # a corpus is not read for a plan
            return Rows(1, bytes_of(path) / CHARACTERS, 0, size=bytes_of(path), assumed=True)
        if Path(path).exists():
            return count_rows(path, self.tokenizer(stage))
        return UNKNOWN

    def selection(self, stage: Stage) -> Rows:
        """What a select stage will write, followed from what it reads and its budget."""
        cfg, source = stage.cfg, self.data(stage)
        share = source.safety if cfg.kinds == ("safety",) else 1 if len(cfg.kinds) == 3 else 0.5
        answers = {"prompt": 0, "preference": 2}.get(cfg.record, 1) * source.answer
        each = max(1.0, source.prompt + answers + cfg.extra_tokens)
        count = int(source.count * share)
        if cfg.tokens is not None:
            count = min(count, int(cfg.tokens / each))
        safety = cfg.shares[0] / sum(cfg.shares) if cfg.shares else share
        return dataclasses.replace(
            source, count=max(1, count), safety=safety, assumed=True, size=int(count * each * CHARACTERS)
        )


def trained_from(stage: Stage) -> tuple[str, str]:
    """(as written, path) of the model whose shape a stage's model has."""
    for field in ("student", "base", "model"):
        if stage.run != "eval" and getattr(stage.raw, field, None):
            return getattr(stage.raw, field), getattr(stage.cfg, field)
    raise InputError(f"stage {stage.name!r} writes no model")


def count_rows(path: str, tokenizer) -> Rows:
    """Rows of a file, and the tokens of some of them. Where there is more than READ rows, the others are reckoned from
    the file's size; what is no record at all counts as one row of text."""
    size = bytes_of(path)
    try:
        rows = [row for _, row in islice(raw_rows(path), READ)]
        found = measure_rows(rows, tokenizer, size)
    except (InputError, OSError):
        return Rows(1, size / CHARACTERS, 0, size=size, assumed=True)
    if len(rows) < READ:
        return found
    each = sum(len(json.dumps(row, ensure_ascii=False).encode()) + 1 for row in rows) / len(rows)
    return dataclasses.replace(found, count=max(READ, int(size / each)), assumed=True)


def bytes_of(path: str) -> int:
    """Bytes of a file, or of all files of a folder."""
    place = Path(path)
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def measure_rows(rows: list[dict], tokenizer, size: int) -> Rows:
    """Mean tokens of rows, from COUNTED of them."""
    some = rows[:: max(1, len(rows) // COUNTED)]
    prompts = [length(tokenizer, row.get("prompt") or row.get("text") or "", True) for row in some]
    answers = [
        length(tokenizer, row[name], False)
        for row in some
        for name in ("response", "chosen", "rejected")
        if isinstance(row.get(name), str)
    ]
    return Rows(
        len(rows), sum(prompts) / len(some), sum(answers) / max(1, len(answers)),
        sum(kind_of(row) == "safety" for row in some) / len(some), size, tokenizer is None,
    )  # fmt: skip


def length(tokenizer, text, prompt: bool) -> int:
    """Tokens of a prompt with its template, or of an answer; by characters where there is no tokenizer."""
    if tokenizer is None or not isinstance(text, (str, list)) or not text:
        words = text if isinstance(text, str) else "".join(str(m.get("content", "")) for m in text or ())
        return 1 + len(words) // CHARACTERS
    return len(encode_prompt(tokenizer, text) if prompt else encode_response(tokenizer, text))


# ---- the [plan] table ----


def checked_plan(file: str, table: dict) -> dict:
    """[plan] with all its keys. Raises InputError for one that is unknown or wrong."""
    known = {"shape": None, "models": {}, "data": {}, "chips": None, "gpus": 1}
    where = f"{file}: [plan]"
    for key, value in table.items():
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}{nearest(key, known)}")
        form = {"models": dict, "data": dict, "gpus": int}.get(key, str)
        if not isinstance(value, form) or isinstance(value, bool):
            wanted = {dict: "a table", int: "a whole number", str: "a string"}[form]
            raise InputError(f"{where}: {key} must be {wanted}, got {value!r}")
    for name in [*table.get("models", {}).values(), *([table["shape"]] if "shape" in table else [])]:
        if name not in SHAPES:
            raise InputError(f"{where}: no shape {name!r}{nearest(str(name), SHAPES, 'shapes')}")
    for name, rows in table.get("data", {}).items():
        fields = {"count", "prompt", "answer", "safety", "size"}
        if not isinstance(rows, dict) or not {"count"} <= rows.keys() <= fields:
            raise InputError(f"{where}: data {name!r} must be a table of count, prompt, answer, safety, size")
        for key, value in rows.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise InputError(
                    f"{where}: data {name!r}: {key} must be a number, 0 or greater, got {value!r}"
                )
    if table.get("gpus", 1) < 1:
        raise InputError(f"{where}: gpus must be at least 1, got {table['gpus']}")
    data = {name: {"prompt": 0, "answer": 0} | rows for name, rows in table.get("data", {}).items()}
    return known | table | {"data": data}
