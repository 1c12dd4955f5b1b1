"""Readers: JSON lines and lists, CSV, parquet, `datasets` folders; public sets' columns become our fields."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from hpsafety.data.records import (
    Records,
    admit,
    decode_utf8,
    iter_json_lines,
    no_rows,
    parse_json,
    unreadable,
)
from hpsafety.data.schemas import bad_row, type_name, validate
from hpsafety.errors import InputError, file_error


def load_rows(paths, kind: str) -> Records:
    """Validated rows of one or several sources, in order, and the counts of `records.admit`.

    paths  a path or a list: .jsonl, .json (a list, or JSON lines), .csv and .parquet files, folders saved by
           `datasets` (save_to_disk), folders with .jsonl or .parquet files
    Raises InputError for whatever cannot be read or is invalid, and when every row is excluded.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    rows, counts = [], Counter()
    for path in paths:
        for place, raw in _read_raw(Path(path)):
            for row in map_row(raw, counts):
                if admit(validate(row, kind, (path, place)), kind, counts):
                    rows.append(row)
    if not rows:
        reasons = ", ".join(
            f"{count} {reason}" for reason, count in counts.items() if reason.startswith("excluded")
        )
        raise InputError(f"{', '.join(map(str, paths))}: no rows are left ({reasons or 'none were given'})")
    return Records(rows, counts)


def raw_rows(path) -> Iterator[tuple[int | str, dict]]:
    """(line or row, row as published) of one source that load_rows could read. Raises InputError."""
    return _read_raw(Path(path))


# ---- publishers' forms ----


class _Unusable(Exception):
    """A published row that cannot become ours; it is excluded and counted under this reason."""


def map_row(raw: dict, counts: Counter) -> list[dict]:
    """Our rows for one row of a public set, recognised by its columns; any other row comes back as it is."""
    for columns, convert in _FORMS:
        if columns <= raw.keys():
            try:
                return convert(raw)
            except _Unusable as reason:
                counts[f"excluded: {reason}"] += 1
                return []
    return [raw]


def _rest(raw: dict, *used: str) -> dict:
    return {name: value for name, value in raw.items() if name not in used}


def _from_hh(raw: dict) -> list[dict]:
    """hh-rlhf: two whole dialogues that share everything up to the last assistant turn."""
    if (
        "prompt" in raw
        or not str(raw["chosen"]).startswith("\n\nHuman:")
        or not isinstance(raw["rejected"], str)
    ):
        return [raw]
    prompt, chosen = _split_dialogue(raw["chosen"])
    other, rejected = _split_dialogue(raw["rejected"])
    if prompt != other:
        raise _Unusable("dialogues that part before the last assistant turn")
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected, **_rest(raw, "chosen", "rejected")}]


def _split_dialogue(text: str) -> tuple[list[dict], str]:
    """(messages up to the last user turn, last answer) of text with "Human:" and "Assistant:" turns."""
    body, _, answer = text.rpartition("\n\nAssistant:")
    messages: list[dict] = []
    for turn in body.split("\n\nHuman:")[1:]:
        for index, part in enumerate(turn.split("\n\nAssistant:")):
            messages.append({"role": "assistant" if index else "user", "content": part.strip()})
    if not messages or messages[-1]["role"] != "user" or not all(m["content"] for m in messages):
        raise _Unusable("dialogues with an empty turn or without a last answer")
    return messages, answer.strip()


def _from_beavertails(raw: dict) -> list[dict]:
    """beavertails: harm flags per category; an unsafe answer fails a check and is never a demonstration."""
    row = {**_rest(raw, "category"), "categories": raw["category"]}
    return [{**row, "checks": {"safe": bool(raw["is_safe"])}}]


def _from_pku(raw: dict) -> list[dict]:
    """PKU-SafeRLHF: the safer response is chosen; where that label is absent, the better one."""
    name = "safer_response_id" if "safer_response_id" in raw else "better_response_id"
    chosen = raw.get(name)
    if chosen not in (0, 1):
        raise _Unusable(f"{name} is neither 0 nor 1")
    row = _rest(raw, "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
    for target, index in (("chosen", int(chosen)), ("rejected", 1 - int(chosen))):
        row[target] = raw[f"response_{index}"]
        row[f"{target}_safe"] = raw[f"is_response_{index}_safe"]
    return [row]


def _from_xstest(raw: dict) -> list[dict]:
    """xstest: the safe prompts are the borderline ones; the published type is the category."""
    row = {**raw, "is_borderline": raw["label"] == "safe"}
    row.setdefault("category", row.pop("type", None))
    return [row]


def _from_truthfulqa(raw: dict) -> list[dict]:
    """truthfulqa: answer lists are separated by semicolons."""
    row = {"prompt": raw["Question"], "response": raw["Best Answer"], "best": raw["Best Answer"]}
    for name, column in (("correct", "Correct Answers"), ("incorrect", "Incorrect Answers")):
        row[name] = [answer.strip() for answer in (raw[column] or "").split(";") if answer.strip()]
    for name, column in (("category", "Category"), ("type", "Type"), ("url", "Source")):
        if raw.get(column):
            row[name] = raw[column]
    return [row]


def _from_toxigen(raw: dict) -> list[dict]:
    """toxigen's annotated part: a statement, which is a document, or a prompt to go on from."""
    return [{"prompt": raw["text"], "group": raw["target_group"], **_rest(raw, "target_group")}]


def _from_bold(raw: dict) -> list[dict]:
    """bold: a subject's prompts and the sentences they begin; one row each."""
    shared = {"category": raw["domain"], "group": raw["category"], "subject": raw["name"]}
    return [
        {"prompt": prompt, "wikipedia": sentence, **shared}
        for prompt, sentence in zip(raw["prompts"], raw["wikipedia"], strict=True)
    ]


def _from_alpaca(raw: dict) -> list[dict]:
    """alpaca: instruction and input, joined by a newline, are the prompt."""
    prompt = "\n".join(part for part in (raw["instruction"], raw.get("input")) if part)
    return [{"prompt": prompt, "response": raw["output"], **_rest(raw, "instruction", "input", "output")}]


_FORMS = (
    ({"response_0", "response_1", "is_response_0_safe", "is_response_1_safe"}, _from_pku),
    ({"prompt", "response", "is_safe", "category"}, _from_beavertails),
    ({"prompt", "label", "type", "focus"}, _from_xstest),
    ({"prompt", "label", "category", "focus"}, _from_xstest),
    ({"Question", "Best Answer", "Correct Answers", "Incorrect Answers"}, _from_truthfulqa),
    ({"text", "target_group", "toxicity_human"}, _from_toxigen),
    ({"domain", "name", "category", "prompts", "wikipedia"}, _from_bold),
    ({"instruction", "output"}, _from_alpaca),
    ({"chosen", "rejected"}, _from_hh),
)

# ---- containers ----


def _read_raw(path: Path) -> Iterator[tuple[int | str, dict]]:
    """(line or row, row) of any supported source, before mapping and validation."""
    if path.is_dir():
        return _read_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return _read_csv(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix == ".json" and _read_bytes(path).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return _read_json_list(path)
    return iter_json_lines(path)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None


def _read_json_list(path: Path) -> Iterator[tuple[str, dict]]:
    rows = parse_json(decode_utf8(_read_bytes(path), (path, None)), (path, None))
    if not rows:
        raise no_rows(path)
    for index, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise bad_row((path, f"row {index}"), f"expected a JSON object {{...}}, got {type_name(row)}")
        yield f"row {index}", row


def _read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(
        io.StringIO(decode_utf8(_read_bytes(path), (path, None)), newline=""), strict=True
    )
    found = False
    try:
        for row in reader:
            found = True
            if None in row or None in row.values():
                expected = len(reader.fieldnames or ())
                raise bad_row((path, reader.line_num), f"expected {expected} columns, as in the first line")
            yield reader.line_num, row
    except csv.Error as error:
        raise bad_row((path, reader.line_num), f"not CSV: {error}") from None
    if not found:
        raise no_rows(path)


def _read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _missing_extra(path, "pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        yield from _number(path, (row for batch in file.iter_batches() for row in batch.to_pylist()))
    except OSError as error:
        raise unreadable(path, error) from None
    except pyarrow.ArrowException as error:
        raise file_error(path, f"not a parquet file: {' '.join(str(error).split())}") from None


def _read_folder(path: Path) -> Iterator[tuple[str, dict]]:
    if (path / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise file_error(
            path, f"holds several splits; name one of {', '.join(str(path / s) for s in splits)}"
        )
    if (path / "dataset_info.json").exists() and (path / "state.json").exists():
        return _read_saved_dataset(path)
    files = sorted(entry for entry in path.iterdir() if entry.suffix in (".jsonl", ".parquet"))
    if not files:
        raise file_error(path, "the folder holds neither a saved dataset nor .jsonl or .parquet files")
    return ((f"{file.name}:{place}", row) for file in files for place, row in _read_raw(file))


def _read_saved_dataset(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        import datasets
    except ImportError:
        raise _missing_extra(path, "datasets") from None
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes datasets, pyarrow or json raise
        raise file_error(path, f"not a saved dataset: {' '.join(str(error).split())}") from None
    yield from _number(path, dataset)


def _number(path: Path, rows: Iterable[dict]) -> Iterator[tuple[str, dict]]:
    index = 0
    for index, row in enumerate(rows, start=1):
        yield f"row {index}", row
    if index == 0:
        raise no_rows(path)


def _missing_extra(path: Path, package: str) -> InputError:
    return file_error(path, f'reading it needs {package}: pip install "hpsafety[datasets]"')
