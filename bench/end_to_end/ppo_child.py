"""What ppo.py asks of a process of its own: python -m bench.end_to_end.ppo_child TASK SETTINGS.json ... RESULT.json.

prepare SETTINGS                    writes the file of what the update is given
gradients SETTINGS CONTENDER FILE   writes the gradients of every parameter
judge SETTINGS RUN.json             hpsafety's scores and logprobs of what a contender sampled
python SETTINGS                     the share of hpsafety's iteration that is spent in Python
"""

import importlib
import json
import sys
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.end_to_end import ppo_hpsafety
from bench.end_to_end.common import Settings, make_groups, read_settings, write_json
from bench.end_to_end.ppo_data import PHASES, minibatches, num_sampled, prompt_groups, save_rows
from bench.end_to_end.worker import VARIANTS
from hpsafety.model.heads import value_model_from
from hpsafety.model.io import load_model
from hpsafety.model.reward_io import load_reward_model
from hpsafety.profile import account
from hpsafety.rollout.scoring import Scorer
from hpsafety.train import phases


def prepare(settings: Settings) -> dict:
    """Writes settings.experience, in fp32 whatever the precision of the benchmark."""
    groups = make_groups(settings)
    policy = load_model(settings.model)
    critic = value_model_from(load_reward_model(settings.reward_models[0]))
    taken = ppo_hpsafety.taker(settings, policy, groups)
    (logprobs,) = taken(lambda batch: (policy.logprobs(batch),))
    (values,) = taken(lambda batch: (critic.values(batch),))
    save_rows(settings, logprobs, values)
    return {"sampled_tokens": num_sampled(groups)}


def gradients(settings: Settings, contender: str, path: str) -> dict:
    """Writes a contender's gradients of one minibatch to `path`; its loss."""
    if len(minibatches(settings)) != 2:
        raise ValueError("gradients are taken of one minibatch: batch must be groups")
    module = importlib.import_module(f"bench.end_to_end.ppo_{contender.partition('-')[0]}")
    loss, named = module.gradients(settings, **VARIANTS.get(contender, {}))
    save_file({key: grad.contiguous() for key, grad in named.items()}, path)
    return {"loss": loss}


@torch.no_grad()
def judge(settings: Settings, run_path: str) -> dict:
    """values: what ppo_hpsafety.judged returns, for the samples of a run by whatever contender."""
    samples = iter(json.loads(Path(run_path).read_text(encoding="utf-8"))["samples"])
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    scorer = Scorer(*(load_reward_model(path, dtype) for path in settings.reward_models))
    end, groups = scorer.tokenizer.end_of_turn_id, []
    for prompt, _ in make_groups(settings):
        groups.append((prompt, [next(samples) for _ in range(settings.k)]))
    ended = prompt_groups([(prompt, [[*r, end] for r in responses]) for prompt, responses in groups])
    scores = scorer.score(ended, [False] * len(ended), settings.tokens_per_batch)
    policy = load_model(settings.model, dtype)
    (logprobs,) = ppo_hpsafety.taker(settings, policy, groups)(lambda batch: (policy.logprobs(batch),))
    lengths = [len(response) for _, responses in groups for response in responses]
    sums = [float(row.double().sum()) for row in logprobs.split(lengths)]
    return {"values": [z for s in scores for z in s.safety] + [z for s in scores for z in s.helpful] + sums}


class _Marks:
    """Marks an iteration's phases in a trace, the outer ones only."""

    @contextmanager
    def phase(self, name: str):
        if name not in PHASES:
            yield
            return
        with torch.profiler.record_function(account.PHASE + name):
            yield

    def work(self, *_) -> None:
        pass


def python_share(settings: Settings) -> dict:
    """Phase -> the share of its time in no op: Python between ops and Python in autograd, as `hpsafety profile` counts.

    Recording an event costs more than most Python between two of them, so that shares are upper bounds.
    """
    r = ppo_hpsafety.prepared(settings, "rloo", settings.lr)
    prompts = [prompt for prompt, _ in make_groups(settings)]
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as profiler, phases.recorded_by(_Marks()):
        with torch.profiler.record_function(account.STEP):
            ppo_hpsafety.iterate(r, prompts, settings.response_tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        found = account.read(path)
    time, python = defaultdict(float), defaultdict(float)
    for row in found["host"]:
        for name in (row["phase"], "all"):
            time[name] += row["us"]
            python[name] += row["us"] if row["kind"] in (account.PYTHON, account.AUTOGRAD) else 0.0
    return {name: python[name] / time[name] for name in (*PHASES, "all")}


TASKS = {"prepare": prepare, "gradients": gradients, "judge": judge, "python": python_share}


def main(task: str, settings_path: str, *arguments: str) -> None:
    *words, result_path = arguments
    settings = read_settings(settings_path)
    torch.set_num_threads(settings.threads)
    write_json(result_path, TASKS[task](settings, *words))


if __name__ == "__main__":
    main(*sys.argv[1:])
