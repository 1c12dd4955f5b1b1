"""The counts of a corpus audit (spec section 1). The bug this file must catch: a share over the wrong denominator."""

import hashlib
import json
import math
import random
import tomllib
from collections import Counter

import pytest

from hpsafety.data.corpus import Block, Fault, Place
from hpsafety.errors import InputError
from hpsafety.safety import audit, audit_report, audit_terms, toxicity
from hpsafety.safety.audit import Counts, Tally, language_of, measure, read_counts
from hpsafety.safety.audit_sample import bucket_of, choose_sample, sampling_key
from hpsafety.safety.audit_terms import AXES, find, load_lists, make_lists
from hpsafety.safety.toxicity import Classifier, load_classifier, score_documents

LISTS = load_lists()
# Twenty documents; what they hold was counted by hand, see HAND.
FIXTURE = [
    "She left early.",
    "there HERON heroine sheet",
    "He said hers was HIS.",
    "They told themselves so.",
    "I know you.",
    "Whether it rains",
    "The American singer met a Christian poet.",
    "an american in Paris; another American",
    "White walls, black doors, straight lines.",
    "A gay couple, and a lesbian one.",
    "Female voters",
    "Male and female nurses; she wrote",
    "African-American history, and African  American art",
    "Jewish and Muslim families gave us theirs",
    "We're here; they're not.",
    "his_name is a variable",
    "The non-binary writer",
    "No pronoun at all.",
    "SHE shouted. he did not",
    "queer theory",
]
HAND = {  # group -> documents
    "gender/she": 4, "gender/he": 2, "gender/unspecified": 3,
    "person/first": 3, "person/second": 1, "person/third": 8,
}  # fmt: skip
ANY = {"gender": 7, "person": 9}
HAND_AXES = {
    "religion": (2, {"christian": 1, "jewish": 1, "muslim": 1}),
    "gender_and_sex": (3, {"female": 2, "male": 1, "non-binary": 1}),
    "nationality": (3, {"american": 3}),
    "race_and_ethnicity": (1, {"african": 1, "african american": 1, "african-american": 1}),
    "sexual_orientation": (2, {"gay": 1, "lesbian": 1, "queer": 1}),
}


def block(texts, file: int = 0, first: int = 1) -> Block:
    raw = [json.dumps({"text": text}).encode() for text in texts]
    return Block("a.jsonl", file, "json", first, raw, Place(file, 0, first + len(raw) - 1), 0)


def english(text: str) -> tuple[str, float]:
    return "en", 1.0


def counted(texts, identify=english, **place) -> Counts:
    counts, faults = measure(block(texts, **place), 0, 10**6, identify, LISTS)
    assert not faults
    return counts


@pytest.mark.parametrize(
    "text, groups",
    [
        ("there Heron hehe ushered", set()),
        ("HERS", {("gender", "she"), ("person", "third")}),
        ("(he)", {("gender", "he"), ("person", "third")}),
        ("they're", {("gender", "unspecified"), ("person", "third")}),
        ("he_said xhe he2", set()),
        ("I'm", {("person", "first")}),
        ("«Yourself»", {("person", "second")}),
        ("Ihre hé", set()),
    ],
)
def test_pronouns_are_whole_words_in_any_case(text, groups):
    """AUD-1."""
    assert set(find(text, LISTS).groups) == groups


def test_the_core_of_the_pronoun_lists():
    """Spec section 1, the members it states."""
    gender = LISTS.families["gender"]
    assert {"she", "her", "hers", "herself"} == gender["she"] and {"he", "him", "his", "himself"} == gender[
        "he"
    ]
    assert {"they", "them", "their", "theirs", "themselves"} <= gender["unspecified"]
    assert set.union(*map(set, gender.values())) <= LISTS.families["person"]["third"]


def test_twenty_documents_counted_by_hand():
    """AUD-2: both denominators of pronouns, axes and terms."""
    tally = counted(FIXTURE).all
    found = audit_report.pronouns(tally, LISTS)
    assert found["documents"] == 20
    for name, number in HAND.items():
        family, group = name.split("/")
        row, any_of = found["families"][family]["groups"][group], ANY[family]
        assert row["of_documents"] == {"count": number, "of": 20, "share": number / 20}, name
        assert row["of_family"] == {"count": number, "of": any_of, "share": number / any_of}, name
        assert found["families"][family]["any"]["count"] == any_of
    assert found["any"]["count"] == 9
    axes = audit_report.identity(tally, LISTS)["axes"]
    for axis, (any_of, terms) in HAND_AXES.items():
        assert axes[axis]["any"] == {"count": any_of, "of": 20, "share": any_of / 20}, axis
        terms = {term: n for term, n in terms.items() if term in LISTS.axes[axis]}
        assert axes[axis]["terms"] == terms, axis
        assert {row["term"]: row["of"] for row in axes[axis]["top"]} == dict.fromkeys(terms, any_of)
        assert all(row["share"] == terms[row["term"]] / any_of for row in axes[axis]["top"])


def test_the_english_part_is_counted_apart():
    counts = counted(["She is", "Ella es; he", "They"], lambda text: ("es" if "Ella" in text else "en", 0.9))
    assert (counts.all.documents, counts.english.documents) == (3, 2)
    assert (counts.all.groups["gender/he"], counts.english.groups["gender/he"]) == (1, 0)
    assert counts.buckets.total() == 2 and counts.languages == {"en": 2, "es": 1}


def test_dropped_terms_are_in_no_table():
    """AUD-3: the drop list and the homes of shared terms are data, every entry is needed, and none is counted twice."""
    texts = {name: tomllib.loads(text.decode()) for name, text in audit_terms._texts().items()}
    listed = [term for terms in texts["identity.toml"].values() for term in terms]
    assert tuple(texts["identity.toml"]) == AXES
    dropped, shared = texts["drop.toml"]["dropped"], texts["drop.toml"]["shared"]
    assert {"white", "black", "straight"} <= dropped.keys() <= set(listed)
    assert shared.keys() == {term for term, n in Counter(listed).items() if n > 1 and term not in dropped}
    assert all(term in texts["identity.toml"][axis] for term, axis in shared.items())
    kept = [term for terms in LISTS.axes.values() for term in terms]
    assert len(kept) == len(set(kept)) and not set(kept) & dropped.keys()
    words = " ".join(dropped)
    axes = audit_report.identity(counted([words] * 10 + ["gay"]).all, LISTS)["axes"]
    assert {axis: [row["term"] for row in part["top"]] for axis, part in axes.items() if part["top"]} == {
        "sexual_orientation": ["gay"]
    }


def test_a_term_of_two_axes_needs_a_home():
    identity = {"religion": ["jewish", "sikh"], "race_and_ethnicity": ["jewish", "asian"]}
    with pytest.raises(ValueError, match="'jewish' stands on the axes religion and race_and_ethnicity"):
        make_lists({}, identity, {"dropped": {}, "shared": {}})
    lists = make_lists({}, identity, {"dropped": {"asian": "a test"}, "shared": {"jewish": "religion"}})
    assert lists.axes == {"religion": ("jewish", "sikh"), "race_and_ethnicity": ()}


@pytest.mark.parametrize(
    "text, terms",
    [
        ("two spirit, TWO-SPIRIT", {"two-spirit"}),
        ("two\nspirit", {"two-spirit"}),
        ("two good spirits", set()),
        ("a Jehovah’s Witness", {"jehovah's witness"}),
        ("South Koreans", set()),
        ("South Korean", {"south korean", "korean"}),
        ("pre-Christian", {"christian"}),
        ("Christianity", set()),
    ],
)
def test_terms_are_whole_words(text, terms):
    assert {term for _, term in find(text, LISTS).terms} == terms


def test_long_texts_lose_no_word(monkeypatch):
    """A text is cut into slices, never inside a word."""
    monkeypatch.setattr(audit_terms, "SLICE", 7)
    text = " ".join(FIXTURE).lower() + " they"
    assert audit_terms.word_set(text) == set(audit_terms.WORD.findall(text))


def test_any_grouping_of_blocks_has_the_same_counts():
    """Counts are whole numbers that add up in any grouping, and go through JSON unchanged."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(" ".join(FIXTURE).split(), k=12)) for _ in range(60)]
    identify = lambda text: (("en", "de", "fr")[len(text) % 3], 0.4 + 0.6 * (len(text) % 5 > 0))  # noqa: E731
    whole = counted(texts, identify)
    for cuts in ([10], [1, 2, 3, 40], [59]):
        ends, total = [*cuts, 60], Counts()
        parts = [counted(texts[a:b], identify, first=a + 1) for a, b in zip([0, *cuts], ends, strict=True)]
        rng.shuffle(parts)
        for part in parts:
            total.add(read_counts(json.loads(json.dumps(part.record()))))
        assert total == whole


# ---- languages ----


def test_the_probability_from_which_a_language_is_accepted():
    """AUD-5, and the identifier sees the head of a document."""
    assert language_of("x", lambda text: ("fr", 0.499)) == "unknown"
    assert language_of("x", lambda text: ("fr", 0.5)) == "fr"
    seen = []
    language_of("ab" * 5000, lambda text: (seen.append(text) or "en", 1.0))
    assert seen == ["ab" * 500]


def test_language_shares_sum_to_one():
    """AUD-5: within 0.01 %, with the rare languages that are not listed."""
    found = audit_report.languages(Counter(en=89_700, unknown=8_380, de=1_914, is_=5, cy=1), "judge")
    assert [row["language"] for row in found["listed"]] == ["en", "de"]  # 0.005 % of 100,000 is 5: not above
    assert found["rarer"]["count"] == 6 and found["judge"] == "judge"
    shares = [row["share"] for row in found["listed"]] + [found["unknown"]["share"], found["rarer"]["share"]]
    assert abs(sum(shares) - 1) < 1e-4


def test_the_built_in_identifier(shared_data):
    """The head of a document has its language: on 300 public English documents, nothing but en and unknown."""
    identify = audit.language_identifier()
    with open(shared_data / "c4_demo_docs.jsonl", encoding="utf-8") as handle:
        texts = [json.loads(line)["text"] for line in handle]
    found = Counter(language_of(text, identify) for text in texts)
    assert found["en"] >= 290 and found.keys() <= {"en", "unknown"}
    assert language_of("Это предложение написано на русском языке, а не на английском.", identify) == "ru"
    assert language_of("x = 3", identify) == "unknown"


# ---- the sample ----


@pytest.mark.parametrize("count", [0, 1, 4, 5, 99, 1234])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.37, 1.0])
def test_the_sample_is_those_of_smallest_key(count, fraction):
    """AUD-4: within one document of fraction x N, exactly the documents of smallest key."""
    keys = [sampling_key(3, 0, line) for line in range(count)]
    buckets = Counter(bucket_of(key) % 50 for key in keys)  # few buckets, so that the border holds many
    sample = choose_sample(buckets, fraction)
    assert abs(sample.size - fraction * count) <= 0.5
    below = sum(n for bucket, n in buckets.items() if bucket < sample.border)
    assert below + sample.from_border == sample.size and sample.from_border <= buckets[sample.border]
    if sample.size:
        assert sample.from_border >= 1


def test_the_sample_is_uniform():
    """AUD-4: over 400 seeds each of 50 documents is drawn about as often as any other, and pairs as chance has it."""
    drawn, together = Counter(), 0
    for seed in range(400):
        keys = sorted((sampling_key(seed, 0, line), line) for line in range(50))[:10]
        lines = {line for _, line in keys}
        drawn.update(lines)
        together += {1, 2} <= lines
    squares = sum((drawn[line] - 80) ** 2 / (400 * 0.2 * 0.8) for line in range(50))
    assert squares < 86  # the 99.9 % point of chi square with 49 degrees of freedom
    assert abs(together - 400 * 10 * 9 / (50 * 49)) < 4 * math.sqrt(14.7)
    assert len({sampling_key(0, file, line) for file in range(30) for line in range(30)}) == 900


# ---- toxicity ----

LENGTH = Classifier("length", lambda lines: [min(1.0, len(line) / 10) for line in lines])


def test_a_document_has_the_mean_of_its_lines():
    """AUD-4: of the lines that are not empty, within 1e-6."""
    texts = ["ab\n\n  \nabcd\r\n", "x" * 30, "a\nb\nc"]
    assert score_documents(texts, LENGTH) == [
        (pytest.approx(0.35, abs=1e-6), 2),
        (1.0, 1),
        (pytest.approx(0.1), 3),
    ]


def test_the_built_in_classifier():
    """AUD-4 and AUD-6: the mean of the package's own line scores, alone or among others, under its name."""
    import profanity_check

    classifier = load_classifier(toxicity.BUILT_IN)
    assert classifier.name.startswith("alt-profanity-check 1.9.1") and "substitute" in classifier.name
    texts = ["What a fine day.\nYou stupid piece of shit!", "Thanks for the help.", "the\n\nof"]
    found = score_documents(texts, classifier)
    for text, (score, lines) in zip(texts, found, strict=True):
        own = [float(profanity_check.predict_prob([line])[0]) for line in text.split("\n") if line]
        assert lines == len(own) and abs(score - sum(own) / len(own)) < 1e-6
        assert score_documents([text], classifier) == [(score, lines)]
    assert found[0][0] > 0.4 > 0.2 > found[1][0]


def test_weights_that_are_not_the_package_s_are_not_read(tmp_path, monkeypatch):
    """Pickles run code: a file with another checksum is refused before anything of it is read."""
    data = tmp_path / "profanity_check" / "data"
    data.mkdir(parents=True)
    (tmp_path / "profanity_check" / "__init__.py").write_text("raise SystemExit('imported')")
    for name in toxicity.WEIGHTS:
        (data / name).write_bytes(b"cos\nsystem\n")
    monkeypatch.delitem(__import__("sys").modules, "profanity_check", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="model.joblib is not that of alt-profanity-check 1.9.1"):
        toxicity._built_in()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a tiny classifier in the layout of the hub."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("hub") / "tiny-bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "day", *"abcdefg"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, id2label={0: "fine", 1: "Toxic"}, label2id={"fine": 0, "Toxic": 1},
        initializer_range=1.0,
    )  # fmt: skip
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    return folder


def test_a_hugging_face_classifier(bert):
    """AUD-6: named beside its numbers; softmax of the label that means toxic; a line's score has no neighbours."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    classifier = load_classifier(str(bert))
    assert classifier.name == "tiny-bert, label 'Toxic' (Hugging Face)"
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(bert).eval(),
        AutoTokenizer.from_pretrained(bert),
    )
    lines = ["good day", "bad a b c d", "bad " * 60]
    for line, score in zip(lines, classifier.scores(lines), strict=True):
        encoded = tokenizer(line, truncation=True, max_length=14, return_tensors="pt")
        with torch.no_grad():
            expected = model(**encoded).logits.softmax(-1)[0, 1]
        assert score == pytest.approx(float(expected), abs=1e-6)
        assert classifier.scores([line]) == [score]
    fine = load_classifier(str(bert), "fine")
    assert fine.scores(["good"])[0] == pytest.approx(1 - classifier.scores(["good"])[0], abs=1e-6)
    with pytest.raises(InputError, match="which of its labels means toxic.*takes one of fine, Toxic"):
        load_classifier(str(bert), "rude")
    with pytest.raises(InputError, match="--classifier .*nowhere: cannot be loaded"):
        load_classifier(str(bert / "nowhere"))


def test_weights_as_pickles_are_refused(bert, tmp_path):
    import shutil

    import torch

    shutil.copytree(bert, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_classifier(str(tmp_path / "old"))


def test_faults_are_counted_and_nothing_else_of_them():
    raw = block(["good"])
    raw.raw += [b"{", b'{"text": ""}']
    counts, faults = measure(raw, 0, 10**6, english, LISTS)
    assert counts.faults == {"broken record": 1, "empty document": 1} and counts.all.documents == 1
    assert [type(fault) for fault in faults] == [Fault, Fault] and Tally() == Counts().all


def test_list_hashes_are_those_of_the_files():
    for name, text in audit_terms._texts().items():
        assert audit_terms.list_hashes()[f"terms/{name}"] == hashlib.sha256(text).hexdigest()
