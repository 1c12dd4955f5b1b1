"""bench/end_to_end/ppo.py: no time counts unless the padded update computes hpsafety's loss and gradients.

The bugs this file must catch: padding taken for tokens, another denominator or clip range, a check that passes on
gradients that differ.
"""

import functools
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.end_to_end import ppo, ppo_agree, ppo_data
from bench.end_to_end.common import Settings, count_tokens, make_groups
from hpsafety.model.heads import reward_model_from
from hpsafety.model.io import load_model, save_model
from hpsafety.model.reward_io import save_reward_model
from tests.stages.conftest import write_tokenizer
from tests.tiny import tiny_model

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    save_model(tiny_model(seed=6, max_positions=256), str(folder / "m"))
    write_tokenizer(folder / "m")
    for seed in (3, 4):
        save_reward_model(reward_model_from(load_model(str(folder / "m")), seed), folder / f"rm{seed}")
    return Settings(
        model=str(folder / "m"), work="ppo", part="update", groups=4, k=2, batch=2, prompt_tokens=20,
        response_tokens=8, spread=0.25, equal_responses=True, reward_models=(str(folder / "rm3"), str(folder / "rm4")),
        experience=str(folder / "experience"), tokens_per_batch=128, peer_tokens_per_batch=128, threads=1,
    )  # fmt: skip


def call(module, task, settings_path, *words, threads, change=None):
    """alternate.child without a process; change(gradients) is what a bug does to the peer's."""
    from bench.end_to_end import ppo_child
    from bench.end_to_end.common import read_settings

    found = ppo_child.TASKS[task](read_settings(settings_path), *words)
    if change and task == "gradients" and words[0] != "hpsafety":
        named = {name: grad.clone() for name, grad in load_file(words[1]).items()}
        change(named)
        save_file(named, words[1])
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_padded_update_has_our_gradients(settings, tmp_path, precision):
    low = replace(settings, precision=precision)
    found = ppo.agree_on_gradients(low, ["transformers", "transformers-rows"], tmp_path, call)
    assert len(found) == (2 if precision == "fp32" else 4)
    assert 0 < found["transformers, fp32"]["largest_distance"] < 1e-5  # tiny: rounding alone


@pytest.mark.parametrize(
    "wrong",
    [
        lambda g: g["critic.model.layers.1.mlp.down_proj.weight"].mul_(1.001),
        lambda g: g["policy.model.layers.0.self_attn.k_proj.weight"][0].mul_(1.01),
        lambda g: g.pop("policy.model.norm.weight"),
        lambda g: g["critic.value"].fill_(float("nan")),
    ],
)
def test_gradients_that_differ_stop_the_benchmark(settings, tmp_path, wrong):
    with pytest.raises(SystemExit, match="this is not the same work"):
        ppo.agree_on_gradients(settings, ["transformers"], tmp_path, functools.partial(call, change=wrong))


@pytest.mark.parametrize("name, value", [("CLIP_RATIO", 0.1), ("VALUE_CLIP", 0.1), ("VALUE_COEF", 1.0)])
def test_another_loss_stops_the_benchmark(settings, tmp_path, monkeypatch, name, value):
    """The noise of the experience reaches both sides of the clip ranges, else these would go unseen."""
    from bench.end_to_end import ppo_transformers

    monkeypatch.setattr(ppo_transformers, name, value)
    with pytest.raises(SystemExit, match="this is not the same work"):
        ppo.agree_on_gradients(settings, ["transformers"], tmp_path, call)


def test_bf16_gradients_beyond_rounding_stop_the_benchmark(tmp_path):
    g = torch.Generator().manual_seed(0)
    exact = {"policy.a": torch.randn(64, 64, generator=g)}
    noise = torch.randn(64, 64, generator=g)
    for name, far in (("exact", 0.0), ("peer", 0.01), ("near", 0.03), ("far", 0.05)):
        save_file({"policy.a": exact["policy.a"] + far * noise}, tmp_path / name)
    others = (tmp_path / "peer", tmp_path / "exact")
    assert ppo_agree.gradients_bf16(tmp_path / "near", *others)["policy"]["hpsafety"] < 0.04
    with pytest.raises(SystemExit, match="5.*times that is rounding"):
        ppo_agree.gradients_bf16(tmp_path / "far", *others)


def test_both_do_the_same_updates_and_logprobs(settings):
    from bench.end_to_end import ppo_child, ppo_hpsafety, ppo_transformers

    ppo_child.prepare(settings)
    ours, theirs = (m.run(settings) for m in (ppo_hpsafety, ppo_transformers))
    assert (
        len(ours.values) == 2
    )  # optimiser steps; the second loss also needs the same AdamW update before it
    assert theirs.values == pytest.approx(ours.values, abs=1e-5)
    settings = replace(settings, part="logprobs")
    ours, theirs = (m.run(settings) for m in (ppo_hpsafety, ppo_transformers))
    assert len(ours.values) == 3 * 4 * 2 * 8
    runs = [{"contender": n, "values": r.values} for n, r in (("transformers", theirs), ("hpsafety", ours))]
    ppo.check_values(runs, settings)
    assert runs[0]["difference"] < 1e-4
    runs[0]["values"][5] += 1e-3
    with pytest.raises(SystemExit, match="logprobs of transformers and hpsafety differ"):
        ppo.check_values(runs, settings)


@pytest.mark.parametrize("advantages", ["rloo", "gae"])
def test_what_was_sampled_is_judged_anew(settings, tmp_path, monkeypatch, advantages):
    """A contender that reads its own samples wrongly is found, whatever it sampled."""
    from bench.end_to_end import ppo_hpsafety

    monkeypatch.setattr(ppo, "child", call)
    settings = replace(settings, part="iteration")
    run = asdict(ppo_hpsafety.run(settings, advantages)) | {"contender": "hpsafety"}
    assert set(run["phases"]) == set(ppo_data.PHASES) and sum(run["phases"].values()) <= run["seconds"]
    good = [dict(run)]
    ppo.check_iteration(good, settings, tmp_path)
    assert good[0]["difference"] < 1e-4
    for place, what in ((0, "score"), (-1, "sum of logprobs")):
        values = list(run["values"])
        values[place] += 0.01
        with pytest.raises(SystemExit, match=f"{what} of hpsafety"):
            ppo.check_iteration([run | {"values": values}], settings, tmp_path)


def test_equal_work_is_counted(settings):
    groups = make_groups(settings)
    assert {len(response) for _, responses in groups for response in responses} == {8}
    assert count_tokens(groups) == sum(2 * (len(prompt) + 8) for prompt, _ in groups)
    with_critic, without = (ppo_data.needed_flops(settings, critic) for critic in (True, False))
    assert with_critic["update"] - without["update"] == pytest.approx(1.5 * with_critic["score"])
    assert without["update"] == pytest.approx(3 * without["rollout"])
    run = {"contender": "trl", "samples": [[1] * 8] * 7 + [[1] * 7]}
    with pytest.raises(SystemExit, match="trl did not sample 8 responses of 8 tokens"):
        ppo_agree.lengths(run, 8, 8)


@pytest.mark.parametrize(
    "words",
    [["--batch", "3"], ["--k", "1"], ["--new-tokens", "2"], ["--contenders", "trl"], ["--prompts", "0"]],
)
def test_bad_values(words, capsys):
    with pytest.raises(SystemExit) as stop:
        ppo.parse(words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err
