"""From a config dataclass to its command line: flags, a TOML file underneath them, help, and one-line errors."""

import argparse
import dataclasses
import difflib
import re
import types
import typing

from hpsafety.config import flag
from hpsafety.errors import InputError, file_error

NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|-(inf|nan)")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message.removeprefix('argument ')}. See {self.prog} --help")


def _form(annotation) -> tuple[type, bool, tuple | None]:
    """A field's (element type, whether it is a list, choices or None): int | None is (int, False, None)."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return _form(next(a for a in args if a is not types.NoneType))
    if origin is tuple:
        return args[0], True, None
    if origin is typing.Literal:
        return str, False, args
    return annotation, False, None


def _default_text(field) -> str:
    if field.default is dataclasses.MISSING:
        return " (required)"
    if field.default is None or field.default == ():
        return ""
    return f" (default {str(field.default).lower() if isinstance(field.default, bool) else field.default})"


def make_parser(config: type, prog: str, summary: str) -> argparse.ArgumentParser:
    """A parser whose namespace holds what was given and no defaults."""
    hints = typing.get_type_hints(config)
    words = ""
    for field in dataclasses.fields(config):
        if field.metadata["positional"]:
            name, (_, many, _) = field.metadata["positional"], _form(hints[field.name])
            words += f" {name} [{name} ...]" if many else f" {name}"
    parser = _Parser(
        prog=prog,
        usage=f"{prog}{words} [--config FILE.toml] [--flags]",
        description=summary,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )
    parser.add_argument("--config", metavar="FILE.toml", help="TOML file of these names; flags override it")
    for field in dataclasses.fields(config):
        kind, many, choices = _form(hints[field.name])
        text = field.metadata["help"].replace("%", "%%") + _default_text(field)
        if field.metadata["positional"]:
            number = "*" if many else "?"  # the config file may hold it too, so argparse must not insist
            parser.add_argument(field.name, nargs=number, metavar=field.metadata["positional"], help=text)
            continue
        if kind is bool:
            parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, help=text)
            continue
        more = {"nargs": "+", "action": "extend"} if many else {}
        metavar = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X", str: "TEXT"}[kind]
        parser.add_argument(flag(field.name), type=kind, choices=choices, metavar=metavar, help=text, **more)
    return parser


def load_toml(path: str, hint: str = "") -> dict:
    """The table of a TOML file. InputError names the file; hint: what it should have been."""
    import tomllib

    try:
        with open(path, "rb") as handle:
            return tomllib.load(handle)
    except OSError as error:
        raise file_error(path, f"cannot be read: {error.strerror}{hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise file_error(path, f"is not valid TOML: {error}") from None


def read_toml(path: str, config: type) -> dict:
    """The values of a TOML file, keyed by field name. InputError names file and key."""
    return table_values(path, load_toml(path, "; --config takes a TOML file"), config)


def table_values(where: str, table: dict, config: type) -> dict:
    """The values of a TOML table, keyed by field name. InputError starts with `where` and names the key."""
    hints = typing.get_type_hints(config)
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in hints:
            raise file_error(where, f"unknown key {key!r}{nearest(name, hints)}")
        values[name] = _checked(where, key, value, *_form(hints[name]))
    return values


def _checked(path: str, key: str, value, kind: type, many: bool, choices: tuple | None):
    if many:
        items = [value] if isinstance(value, kind) else value
        if isinstance(items, list) and all(isinstance(item, kind) for item in items):
            return tuple(items)
    elif isinstance(value, bool) == (kind is bool) and isinstance(
        value, (int, float) if kind is float else kind
    ):
        if choices is None or value in choices:
            return kind(value)
    expected = (
        "one of " + ", ".join(choices) if choices else {int: "a whole number", float: "a number"}.get(kind)
    )
    expected = expected or (
        "true or false" if kind is bool else "a string" + (" or a list of strings" if many else "")
    )
    raise file_error(path, f"key {key!r} must be {expected}, got {value!r}")


def missing_fields(config: type, values: dict):
    """The fields that must be given and are not among `values`, in order."""
    fields = dataclasses.fields(config)
    return (f for f in fields if f.name not in values and f.default is dataclasses.MISSING)


def nearest(name: str, names, what: str = "keys") -> str:
    """What a wrong name may have meant, as the end of a message."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known {what}: {', '.join(names)}"


def _join_negatives(args: list[str]) -> list[str]:
    """['--lr', '-1e-5'] as ['--lr=-1e-5']: argparse takes some negative numbers for flags."""
    joined: list[str] = []
    for word in args:
        if NUMBER.fullmatch(word) and joined and re.fullmatch(r"--[a-z][\w-]*", joined[-1]):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def parse(config: type, prog: str, summary: str, args: list[str]):
    """The config made from `args` over the file of --config over the defaults. InputError on anything else."""
    parser = make_parser(config, prog, summary)
    given, rest = parser.parse_known_intermixed_args(_join_negatives(args))
    names = [field.name for field in dataclasses.fields(config)]
    if rest:
        word = rest[0].split("=")[0]
        if not word.startswith("-"):
            raise InputError(f"unexpected argument {word!r}; values follow a flag. See {prog} --help")
        name = word.lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(name, [*names, "config", "help"], n=1, cutoff=0.6)
        hint = f"; did you mean {flag(near[0])}?" if near else "."
        raise InputError(f"unknown flag {word}{hint} See {prog} --help")
    values = vars(given)
    path = values.pop("config", None)
    values = {**(read_toml(path, config) if path is not None else {}), **values}
    missing = next(missing_fields(config, values), None)
    if missing is not None:
        name = missing.metadata["positional"] or flag(missing.name)
        raise InputError(f"{name} is missing ({missing.metadata['help']}). See {prog} --help")
    for field in dataclasses.fields(config):
        if isinstance(values.get(field.name), list):
            values[field.name] = tuple(values[field.name])
    return config(**values)
