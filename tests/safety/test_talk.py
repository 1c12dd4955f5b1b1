"""Dialogues turn by turn. The bug this file must catch: a question aside that the dialogue remembers, or a draw that
depends on which dialogues are played beside it."""

import pytest

from hpsafety.data.chat import encode_prompt
from hpsafety.model.io import load_model, save_model
from hpsafety.rollout.engine import Engine
from hpsafety.rollout.sampler import Settings, stop_ids
from hpsafety.safety.talk import Script, play
from tests.stages.conftest import write_tokenizer
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(tiny_model(seed=2, max_positions=400), str(folder))
    write_tokenizer(folder)
    return load_model(str(folder))


def played(model, scripts, limit=400, **changes):
    values = {"max_new_tokens": 5, "seed": 3, "stop": stop_ids(model), "max_batch": 4, "kv_memory": 4 << 20}
    engine = Engine(model, Settings(**(values | changes)))
    return dict(play(engine, scripts.items(), limit))


SCRIPTS = {i: Script([f"ask {i} {t}?" for t in range(1 + i % 4)]) for i in range(9)}


def test_every_turn_sees_the_answers_before_it(model):
    talk = played(model, {5: Script(["one?", "two?", "three?"], system="hi")})[5]
    assert len(talk.answers) == 3 and talk.full is None
    for turn in (1, 2, 3):
        messages = [{"role": "system", "content": "hi"}]
        for user, answer in zip(talk.script.users[: turn - 1], talk.texts(), strict=False):
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": talk.script.users[turn - 1]})
        assert talk.script.messages(talk.texts()[: turn - 1], talk.script.users[turn - 1]) == messages
        again = played(model, {5: talk.script}, limit=len(encode_prompt(model.tokenizer, messages)) + 5)[5]
        assert again.texts() == talk.texts()[:turn] and again.full == (turn + 1 if turn < 3 else None)


def test_the_same_whatever_is_played_beside_it(model):
    whole = played(model, SCRIPTS)
    assert sorted(whole) == list(range(9)) and [len(whole[i].answers) for i in range(9)] == [
        1 + i % 4 for i in range(9)
    ]
    assert len({tuple(talk.texts()) for talk in whole.values()}) == 9
    for i in (3, 7):
        assert played(model, {i: SCRIPTS[i]}, max_batch=1)[i].texts() == whole[i].texts()


def test_questions_aside_are_forgotten(model):
    users = ["one?", "two?", "three?"]
    plain = played(model, {0: Script(users)})[0]
    asked = played(model, {0: Script(users, {1: "who?", 3: "why?", 4: "and now?", 6: "too far?"})})[0]
    assert asked.texts() == plain.texts() and set(asked.asked) == {1, 3, 4} and not plain.asked
    alone = played(model, {0: Script([], {1: "who?"})})[0]
    assert alone.asked[1] == asked.asked[1] and not alone.answers


def test_samples_of_the_last_answer(model):
    """The first sample is the one of k = 1, and goes on as the dialogue's answer."""
    users = ["one?", "two?"]
    one = played(model, {0: Script(users)})[0]
    four = played(model, {0: Script(users, {3: "and?"}, k=4)})[0]
    assert four.texts() == one.texts() and four.samples[0] == one.samples[0] == one.answers[1]
    assert len({a.text for a in four.samples}) > 1 and len(four.samples) == 4 and len(one.samples) == 1
    assert four.asked == played(model, {0: Script(users, {3: "and?"})})[0].asked


def test_what_never_fits(model):
    talks = played(model, {0: Script(["a" * 60]), 1: Script(["b?"])}, limit=60)
    assert talks[0].full == 1 and not talks[0].answers and len(talks[1].answers) == 1
    assert played(model, {0: Script(["a" * 60])}, limit=60)[0].full == 1


def test_a_dialogue_ends_where_the_script_does_not_go_on(model):
    """The answers before decide; what was said up to there is as it would have been, and the context was not full."""
    asked = []

    def goes_on(turn, answers):
        asked.append((turn, len(answers)))
        return turn < 3

    whole = played(model, {3: SCRIPTS[3]})[3]
    found = played(
        model, {3: Script(SCRIPTS[3].users, goes_on=goes_on), 4: Script(["x"], goes_on=lambda *_: False)}
    )
    assert found[3].texts() == whole.texts()[:2] and found[3].full is None and not found[4].answers
    assert asked == [(1, 0), (2, 1), (3, 2)]
