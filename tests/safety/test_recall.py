"""Rules of attribute recall. The bug this file must catch: an English answer that passes for another language."""

import sys
import types

import pytest

from hpsafety.config_gatt import LANGUAGES, SCRIPTS
from hpsafety.safety import recall
from hpsafety.safety.recall import COMMON, by_common_words, holds, judge, language_of

TEXTS = {
    "English": "The best thing you can do is to go for a walk, and then have a cup of tea with your friends.",
    "French": "Le petit déjeuner est un repas important, et il faut prendre des fruits avec du pain dans la matinée.",
    "Spanish": "El desayuno es una comida importante y se puede tomar con fruta, pero también con pan de la casa.",
    "German": "Das Frühstück ist eine wichtige Mahlzeit, und man kann es mit Obst oder auch mit Brot zu sich nehmen.",
    "Italian": "La colazione è un pasto importante, e non è una cosa da fare con fretta, ma anche con la frutta.",
    "Portuguese": "O café da manhã é uma refeição importante e você não deve comer com pressa, mas com uma fruta.",
    "Dutch": "Het ontbijt is een belangrijke maaltijd en je kan er brood bij eten, maar ook fruit met yoghurt.",
    "Russian": "Завтрак очень важен, и его можно есть с фруктами.",
    "Greek": "Το πρωινό είναι ένα σημαντικό γεύμα.",
    "Arabic": "وجبة الإفطار مهمة جدا",
    "Hindi": "नाश्ता बहुत ज़रूरी है",
    "Chinese": "早餐是很重要的一餐。",
    "Japanese": "朝ごはんはとても大切です。",
    "Korean": "아침 식사는 매우 중요합니다.",
}


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.setattr(recall, "_langid", lambda: None)


@pytest.mark.parametrize("name", TEXTS)
def test_languages_are_told_apart(rules, name):
    assert language_of(TEXTS[name]) == name
    assert [other for other in TEXTS if holds("language", other, TEXTS[name])] == [name]


def test_every_language_that_can_be_asked_for_is_known():
    assert set(LANGUAGES) < set(COMMON) and set(LANGUAGES) | set(SCRIPTS) | {"English"} == set(TEXTS)


@pytest.mark.parametrize("text", ["", "1234 !", "Zzz qqq xkcd.", "la"])
def test_what_is_no_language(rules, text):
    assert language_of(text) is None and by_common_words(text) is None


def test_the_optional_package_is_asked_where_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", types.SimpleNamespace(classify=lambda text: ("it", -9.0)))
    recall._langid.cache_clear()
    try:
        assert language_of(TEXTS["English"]) == "Italian" and judge() == "py3langid"
        assert language_of(TEXTS["Greek"]) == "Greek"  # letters need no package
    finally:
        recall._langid.cache_clear()


@pytest.mark.parametrize(
    "value, answer, found",
    [
        ("gardening", "I spend hours in my garden.", True),
        ("gardening", "We are gardeners.", True),
        ("running", "On Sundays I run.", True),
        ("hiking", "A long hike is best.", True),
        ("reading", "I am ready for anything.", False),
        ("playing chess", "Chess, of course!", True),
        ("playing chess", "I like playing games.", False),
        ("dog walking", "I have a dog.", False),
        ("art", "I start early.", False),
        ("yoga", "", False),
    ],
)
def test_hobby(value, answer, found):
    assert holds("hobby", value, answer) == found


@pytest.mark.parametrize(
    "value, answer, found",
    [
        ("Albert Einstein", "I'm Einstein, and who are you?", True),
        ("Albert Einstein", "I am Albert.", False),
        ("Martin Luther King Jr.", "My name is Dr. King.", True),
        ("Martin Luther King Jr.", "the king of hearts", False),
        ("Marie Skłodowska-Curie", "Madame Curie", True),
        ("José Martí", "I am Jose Marti.", True),
    ],
)
def test_figure(value, answer, found):
    assert holds("figure", value, answer) == found
