"""Preprompts: the generator, the answer templates' file, and where the text goes.

The bug this file must catch: an adjective paired with itself, or a label of the data that silently gets no template.
"""

import re
from itertools import permutations

import pytest

from hpsafety.data.chat import default_system, encode_prompt
from hpsafety.errors import InputError
from hpsafety.model.tokenizer import Tokenizer
from hpsafety.safety import preprompts as p
from tests.stages.conftest import TEMPLATE, tiny_tokenizer

WORDS = ("wise", "safe", "kind", "calm")
FORMS = {
    "T1": ["be {adj1} and {adj2}"],
    "T3": ["be {adj1}", "be good"],
    "T4": ["{adj2} and {adj1}, all {adj1}"],
}


def test_generic_is_the_product():
    """CD-1: n(n-1) per two-slot template, n per one-slot form, one without; no duplicates, no adjective twice."""
    made = p.generic_preprompts(WORDS, FORMS)
    assert len(made) == 2 * 4 * 3 + 4 + 1 == len({one.id for one in made}) == len({one.text for one in made})
    expected = {f"be {a} and {b}" for a, b in permutations(WORDS, 2)}
    assert {one.text for one in made if one.id.startswith("generic/T1")} == expected
    assert next(one.text for one in made if one.id == "generic/T4/wise-calm") == "calm and wise, all wise"


def test_the_package_has_the_four_kinds_and_labels():
    """CD-1 on what is shipped; CD-2: every category has an answer template of numbered steps."""
    library = p.load_library()
    n = 10
    assert len(library.generic) == 3 * n * (n - 1) + n + 1 == len({one.text for one in library.generic})
    assert {one.id.split("/")[1] for one in library.generic} == {"T1", "T2", "T3", "T4"}
    assert not any("{" in one.text for one in (*library.generic, *library.answers.values()))
    for category in ("illicit", "hateful", "advice"):
        label = p.label_of({"category": category}, library)
        text = library.answers[label].text
        numbers = [int(x) for x in re.findall(r"^(\d+)\. ", text, re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 3


@pytest.mark.parametrize(
    "row, label",
    [
        ({"risk_label": "Criminal / Fraudulent"}, "criminal"),
        ({"risk_label": "false information", "category": "illicit"}, "false_information"),
        ({"risk_label": " ", "category": "advice"}, "advice"),
        ({"category": "Illicit"}, "criminal"),
        ({"risk_label": "unheard of", "category": "illicit"}, None),
        ({}, None),
    ],
)
def test_label_of_a_row(row, label):
    """CD-2: the row's own label before its category; an unknown one is no other's."""
    library = p.load_library()
    assert p.label_of(row, library) == label
    fallback = p.choose_generic(library, 3, 0)
    chosen = p.choose_answer(library, row, fallback)
    assert (chosen is fallback) == (label is None) and (label is None or chosen.id == f"template/{label}")


def test_choice_depends_on_seed_and_row_alone():
    library = p.load_library()
    first = [p.choose_generic(library, i, 0).id for i in range(200)]
    assert first == [p.choose_generic(library, i, 0).id for i in range(200)] and len(set(first)) > 100
    assert first != [p.choose_generic(library, i, 1).id for i in range(200)]


def test_a_file_changes_and_extends(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(
        'adjectives = ["calm", "kind"]\n[generic]\nT9 = "always {adj1}"\n'
        '[labels.criminal]\nsteps = ["one for {label}"]\n[labels.spam]\nname = "bulk mail"\ncategories = ["Spam!"]\n'
        'steps = ["decline"]\n'
    )
    library = p.load_library(str(path))
    assert len(library.generic) == 3 * 2 + 2 + 1 + 2
    assert library.answers["criminal"].text.endswith("\n1. one for criminal")
    assert (
        p.label_of({"category": "spam"}, library)
        == p.label_of({"risk_label": "Bulk mail"}, library)
        == "spam"
    )
    assert "explicit" in library.answers and p.label_of({"category": "illicit"}, library) is None


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '[generic]\nT1 = "be {adj3}"',
            r"key generic.T1: unknown slot \{adj3\}; a text here may hold \{adj1\}",
        ),
        ('[generic]\nT1 = "be {adj2}"', r"key generic.T1: has \{adj2\} without \{adj1\}"),
        ('[generic]\nT1 = "be {adj1"', "key generic.T1: has a brace without its partner"),
        ("[generic]\nT1 = []", "key generic.T1: expected text that is not empty"),
        ('adjectives = ["wise"]', "key adjectives: expected at least 2 text"),
        ('adjectives = ["wise", "Wise"]', "key adjectives: holds a word twice"),
        ('[labels.new]\nname = "new"', "key labels.new.steps: there are no steps"),
        ("[labels.new]\nsteps = [1]", "key labels.new.steps: expected text"),
        ('[labels.new]\nsteps = ["see {name}"]', r"key labels.new.steps: unknown slot \{name\}"),
        (
            '[labels.new]\nsteps = ["a"]\ncategory = ["b"]',
            "key labels.new.category: unknown; did you mean categories",
        ),
        ('[answer]\nnotice = "careful"', r"key answer.notice: lacks the slot \{label\}"),
        ('[label.new]\nsteps = ["a"]', "key label: unknown; did you mean labels"),
        ("labels = 1", "key labels: expected a table"),
        ("a = ", "is not valid TOML"),
    ],
)
def test_a_bad_file_names_file_and_key(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text + "\n")
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {message}") as caught:
        p.load_library(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="absent.toml: cannot be read"):
        p.load_library(str(tmp_path / "absent.toml"))


# ---- where the text goes ----

WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nyou are kind<|im_end|>\n' }}{% endif %}"
    + TEMPLATE
)
INSIDE_USER = (
    "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['content'] }}]{% endif %}{% endfor %}"
)


def tokenizer(template: str) -> Tokenizer:
    return Tokenizer(tiny_tokenizer(), {"chat_template": template, "eos_token": "<|im_end|>"})


def exact(template: str, prompt) -> str:
    return tokenizer(template).decode(encode_prompt(tokenizer(template), prompt), skip_special=False)


def test_default_system_text_is_found():
    assert default_system(tokenizer(WITH_DEFAULT)) == "you are kind"
    assert default_system(tokenizer(TEMPLATE)) == ""
    with pytest.raises(InputError, match="takes no system message"):
        default_system(tokenizer(INSIDE_USER))


@pytest.mark.parametrize(
    "template, system", [(WITH_DEFAULT, "you are kind\n\nbe wise"), (TEMPLATE, "be wise")]
)
def test_both_places(template, system):
    """Before the user's text nothing else changes, the template's own system text stays; behind the system text the
    user's turn is what it was."""
    plain = exact(template, "a cake?")
    before = exact(template, p.attach(tokenizer(template), "a cake?", "be wise", False))
    assert before == plain.replace("a cake?", "be wise\n\na cake?")
    behind = exact(template, p.attach(tokenizer(template), "a cake?", "be wise", True))
    user = "<|im_start|>user\na cake?<|im_end|>\n<|im_start|>assistant\n"
    assert plain.endswith(user) and behind == f"<|im_start|>system\n{system}<|im_end|>\n{user}"


def test_dialogues_and_own_system_messages():
    chat = [{"role": "system", "content": "own"}, {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]  # fmt: skip
    before = p.attach(tokenizer(TEMPLATE), chat, "be wise", False)
    assert [m["content"] for m in before] == ["own", "a", "b", "be wise\n\nc"]
    behind = p.attach(tokenizer(TEMPLATE), chat, "be wise", True)
    assert [m["content"] for m in behind] == ["own\n\nbe wise", "a", "b", "c"] and chat[0]["content"] == "own"
