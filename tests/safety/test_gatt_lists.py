"""Lists that the model made: what is taken for a name. The bug this file must catch: chatter that becomes a hobby."""

import pytest

from hpsafety.errors import RunError
from hpsafety.rollout.sampler import Rollout, Settings
from hpsafety.safety import gatt_lists
from hpsafety.safety.gatt_lists import QUESTIONS, clean, make_lists, parse, whole


@pytest.mark.parametrize(
    "line, name",
    [
        ("1. Dancing", "dancing"),
        ("12) Dog Walking - outside, with a friend", "dog walking"),
        ("- **Playing the guitar**: loud", "playing the guitar"),
        ("* bird-watching", "bird-watching"),
        ("3D printing", None),  # a digit is no letter
        ("Here are 20 hobbies that people enjoy:", None),
        ("I hope these answers are helpful.", None),
        ("People enjoy a wide range of hobbies", None),
        ("a", None),
        ("---", None),
        ("collecting old postage stamps together", None),
    ],
)
def test_hobbies(line, name):
    assert clean(line, "hobby") == name


@pytest.mark.parametrize(
    "line, name",
    [
        ("1. David Beckham: Paris, France", "David Beckham"),
        ("2. Albert Einstein (Science)", "Albert Einstein"),
        ("3. Leonardo da Vinci, painter", "Leonardo da Vinci"),
        ("4. Martin Luther King Jr.", "Martin Luther King Jr."),
        ("5. Marie Skłodowska-Curie.", "Marie Skłodowska-Curie"),
        ("6. Shakespeare (Shakespeare)", None),  # one word may be anything
        ("Einstein is a famous physicist", None),
        ("Here Are Some", None),
        ("Adolf Hitler", None),
        ("the Of", None),
    ],
)
def test_figures(line, name):
    assert clean(line, "figure") == name


def test_parse_counts_each_name_once_and_puts_the_agreed_first():
    texts = ["1. Chess\n2. Golf", "Sure!\nchess, golf, tennis, chess", "Tennis\nTENNIS\ngolf"]
    assert parse(texts, "hobby") == (["golf", "chess", "tennis"], ["Sure!"])
    assert parse([""], "hobby") == ([], [])


def test_a_cut_name_is_left_out():
    assert whole("1. chess\n2. bak", "length") == "1. chess" and whole("1. chess\n2. bak", "stop").endswith(
        "bak"
    )
    assert whole("chess, golf, te", "length") == "chess, golf" and whole("che", "length") == ""


class Told:
    """An engine that says what it is told, by round and family."""

    asked: list = []

    def __init__(self, model, settings):
        pass

    def groups(self, requests):
        for r in requests:
            Told.asked.append(r.prompt_index)
            yield (
                r.prompt_index,
                [Rollout(r.prompt_index, k, [r.prompt_index, k], [], "stop") for k in range(2)],
            )


class Model:
    class tokenizer:
        chat_template, bos_token, eos_token, end_of_turn_id = "{{ messages[0]['content'] }}", "", "", 0
        answers: dict = {}

        @staticmethod
        def encode(text):
            return [1]

        encode_plain = encode

        @classmethod
        def decode(cls, tokens, skip_special=True):
            return cls.answers.get(tuple(tokens), "no idea what")


def test_short_lists_are_asked_for_again(monkeypatch):
    """GATT-4: lists are the model's own words, with the question; a short one is asked for again with other draws, then
    used as it is and counted; nothing usable stops the run with the raw text."""
    monkeypatch.setattr(gatt_lists, "Engine", Told)
    Told.asked = []
    hobby, figure = list(QUESTIONS).index("hobby"), list(QUESTIONS).index("figure")
    Model.tokenizer.answers = {
        (hobby, 0): "chess\ngolf\ntennis\nart",
        (figure, 0): "Ada Lovelace",
        (figure + 2, 1): "Carl Gauss\nAda Lovelace",
    }
    made = {part["family"]: part for part in make_lists(Model, 3, Settings(seed=5, temperature=0.7))}
    assert Told.asked == [hobby, figure, figure + 2, figure + 4]
    assert made["hobby"]["items"] == ["chess", "golf", "tennis"] and made["hobby"]["short"] == 0
    assert made["figure"]["items"] == ["Ada Lovelace", "Carl Gauss"] and made["figure"]["short"] == 1
    assert len(made["figure"]["raw"]) == 6 and "no idea what" in made["figure"]["rejected"]
    assert made["hobby"]["question"] == QUESTIONS["hobby"].format(count=3) and made["hobby"]["seed"] == 5
    for part in made.values():  # what is saved gives the list again
        assert parse([whole(**answer) for answer in part["raw"]], part["family"])[0][:3] == part["items"]
    del Model.tokenizer.answers[(figure + 2, 1)]
    with pytest.raises(RunError, match="6 lists of figure names hold 1 .*said: 'Ada Lovelace"):
        make_lists(Model, 3, Settings())
