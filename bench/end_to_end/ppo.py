"""PPO, the same work in hpsafety and its peers: python -m bench.end_to_end.ppo [--help].

Three parts: an iteration beside TRL's RLOOTrainer; the update alone and the logprobs alone beside plain transformers on
padded samples, the way OpenRLHF does it. Nothing is reported unless gradients, losses, scores and logprobs agree. See
bench/README.md.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from bench.end_to_end import alternate, ppo_agree, ppo_table
from bench.end_to_end.alternate import child
from bench.end_to_end.common import Settings, count_tokens, make_groups, write_json
from bench.end_to_end.ppo_data import needed_flops
from bench.machine import machine

PADDED = ("transformers", "transformers-rows")
CRITIC = "hpsafety-critic"  # an iteration with GAE and a critic: more work than any other contender's
KNOWN = {"iteration": (CRITIC, "trl"), "update": PADDED, "logprobs": PADDED}  # part -> hpsafety's peers in it
CONTENDERS = ("hpsafety", CRITIC, "trl", *PADDED)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits 2 with one line on bad values."""
    p = alternate.parser("ppo", __doc__, CONTENDERS, ["hpsafety", "trl", "transformers"])
    p.add_argument("--parts", nargs="+", choices=KNOWN, default=list(KNOWN), help="(default: all)")
    p.add_argument(
        "--prompts", type=int, default=16, help="of about 96 tokens; 4 for a quick look (default: 16)"
    )
    p.add_argument("--k", type=int, default=4, help="samples per prompt (default: 4)")
    p.add_argument("--new-tokens", type=int, default=64, help="of every sample (default: 64)")
    p.add_argument("--batch", type=int, default=8, help="prompts per optimiser step (default: 8)")
    p.add_argument(
        "--no-python-share", action="store_true", help="do not record an iteration for Python's share"
    )
    options = alternate.parse(p, arguments)
    if options.prompts % options.batch:
        p.error(f"--batch must divide --prompts {options.prompts}, got {options.batch}")
    if options.k < 2 and "iteration" in options.parts:
        p.error("--k must be at least 2: TRL's advantages are those among a prompt's samples")
    if options.new_tokens < 3:
        p.error("--new-tokens must be at least 3: the warm-up has 2")
    if "hpsafety" not in options.contenders:
        p.error("--contenders must name hpsafety, which the ratios are to")
    return options


def part_settings(options, part: str, experience: str = "") -> Settings:
    return Settings(
        model=alternate.model_directory(options.model), work="ppo", part=part, groups=options.prompts, k=options.k,
        batch=options.batch, prompt_tokens=96, response_tokens=options.new_tokens, spread=0.25, equal_responses=True,
        reward_models=alternate.reward_directories(options.model, 2), experience=experience,
        tokens_per_batch=options.tokens_per_batch, peer_tokens_per_batch=options.peer_tokens_per_batch,
        precision=options.precision, threads=options.threads, lr=1e-6,
    )  # fmt: skip


# ---- the same work? ----


def agree_on_gradients(settings: Settings, peers: list[str], folder: Path, call: Callable = child) -> dict:
    """Loss and gradients of all contenders on a small ragged minibatch of several micro-batches: in fp32, and in bf16
    as well where that is measured. Exits 1 where they differ.

    call  as alternate.child
    """
    small = replace(
        settings, part="update", groups=4, k=2, batch=4, prompt_tokens=24, response_tokens=12, spread=0.5,
        equal_responses=False, tokens_per_batch=128, peer_tokens_per_batch=128, experience=str(folder / "small"),
    )  # fmt: skip
    paths = {precision: folder / f"{precision}.json" for precision in ("fp32", "bf16")}
    for precision, path in paths.items():
        write_json(path, replace(small, precision=precision))

    def ask(task: str, precision: str, *words) -> dict:
        return call("ppo_child", task, str(paths[precision]), *map(str, words), threads=settings.threads)

    ask("prepare", "fp32")
    found = {}
    for precision in dict.fromkeys(("fp32", settings.precision)):
        ours = folder / f"hpsafety-{precision}"
        loss = ask("gradients", precision, "hpsafety", ours)["loss"]
        for peer in peers:
            theirs = folder / f"{peer}-{precision}"
            other = ask("gradients", precision, peer, theirs)["loss"]
            off = ppo_agree.values("loss", peer, [other], [loss], ppo_agree.LOSS[precision])
            if precision == "fp32":
                told = ppo_agree.gradients_fp32(ours, theirs)
            else:
                told = ppo_agree.gradients_bf16(ours, theirs, folder / f"{peer}-fp32")
            found[f"{peer}, {precision}"] = {"loss_difference": off, **told}
    return found


def check_values(runs: list[dict], settings: Settings) -> None:
    """Exits 1 unless the peers' first loss of an update, or all logprobs and values, are hpsafety's."""
    ours = next(run for run in runs if run["contender"] == "hpsafety")
    precision, part = settings.precision, settings.part
    for run in runs:
        pair = run["values"], ours["values"]
        if part == "update":
            first = [values[:1] for values in pair]
            off = ppo_agree.values("loss", run["contender"], *first, ppo_agree.LOSS[precision])
        else:
            limit = ppo_agree.LOGPROB[precision]
            off = ppo_agree.values(part, run["contender"], *pair, limit, rms=precision == "bf16")
        run["difference"] = off


def check_iteration(runs: list[dict], settings: Settings, folder: Path) -> None:
    """Exits 1 unless a contender sampled what it was told to, and scored and measured it as hpsafety does."""
    count, models = settings.groups * settings.k, len(settings.reward_models)
    settings_path, path = folder / "settings.json", folder / "run.json"
    write_json(settings_path, settings)
    for run in (run for run in runs if "difference" not in run):
        ppo_agree.lengths(run, count, settings.response_tokens)
        write_json(path, run)
        judged = child("ppo_child", "judge", str(settings_path), str(path), threads=settings.threads)
        name, pair, precision = run["contender"], (run["values"], judged["values"]), settings.precision
        scores, sums = ([v[: count * models] for v in pair], [v[count * models :] for v in pair])
        off = ppo_agree.values("score", name, *scores, ppo_agree.SCORE[precision])
        limit = ppo_agree.LOGPROB_SUM[precision] * settings.response_tokens**0.5
        far = ppo_agree.values("sum of logprobs", name, *sums, limit, rms=precision == "bf16")
        run["difference"] = max(off, far)


# ---- the runs ----


def compete(options, part: str, folder: Path) -> dict:
    """One part: runs in turn, checked, and their summary."""
    settings = part_settings(options, part, str(folder / "experience"))
    if part == "update":
        write_json(folder / "prepare.json", replace(settings, precision="fp32"))
        child("ppo_child", "prepare", str(folder / "prepare.json"), threads=settings.threads)
    names = ["hpsafety", *(name for name in options.contenders if name in KNOWN[part])]

    def check(runs: list[dict]) -> None:
        if part == "iteration":
            check_iteration(runs, settings, folder)
        else:
            check_values(runs, settings)

    given = argparse.Namespace(runs=options.runs, contenders=names)
    runs, limits = alternate.run_all(given, settings, check)
    work = {
        "tokens_equiv": count_tokens(make_groups(settings)), "samples": settings.groups * settings.k,
        "optimiser_steps": settings.groups // settings.batch,
        "needed_flops": {
            name: needed_flops(settings, critic=part != "iteration" or name == CRITIC) for name in names
        },
    }  # fmt: skip
    summary = ppo_table.summarise(settings, runs, limits, work)
    if part == "iteration" and not options.no_python_share:
        write_json(folder / "python.json", settings)
        share = child("ppo_child", "python", str(folder / "python.json"), threads=settings.threads)
        summary["python_share"] = share
    for run in runs:
        del run["samples"], run["values"]
    return {"settings": asdict(settings), "work": work, "summary": summary, "runs": runs, "gemm": limits}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if alternate.bf16_is_pointless(options):
        return
    before, record = machine(options.threads), {}
    peers = [name for name in options.contenders if name in PADDED]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "update" in options.parts and peers:
            record["gradients"] = agree_on_gradients(part_settings(options, "update"), peers, folder)
        parts = {part: compete(options, part, folder) for part in options.parts}
    ppo_table.print_tables(parts, record.get("gradients", {}), before)
    if options.json:
        for part in parts.values():
            told = {"model": options.model, "reward_models": 2, "experience": ""}
            part["settings"] |= told
        write_json(options.json, {"machine": before, **record, "parts": parts})
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
