"""Running a template that came inside a model file: jinja2's sandbox, and a bound on the work it may do.

jinja2's ImmutableSandboxedEnvironment keeps a template away from Python's internals, but not from the
processor or the memory: nested loops, a macro that calls itself twice, text multiplied by a billion, a list
that holds itself twice, forty times over. So each expression that makes a value is wrapped, in the syntax
tree, in a filter that charges the value's size to a budget; what could make something large in one step
(replace, join, `*`, ...) charges it beforehand; loops and macros charge each round. As no value is larger
than the budget, every step is short, and the time is looked at between them. This works in any thread and on
any platform, where signals do not, and costs little, where a process would cost a tenth of a second.
"""

import json
from functools import lru_cache, update_wrapper

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.filters import FILTERS, do_indent, do_trim
from jinja2.runtime import LoopContext, TemplateReference
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from hpsafety.data.budget import (
    MAX_INT_BITS,
    NODE,
    Budget,
    TemplateLimitError,
    bounded,
    charge,
    check_time,
    measure,
    tick,
)

MAX_TEMPLATE_CHARS = 49_152  # the longest known chat templates have 20,000
BASE_UNITS = 4_000_000
UNITS_PER_INPUT_UNIT = 64  # so often may a template look at everything it was given


def run_template(template: str, variables: dict) -> str:
    """The text a template makes of `variables` (plain dicts, lists, strings, numbers).

    Raises TemplateLimitError beyond the bounds, and whatever else jinja2 or the template raises.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise TemplateLimitError(f"it has {len(template)} characters, more than {MAX_TEMPLATE_CHARS}")
    compiled = _compile(template)
    with Budget(BASE_UNITS + UNITS_PER_INPUT_UNIT * measure(variables, float("inf"))):
        return compiled.render(variables)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    with Budget(BASE_UNITS):
        return _ENVIRONMENT.from_string(template)


class _Meter(NodeTransformer):
    """Puts `_bounded` around each expression that makes or walks a value, and `_tick` into each round."""

    def _wrap(self, node):
        if isinstance(node, (nodes.Const, nodes.TemplateData)):
            return node
        if isinstance(node, nodes.Filter) and node.name == "_bounded":
            return node
        return nodes.Filter(node, "_bounded", [], [], None, None).set_lineno(node.lineno)

    def _visit_value(self, node):
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._wrap(node)

    visit_Call = visit_Filter = visit_Getitem = visit_List = visit_Tuple = visit_Dict = _visit_value
    visit_Add = visit_Sub = visit_Mul = visit_Div = visit_FloorDiv = visit_Mod = visit_Pow = _visit_value

    def visit_Concat(self, node):
        self.generic_visit(node)
        parts = self._wrap(nodes.List(node.nodes).set_lineno(node.lineno))
        return self._wrap(nodes.Filter(parts, "_concat", [], [], None, None).set_lineno(node.lineno))

    def visit_Compare(self, node):
        self.generic_visit(node)
        for part in (node, *node.ops):
            part.expr = self._wrap(part.expr)
        return node

    def visit_Test(self, node):
        self.generic_visit(node)
        if node.name not in _CHEAP_TESTS:
            node.node = self._wrap(node.node)
            node.args = [self._wrap(arg) for arg in node.args or []]
        return node

    def visit_Output(self, node):
        self.generic_visit(node)
        node.nodes = [self._wrap(child) for child in node.nodes]
        return node

    def visit_For(self, node):
        self.generic_visit(node)
        node.iter = self._wrap(node.iter)
        return self._count_rounds(node)

    def visit_Macro(self, node):
        self.generic_visit(node)
        return self._count_rounds(node)

    def visit_CallBlock(self, node):
        call = self.generic_visit(node.call)  # jinja2 wants the bare call here
        node.call = nodes.Const(None)
        self.generic_visit(node)
        node.call = call
        return self._count_rounds(node)

    def _count_rounds(self, node):
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        tick = nodes.Filter(nodes.Const(text), "_tick", [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno, override=True))
        return node


# ---- the environment ----

_CHEAP_TESTS = frozenset(
    ("boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping")
    + ("none", "number", "sequence", "string", "true", "undefined")
)
_TEXT_METHODS = frozenset(
    ("capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdecimal", "isdigit")
    + ("islower", "isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix")
    + ("removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines")
    + ("startswith", "strip", "swapcase", "title", "upper")
)
_CONTAINER_METHODS = frozenset(("copy", "count", "get", "index", "items", "keys", "values"))
_FILTERS = frozenset(
    (
        "abs",
        "capitalize",
        "count",
        "d",
        "default",
        "dictsort",
        "e",
        "escape",
        "first",
        "float",
        "int",
        "items",
    )
    + ("last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe")
    + ("select", "selectattr", "sort", "string", "title", "unique", "upper")
)
_CHEAP_FILTERS = frozenset(("count", "d", "default", "first", "items", "last", "length"))


class _TimedGenerator(CodeGenerator):
    """jinja2's compiler, which is quadratic in the number of branches, under the deadline."""

    def visit(self, node, *args, **kwargs):
        check_time()
        return super().visit(node, *args, **kwargs)


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with methods, filters and operators reduced to those whose cost is known."""

    intercepted_binops = frozenset(("*", "**", "%"))
    code_generator_class = _TimedGenerator

    def _parse(self, source, name, filename):
        tree = _Meter().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)

    def is_safe_attribute(self, obj, attr, value):
        if isinstance(obj, str):
            return attr in _TEXT_METHODS
        if isinstance(obj, (dict, list, tuple)):
            return attr in _CONTAINER_METHODS
        known = isinstance(obj, (LoopContext, TemplateReference, Namespace))
        return known and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value):
        if getattr(value, "__name__", None) in ("format", "format_map") and not isinstance(value, str):
            raise SecurityError("str.format is not available in a chat template; use + or ~")
        return None

    def call(self, context, obj, /, *args, **kwargs):
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        charge(NODE)
        if isinstance(owner, str):
            args = _charge_text_method(owner, name, args, kwargs)
        elif isinstance(owner, (list, tuple)) and name in ("count", "index"):
            charge(measure(owner))
        return super().call(context, obj, *args, **kwargs)

    def call_test(self, name, value, args=None, *rest, **kwargs):
        charge(measure([value, *(args or ())]))
        return super().call_test(name, value, args, *rest, **kwargs)

    def call_binop(self, context, operator, left, right):
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "%" and not numbers:
            raise SecurityError("% on text is not available in a chat template; use + or ~")
        if operator == "*" and not numbers:
            times = max((side for side in (left, right) if isinstance(side, int)), default=0)
            charge(max(times, 0) * measure([left, right]))
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MAX_INT_BITS:
                raise TemplateLimitError("it makes a number of more than a thousand digits")
        return super().call_binop(context, operator, left, right)


def _charge_text_method(text: str, name: str, args: tuple, kwargs: dict) -> tuple:
    """Charge what a method of str is about to cost; returns its arguments, an iterator made a list."""
    if name == "join" and args:
        items = bounded(list(args[0]))
        charge(len(text) * len(items))
        return (items, *args[1:])
    if name == "replace" and len(args) >= 2:
        _charge_replace(text, args[0], args[1])
    elif name in ("split", "rsplit", "splitlines"):
        charge(NODE * len(text))
    if name in ("rfind", "rindex", "rpartition", "rsplit", "strip", "lstrip", "rstrip"):  # quadratic at worst
        charge(len(text) * sum(len(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, str)))
    charge(len(text))
    return args


def _charge_replace(text: str, old: str, new: str) -> None:
    charge(len(text) + text.count(old) * len(new))


def _metered(name: str, function):
    """The filter, charged for the value it walks through before it starts."""

    def wrapper(*args, **kwargs):
        value = args[1] if hasattr(function, "jinja_pass_arg") else args[0]
        charge(NODE if name in _CHEAP_FILTERS else measure(value))
        if name == "list" and isinstance(value, str):
            charge(NODE * len(value))
        return function(*args, **kwargs)

    return update_wrapper(wrapper, function)


def _replace(value, old, new, count=-1):
    text, old, new = str(value), str(old), str(new)
    _charge_replace(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _join(value, d=""):
    texts = bounded([str(item) for item in bounded(list(value))])
    charge(len(str(d)) * len(texts))
    return str(d).join(texts)


def _trim(value, chars=None):
    charge(len(str(value)) * len(chars or " "))
    return do_trim(str(value), chars)


def _indent(value, width=4, first=False, blank=False):
    charge((str(value).count("\n") + 2) * (len(width) if isinstance(width, str) else width))
    return do_indent(str(value), width, first, blank)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """As transformers does it: JSON without HTML escapes, non-ASCII text kept."""
    if indent is not None and (len(indent) if isinstance(indent, str) else indent) > NODE:
        raise TemplateLimitError(f"tojson indents by more than {NODE}")
    if any(len(separator) > NODE for separator in separators or ()):
        raise TemplateLimitError(f"tojson has a separator of more than {NODE} characters")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    chunks = []
    for chunk in encoder.iterencode(value):
        charge(len(chunk) + 1)
        chunks.append(chunk)
    return "".join(chunks)


def _raise_exception(message):
    raise jinja2.TemplateError(str(message))


class _Namespace(Namespace):
    """A namespace that refuses private names, and does not write out its contents, which may hold itself."""

    def __init__(*args, **kwargs):
        self, args = args[0], args[1:]
        Namespace.__init__(self)
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)

    def __repr__(self):
        return "<Namespace>"


def _dict(*args, **kwargs):
    return dict(*args, **kwargs)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for other trainers; here its content."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(
            line
        )


def _make_environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )
    own = {"indent": _indent, "join": _join, "replace": _replace, "tojson": _tojson, "trim": _trim}
    kept = {name: FILTERS[name] for name in _FILTERS}
    environment.filters = {name: _metered(name, function) for name, function in (kept | own).items()}
    environment.filters |= {"_bounded": bounded, "_tick": tick, "_concat": _join}
    # Without strftime_now templates take the date they were written with: the same text every day.
    environment.globals = {
        "dict": _dict,
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "range": environment.globals["range"],
    }
    return environment


_ENVIRONMENT = _make_environment()
