"""Dialogues played turn by turn: each answer becomes part of the next turn's prompt.

All dialogues are in the engine at once. An answer that is finished puts its dialogue's next turn at the end of the
queue, before dialogues that have not begun, so the batch stays full whatever the lengths of answers. A turn's prompt is
computed anew (rollout/engine.py keeps no cache between turns): n turns cost about n/2 times the tokens of the whole
dialogue. For the handful of turns of training data that is about what the sampling costs; at turn 20 it is most.

A draw is keyed by (seed, dialogue, turn), so the bytes do not depend on batch, ranks or interruptions.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from hpsafety.data.chat import encode_prompt
from hpsafety.rollout.engine import Engine, Request

STRIDE = 2**21  # request numbers per dialogue: two per turn


@dataclass(frozen=True, slots=True)
class Script:
    """What the user says. Turns count from 1.

    users  the turns of the dialogue itself
    asked  turn -> a question that is put there in place of the turn's own, for an answer that the dialogue forgets
    k      samples of the last turn's answer
    goes_on  (turn, the answers before it) -> whether that turn is said at all; where not, the dialogue is over
    """

    users: list[str]
    asked: dict[int, str] = field(default_factory=dict)
    system: str | None = None
    k: int = 1
    goes_on: Callable[[int, list[str]], bool] | None = None

    def messages(self, answers: list[str], last: str) -> list[dict]:
        """The chat after `answers`, with `last` as the user's newest text."""
        out = [] if self.system is None else [{"role": "system", "content": self.system}]
        for text, answer in zip(self.users, answers, strict=False):
            out += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return [*out, {"role": "user", "content": last}]


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    finish: str  # "stop" or "length"


@dataclass(slots=True)
class Played:
    """What came of a script.

    answers  one a turn; of the last turn the first of its `samples`
    full     the turn whose prompt left no room for an answer, or None
    """

    script: Script
    answers: list[Answer] = field(default_factory=list)
    asked: dict[int, Answer] = field(default_factory=dict)
    samples: list[Answer | None] = field(default_factory=list)
    full: int | None = None
    _open: int = 0  # answers that the engine owes

    def texts(self) -> list[str]:
        return [answer.text for answer in self.answers]


def play(engine: Engine, scripts: Iterable[tuple[int, Script]], limit: int) -> Iterator[tuple[int, Played]]:
    """(number, what came of it) of each script as it ends.

    limit  tokens that a prompt and its answer may have together; a dialogue ends before the first turn that exceeds it
    """
    playing: dict[int, Played] = {}
    ended: list[tuple[int, Played]] = []  # those that never reached the engine

    def opening() -> Iterator[Request]:
        for index, script in scripts:
            playing[index] = Played(script)
            requests = _turn(engine, index, playing[index], limit)
            yield from requests
            if not requests:
                ended.append((index, playing.pop(index)))

    for rollout in engine.rollouts(opening()):
        index, rest = divmod(rollout.prompt_index, STRIDE)
        turn, aside = divmod(rest, 2)
        talk = playing[index]
        text = engine.model.tokenizer.decode(rollout.tokens, skip_special=True).strip()
        answer = Answer(text, rollout.finish)
        talk._open -= 1
        if aside:
            talk.asked[turn] = answer
        elif turn == len(talk.script.users):
            talk.samples[rollout.sample_index] = answer
        else:
            talk.answers.append(answer)
        if not aside and None not in talk.samples:
            talk.answers += talk.samples[:1]
            for request in _turn(engine, index, talk, limit):
                engine.add(request)
        if not talk._open:
            yield index, playing.pop(index)
        yield from ended
        ended.clear()
    yield from ended


def _turn(engine: Engine, index: int, talk: Played, limit: int) -> list[Request]:
    """The requests of the dialogue's next turn; none where it is over or the context is full."""
    script, turn = talk.script, len(talk.answers) + 1
    if script.goes_on is not None and turn <= len(script.users) and not script.goes_on(turn, talk.texts()):
        return []
    wanted = []
    if turn in script.asked:
        wanted.append((1, script.asked[turn]))
    if turn <= len(script.users):
        wanted.append((0, script.users[turn - 1]))
    requests = []
    for aside, text in wanted:
        prompt = encode_prompt(engine.model.tokenizer, script.messages(talk.texts(), text))
        if len(prompt) + engine.settings.max_new_tokens > limit:
            talk.full = talk.full or turn
            continue
        last = not aside and turn == len(script.users)
        if last:
            talk.samples = [None] * script.k
        requests.append(Request(prompt, script.k if last else 1, index * STRIDE + 2 * turn + aside))
    talk._open += sum(request.k for request in requests)
    return requests
