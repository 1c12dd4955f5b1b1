"""hpsafety chat (issue 5). The bug this file must catch: an answer's control characters reaching the terminal, or half
a character printed as a replacement mark."""

import io

import pytest

from hpsafety import chat, cli
from hpsafety.config import ChatConfig
from hpsafety.errors import InputError
from hpsafety.model.io import load_model
from tests.stages.conftest import model_dir

__all__ = ["model_dir"]  # a fixture


class Pipe(io.StringIO):
    """stdin that is no terminal."""


def talk(monkeypatch, capsys, lines: str, *flags: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", Pipe(lines))
    code = cli.main(["chat", "--precision", "fp32", "--device", "cpu", "--max-new-tokens", "12", *flags])
    return code, *capsys.readouterr()


def config(model_dir, **changes) -> ChatConfig:
    return ChatConfig(
        **({"model": model_dir, "device": "cpu", "precision": "fp32", "max_new_tokens": 12} | changes)
    )


def expected(model, messages, cfg, turn) -> str:
    ids = chat.encode_prompt(model.tokenizer, messages)
    options = {"temperature": cfg.temperature, "top_p": cfg.top_p, "seed": cfg.seed, "max_new_tokens": 12}
    # The key of a turn is its number: the same prompt at place `turn`.
    rollouts = model.generate([ids] * (turn + 1), **options)
    return model.tokenizer.decode(rollouts[turn].tokens)


def test_piped_questions_are_answered_in_turn(model_dir, monkeypatch, capsys):
    """`echo hello | hpsafety chat`: the second answer sees the first turn; /reset forgets it; /quit ends."""
    model, cfg = load_model(model_dir), config(model_dir)
    first = expected(model, [{"role": "user", "content": "hello"}], cfg, 0)
    dialogue = [
        {"role": "user", "content": "hello"}, {"role": "assistant", "content": first},
        {"role": "user", "content": "why"},
    ]  # fmt: skip
    second = expected(model, dialogue, cfg, 1)
    third = expected(model, [{"role": "user", "content": "why"}], cfg, 3)
    code, out, err = talk(
        monkeypatch, capsys, "hello\nwhy\n/reset\nwhy\n/quit\nnever\n", "--model", model_dir
    )
    assert (code, err) == (0, "")
    assert out == "".join(chat.printable(text) + "\n" for text in (first, second, third))


def test_two_models_under_their_names(model_dir, monkeypatch, capsys):
    alone = talk(monkeypatch, capsys, "hello\n", "--model", model_dir)[1]
    code, out, _ = talk(monkeypatch, capsys, "hello\n", "--model", model_dir, "--against", model_dir)
    assert code == 0 and out == f"[{model_dir}]\n{alone}" * 2


def test_side_by_side_gives_the_same_answers(model_dir, monkeypatch, capsys):
    """The columns of a terminal hold what the plain form prints."""
    voices = [chat.Voice(name, load_model(model_dir)) for name in ("one", "two")]
    cfg = config(model_dir)
    for voice in voices:
        voice.messages = [{"role": "user", "content": "hello"}]
    plain = chat.answer_in_turn(voices, cfg, 0)
    assert chat.answer_side_by_side(voices, cfg, 0) == plain
    assert "one" in capsys.readouterr().out


def test_system_message(model_dir, monkeypatch, capsys):
    model, cfg = load_model(model_dir), config(model_dir)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    code, out, _ = talk(monkeypatch, capsys, "hello\n", "--model", model_dir, "--system", "be brief")
    assert code == 0 and out == chat.printable(expected(model, messages, cfg, 0)) + "\n"


def test_a_full_context_says_so(model_dir, monkeypatch, capsys):
    code, _, err = talk(monkeypatch, capsys, "a" * 200 + "\n", "--model", model_dir)
    assert code == 2 and "the conversation fills the context of 128 tokens; /reset" in err


class Bytes:
    """A tokenizer of single bytes, for what a stream must hold back."""

    def decode(self, tokens, skip_special=True):
        return bytes(tokens).decode("utf-8", errors="replace")


def test_a_stream_never_shows_half_a_character(model_dir, monkeypatch, capsys):
    text = "é\x1b[31mred\u202e 🙂!"
    steps = list(text.encode())

    class Fake:
        def __init__(self, *_):
            self.left = list(steps)

        def add(self, request):
            pass

        def step(self):
            if not self.left:
                return []
            token = self.left.pop(0)
            return [chat_token(token, None if self.left else "length")]

    def chat_token(token, finish):
        from hpsafety.rollout.engine import Token

        return Token(0, 0, token, 0.0, finish)

    model = load_model(model_dir)
    model.tokenizer = Bytes()
    monkeypatch.setattr(chat, "Engine", Fake)
    monkeypatch.setattr(chat, "stop_ids", lambda model: frozenset())
    monkeypatch.setattr(chat, "encode_prompt", lambda *_: [1])
    voice = chat.Voice("m", model)
    pieces = list(chat.stream(voice, config(model_dir), 0))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert chat.answer_in_turn([voice], config(model_dir), 0) == [text]
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\u202e" not in shown and "é" in shown and "🙂!" in shown


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(model_dir, monkeypatch, capsys):
    def broken(voice, cfg, turn):
        yield "so "
        yield "far"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", broken)
    voice = chat.Voice("m", None)
    chat.ask([voice], "go on", config(model_dir), 0)
    assert [m["content"] for m in voice.messages] == ["go on", "so far"]
    assert capsys.readouterr().out == "so far\n"


@pytest.mark.parametrize(
    "changes", [{"temperature": -1.0}, {"top_p": 0.0}, {"system": " "}, {"max_new_tokens": 0}]
)
def test_settings_refuse(changes):
    with pytest.raises(InputError, match="must be"):
        ChatConfig(model="m", **changes)
