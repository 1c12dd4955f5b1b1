"""DPO end to end on a tiny model. The bug this file must catch: a reference taken by other calls than those that train,
or of a model that has already moved, so that the first loss is not log 2."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from hpsafety import cli
from hpsafety.config import DPOConfig
from hpsafety.data.groups import PromptGroup, pack
from hpsafety.data.preferences import Pair
from hpsafety.errors import InputError, RunError
from hpsafety.model.io import load_model
from hpsafety.stages import dpo
from hpsafety.train import distributed, loop
from hpsafety.train.pairs import prepare_pairs
from hpsafety.train.rundir import tree_hashes
from tests.stages.test_reward import make_rows, write
from tests.stages.test_sft import metrics, model_bytes, stable
from tests.tiny import tiny_model

WORLD = distributed.World(0, 1, torch.device("cpu"))
FIGURES = ("accuracy", "margin", "reward_chosen", "reward_rejected")


@pytest.fixture
def data_file(tmp_path) -> str:
    return write(tmp_path / "pairs.jsonl", make_rows(40))


def config(model_dir, data_file, out, **changes) -> DPOConfig:
    values = {
        "model": model_dir, "data": (data_file,), "out": str(out), "batch": 9, "lr": 1e-3, "checkpoint_every": 3,
        "device": "cpu", "precision": "fp32", "tokens_per_batch": 256,
    }  # fmt: skip
    return DPOConfig(**(values | changes))


def report_of(out) -> dict:
    return json.loads((Path(out) / "report.json").read_text())


def test_run_directory(model_dir, data_file, tmp_path, monkeypatch, capsys):
    """Design section 8, and issue 6: both sides share the prompt, one group a pair; the start is left alone."""
    before, widths, real = tree_hashes(Path(model_dir)), [], loop.train_step

    def spy(model, groups, *rest):
        widths.extend(len(group.responses) for group in groups)
        return real(model, groups, *rest)

    monkeypatch.setattr(loop, "train_step", spy)
    out = tmp_path / "run"
    dpo.run(config(model_dir, data_file, out, epochs=3))
    rows = metrics(out)
    assert (
        [row["step"] for row in rows] == list(range(1, 13)) and set(widths) == {2} and len(widths) == 3 * 36
    )
    fields = "loss lr grad_norm tokens tokens_equiv tokens_per_s elapsed_s peak_rss_mb"
    assert all({*fields.split(), *FIGURES} <= row.keys() for row in rows)
    # At the start every implicit reward is exactly 0: the loss is log 2 to fp32's rounding, and nobody is ahead.
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert [rows[0][name] for name in FIGURES] == [0.0] * 4
    assert rows[-1]["loss"] < 0.6 and rows[-1]["accuracy"] > 0.9
    assert all(
        r["margin"] == pytest.approx(r["reward_chosen"] - r["reward_rejected"], abs=1e-6) for r in rows
    )
    assert rows[0]["lr"] == pytest.approx(1e-3 / 2) and rows[1]["lr"] == 1e-3  # 10 % of 12 steps, rounded up
    assert rows[0]["tokens"] < rows[0]["tokens_equiv"]
    held = report_of(out)["held_out"]
    assert held["pairs"] == 4 and held["accuracy"]["all"]["total"] == 4
    assert held["loss"] == pytest.approx(min(r["valid_loss"] for r in rows if "valid_loss" in r), rel=1e-5)
    assert held["margin"] == pytest.approx(held["reward_chosen"] - held["reward_rejected"], abs=1e-6)
    assert report_of(out)["beta"] == 0.1 and report_of(out)["data"]["examples"] == 40
    assert "of the held-out pairs, " in capsys.readouterr().err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["stage"] == "dpo" and manifest["ended"] and manifest["counts"]["held_out"] == 4
    assert set(manifest["output_hashes"]) == {f"model/{name}" for name in model_bytes(out)}
    assert not [*out.glob("checkpoints/*.safetensors"), *out.glob("checkpoints/*/optimizer")]
    assert tree_hashes(Path(model_dir)) == before
    trained, start = load_model(str(out / "model")), load_model(model_dir)
    assert not torch.equal(trained.embed, start.embed) and trained.tokenizer.chat_template


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_loss_is_log_2(precision, model_dir, data_file, tmp_path):
    """The reference comes of the same ops in the same precision, from micro-batches other than those of the step."""
    dpo.run(
        config(model_dir, data_file, tmp_path / "run", precision=precision, steps=1, tokens_per_batch=150)
    )
    (row,) = metrics(tmp_path / "run")
    assert (
        row["loss"] == pytest.approx(math.log(2), abs=1e-7) and row["margin"] == 0.0 and row["grad_norm"] > 0
    )


def plain_loss(model, pairs, beta):
    """The formula, one whole sequence at a time, nothing packed or shared; fp64: (loss, share right, mean margin)."""
    terms, margins = [], []
    for pair in pairs:
        sums = []
        for response in pair.responses:
            alone = pack([PromptGroup([pair.prompt[0]], [[*pair.prompt[1:], *response]])])
            logits = (model(alone) @ model.head_weight.t())[alone.predict_rows]
            logprobs = logits.log_softmax(-1).gather(1, alone.targets[:, None])[:, 0]
            sums.append(logprobs[len(pair.prompt) - 1 :].sum())
        margin = beta * ((sums[0] - pair.reference[0]) - (sums[1] - pair.reference[1]))
        margins.append(float(margin.detach()))
        terms.append(-torch.nn.functional.logsigmoid(margin))
    return torch.stack(terms).mean(), sum(m > 0 for m in margins) / len(pairs), sum(margins) / len(pairs)


@pytest.mark.parametrize("budget", [1, 10_000])
def test_loss_and_gradient_are_the_plain_formula(budget, model_dir, data_file, monkeypatch):
    """Against fp64 on sequences of their own, with references that differ from the policy, for any micro-batches."""
    cfg = config(model_dir, data_file, "unused")
    model = load_model(model_dir)
    pairs = prepare_pairs(dpo.load_rows(cfg.data, "preference"), model, cfg)[0][:5]
    start = tiny_model(seed=9)
    rows = dpo.measure_pairs(
        start, pairs, lambda batch: dpo.response_logprobs(start, batch), 64, WORLD, "", ""
    )
    pairs = [dataclasses.replace(p, reference=tuple(r)) for p, r in zip(pairs, rows.tolist(), strict=True)]
    twin = copy.deepcopy(model).double()
    with monkeypatch.context() as patch:
        patch.setenv("HPSAFETY_IMPL", "reference")  # which takes fp64
        expected, right, margin = plain_loss(twin, pairs, 0.3)
        expected.backward()
    got = loop.train_step(
        model, pairs, dpo.dpo_loss(0.3), len(pairs), loop.AdamW(model), 1e-30, budget, WORLD
    )
    assert got.loss == pytest.approx(float(expected.detach()), abs=1e-5)
    assert got.figures["accuracy"] == pytest.approx(right, abs=1e-12) and 0 < right < 1
    assert got.figures["margin"] == pytest.approx(margin, abs=1e-4)
    for p, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad.double(), wanted.grad, atol=1e-5, rtol=1e-4)


def test_no_pairs_give_a_loss_of_zero(model_dir):
    """A rank may have no micro-batch where another has one: 0, with gradients and figures of the same names."""
    loss, figures = dpo.dpo_loss(0.1)(load_model(model_dir), pack([]), 4)
    loss.backward()
    assert float(loss.detach()) == 0.0 and {name: float(x) for name, x in figures.items()} == dict.fromkeys(
        FIGURES, 0
    )


def test_interrupted_run_goes_on_to_the_same_bytes(model_dir, data_file, tmp_path, monkeypatch):
    """The start is measured once: a resumed run reads what it gave, and ends as the uninterrupted one."""
    whole = config(model_dir, data_file, tmp_path / "whole", epochs=2)
    dpo.run(whole)
    cut = dataclasses.replace(whole, out=str(tmp_path / "cut"))
    real, calls, measured = loop.train_step, [], []

    def step(*args):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            dpo.run(cut)
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "reference_logprobs", lambda *args: measured.append(1))
        dpo.run(cut)
    assert not measured and "resumed from step 3" in (tmp_path / "cut" / "log.txt").read_text()
    assert model_bytes(tmp_path / "cut") == model_bytes(tmp_path / "whole")
    assert stable(metrics(tmp_path / "cut")) == stable(metrics(tmp_path / "whole"))
    assert report_of(tmp_path / "cut") == report_of(tmp_path / "whole")


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_optimum_is_the_pairs_log_odds(beta):
    """Where three of four prefer one answer, the loss is least at an implicit margin of log 3: the policy moves by
    log 3 / beta nats, the less the larger beta is."""
    model, a, b = tiny_model(seed=2), [5, 9, 7, 1], [8, 8, 3, 1]
    known = dict(margin=0.0, safe=(-1, -1), rating=None, safety_bin=None, is_safety=False, name="p")
    start = dpo.response_logprobs(model, pack([PromptGroup([1, 2], [a, b])])).tolist()
    pairs = [Pair([1, 2], [a, b], reference=tuple(start), **known) for _ in range(3)]
    pairs.append(Pair([1, 2], [b, a], reference=tuple(start[::-1]), **known))
    optimizer = loop.AdamW(model, weight_decay=0.0)
    for t in range(60):
        got = loop.train_step(model, pairs, dpo.dpo_loss(beta), 4, optimizer, 3e-3 * 0.93**t, 64, WORLD)
    odds = math.log(3)
    assert got.loss == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), abs=1e-3)
    assert got.figures["margin"] == pytest.approx(0.5 * odds, abs=0.03) and got.figures["accuracy"] == 0.75
    ended = dpo.response_logprobs(model, pack([PromptGroup([1, 2], [a, b])])).detach()
    moved = ended - torch.tensor(start, dtype=torch.float64)
    assert float(moved[0] - moved[1]) == pytest.approx(odds / beta, abs=0.06 / beta)


def test_bad_input(model_dir, data_file, tmp_path, capsys):
    """One line, exit code 2, and nothing written."""
    for changes, message in (
        ({"beta": 0.0}, "--beta must be a number greater than 0, got 0.0"),
        ({"beta": math.nan}, "--beta must be a number greater than 0, got nan"),
        ({"max_length": 9}, "longer than 9 tokens"),
        (
            {"data": (write(tmp_path / "same.jsonl", make_rows(rejected="x", chosen="x")),)},
            "are the same text",
        ),
        ({"data": (write(tmp_path / "held.jsonl", make_rows(split="valid")),)}, "held out by its split"),
        (
            {"data": (write(tmp_path / "bad.jsonl", [{"prompt": "p", "chosen": "c"}]),)},
            'jsonl:1: field "rejected"',
        ),
    ):
        with pytest.raises(InputError, match=message):
            dpo.run(config(model_dir, data_file, tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()
    words = ["dpo", "--model", model_dir, "--data", data_file, "--out", str(tmp_path / "run"), "--beta", "-1"]
    assert cli.main(words) == 2 and "--beta must be" in capsys.readouterr().err


def test_a_start_that_gives_no_numbers_is_named(model_dir, data_file, tmp_path, monkeypatch):
    real = dpo.response_logprobs
    monkeypatch.setattr(dpo, "response_logprobs", lambda *args: real(*args) * math.nan)
    with pytest.raises(RunError, match="the start gives pair row-.* the logprobs .nan, nan"):
        dpo.run(config(model_dir, data_file, tmp_path / "run"))


@pytest.mark.slow
def test_two_ranks_give_the_same_losses_and_report(model_dir, data_file, tmp_path):
    """torchrun with 2 gloo ranks: losses and figures within 1e-4, the first exactly the start's."""
    from tests.stages.test_ppo_processes import finish, start

    code = "from hpsafety.config import DPOConfig as C\nfrom hpsafety.stages.dpo import run"
    one = config(model_dir, data_file, tmp_path / "one", epochs=2, lr=1e-4)
    two = dataclasses.replace(one, out=str(tmp_path / "two"))
    dpo.run(one)
    script = (
        f"{code}\nimport json, sys\nv = json.loads(sys.argv[1])\nrun(C(**v | {{'data': tuple(v['data'])}}))"
    )
    finish(start(two, ranks=2, script=script))
    alone, ranks = metrics(one.out), metrics(two.out)
    for name in ("loss", "valid_loss", *FIGURES):
        got, wanted = ([row[name] for row in rows if name in row] for rows in (ranks, alone))
        assert got and got == pytest.approx(wanted, abs=1e-4), name
    assert [row["tokens"] for row in ranks] == [row["tokens"] for row in alone]
    assert ranks[0]["margin"] == 0.0
    assert "rank 1: " in (tmp_path / "two" / "log.txt").read_text()
    assert report_of(two.out)["held_out"]["margin"] == pytest.approx(
        report_of(one.out)["held_out"]["margin"], abs=1e-4
    )
