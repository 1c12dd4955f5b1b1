"""The reward stage end to end on a tiny model (PREF, RM). The bug this file must catch: the loss divided by the pairs
of a micro-batch instead of the step's."""

import json
import math
from pathlib import Path

import pytest
import torch

from hpsafety import cli, flags, ops
from hpsafety.config import RewardConfig
from hpsafety.data.groups import pack
from hpsafety.data.preferences import Pair
from hpsafety.errors import InputError, RunError
from hpsafety.model.heads import reward_model_from, same_trunk
from hpsafety.model.io import load_model, save_model
from hpsafety.model.reward_io import load_reward_model
from hpsafety.stages import reward
from hpsafety.train import loop, stage
from hpsafety.train.optim import AdamW
from tests.stages.conftest import write_tokenizer
from tests.stages.test_sft import metrics, model_bytes, stable
from tests.tiny import tiny_model

RATINGS = ("significantly", "better", "slightly", "negligibly", None)
UNSAFE, SAFE = "sure, here is how to do it.", "no, that would hurt somebody."


def make_rows(count: int = 60, **changes) -> list[dict]:
    """Pairs that a tiny model can tell apart, rated and binned, all safety data."""
    answers = {1: (SAFE, UNSAFE), 2: (SAFE, "no."), 3: (UNSAFE, "sure!")}
    rows = []
    for i in range(count):
        chosen, rejected = (f"{text} {i % 7}" for text in answers[1 + i % 3])
        rows.append({
            "id": f"row-{i}", "prompt": f"question {i} please?", "chosen": chosen, "rejected": rejected,
            "safety_bin": 1 + i % 3, "is_safety": True, "category": "illicit", "attack": "logic",
        } | ({"rating": RATINGS[i % 5]} if RATINGS[i % 5] else {}) | changes)  # fmt: skip
    return rows


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data_file(tmp_path) -> str:
    return write(tmp_path / "pairs.jsonl", make_rows())


def config(model_dir, data_file, out, **changes) -> RewardConfig:
    values = {
        "model": model_dir, "data": (data_file,), "out": str(out), "kind": "safety", "batch": 6, "lr": 1e-3,
        "checkpoint_every": 3, "device": "cpu", "precision": "fp32", "tokens_per_batch": 256,
    }  # fmt: skip
    return RewardConfig(**(values | changes))


def report_of(out) -> dict:
    return json.loads((Path(out) / "report.json").read_text())


def test_run_directory(model_dir, data_file, tmp_path, capsys):
    """design section 8 and RM-9: the model, its run and its report; RM-4: no token head in what is saved."""
    out = tmp_path / "run"
    reward.run(config(model_dir, data_file, out, batch=3, lr=3e-3))
    rows = metrics(out)
    assert [r["step"] for r in rows] == list(range(1, 19)) and rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["stage"] == "reward" and manifest["ended"]
    assert (manifest["config"]["margin"], manifest["config"]["aux_weight"]) == ("none", 1.0)
    assert set(manifest["output_hashes"]) == {f"model/{name}" for name in model_bytes(out)}
    fields = json.loads((out / "model" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForSequenceClassification"]
    model = load_reward_model(out / "model")
    assert "head" not in dict(model.named_parameters()) and not same_trunk(
        model, reward_model_from(load_model(model_dir))
    )
    result = report_of(out)
    assert result["held_out"]["pairs"] == 6 == manifest["counts"]["held_out"]
    assert result["data"]["examples"] == 60 and result["data"]["bins"]["1"] == pytest.approx(1 / 3)
    assert {*result["held_out"]} >= {"accuracy", "unsafe", "calibration", "histogram", "loss"}
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2 and "http" not in page.replace("http-equiv", "").replace(
        "http://www.w3.org", ""
    )
    assert "6 held-out pairs" in capsys.readouterr().out


def test_report_scores_are_the_saved_model_s(model_dir, data_file, tmp_path):
    """The report's loss is that of the model in OUT/model on rows that never trained."""
    out = tmp_path / "run"
    cfg = config(model_dir, data_file, out)
    reward.run(cfg)
    model = load_reward_model(out / "model")
    with stage.ranks("cpu") as world:
        pairs, held, _, _ = reward.prepare(reward.load_rows(cfg.data, "preference"), model, cfg)
        loss, scores = reward.score_held_out(model, held, cfg, world)
    assert loss == pytest.approx(report_of(out)["held_out"]["loss"], abs=1e-6)
    assert not {tuple(p.prompt) for p in held} & {tuple(p.prompt) for p in pairs}
    chosen, rejected = torch.tensor(scores).t().float().contiguous()
    safe = torch.tensor([p.safe for p in held], dtype=torch.int8).t().contiguous()
    assert loss == pytest.approx(float(ops.pair_loss(chosen, rejected, 0.0, *safe, 1.0)), abs=1e-5)


def start_of(monkeypatch, cfg) -> tuple:
    """(model, pairs, held-out pairs, settings) as training would begin with them."""
    seen = []

    def fit(model, pairs, valid, loss, count, settings, *rest):
        seen.append((model, pairs, valid, settings))
        raise RunError("seen enough")

    monkeypatch.setattr(reward, "fit", fit)
    with pytest.raises(RunError):
        reward.run(cfg)
    return seen[0]


def test_weights_at_step_0(model_dir, data_file, tmp_path, monkeypatch):
    """RM-4: the chat checkpoint's own weights, and a head of the seed."""
    model, *_ = start_of(monkeypatch, config(model_dir, data_file, tmp_path / "run", seed=5))
    expected = reward_model_from(load_model(model_dir), seed=5)
    assert same_trunk(model, expected) and torch.equal(model.score, expected.score)


@pytest.mark.parametrize("kind, safety, expected", [("safety", 27, (27, 3)), ("helpfulness", 42, (36, 36))])
def test_mix(kind, safety, expected, model_dir, tmp_path, monkeypatch):
    """RM-6 in what is trained on: safety 90/10, helpfulness 50/50; the log says what is left out."""
    helpful = [
        row | {"prompt": f"other {i}", "is_safety": False}
        for i, row in enumerate(make_rows(36, safety_bin=None))
    ]
    rows = [*make_rows(safety), *helpful, helpful[0] | {"split": "valid", "prompt": "held out"}]
    cfg = config(model_dir, write(tmp_path / "both.jsonl", rows), tmp_path / "run", kind=kind)
    _, pairs, _, _ = start_of(monkeypatch, cfg)
    own = sum(p.is_safety == (kind == "safety") for p in pairs)
    assert (own, len(pairs) - own) == expected
    assert "are left out, so that the mix for" in (tmp_path / "run" / "log.txt").read_text()


def test_margins_reach_the_loss(model_dir, data_file, tmp_path, monkeypatch):
    """RM-1 at the stage: its loss on a batch is the float64 formula with the ratings' margins and the bins."""
    cfg = config(model_dir, data_file, tmp_path / "run", margin="large", aux_weight=0.5)
    model, pairs, _, _ = start_of(monkeypatch, cfg)
    batch = pack(pairs)
    r = model.rewards(batch).detach().double().view(-1, 2)
    log_sigmoid = torch.nn.functional.logsigmoid
    expected = 0.0
    for (rc, rr), pair in zip(r, pairs, strict=True):
        margin = dict(zip(RATINGS, (3, 2, 1, 0, 0), strict=True))[pair.rating]
        s = {1: (1, 0), 2: (1, 1), 3: (0, 0)}[pair.safety_bin]
        aux = sum(log_sigmoid(x if label else -x) for x, label in zip((rc, rr), s, strict=True)) / -2
        expected += -log_sigmoid(rc - rr - margin) + 0.5 * aux
    loss = reward.pair_loss(0.5)(model, batch, 80).detach()
    assert float(loss) == pytest.approx(float(expected) / 80, abs=1e-5)


def test_no_pairs_give_a_loss_of_zero(model_dir):
    """A rank may have no micro-batch where another has one: 0, with gradients."""
    model = reward_model_from(load_model(model_dir))
    loss = reward.pair_loss(1.0)(model, pack([]), 4)
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_aux_weight_0_is_the_pure_ranking_run(model_dir, tmp_path):
    """RM-3: bit for bit, whether the rows have bins or not; with a weight the bins matter."""
    for name, changes in (("bins", {}), ("plain", {"safety_bin": None})):
        data = write(tmp_path / f"{name}.jsonl", make_rows(**changes))
        reward.run(config(model_dir, data, tmp_path / name, aux_weight=0.0))
    reward.run(config(model_dir, str(tmp_path / "bins.jsonl"), tmp_path / "aux", aux_weight=1.0))
    assert stable(metrics(tmp_path / "bins")) == stable(metrics(tmp_path / "plain"))
    assert model_bytes(tmp_path / "bins") == model_bytes(tmp_path / "plain")
    assert model_bytes(tmp_path / "bins") != model_bytes(tmp_path / "aux")


def test_each_pair_once_warm_up_and_last_rate(model_dir, data_file, tmp_path, monkeypatch):
    """RM-7: one epoch; 5 steps of warm-up in a short run; the last rate is a tenth of the peak within 1e-9."""
    seen, real = [], loop.train_step

    def spy(model, groups, *rest):
        seen.extend(groups)
        return real(model, groups, *rest)

    monkeypatch.setattr(loop, "train_step", spy)
    reward.run(config(model_dir, data_file, tmp_path / "run", batch=5))
    assert len(seen) == len({id(p) for p in seen}) == 54
    assert all(isinstance(p, Pair) and len(p.responses) == 2 for p in seen), "RM-8: a group is a pair"
    rates = [r["lr"] for r in metrics(tmp_path / "run")]
    assert rates[:5] == pytest.approx([1e-3 * (t + 1) / 5 for t in range(5)], abs=1e-12)
    assert len(rates) == 11 and abs(rates[-1] - 1e-4) < 1e-9
    assert "rank 0: 5 groups" in (tmp_path / "run" / "log.txt").read_text(), "RM-8: the batch counts pairs"


@pytest.mark.parametrize("steps, expected", [(1, 5), (100, 5), (166, 5), (167, 6), (1000, 30), (1001, 31)])
def test_warm_up_steps(steps, expected):
    """RM-7: max(5, ceil(0.03 x steps))."""
    assert reward.warmup_steps(steps) == expected


def test_accumulation_equals_one_big_batch(model_dir, data_file, tmp_path):
    """RM-8: micro-batches of one or two pairs against the whole step at once."""
    for budget in (40, 10_000):
        reward.run(config(model_dir, data_file, tmp_path / str(budget), tokens_per_batch=budget, steps=6))
    small, large = metrics(tmp_path / "40"), metrics(tmp_path / "10000")
    for a, b in zip(small, large, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["tokens"] == b["tokens"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_auxiliary_loss_and_unsafe_recall(model_dir, data_file, tmp_path):
    """RM-10, a trend: on separable toy pairs the auxiliary loss does not lower unsafe recall at 0.5."""
    recall = {}
    for weight in (0.0, 1.0):
        rows = make_rows(150)
        data = write(tmp_path / "toy.jsonl", rows)
        out = tmp_path / f"aux-{weight}"
        reward.run(config(model_dir, data, out, aux_weight=weight, lr=3e-3))
        recall[weight] = report_of(out)["held_out"]["unsafe"]["recall_below_0.5"]
    print(f"unsafe recall at 0.5: {recall[0.0]} without, {recall[1.0]} with the auxiliary loss")
    assert recall[0.0]["total"] == recall[1.0]["total"] > 5
    assert recall[1.0]["value"] >= recall[0.0]["value"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_head_only(precision, model_dir, data_file, tmp_path, monkeypatch):
    """The trunk stays the chat model's to the bit, so that one pass scores two heads; backward ends above it."""
    real, optimizers = loop.AdamW, []
    monkeypatch.setattr(loop, "AdamW", lambda *args: optimizers.append(real(*args)) or optimizers[-1])
    for name, kind in (("a", "safety"), ("b", "helpfulness")):
        reward.run(
            config(
                model_dir, data_file, tmp_path / name, kind=kind, head_only=True, precision=precision, lr=1e-2
            )
        )
    a, b = (load_reward_model(tmp_path / name / "model") for name in "ab")
    chat = reward_model_from(load_model(model_dir))
    assert same_trunk(a, chat) and same_trunk(a, b)
    assert not torch.equal(a.score, b.score) and not torch.equal(a.score, chat.score)
    assert all(optimizer.names == ["score"] for optimizer in optimizers)
    reward.freeze_trunk(chat)
    pairs = reward.prepare(
        reward.load_rows((data_file,), "preference"), chat, config(model_dir, data_file, tmp_path)
    )[0]
    batch = pack(pairs[:3])
    assert not chat(batch, batch.last_rows).requires_grad and chat.rewards(batch).requires_grad


def test_optimiser_leaves_frozen_parameters_alone():
    model = reward_model_from(tiny_model())
    reward.freeze_trunk(model)
    optimizer = AdamW(model, torch.bfloat16)
    assert optimizer.names == ["score"] and all(
        name.endswith((".score", "step")) for name in optimizer.state()
    )
    assert all(p.dtype == torch.bfloat16 for p in model.parameters()), "they compute in the run's dtype"


def test_early_stopping_in_more_than_one_pass(model_dir, data_file, tmp_path):
    """A single pass is spared the held-out loss; several are watched, as in sft."""
    reward.run(config(model_dir, data_file, tmp_path / "one"))
    assert not any("valid_loss" in r for r in metrics(tmp_path / "one"))
    reward.run(config(model_dir, data_file, tmp_path / "many", epochs=3))
    values = [r["valid_loss"] for r in metrics(tmp_path / "many") if "valid_loss" in r]
    assert values and report_of(tmp_path / "many")["held_out"]["loss"] == pytest.approx(min(values), rel=1e-5)


def test_counts_of_what_is_left_out(model_dir, tmp_path):
    """PREF-1 and equal responses: excluded and counted; rows without rating or bin are counted."""
    rows = make_rows(30)
    rows[0] |= {"rejected": rows[0]["chosen"]}
    rows[1] |= {"safety_bin": None, "chosen_safe": False, "rejected_safe": True}
    rows[2] |= {"gen_a": {"model": "m"}, "gen_b": {"model": "m"}}
    rows[3] |= {"chosen": "a" * 120}
    out = tmp_path / "run"
    reward.run(config(model_dir, write(tmp_path / "rows.jsonl", rows), out, max_length=100))
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert counts["excluded: equal responses"] == counts["excluded: chosen unsafe, rejected safe"] == 1
    assert counts["excluded: gen_a equals gen_b"] == 1 and counts["without rating"] == 6
    assert counts["dropped_too_long"] + counts["valid_dropped_too_long"] == 1
    assert counts["groups"] == 30 - 3 - 1 - counts["held_out"] + counts["valid_dropped_too_long"]


@pytest.mark.parametrize(
    "changes, limits, message",
    [
        ({"rating": "much better"}, {}, 'pairs.jsonl:1: field "rating" must be one of significantly'),
        ({"rejected": "x", "chosen": "x"}, {}, "chosen and rejected are the same text"),
        ({"safety_bin": None, "chosen_safe": False, "rejected_safe": True}, {}, "60 excluded: chosen unsafe"),
        ({"split": "valid"}, {}, "every row is held out by its split"),
        ({}, {"max_length": 9}, "longer than 9 tokens"),
    ],
)  # fmt: skip
def test_bad_data(changes, limits, message, model_dir, tmp_path):
    """One line, and nothing written."""
    data = write(tmp_path / "pairs.jsonl", make_rows(**changes))
    with pytest.raises(InputError, match=message):
        reward.run(config(model_dir, data, tmp_path / "run", **limits))
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_serve(model_dir, data_file, tmp_path, capsys):
    """Exit code 2 for a model without tokenizer or chat template, and for a reward model."""
    save_model(tiny_model(), str(tmp_path / "bare"))
    save_model(tiny_model(), str(tmp_path / "plain"))
    write_tokenizer(tmp_path / "plain")
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    reward.run(config(model_dir, data_file, tmp_path / "rm", steps=1))
    capsys.readouterr()
    cases = {"bare": "no tokenizer", "plain": "no chat template", "rm/model": "is a reward model"}
    for name, message in cases.items():
        words = ["--model", str(tmp_path / name), "--data", data_file, "--out", str(tmp_path / "x"), "--kind"]
        assert cli.main(["reward", *words, "safety"]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_flags(capsys, tmp_path):
    """Defaults of the kind; choices that may be left out, on the command line and in a TOML file."""
    needed = ["--model", "m", "--data", "d", "--out", "o", "--kind"]
    parse = lambda *args: flags.parse(RewardConfig, "hpsafety reward", "", [*needed, *args])  # noqa: E731
    helpful = parse("helpfulness")
    assert (helpful.margin, helpful.aux_weight, helpful.batch, helpful.epochs) == ("small", 0.0, 512, 1)
    assert (parse("safety").margin, parse("safety").aux_weight) == ("none", 1.0)
    (tmp_path / "run.toml").write_text('margin = "large"\naux-weight = 0.0\n')
    given = parse("safety", "--config", str(tmp_path / "run.toml"))
    assert (given.margin, given.aux_weight) == ("large", 0.0)
    for words, message in (
        (["safety", "--aux-weight", "nan"], "--aux-weight"), (["polite"], "--kind"),
        (["safety", "--margin", "huge"], "--margin"),
    ):  # fmt: skip
        assert cli.main(["reward", *needed, *words]) == 2
        assert message in capsys.readouterr().err


def test_what_the_data_keeps_a_run_from_is_said(model_dir, tmp_path, capsys):
    """Nothing to mix, no bins, no ratings, nothing held out, nothing but warm-up: each in a line, none an error."""
    rows = [{"prompt": f"p {i}", "chosen": "yes", "rejected": "no", "is_safety": False} for i in range(8)]
    data = write(tmp_path / "rows.jsonl", rows)
    reward.run(config(model_dir, data, tmp_path / "run", margin="small", batch=512))
    said = capsys.readouterr().err
    for words in (
        "all pairs are helpfulness data", "no pair has a safety bin", "no pair has a rating", "nothing is held out",
        "all of the 1 optimiser steps are warm-up",
    ):  # fmt: skip
        assert words in said
    result = report_of(tmp_path / "run")["held_out"]
    assert result["pairs"] == 0 and result["loss"] is None


def test_nan_scores_name_the_pair(model_dir, data_file, tmp_path):
    cfg = config(model_dir, data_file, tmp_path / "run")
    model = reward_model_from(load_model(model_dir))
    with stage.ranks("cpu") as world:
        _, held, _, _ = reward.prepare(reward.load_rows(cfg.data, "preference"), model, cfg)
        with torch.no_grad():
            model.score[0, 0] = math.nan
        with pytest.raises(RunError, match=f"held-out pair {held[0].name} are"):
            reward.score_held_out(model, held, cfg, world)
