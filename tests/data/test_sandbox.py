"""Chat templates from model files are programs of strangers: planted ones must fail, soon and in one line."""

import threading
import time

import pytest

from hpsafety.data.chat import render
from hpsafety.data.sandbox import MAX_TEMPLATE_CHARS
from hpsafety.errors import InputError

MESSAGES = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yo"}]
GROW = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(1000) %%}{%% set ns.x = %s %%}{%% endfor %%}"
    "{{ ns.x %s }}"
)
BIG = "{% set a = 'x' * 1000000 %}"
TWICE = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"

EXPENSIVE = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "loop over text": "{% for a in range(99999) %}" + "x" * 40_000 + "{% endfor %}",
    "huge range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "repeated text": "{{ 'x' * 10000000000 }}",
    "repeated list": "{{ [1] * 10000000000 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "growing number": GROW % ("3", "ns.x * ns.x", ""),
    "doubled by +": GROW % ("'xx'", "ns.x + ns.x", "| length"),
    "doubled by ~": GROW % ("'xx'", "ns.x ~ ns.x", "| length"),
    "doubled list": GROW % ("[1]", "[ns.x, ns.x]", ""),
    "doubled tuple compared": GROW % ("(1,)", "(ns.x, ns.x)", "== ns.x"),
    "doubled dict": GROW % ("{}", "{'a': ns.x, 'b': ns.x}", "| tojson"),
    "doubled block": GROW.replace(
        "{%% set ns.x = %s %%}", "{%% set y %%}%s{%% endset %%}{%% set ns.x = y %%}"
    )
    % ("'xx'", "{{ ns.x }}{{ ns.x }}", "| length"),
    "macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macro that calls itself twice": TWICE,
    "recursive loop": "{% for m in [messages] recursive %}{{ loop([m]) }}{{ loop([m]) }}{% endfor %}",
    "replace": BIG + "{{ a.replace('x', a) }}",
    "replace filter": BIG + "{{ a | replace('x', a) }}",
    "replace block": "{% filter replace('x', 'x' * 1000000) %}xxxxxxxx{% endfilter %}",
    "join": BIG + "{{ range(9999) | join(a) }}",
    "join of a map": BIG + "{{ ''.join(range(9999) | map('replace', '1', a)) }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "center": "{{ 'x'.center(1000000000) }}",
    "indent": "{{ 'x\\n' | indent(1000000000) }}",
    "json indent": "{{ [[1]] | tojson(indent=1000000000) }}",
    "to_bytes": "{{ (5).to_bytes(1000000000, 'big') }}",
    "rfind": "{% set h = 'a' * 1000000 %}{{ h.rfind('b' + h[2:]) }}",
    "strip": "{% set h = 'a' * 1000000 %}{{ h | trim('b' * 500000 + 'a') }}",
    "select in": "{% set l = range(99999) | list %}{{ l | select('in', l) | list | length }}",
    "budget refilled": "{% for i in range(99999) %}{{ (0 - 99999999) | _tick }}{{ 'x' * 99999 }}{% endfor %}",
    "brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "long sum": "{{ 1" + "+1" * 20_000 + " }}",
    "many branches": "".join(f"{{% if x %}}{{% set a{i} = 1 %}}{{% endif %}}" for i in range(1200))
    + "{{ 1 + }}",
    "long template": "x" * (MAX_TEMPLATE_CHARS + 1),
    "long number": "{{ " + "9" * 40_000 + " }}",
}
ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by item": "{{ messages[0]['content']['__cl' ~ 'ass__'].mro() }}",
    "globals of a function": "{{ raise_exception.__globals__['json'] }}",
    "globals of a class": "{{ namespace.__init__.__globals__['json'] }}",
    "globals of a default": "{{ cycler.__init__.__globals__['os'] }}",
    "attr filter": "{{ '' | attr('__class__') }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format in a map": "{{ ['{0.__class__}'] | map('format', '') | list }}",
    "map": "{{ messages | map(attribute='__class__.__mro__') | list }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
    "loop": "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "context": "{{ self._TemplateReference__context.environment }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/hostname' %}",
    "import": "{% import 'os' as os %}",
}


@pytest.mark.parametrize("name", EXPENSIVE)
def test_expensive_templates_fail_soon(name):
    began = time.thread_time()  # processor time: other processes on the machine do not count
    with pytest.raises(InputError, match="chat template cannot be used") as caught:
        render(EXPENSIVE[name], MESSAGES, add_generation_prompt=True)
    assert time.thread_time() - began < 2
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ESCAPES)
def test_templates_cannot_reach_out_of_the_sandbox(name):
    with pytest.raises(InputError, match="chat template cannot be used"):
        render(ESCAPES[name], MESSAGES, add_generation_prompt=True)


def test_the_bound_holds_in_other_threads():
    caught = []

    def work():
        try:
            render(TWICE, MESSAGES, add_generation_prompt=True)
        except InputError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=20)
    assert len(caught) == 1


def test_long_dialogues_are_within_the_bounds():
    template = (
        "{% for m in messages %}{% set c = m.content.split('</think>')[-1].strip() | trim %}"
        "{% if c is string and c.startswith('x') %}{{ '<' + m['role'] + '>' ~ c }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "x" * 20_000}] * 200
    assert len(render(template, messages, add_generation_prompt=False)) == 200 * 20_006
    many = [{"role": "user", "content": "x"}] * 5_000
    assert len(render(template, many, add_generation_prompt=False)) == 5_000 * 7


EACH = "{% for m in messages %}"
ORDINARY = {
    "loop controls": EACH + "{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}|{{ {'a': '<é>'} | tojson }}",
    "namespace": "{% set ns = namespace(n=0) %}" + EACH + "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "map": "{{ messages | map(attribute='role') | join(', ') | upper }}",
    "select": "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "slices": "{{ messages[1:][0]['content'] }}{{ messages[-1].role }}{{ messages[::-1] | length }}",
    "macro": "{% macro t(m, pad=2) %}<{{ m.role }}>{{ pad }}{% endmacro %}" + EACH + "{{ t(m) }}{% endfor %}",
    "call block": "{% macro w() %}[{{ caller() }}]{% endmacro %}{% call w() %}x{% endcall %}",
    "dict": "{% set d = dict(a=1) %}{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}{{ d.get('c') }}",
    "concat": "{{ 1 ~ 'a' ~ none ~ [1, 'b'] ~ (1, 2) }}{{ 'ab' * 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ -3 // 2 }}",
    "undefined": "{{ tools is none }}{{ nothing | default('d') }}{{ nothing is defined }}",
    "strip": "{{ ' a b ' | trim }}{{ ' x '.strip() }}{{ 'a-b'.split('-')[-1] }}{{ 'abc'.replace('b', 'X') }}",
    "loop facts": EACH + "{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.index }}{% endfor %}",
    "loop filter": "{% for m in messages if m.role == 'x' %}{{ m }}{% else %}none{% endfor %}",
    "indent": "{{ 'a\nb' | indent(3) }}{{ 'a\nb' | indent('> ', true) }}",
    "set block": "{% set x | upper %}a{{ messages[0] }}{% endset %}{% filter lower %}A{{ x }}{% endfilter %}",
    "generation": EACH + "{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "trimmed blocks": "  {% if true %}\n  a\n  {%- endif %}\n\n  {# c #}\n b",
    "tests": "{{ 'a' in ['a', 'b'] }}{{ 'x' not in 'abc' }}{{ 3 is odd }}{{ [1] == [1] }}{{ 1 < 2 < 3 }}",
    "prompt": "{{ 1 if add_generation_prompt else 2 }}{{ bos_token }}{{ messages | length > 1 }}",
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_templates_equal_transformers(name):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    for generation in (True, False):
        theirs, _ = utils.render_jinja_template(
            [MESSAGES], chat_template=ORDINARY[name], add_generation_prompt=generation, bos_token=""
        )
        assert render(ORDINARY[name], MESSAGES, add_generation_prompt=generation) == theirs[0]
