"""Direct preference optimisation (Rafailov et al. 2023): a policy from preference pairs, without a reward model.

Loss of a pair: -log sigmoid(beta ((logp_c - ref_c) - (logp_r - ref_r))), of the summed logprobs of the chosen and the
rejected response. beta (logp - ref) is a response's implicit reward, in nats. The frozen start's logprobs are taken
once, before the first step, by the ops that train; then it leaves memory.
"""

import dataclasses
import json
import math

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from hpsafety import ops
from hpsafety.data.sources import load_rows
from hpsafety.errors import file_error
from hpsafety.files import atomic_write
from hpsafety.model.io import load_model
from hpsafety.safety.reward_report import accuracy, rate_of
from hpsafety.train import distributed, precision, stage
from hpsafety.train.finetune import train
from hpsafety.train.metrics import say
from hpsafety.train.pairs import measure_pairs, plan, prepare_pairs


def run(cfg) -> None:
    """hpsafety dpo: see DPOConfig. Writes the run directory of design.md section 8 to cfg.out, and beside the model
    report.json: the implicit rewards of held-out pairs."""
    with stage.ranks(cfg.device) as world:
        _run(cfg, world)


def _run(cfg, world) -> None:
    records = load_rows(cfg.data, "preference")
    out = stage.run_directory(cfg, "dpo", cfg.data, world)
    if out is None:
        return
    dtype, why = precision.choose(cfg.precision, world.device)
    torch.manual_seed(cfg.seed)
    model = load_model(cfg.model)  # fp32: the masters of a bf16 run
    pairs, held, counts, found = prepare_pairs(records, model, cfg)
    stage.begin(out, f"dpo: {len(pairs)} pairs, beta {cfg.beta:g}; {why}", counts, world)
    if world.is_main and not held:
        say("dpo: nothing is held out (too few rows, none with split valid); the report stays empty")
    pairs, held = with_reference(pairs, held, cfg, dtype, out, world)
    total, one_pass = plan(len(pairs), cfg)
    warmup = math.ceil(0.1 * total) if cfg.warmup is None else cfg.warmup
    watched = held if total > one_pass else []  # one pass cannot stop early, so it is spared the measurement
    settings = dataclasses.replace(cfg, warmup=warmup)
    done = train(model, pairs, watched, dpo_loss(cfg.beta), len, settings, dtype, out, world, "dpo")
    report(model, held, found, cfg, out, world)
    out.finish(counts | done)
    if world.is_main:
        say(f"dpo: wrote {out.path / 'model'}")
    distributed.barrier(world)


# ---- the loss ----


def response_logprobs(model, batch) -> torch.Tensor:
    """(R,) fp64: the summed logprob of each response; on a CPU its tokens are added in order, so that its bits depend
    on no other response."""
    logprobs, lengths = model.logprobs(batch), batch.cu_responses.diff()
    of_token = torch.repeat_interleave(lengths)  # (N,) the response of each token
    return torch.zeros(len(lengths), dtype=torch.float64, device=logprobs.device).index_add(
        0, of_token, logprobs.double()
    )


def implicit_rewards(logprobs: torch.Tensor, pairs, beta: float) -> torch.Tensor:
    """(P, 2) fp32: beta (logp - ref) of chosen and rejected. logprobs: (2P,) fp64, in the pairs' order."""
    reference = torch.tensor([pair.reference for pair in pairs], dtype=torch.float64, device=logprobs.device)
    return (beta * (logprobs.view(len(pairs), 2) - reference.view(len(pairs), 2))).float()


def dpo_loss(beta: float):
    """The loss of a micro-batch of Pairs (train.step.train_step); its denominator counts pairs. Its figures: the means
    of the implicit rewards, of their margin, and the share of pairs whose chosen response has the larger one."""

    def loss(model, batch, num_pairs):
        chosen, rejected = (
            implicit_rewards(response_logprobs(model, batch), batch.groups, beta).t().contiguous()
        )
        rows = {"accuracy": chosen > rejected, "margin": chosen - rejected}
        rows |= {"reward_chosen": chosen, "reward_rejected": rejected}
        figures = {name: row.detach().double().sum() / num_pairs for name, row in rows.items()}
        return ops.pair_loss(chosen, rejected, 0.0, num_pairs=num_pairs), figures

    return loss


# ---- the frozen start ----


def with_reference(pairs, held, cfg, dtype: torch.dtype, out, world) -> tuple[list, list]:
    """(pairs, held-out pairs) with the start's logprobs, kept in checkpoints/: a resumed run has the same bits."""
    path = out.checkpoints / "reference.safetensors"
    if distributed.broadcast_object(out.resume_step > 0 and path.is_file(), world):
        try:
            rows = load_file(path)["logprobs"]
        except (SafetensorError, KeyError) as error:
            raise file_error(path, f"cannot be read ({error}); start anew with --no-resume") from error
    else:
        rows = reference_logprobs([*pairs, *held], cfg, dtype, world)
        if world.is_main:
            with atomic_write(path, "wb") as handle:
                handle.write(to_bytes({"logprobs": rows}))
    known = [
        dataclasses.replace(pair, reference=tuple(row))
        for pair, row in zip([*pairs, *held], rows.tolist(), strict=True)
    ]
    return known[: len(pairs)], known[len(pairs) :]


def reference_logprobs(pairs, cfg, dtype: torch.dtype, world) -> torch.Tensor:
    """(P, 2) fp64: response_logprobs of the pairs under cfg.model, in the precision that trains. It is loaded here and
    nowhere kept."""
    start = load_model(cfg.model, torch.float32 if world.size > 1 else dtype, world.device)
    start = distributed.shard(start.requires_grad_(False), world, dtype)
    fault = "the start gives pair {name} the logprobs {row}; choose another --model or --precision"
    return measure_pairs(
        start, pairs, lambda batch: response_logprobs(start, batch), cfg.tokens_per_batch, world,
        "logprobs of the start", fault,
    )  # fmt: skip


# ---- the report ----


def report(model, held, found: dict, cfg, out, world) -> None:
    """OUT/report.json and a line on the terminal: the held-out pairs under the trained model."""
    fault = "the logprobs of held-out pair {name} are {row}; lower --lr"
    logprobs = measure_pairs(
        model, held, lambda batch: response_logprobs(model, batch), cfg.tokens_per_batch, world,
        "held-out pairs", fault,
    )  # fmt: skip
    if not world.is_main:
        return
    result = {"beta": cfg.beta, "data": found, "held_out": summarise(logprobs, held, cfg.beta)}
    with atomic_write(out.path / "report.json") as handle:
        json.dump(result, handle, indent=1, allow_nan=False)
        handle.write("\n")
    if held:
        share = rate_of(result["held_out"]["accuracy"]["all"])
        say(f"dpo: of the held-out pairs, {share} prefer the chosen answer more than the start does")


def summarise(logprobs: torch.Tensor, held, beta: float) -> dict:
    """Plain JSON data of held-out pairs: loss, mean implicit rewards and margin (nats; None without pairs), and the
    share of pairs whose chosen response has the larger one, in all, by rating, by bin and by kind of data."""
    rewards = implicit_rewards(logprobs.flatten(), held, beta)
    chosen, rejected = rewards.t().contiguous()
    rows = {"margin": chosen - rejected, "reward_chosen": chosen, "reward_rejected": rejected}
    means = {name: float(row.double().mean()) if held else None for name, row in rows.items()}
    loss = float(ops.pair_loss(chosen, rejected, 0.0)) if held else None
    return {"pairs": len(held), "loss": loss} | means | {"accuracy": accuracy(held, rewards.tolist())}
