"""Text of others made harmless, for pages, terminals, spreadsheets and Markdown."""

import csv

import pytest

from hpsafety.report import card_text, text
from tests.report.fake_run import ANSI, BIDI, HOSTILE, LONG


def test_marks_that_steer_are_written_out():
    shown = text.visible(ANSI + BIDI + "\r\x00\u2028\ufeff")
    assert not {"\x1b", "\x07", "\u202e", "\u2066", "\u2069", "\r", "\x00", "\u2028", "\ufeff"} & set(shown)
    assert "⟨U+202E⟩" in shown and "⟨U+001B⟩" in shown
    assert text.visible("Ünïcödé 漢字 שלום\n\tx\u00a0y") == "Ünïcödé 漢字 שלום\n\tx y"


def test_a_long_text_is_cut_with_a_note():
    shown = text.visible(LONG)
    assert len(shown) < text.MOST + 60 and shown.endswith(
        f"({len(LONG) - text.MOST:,} further characters cut)"
    )
    assert text.visible("x" * text.MOST) == "x" * text.MOST


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "  =", "＝", "\t=", "\u00a0="])
def test_no_cell_is_a_formula(tmp_path, start):
    text.write_csv(tmp_path / "x.csv", ["a", "b"], [[f"{start}1+1", -0.5]])
    with open(tmp_path / "x.csv", encoding="utf-8", newline="") as handle:
        _, (first, second) = csv.reader(handle)
    assert first[0] not in "=+-@＝\t\r\n " and second == "-0.5"  # a number of ours stays one


def test_a_dialogue_has_its_roles():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, "odd"]
    assert (
        text.said(turns) == "user: a\nassistant: b" and text.said(turns[:1]) == "a" and text.said(None) == ""
    )


def test_markdown_of_data_is_a_code_span():
    assert card_text.code("a`b``c") == "``` a`b``c ```" and card_text.code("x\ny") == "`x y`"
    assert "\n" not in card_text.code(HOSTILE) and card_text.code(HOSTILE).startswith("``")
    assert card_text.escaped("[a](b) <i> *x*") == "\\[a\\](b) \\<i\\> \\*x\\*"
