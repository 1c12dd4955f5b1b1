"""The model card (spec section 10)."""

import json
import re

import pytest
import yaml

from hpsafety import cli
from hpsafety.report.card import hours
from hpsafety.report.collect import collect
from hpsafety.report.limits import LIMITS
from tests.report.fake_run import HOSTILE, make_run
from tests.report.test_run_page import check_form

FIELDS = {  # Table 52, section by section
    "Model details": ("Developers", "Variations", "Input", "Output", "Architecture and tuning method", "Dates",
                      "Status", "License", "Where to send comments"),
    "Intended use": ("Use cases", "Out-of-scope uses"),
    "Hardware and software": ("Device", "Training factors", "Energy", "Carbon footprint"),
    "Training data": ("Overview", "Freshness"),
    "Evaluation results": ("Evaluation reports",),
    "Ethics and limits": ("Languages tested", "Limits of coverage", "Before deployment"),
}  # fmt: skip


def card(run, *flags) -> str:
    assert cli.main(["card", str(run), *flags]) == 0
    return (run / "card" / "card.md").read_text(encoding="utf-8")


def lines_of(text: str, section: str, field: str) -> list[str]:
    part = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.S | re.M)[1]
    return re.search(rf"^- \*\*{field}\*\*\n((?:  - .+\n)*)", part, re.M)[1].splitlines()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("card") / "run")


def test_card_1_every_field_is_there(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "pipeline.json").write_text(json.dumps({"stages": [{"name": "sft", "run": "sft", "out": "sft"}]}))
    for text in (card(run), card(bare)):
        for section, fields in FIELDS.items():
            for field in fields:
                found = lines_of(text, section, field)
                assert found and all(line.removeprefix("  - ").strip() for line in found), field
    assert lines_of(text, "Training data", "Freshness") == ["  - not measured"]
    text = card(
        run, "--license", "apache-2.0", "--contact", "us", "--cutoff", "2024", "--languages", "en", "de"
    )
    assert lines_of(text, "Model details", "License") == ["  - `apache-2.0`"]
    assert lines_of(text, "Ethics and limits", "Languages tested") == ["  - `en, de`"]


def test_card_2_each_number_has_its_manifest_and_the_bytes_are_the_same(run):
    text = card(run)
    html = (run / "card" / "card.html").read_bytes()
    pipeline = json.loads((run / "pipeline.json").read_text())
    (run / "pipeline.json").write_text(
        json.dumps(pipeline | {"ended": "later"})
    )  # its clock is not the card's
    assert card(run) == text and (run / "card" / "card.html").read_bytes() == html
    hashes = {stage.hash for stage in collect(run).stages if stage.hash}
    results = re.search(r"^## Evaluation results\n(.*?)^## ", text, re.S | re.M)[1]
    numbers = [line for line in results.splitlines() if re.search(r"\d", line) and line.startswith("  - ")]
    assert len(numbers) > 20
    for line in numbers:
        assert re.search(r"`([0-9a-f]{12})`$", line)[1] in hashes, line
    check_form(html.decode())


def test_card_3_device_hours_energy(run):
    text = card(run)
    assert lines_of(text, "Hardware and software", "Energy") == ["  - not measured"]
    told = lines_of(text, "Hardware and software", "Training factors")
    assert "0.350 h" in told[0] and len(told) == 8
    assert "`cpu`" in "".join(lines_of(text, "Hardware and software", "Device"))
    (energy,) = lines_of(card(run, "--watts", "200"), "Hardware and software", "Energy")
    assert "hours × watts / 1000 = 0.350 × 200 / 1000 = 0.0700 kWh" in energy
    assert hours(collect(run).stages[0]) == 0.05


def test_card_4_stages_and_fitness(run, tmp_path):
    text = card(run)
    assert "**Not fit for deployment.** Its model has 10,000 parameters" in text
    assert all(re.sub(r"[^\w ]", "", limit) in re.sub(r"[^\w ]", "", text) for limit in LIMITS)
    for words in (": run `", "not finished no manifest", "substituted: `no larger model`"):
        assert words.replace("not finished", "skipped") in text, words
    assert lines_of(text, "Stages run, skipped and substituted", "corpus audit .AUD.") == ["  - skipped"]
    large = make_run(tmp_path / "large", n=2, size=700_000_000)
    assert "Not fit for deployment" not in card(large)
    (large / "pipeline.json").write_text(
        (large / "pipeline.json").read_text().replace("# ", "data = '{demo}/x'")
    )
    assert "Not fit for deployment" in card(large)


def test_the_header_is_what_hugging_face_reads(run):
    text = card(run, "--license", "apache-2.0", "--languages", "en")
    head = yaml.safe_load(text.split("---")[1])
    assert (head["license"], head["language"], head["base_model"]) == ("apache-2.0", ["en"], "base")
    metrics = {m["type"]: m for m in head["model-index"][0]["results"][0]["metrics"]}
    last = next(s.hash for s in collect(run).stages if s.name == "eval-ppo")
    assert metrics["refused/adversarial"]["value"] == 11 / 12
    assert {m["args"]["manifest"] for m in metrics.values()} == {last}


def test_hostile_text_is_harmless(tmp_path):
    run = make_run(tmp_path / "run", hostile=HOSTILE)
    text = card(run, "--developers", HOSTILE)
    head = yaml.safe_load(text.split("\n---\n")[0])
    assert "<script>" in head["model-index"][0]["name"]  # as text, between quotes
    assert not {"\x1b", "\x07", "\u202e", "\u2066"} & set(text)
    body = text.split("\n---\n", 1)[1]
    spans = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", body)  # what is left outside of code spans
    assert not re.search(r"(?<!\\)[<\[]|https?:", spans), re.search(r".*(?<!\\)[<\[].*", spans)
    found = check_form((run / "card" / "card.html").read_text(encoding="utf-8"))
    assert not any(tag in ("script", "img") for tag, _ in found.tags)
