"""Ghost attention end to end on a tiny model. The bug this file must catch: an instruction that stays in a later turn
of a training row, or a loss that counts an answer which was made under another context."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from hpsafety.config import GAttConfig
from hpsafety.data.groups import pack
from hpsafety.data.records import iter_records, write_records
from hpsafety.errors import InputError
from hpsafety.model.io import load_model, save_model
from hpsafety.rollout.engine import Engine
from hpsafety.rollout.sampler import Rollout
from hpsafety.safety import gatt_lists, talk_job
from hpsafety.safety.gatt_data import keep_dialogue, make_dialogues, sampling_script, split_rows, training_row
from hpsafety.safety.talk import Answer, Played
from hpsafety.stages import gatt
from hpsafety.train import loop
from hpsafety.train.finetune import build_groups
from tests.stages.conftest import save_chat_model
from tests.tiny import tiny_model

LISTS = ("1. chess\n2. Hiking\n3. baking", "1. Ada Lake\n2. Carl Gauss, a mind\n3. Marie Curie")


class NamingEngine:
    """Gives lists in place of the tiny model, which knows no names."""

    texts = LISTS

    def __init__(self, model, settings):
        self.encode = model.tokenizer.encode_plain

    def groups(self, requests):
        for request in requests:
            tokens = self.encode(self.texts[request.prompt_index % 2])
            yield (
                request.prompt_index,
                [Rollout(request.prompt_index, 0, tokens, [0.0] * len(tokens), "stop")],
            )


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """A tiny chat model whose context holds a dialogue, letter by letter."""
    folder = tmp_path_factory.mktemp("model") / "tiny-chat"
    return save_chat_model(folder, seed=2, max_positions=700)


@pytest.fixture
def names(monkeypatch):
    monkeypatch.setattr(gatt_lists, "Engine", NamingEngine)


@pytest.fixture
def no_page(monkeypatch):
    """Leaves report.html out: drawing costs more than all the rest of such a run."""
    monkeypatch.setattr(gatt, "write_page", lambda result, path: None)


@pytest.fixture
def dialogues(tmp_path):
    def row(name, *texts, **fields):
        return {"id": name, "prompt": [{"role": "user", "content": text} for text in texts], **fields}

    rows = [row(f"d{i}", f"ask {i}?", "and then?", f"why {i}?") for i in range(6)]
    rows[1]["prompt"].insert(0, {"role": "system", "content": "be brief"})
    rows[2]["prompt"].insert(1, {"role": "assistant", "content": "an answer that is not used"})
    rows += [row(f"v{i}", *(f"held {i} {k}?" for k in range(3)), split="valid") for i in range(2)]
    rows.append(row("t", "a test", split="test_help"))
    path = tmp_path / "dialogues.jsonl"
    write_records(path, rows)
    return str(path)


def config(model, data, folder, **changes) -> GAttConfig:
    values = {
        "model": model, "data": (data,), "out": str(folder), "list_size": 3, "max_new_tokens": 6, "eval_dialogues": 2,
        "eval_turns": (2, 4, 9), "eval_tokens": 5, "batch": 4, "epochs": 1, "lr": 5e-3, "device": "cpu",
        "precision": "fp32", "checkpoint_every": 1, "kv_memory": "4MB", "k": 2, "select": "all",
    }  # fmt: skip
    return GAttConfig(**(values | changes))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def model_bytes(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


def test_run_directory(chat_model, dialogues, tmp_path, names, monkeypatch):
    """GATT-1: the engine sees the instruction in every user turn, the training rows have it once, in turn 1; GATT-4:
    the lists with question and raw text; GATT-5: the turns asked for, both models, an unseen constraint, the
    unreachable."""
    seen: list[str] = []
    real = Engine.add
    monkeypatch.setattr(
        Engine,
        "add",
        lambda self, r: (seen.append(self.model.tokenizer.decode(r.prompt, False)), real(self, r)),
    )
    out = tmp_path / "run"
    gatt.run(config(chat_model, dialogues, out))
    rows = lines(out / "instructions.jsonl")
    assert [row["id"] for row in rows] == [f"d{i}" for i in range(6)]
    asked = iter(seen)
    contexts = [next(asked) for _ in range(3 * 6)]  # the sampling comes first: three turns of six dialogues
    for row in rows:
        mine = [c for c in contexts if f"ask {row['id'][1:]}?" in c]
        written = row["instruction"].translate(
            str.maketrans({c: "?" for c in ":;NOPQRSTUVWXYZ"})
        )  # as it is spelled
        assert (
            sorted(c.count("<|im_start|>user") for c in mine)
            == [1, 2, 3]
            == sorted(c.count(written) for c in mine)
        )
        assert all("not used" not in c for c in mine)
    assert sum("be brief" in c for c in contexts) == 3
    trained = list(iter_records(out / "train.jsonl", "demonstration"))
    dropped = sum("dropped" in row for row in lines(out / "dialogues.jsonl"))
    assert len(trained) + dropped == 6 and trained
    for row in trained:
        users = [m["content"] for m in row["prompt"] if m["role"] == "user"]
        assert row["instruction"] in users[0] and json.dumps(row["prompt"]).count(row["instruction"]) == 1
        assert row["instruction"] not in row["response"] and len(users) == 3
    for part, raw in zip(lines_of_lists(out), reversed(LISTS), strict=True):
        assert (
            part["question"]
            and {answer["text"] for answer in part["raw"]} == {raw}
            and len(part["items"]) == 3
        )
    report = json.loads((out / "report.json").read_text())
    assert report["eval_turns"] == [2, 4, 9]
    for name in ("before", "after"):
        table = report["recall"][name]
        assert {f for f, part in table.items() if not part["trained"]} == {"opening"} and len(table) == 4
        for part in table.values():
            assert part["turns"]["2"]["total"] == part["control"]["total"] == 2
            far = part["turns"]["9"]  # six held-out questions make six turns, and a probe at most one more
            assert (far["total"], far["unreachable"], far["value"], far["low"]) == (0, 2, None, None)
    grid = report["attention"]["after"]["by_layer"]
    assert len(grid) == 2 and all(0 < x < 1 for row in grid for x in row)
    assert grid != report["attention"]["before"]["by_layer"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3 and "unreachable (2)" in page
    manifest = json.loads((out / "manifest.json").read_text())
    assert (
        manifest["ended"]
        and manifest["counts"]["held_questions"] == 6
        and manifest["counts"]["listed_hobby"] == 3
    )
    assert manifest["counts"]["other_splits"] == 1 and manifest["counts"]["trained_dialogues"] == len(trained)
    # GATT-2: letters of the last answers, and the end of turn of those that have one; nothing else is trained
    last = sum(len(row["response"]) + (row["finish"] == "stop") for row in trained)
    assert manifest["counts"]["trained_tokens"] == last
    assert model_bytes(out / "model") != model_bytes(chat_model)


def lines_of_lists(out) -> list[dict]:
    """lists.json, the figures first."""
    return sorted(json.loads((out / "lists.json").read_text()), key=lambda part: part["family"])


def three_turns() -> dict:
    messages = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": text}
        for i, text in enumerate(("role A. one?", "first.", "two?", "second.", "three?"))
    ]
    return {"prompt": messages, "response": "third.", "finish": "stop"}


def test_only_the_last_answer_is_trained_on(chat_model):
    """GATT-2: mask 1 on the last answer only; labels of earlier turns change neither loss nor gradients by one bit, one
    of the last answer does."""
    model = load_model(chat_model)
    groups, _ = build_groups([three_turns()], model.tokenizer, 700, train="last")
    batch = pack(groups)
    answer = [*model.tokenizer.encode_plain("third."), model.tokenizer.end_of_turn_id]
    assert batch.train_mask.tolist() == [False] * (len(batch.targets) - len(answer)) + [True] * len(answer)

    def loss_and_gradients(targets):
        model.zero_grad()
        loss = model.nll(dataclasses.replace(batch, targets=targets), batch.num_trained)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    plain = loss_and_gradients(batch.targets)
    others = torch.where(batch.train_mask, batch.targets, (batch.targets + 7) % 67)
    assert all(torch.equal(a, b) for a, b in zip(plain, loss_and_gradients(others), strict=True))
    others = batch.targets.clone()
    others[-2] = (others[-2] + 7) % 67
    assert not torch.equal(plain[0], loss_and_gradients(others)[0])


def test_a_cut_last_answer_trains_no_end_of_turn(chat_model):
    tokenizer = load_model(chat_model).tokenizer
    masks = [
        build_groups([three_turns() | {"finish": finish}], tokenizer, 700, train="last")[0][0].train[0]
        for finish in ("stop", "length")
    ]
    assert sum(masks[0]) - sum(masks[1]) == 1 and masks[0][-1] and not masks[1][-1]


def kill_in(patch, where: str) -> None:
    """Makes the run die after two lines of a file, or after one step of the training."""
    done = []
    if where == "training":
        real = loop.checkpoint_if_due

        def one_step(*args, **kwargs):
            real(*args, **kwargs)
            raise KeyboardInterrupt

        patch.setattr(loop, "checkpoint_if_due", one_step)
        return
    real = talk_job.LineJob.add

    def two_lines(self, index, row):
        if self.out.stem == where:
            done.append(index)
            if len(done) == 3:
                raise KeyboardInterrupt
        real(self, index, row)

    patch.setattr(talk_job.LineJob, "add", two_lines)


def test_killed_run_goes_on_to_the_same_bytes(chat_model, dialogues, tmp_path, names, no_page, monkeypatch):
    """Killed at every stage of its way, one run after the other, it ends as the one that was left alone."""
    whole = config(chat_model, dialogues, tmp_path / "whole")
    gatt.run(whole)
    cut = dataclasses.replace(whole, out=str(tmp_path / "cut"))
    for where in ("dialogues", "recall-before", "training", "recall-after"):
        with monkeypatch.context() as patch:
            kill_in(patch, where)
            with pytest.raises(KeyboardInterrupt):
                gatt.run(cut)
        part = tmp_path / "cut" / f"{where}.jsonl.part" / "rank-0.jsonl"
        assert where == "training" or len(lines(part)) == 2
    assert "resumed from step 1" in (tmp_path / "cut" / "log.txt").read_text()
    gatt.run(cut)
    for name in gatt.OURS:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert model_bytes(tmp_path / "cut" / "model") == model_bytes(tmp_path / "whole" / "model")
    reports = [json.loads((tmp_path / run / "report.json").read_text()) for run in ("cut", "whole")]
    assert reports[0] == reports[1]


def test_no_resume_inherits_nothing(chat_model, dialogues, tmp_path, names, no_page):
    cfg = config(chat_model, dialogues, tmp_path / "run")
    gatt.run(cfg)
    first = {name: (tmp_path / "run" / name).read_bytes() for name in ("dialogues.jsonl", "lists.json")}
    other = dataclasses.replace(cfg, seed=1)
    with pytest.raises(InputError, match="seed was 0, now 1"):
        gatt.run(other)
    gatt.run(dataclasses.replace(other, resume=False))
    assert all((tmp_path / "run" / name).read_bytes() != text for name, text in first.items())


def test_dialogues_longer_than_the_context(chat_model, dialogues, tmp_path, names, no_page):
    """Issue 7: dropped and counted; where none is left, a clear stop. Later turns of the evaluation are unreachable."""
    rows = list(iter_records(dialogues, "prompt"))
    rows[4]["prompt"][2]["content"] = "long " * 80
    path = tmp_path / "long.jsonl"
    write_records(path, rows)
    out = tmp_path / "run"
    gatt.run(config(chat_model, str(path), out, max_length=460))
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    kept = {row["id"]: row.get("dropped") for row in lines(out / "dialogues.jsonl")}
    assert kept["d4"] == "longer than the context" and counts["dropped: longer than the context"] >= 1
    assert "d4" not in {row["id"] for row in lines(out / "train.jsonl")}
    far = json.loads((out / "report.json").read_text())["recall"]["before"]["hobby"]["turns"]
    assert far["2"]["total"] + far["2"]["unreachable"] == 2 and far["9"]["total"] == 0
    with pytest.raises(InputError, match="no dialogue leaves room for an answer"):
        gatt.run(config(chat_model, str(path), tmp_path / "none", max_length=20))
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="no dialogue is left to train on .*6 longer than the context"):
        gatt.run(config(chat_model, dialogues, tmp_path / "some", max_length=140))


def test_dialogues_that_are_not_trained_on():
    row = {"id": 1, "prompt": "one?", "instruction": "Role: X.", "values": {}, "terse": True}

    def keep(*texts, full=None, rules=True, **values):
        samples = [Answer(text, "stop") for text in texts]
        played = Played(sampling_script(row, len(texts)), samples[:1], samples=samples, full=full)
        return keep_dialogue(row | {"values": values}, played, rules)

    assert keep("fine")["response"] == "fine" and "dropped" not in keep("fine")
    assert keep("")["dropped"] == "an empty answer"
    assert keep("So, role:  x. it is", "")["dropped"] == "an answer repeats the instruction"
    assert keep(full=1)["dropped"] == "longer than the context"
    french = "Le repas est dans la maison, et il est bon."
    kept = keep("", "The house is in the town.", french, language="French")
    assert (kept["response"], kept["sample_index"]) == (french, 2) and len(kept["samples"]) == 3
    assert (
        keep("The house is in the town.", language="French")["dropped"]
        == "the last answer is in another language"
    )
    assert keep("The house is in the town.", language="French", rules=False)["sample_index"] == 0
    assert keep("", "", rules=False)["dropped"] == "an empty answer"
    two = row | {"prompt": [{"role": "user", "content": t} for t in ("a", "b")]}
    said = [Answer("It is a very good day.", "stop"), Answer("It is a  VERY good night.", "stop")]
    played = Played(sampling_script(two), said, samples=said[1:])
    assert keep_dialogue(two, played, True)["dropped"] == "the last answer begins as an earlier one"
    assert keep_dialogue(two, played, False)["response"] == said[1].text
    assert training_row(row, keep("fine"))["prompt"] == [{"role": "user", "content": "Role: X.\n\none?"}]


def test_rows_of_one_turn_are_joined():
    rows = [{"id": f"r{i}", "prompt": f"q{i}"} for i in range(8)]
    rows.insert(3, {"id": "d", "prompt": [{"role": "user", "content": t} for t in "ab"]})
    made, counts = make_dialogues(rows, 3, None, 0)
    assert [row["id"] for row in made] == ["d", "r0+2", "r3+2"] and counts["single_rows_left_over"] == 2
    assert [m["content"] for m in made[1]["prompt"]] == ["q0", "q1", "q2"]
    fewer, counts = make_dialogues(rows, 3, 2, 0)
    assert len(fewer) == 2 and counts["dialogues_not_used"] == 1 and all(row in made for row in fewer)
    with pytest.raises(InputError, match="8 rows of one turn each, --turns 9"):
        make_dialogues([row for row in rows if row["id"] != "d"], 9, None, 0)


def test_held_out_questions():
    """DATA-3: none is trained on; without rows marked valid a seeded tenth serves."""
    rows = [{"prompt": f"q{i}"} for i in range(20)]
    train, questions, counts = split_rows(rows, 3)
    assert len(train) == 18 and len(questions) == 2 and not {r["prompt"] for r in train} & set(questions)
    rows = [
        {"prompt": "Same  one"},
        {"prompt": "same one", "split": "valid"},
        {"prompt": "x", "split": "valid"},
    ]
    assert split_rows(rows, 0)[1] == ["x"]
    with pytest.raises(InputError, match="all held-out questions are also trained on"):
        split_rows(rows[:2], 0)


def test_bad_input(chat_model, dialogues, tmp_path, names):
    for changes, message in (
        ({"out": ""}, "--out is missing; give it, or --demo"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"languages": ("Klingon",)}, "--languages must be of French"),
        ({"eval_turns": (0, 2)}, "--eval-turns must be one number or more, each at least 1"),
        ({"top_p": 0.0}, "--top-p must be"),
        ({"kv_memory": "40KB"}, "dialogue 'd0': the key-value cache is too small .*raise --kv-memory"),
    ):
        with pytest.raises(InputError, match=message):
            gatt.run(config(chat_model, dialogues, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    with pytest.raises(InputError, match='bad.jsonl:1: field "prompt" must end with a user message'):
        gatt.run(config(chat_model, str(path), tmp_path / "run2"))
    save_model(tiny_model(), str(tmp_path / "mute"))
    with pytest.raises(InputError, match="has no tokenizer.json"):
        gatt.run(config(str(tmp_path / "mute"), dialogues, tmp_path / "run3"))
    assert not (tmp_path / "run2").exists() and not (tmp_path / "run3").exists()


def test_demo_fills_what_is_not_given():
    cfg = GAttConfig(demo=True, batch=8)
    assert (cfg.model, cfg.out, cfg.batch) == ("smollm2", "gatt-demo-out", 8)
    assert cfg.eval_turns == (2, 4, 6, 8) and Path(cfg.data[0]).is_file()
    plain = GAttConfig(model="m", data=("d",), out="o")
    assert (plain.eval_turns, plain.batch, plain.lr, plain.epochs) == ((2, 4, 6, 20), 64, 2e-5, 2)
    with pytest.raises(InputError, match="--model is missing"):
        GAttConfig()
