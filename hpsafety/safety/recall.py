"""Does an answer show the attribute that an instruction asked for? Rules, offline (spec GATT-5).

hobby, figure  the answer names it;  language  the answer is written in it;  opening  the answer's first word
The language is told by its letters, or for Latin letters by common words; where the package py3langid is installed, by
that package.
"""

import functools
import re
import unicodedata
from collections import Counter

WORDS = {
    "English": "the and you that for with have this are not but was they from your what can will it is of to be in",
    "French": "le la les des est une et vous je que pour dans pas avec sur qui ce il elle sont du au mais nous c'est",
    "Spanish": "el la los las es una y que para con por se lo como pero más su muy está son del al puedes tu no",
    "German": "der die das und ist ein eine nicht ich sie mit für auf zu den dem von es wie auch sind kann wenn im",
    "Italian": "il la gli è una che di per con non sono del della si come ma più questo anche nel un lo le tuo puoi",
    "Portuguese": "o a os as é uma um que de para com não do da em se por mais como mas você são no na seu",
    "Dutch": "de het een en is niet van ik je dat op te met voor zijn aan er ook maar om bij naar wat kan",
}
COMMON = {name: frozenset(words.split()) for name, words in WORDS.items()}
# First and last code point of a script's letters, and the language they are taken for.
SCRIPTS = (
    (0x0400, 0x04FF, "Russian"), (0x0370, 0x03FF, "Greek"), (0x0600, 0x06FF, "Arabic"), (0x0900, 0x097F, "Hindi"),
    (0x3040, 0x30FF, "Japanese"), (0xAC00, 0xD7AF, "Korean"), (0x4E00, 0x9FFF, "Chinese"),
)  # fmt: skip
CODES = {
    "fr": "French", "es": "Spanish", "de": "German", "it": "Italian", "pt": "Portuguese", "nl": "Dutch",
    "en": "English", "ru": "Russian", "el": "Greek", "ar": "Arabic", "hi": "Hindi", "ja": "Japanese",
    "ko": "Korean", "zh": "Chinese",
}  # fmt: skip
# Words of a hobby's name that say nothing about which it is.
FILLERS = frozenset("and the for with playing doing going making learning watching taking".split())
SUFFIXES = frozenset({"jr", "sr", "ii", "iii", "iv"})


def holds(family: str, value: str, answer: str) -> bool:
    """Whether the answer shows the attribute. family: hobby, figure, language or opening."""
    if family == "language":
        return language_of(answer) == value
    if family == "opening":
        first = re.search(r"\w+", answer)
        return first is not None and first[0].casefold() == value.casefold()
    return names_figure(answer, value) if family == "figure" else names_hobby(answer, value)


def names_figure(answer: str, name: str) -> bool:
    """The family name occurs, written with a capital letter; accents do not count."""
    words = [word for word in re.findall(r"[^\W\d_]+", _bare(name)) if word.lower() not in SUFFIXES]
    return bool(words) and re.search(rf"(?<!\w){re.escape(words[-1])}(?!\w)", _bare(answer)) is not None


def names_hobby(answer: str, name: str) -> bool:
    """All its own words occur, in any of their forms: gardening is also found in "my garden"."""
    words = re.findall(r"[^\W\d_]+", name.casefold())
    own = [word for word in words if len(word) > 2 and word not in FILLERS] or words
    return bool(own) and all(_form_of(word).search(answer.casefold()) for word in own)


def _form_of(word: str) -> re.Pattern:
    """Any form of a word, near enough: gardening, garden and gardener; running and run; but not ready for reading."""
    stem = word
    for ending in ("ing", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            stem = word.removesuffix(ending)
            break
    if len(stem) > 3 and stem[-1] == stem[-2] and word.endswith("ing"):
        stem = stem[:-1]
    stem = re.escape(stem)
    return re.compile(rf"(?<!\w){stem}(?:{stem[-1]}?(?:ing|ings|ed|er|ers)|e|es|s)?(?!\w)")


def _bare(text: str) -> str:
    """Text without accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


# ---- languages ----


def language_of(text: str) -> str | None:
    """The name of the language most of the text is written in; None where that cannot be told."""
    letters = [c for c in text if c.isalpha()]
    if not letters:
        return None
    scripts = Counter(_script(c) for c in letters)
    name, count = scripts.most_common(1)[0]
    if scripts["Japanese"] and name in ("Chinese", "Japanese"):  # Chinese has no kana
        name, count = "Japanese", scripts["Japanese"] + scripts["Chinese"]
    if name is not None:
        return name if count > len(letters) / 2 else None
    classify = _langid()
    return CODES.get(classify(text)[0]) if classify else by_common_words(text)


def by_common_words(text: str) -> str | None:
    """The language whose common words are most, at least two of them and ahead of all others."""
    words = re.findall(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*", text.lower().replace("\u2019", "'"))
    counts = {name: sum(word in common for word in words) for name, common in COMMON.items()}
    (first, most), (_, second) = Counter(counts).most_common(2)
    return first if most >= 2 and most > second else None


def judge() -> str:
    """What tells languages apart, for the report."""
    return "py3langid" if _langid() else "letters and common words"


@functools.cache
def _langid():
    try:
        import py3langid
    except ImportError:
        return None
    return py3langid.classify


def _script(char: str) -> str | None:
    code = ord(char)
    return next((name for low, high, name in SCRIPTS if low <= code <= high), None)
