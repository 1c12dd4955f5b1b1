"""JSON files of a model directory: read with one clear error, written with sorted keys so that bytes repeat."""

import json
from pathlib import Path

from hpsafety.errors import file_error


def read_json(path) -> dict:
    """The object in a JSON file; InputError when it is missing, no JSON, or no object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise file_error(path, "no such file") from None
    except json.JSONDecodeError as error:
        raise file_error(path, f"not valid JSON: {error.msg}", error.lineno) from None
    except UnicodeDecodeError:
        raise file_error(path, "not valid JSON: it is not UTF-8 text") from None
    if not isinstance(value, dict):
        raise file_error(path, "expected a JSON object { ... }")
    return value


def dump_json(value: dict) -> str:
    """JSON text with sorted keys and a final newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
