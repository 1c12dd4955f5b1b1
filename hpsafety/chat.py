"""`hpsafety chat`: talk to a checkpoint in the terminal, one model or two side by side.

On a terminal two answers stand in two columns; elsewhere each is printed under the model's name, one after the other.
Text of a model is printed without control characters.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from hpsafety.data.chat import encode_prompt
from hpsafety.errors import InputError
from hpsafety.model.io import load_model
from hpsafety.report.text import printable
from hpsafety.rollout.engine import Engine, Request
from hpsafety.rollout.sampler import Settings, stop_ids
from hpsafety.train import distributed, precision

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C ends an answer"


@dataclass
class Voice:
    """One model and the conversation as it went with it."""

    name: str
    model: object
    messages: list[dict] = field(default_factory=list)


def stream(voice: Voice, cfg, turn: int) -> Iterator[str]:
    """The answer to voice.messages as it comes; pieces end where a character does.

    Raises InputError when the conversation leaves no room in the context.
    """
    model, tokenizer = voice.model, voice.model.tokenizer
    prompt = encode_prompt(tokenizer, voice.messages)
    room = model.config.max_positions - len(prompt)
    if room < 1:
        raise InputError(f"the conversation fills the context of {model.config.max_positions} tokens; /reset")
    settings = Settings(
        max_new_tokens=min(room, cfg.max_new_tokens), temperature=cfg.temperature, top_p=cfg.top_p, seed=cfg.seed,
        stop=stop_ids(model), max_batch=1,
    )  # fmt: skip
    engine, tokens, shown = Engine(model, settings), [], 0
    engine.add(Request(prompt, 1, turn))
    while stepped := engine.step():
        tokens.append(stepped[0].token)
        text = tokenizer.decode(tokens, skip_special=True)
        whole = (
            len(text) if stepped[0].finish else len(text.rstrip("\ufffd"))
        )  # half a character waits for its rest
        yield text[shown:whole]
        shown = max(shown, whole)


def answer_in_turn(voices: list[Voice], cfg, turn: int) -> list[str]:
    """Each model's answer, printed as it comes, one model after the other."""
    answers = [""] * len(voices)
    for i, voice in enumerate(voices):
        if len(voices) > 1:
            print(f"[{printable(voice.name)}]")
        with contextlib.suppress(KeyboardInterrupt):
            for piece in stream(voice, cfg, turn):
                answers[i] += piece
                print(printable(piece), end="", flush=True)
        print(flush=True)
    return answers


def answer_side_by_side(voices: list[Voice], cfg, turn: int) -> list[str]:
    """All answers at once, a column each."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    answers = [""] * len(voices)

    def columns() -> Table:
        table = Table(expand=True)
        for voice in voices:
            table.add_column(Text(printable(voice.name)), ratio=1)
        table.add_row(*(Text(printable(text)) for text in answers))
        return table

    with Live(columns(), vertical_overflow="visible") as live, contextlib.suppress(KeyboardInterrupt):
        for pieces in itertools.zip_longest(*(stream(voice, cfg, turn) for voice in voices), fillvalue=""):
            answers = [text + piece for text, piece in zip(answers, pieces, strict=True)]
            live.update(columns())
    return answers


def ask(voices: list[Voice], text: str, cfg, turn: int) -> None:
    """One turn: the question goes to every model, and both sides of it into its conversation."""
    show = answer_side_by_side if len(voices) > 1 and sys.stdout.isatty() else answer_in_turn
    for voice in voices:
        voice.messages.append({"role": "user", "content": text})
    try:
        answers = show(voices, cfg, turn)
    except InputError:
        for voice in voices:
            voice.messages.pop()
        raise
    for voice, answer in zip(voices, answers, strict=True):
        voice.messages.append({"role": "assistant", "content": answer})


def run(cfg) -> None:
    """hpsafety chat: see ChatConfig. Reads stdin line by line until /quit or its end."""
    voices = [_load(path, cfg) for path in (cfg.model, cfg.against) if path is not None]
    system = [] if cfg.system is None else [{"role": "system", "content": cfg.system}]
    terminal = sys.stdin.isatty()
    if terminal:
        print(HELP)
    _reset(voices, system)
    for turn in itertools.count():
        try:
            text = input("> " if terminal else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            print()
            continue
        if text == "/quit":
            break
        if text == "/reset":
            _reset(voices, system)
        elif text:
            try:
                ask(voices, text, cfg, turn)
            except InputError as error:
                if not terminal:
                    raise
                print(error, file=sys.stderr)


def _reset(voices: list[Voice], system: list[dict]) -> None:
    for voice in voices:
        voice.messages = list(system)


def _load(path: str, cfg) -> Voice:
    device = distributed.init(cfg.device).device
    dtype, _ = precision.choose(cfg.precision, device)
    model = load_model(path, dtype, device)
    if model.tokenizer is None:
        raise InputError(f"{path}: has no tokenizer.json; chat needs one")
    return Voice(path, model)
