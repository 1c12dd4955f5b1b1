"""hpsafety report: every section, every hash, nothing that runs or loads, colours that can be read."""

import csv
import re
import shutil
from html.parser import HTMLParser

import pytest

from hpsafety import cli
from hpsafety.report.collect import collect
from hpsafety.report.compare import unpaired
from hpsafety.report.rows import Number
from hpsafety.report.run_page import script
from hpsafety.safety.intervals import wilson
from tests.report.fake_run import HOSTILE, LONG, make_run


class Page(HTMLParser):
    """Tags with their attributes, headings' levels, ids, and links into the page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.levels, self.ids, self.links, self.scripts = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href") and value.startswith("#"):
                self.links.append(value[1:])


def report(run, *more) -> str:
    assert cli.main(["report", str(run), *map(str, more)]) == 0
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run):
    return report(run)


def check_form(text: str) -> Page:
    """One h1, no level left out, ids that are there once, links that lead somewhere, alt texts, scopes, no network."""
    page = Page(text)
    assert page.levels.count(1) == 1 and page.levels[0] == 1
    assert all(b - a <= 1 for a, b in zip(page.levels, page.levels[1:], strict=False))
    assert len(page.ids) == len(set(page.ids)) and set(page.links) <= set(page.ids)
    for tag, attrs in page.tags:
        assert tag != "svg" or (attrs["role"] == "img" and len(attrs["aria-label"]) > 20)
        assert tag != "th" or attrs["scope"] in ("row", "col")
        assert tag not in ("link", "iframe", "img", "form", "object", "embed", "base")
        assert not any(name.startswith("on") for name in attrs)
        assert not str(attrs.get("src", attrs.get("href", "#"))).startswith(
            ("http", "//", "javascript", "data")
        )
    return page


def test_the_page_is_well_formed(page):
    found = check_form(page)
    assert [tag for tag, _ in found.tags].count("script") == 1
    policy = next(a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy and f"script-src {script()[1]}" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1] and script()[0] in page


def test_each_number_names_its_manifest(run, page):
    """Every stage that has numbers is linked by its manifest's hash (CARD-2's rule, in reports)."""
    for stage in collect(run).stages:
        if stage.hash:
            assert f'id="m-{stage.hash}"' in page and f'href="#m-{stage.hash}">{stage.hash}</a>' in page


def test_a_figure_of_each_kind_and_what_is_missing(page):
    for words in ("refused adversarial prompts, % against", "Mean scores by stage", "Scores of the held-out answers",
                  "violations, % of adversarial prompts against", "Violations by category",
                  "Violations by attack vector", "Red-team rounds", "PPO over 4 iterations",
                  "Training losses"):  # fmt: skip
        assert f'aria-label="{words}' in page, words
    assert (
        "Not measured: no audit in this run." in page
        and "Not measured: no scaling study in this run." in page
    )
    assert "83 % (40/48" in page and "substituted: no larger model" in page


def test_risky_text_is_folded(page):
    assert page.count('<details class="risky"') == 12 and "<details open" not in page
    for part in page.split("adversarial question ")[1:]:
        assert part.startswith(("and 3 answers", *map(str, range(12))))


def test_the_numbers_as_csv(run, page):
    with open(run / "report.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    found = {(r["metric"], r["stage"]): r for r in rows}
    row = found["refused/adversarial", "ppo"]
    assert float(row["value"]) == 11 / 12 and row["n"] == "12" and "judge_refusal" in row["judge"]
    assert row["manifest"] == next(s.hash for s in collect(run).stages if s.name == "eval-ppo")
    assert {"held_out_accuracy", "redteam/gamma_auto", "loss, last step"} <= {metric for metric, _ in found}
    with open(run / "samples.csv", encoding="utf-8", newline="") as handle:
        assert len(list(csv.DictReader(handle))) == 3 * 36


def test_hostile_text_is_harmless(tmp_path, capsys):
    run = make_run(tmp_path / "run", hostile=HOSTILE)
    (run / "eval-sft" / "eval.json").write_text("{")  # a fault is told on the terminal too
    found = check_form(report(run))
    text = (run / "report.html").read_text(encoding="utf-8")
    assert [tag for tag, _ in found.tags].count("script") == 1 and "<img" not in text and "</title>" in text
    for name in ("report.html", "report.csv", "samples.csv"):
        assert not {"\x1b", "\x07", "\u202e", "\u2066", "\u2069"} & set(
            (run / name).read_text(encoding="utf-8")
        ), name
    with open(run / "samples.csv", encoding="utf-8", newline="") as handle:
        assert not any(cell[:1] in "=+-@" for row in csv.reader(handle) for cell in row if cell)
    told = capsys.readouterr()
    assert "cannot be read" in told.err and not {"\x1b", "\u202e"} & set(told.err + told.out)


def test_a_line_of_a_megabyte_is_cut(tmp_path):
    run = make_run(tmp_path / "run", n=2, hostile=LONG)
    text = report(run)
    assert len(text) < 2_000_000 and "further characters cut" in text
    assert max(map(len, text.splitlines())) < 120_000


def test_every_output_may_be_missing(tmp_path):
    """A stage without its files reads "not measured" (issue's bad input)."""
    run = make_run(tmp_path / "run", n=2)
    for path in [
        p for p in run.rglob("*") if p.is_file() and p.name not in ("manifest.json", "pipeline.json")
    ]:
        path.unlink()
    check_form(report(run))
    shutil.rmtree(run / "sft")
    text = report(run)
    assert text.count("Not measured:") == 11  # all but the reward model and the round, whose rows say so
    assert text.count("not measured") >= 4


def test_odd_numbers_are_not_measured(tmp_path):
    run = make_run(tmp_path / "run", n=2)
    for name, odd in (("redteam/redteam.json", '{"rounds": 3, "by": "x", "violations": [], "gamma_auto": "high"}'),
                      ("reward-safety/report.json", '{"held_out": []}'), ("eval-sft/eval.json", '{"violation": 3}'),
                      ("ppo/metrics.jsonl", '{"reward": "x"}\n7\n')):  # fmt: skip
        (run / name).write_text(odd)
    text = report(run)
    check_form(text)
    assert "Not everything could be read" in text


def test_two_runs(tmp_path, run):
    other = make_run(tmp_path / "other", shift=0.1)
    assert cli.main(["report", str(run), str(other), "--out", str(tmp_path / "ab.html")]) == 0
    text = (tmp_path / "ab.html").read_text(encoding="utf-8")
    check_form(text)
    assert "paired, n = 12" in text and ">unpaired<" in text and 'aria-label="Two runs.' in text
    with open(tmp_path / "ab.csv", encoding="utf-8", newline="") as handle:
        rows = {(r["metric"], r["stage"]): r for r in csv.DictReader(handle)}
    row = rows["refused/adversarial", "ppo"]
    assert float(row["difference"]) == pytest.approx(float(row["value B"]) - float(row["value A"]))
    assert row["how"] == "paired"


def test_the_unpaired_difference_is_newcombes():
    """Newcombe 1998, method 10, on his example: 56/70 less 48/80 is 0.2, from 0.0524 to 0.3339."""
    one, two = (wilson(*pair) for pair in ((48, 80), (56, 70)))
    a, b = (Number("m", "s", r.value, r.total, r.low, r.high, "j", "h") for r in (one, two))
    found = unpaired(a, b)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0524, 0.3339)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_contrast(page, theme):
    """Every text colour on every ground it stands on: at least 4.5 to 1 (WCAG 2)."""
    blocks = [
        dict(re.findall(r"--(\w+):\s*(#[0-9a-f]{3,6})", b))
        for b in re.findall(r":root \{(.*?)\}", page, re.S)
    ]
    colours = blocks[0] | blocks[{"light": 0, "dark": 1, "print": 2}[theme]]
    for ink in ("ink", "dim", "link"):
        for ground in ("paper", "soft"):
            high, low = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("args, expected", [
    (["a", "b", "c"], "one run directory or two"), (["nowhere"], "no such directory"), ([], "RUN"),
    (["nowhere", "--out", "x.txt"], "ends in .html"),
])  # fmt: skip
def test_usage(tmp_path, monkeypatch, capsys, args, expected):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *args]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
