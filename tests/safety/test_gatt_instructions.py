"""Ghost attention's instructions. The bug this file must catch: a terse form that comes with some families only."""

from collections import Counter

import pytest

from hpsafety.config_gatt import LANGUAGES
from hpsafety.safety.gatt_instructions import FAMILIES, FULL, TERSE, UNSEEN, attach, draw, write
from hpsafety.safety.gatt_page import cell, show_table, write_page
from hpsafety.safety.gatt_probes import PROBES, _rate, keep_probe, probe_rows, probe_script, summarise
from hpsafety.safety.recall import holds
from hpsafety.safety.talk import Answer, Played

LISTS = {
    "hobby": ["chess", "hiking", "baking"], "figure": ["Ada Lovelace", "Marie Curie"], "language": list(LANGUAGES),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_thousand_draws(seed):
    """GATT-3: half are terse, every non-empty combination occurs, about as often as the others and in both forms."""
    drawn = draw(1000, LISTS, seed)
    assert sum(i.terse for i in drawn) == 500
    counts = Counter((frozenset(i.values), i.terse) for i in drawn)
    assert len(counts) == 2 * 7 and min(counts.values()) > 30  # 71 expected each, five deviations of 8
    for i in drawn:
        assert i.text == write(i.values, i.terse) and all(
            v in LISTS[f] and v in i.text for f, v in i.values.items()
        )
    used = {(f, v) for i in drawn for f, v in i.values.items()}
    assert used == {(f, v) for f in FAMILIES for v in LISTS[f]}
    assert drawn == draw(1000, LISTS, seed) != draw(1000, LISTS, seed + 1)


def test_terse_is_shorter_and_says_the_same():
    values = {family: LISTS[family][0] for family in FAMILIES}
    full, terse = write(values, False), write(values, True)
    assert len(terse) < len(full) / 2 and all(value in terse and value in full for value in values.values())
    assert terse == "Role: Ada Lovelace. Hobby: chess. Language: French."
    assert write({"figure": "Martin Luther King Jr."}, True) == "Role: Martin Luther King Jr."
    assert set(FULL) == set(TERSE) == set(FAMILIES) and attach("Do.", "Why?") == "Do.\n\nWhy?"


def test_probes():
    """GATT-5: every family and a constraint that is never trained; the instruction in the first turn alone; questions
    aside ask for what only shows when asked, in place of the turn's own; a control without any instruction."""
    rows = probe_rows(LISTS, [f"q{i}?" for i in range(9)], (2, 4, 1), 4, 0)
    assert len(rows) == 4 * 4 * 2 and {r["family"] for r in rows if not r["trained"]} == set(UNSEEN)
    for row in rows:
        script = probe_script(row)
        if row["control"]:
            assert len(script.users) == 1 and row["value"] not in script.users[0] and not script.asked
            continue
        assert row["instruction"] in script.users[0] and row["value"] in row["instruction"]
        assert not any(row["value"] in text for text in script.users[1:])
        assert len({text.split("\n")[-1] for text in script.users}) == len(script.users)
        if row["family"] in PROBES:
            assert len(script.users) == 3 and set(script.asked) == {1, 2, 4}
            assert [row["instruction"] in script.asked[t] for t in (1, 2, 4)] == [True, False, False]
        else:
            assert len(script.users) == 4 and not script.asked
    terse = [
        r["instruction"].startswith("Hobby:") for r in rows if r["family"] == "hobby" and not r["control"]
    ]
    assert terse == [False, True, False, True]
    short = probe_rows(LISTS, ["q0?", "q1?"], (2, 20), 1, 0)
    assert all(len(probe_script(r).users) <= 2 for r in short)


def test_summary():
    """GATT-5: rates over the dialogues that got there, the others reported as unreachable and never as 0 or 100 %."""
    rows = probe_rows(LISTS, [f"q{i}?" for i in range(9)], (2, 4), 2, 0)

    def play(row, answer):
        played = Played(probe_script(row))
        turns = 4 if row["id"].endswith(("0", "0-control")) else 2
        played.answers = [Answer(answer, "stop")] * min(turns, len(played.script.users))
        played.asked = {t: Answer(answer, "stop") for t in played.script.asked if t <= turns}
        return keep_probe(row, played)

    kept = [play(row, "I like " + row["value"] + "." if row["family"] == "hobby" else "") for row in rows]
    table = summarise(kept, (4, 2))
    assert (table["hobby"]["turns"]["2"]["count"], table["hobby"]["turns"]["2"]["total"]) == (2, 2)
    far = table["hobby"]["turns"]["4"]
    assert (far["count"], far["total"], far["unreachable"], far["value"]) == (1, 1, 1, 1.0) and far[
        "low"
    ] < 0.3
    assert table["language"]["turns"]["4"]["value"] == 0.0 and table["hobby"]["control"]["total"] == 2
    nobody = _rate([None, None])
    assert (nobody["value"], nobody["low"], nobody["high"], nobody["unreachable"]) == (None, None, None, 2)


def test_the_instruction_itself_does_not_pass_for_an_answer_elsewhere():
    """No probe question holds what it asks for, and an opening is checked as a word."""
    for family, questions in PROBES.items():
        assert not any(holds(family, value, q) for q in questions for value in LISTS[family])
    assert holds("opening", "Ahoy", "ahoy! A good one") and not holds("opening", "Well", "Wellness is")


def test_cells_and_page(tmp_path, capsys):
    """Rates with intervals; unreachable turns by that word, no number; hostile text stays text."""
    hostile = "<script>alert(1)</script>"
    some = {"count": 3, "total": 4, "value": 0.75, "low": 0.3, "high": 0.95, "unreachable": 1}
    none = {"count": 0, "total": 0, "value": None, "low": None, "high": None, "unreachable": 5}
    assert (
        cell(some) == "75 % (3/4, 30-95; 1 unreachable)"
        and cell(some, short=True) == "75 % (30-95; 1 unreachable)"
    )
    assert cell(none) == cell(none, short=True) == "unreachable (5)"
    table = {"hobby": {"trained": True, "control": some, "turns": {"2": some, "20": none}}}
    mass = {"by_layer": [[0.2, 0.1]], "uniform": [0.3, 0.2], "dialogues": 4, "sink_words": [hostile]}
    answers = [{"model": m, "text": hostile, "holds": False} for m in ("before", "after")]
    sample = {"instruction": hostile, "turn": 2, "question": hostile, "answers": answers}
    result = {
        "recall": {"before": table, "after": table}, "eval_turns": [2, 20],
        "attention": {"before": mass, "after": mass}, "adherence": {"hobby": some}, "samples": [sample],
        "counts": {"trained_dialogues": 3, f"dropped: {hostile}": 1},
        "lists": [{"family": "hobby", "items": [hostile], "short": 1, "question": hostile}], "limit": 99,
        "held_questions": 5, "eval_tokens": 6, "temperature": 0.7, "context_turns": None, "language_judge": "rules",
    }  # fmt: skip
    write_page(result, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and page.count("&lt;script&gt;") == 8 and page.count("<svg") == 3
    assert page.count("unreachable (5)") == 2 and "0 %" not in page.split("<tbody>")[1].split("</tbody>")[0]
    show_table(result)
    assert "unreachable" in capsys.readouterr().out
