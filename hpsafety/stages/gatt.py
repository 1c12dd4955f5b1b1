"""Ghost attention: an instruction of the first turn that holds for the whole dialogue (spec section 6, GATT-1..5).

OUT/lists.json         hobbies and figures that the model named, with the question and its raw answers
    instructions.jsonl the dialogues' user turns, each with its instruction
    dialogues.jsonl    the dialogues as sampled, the instruction in every user turn
    train.jsonl        the rows trained on: the instruction in the first turn, loss on the last answer
    probes.jsonl       the evaluation's dialogues; recall-before.jsonl, recall-after.jsonl: how they went
    model/, metrics.jsonl, manifest.json ...   the run directory of design.md section 8
    report.json, report.html                   recall by turn, attention on the instruction by turn
"""

import json
import sys

import torch

from hpsafety.config import SampleConfig, memory_bytes
from hpsafety.data.chat import encode_prompt
from hpsafety.data.records import iter_json_lines, write_records
from hpsafety.data.sources import load_rows
from hpsafety.errors import InputError
from hpsafety.files import atomic_write
from hpsafety.model.io import load_model
from hpsafety.rollout.engine import Engine
from hpsafety.rollout.sampler import Settings, stop_ids
from hpsafety.safety import gatt_data, gatt_lists, gatt_probes, recall
from hpsafety.safety.attention_mass import mean_mass
from hpsafety.safety.gatt_instructions import FAMILIES, draw, write
from hpsafety.safety.gatt_page import show_table, write_page
from hpsafety.safety.sampling_job import engine_settings
from hpsafety.safety.talk import Script
from hpsafety.safety.talk_job import check_chat, check_memory, first_prompt, play_file
from hpsafety.train import distributed, precision, stage
from hpsafety.train.finetune import build_groups, count_trained, finetune, longest
from hpsafety.train.metrics import say
from hpsafety.train.rundir import RunDir, model_hashes

OURS = (
    "lists.json", "instructions.jsonl", "dialogues.jsonl", "train.jsonl", "probes.jsonl", "recall-before.jsonl",
    "recall-after.jsonl",
)  # fmt: skip
PROBE_SEED = 9_000_011  # added to the seed, so that probes share no draw with the dialogues trained on
PICTURED = 4  # dialogues whose attention is measured, one of each kind of instruction
SHOWN = 8  # answers in the report, at most


def run(cfg) -> None:
    """hpsafety gatt: see GAttConfig. Writes the run directory of design.md section 8 and the files above to cfg.out."""
    with stage.ranks(cfg.device) as world:
        if cfg.demo and world.is_main:
            print(opening(cfg), file=sys.stderr, flush=True)
        _run(cfg, world)


def _run(cfg, world) -> None:
    records = load_rows(cfg.data, "prompt")
    out = stage.run_directory(cfg, "gatt", cfg.data, world, model_hashes({"model": cfg.model}))
    if out is None:
        return
    dtype, why = precision.choose(cfg.precision, world.device)
    torch.manual_seed(cfg.seed)
    rows, questions, counts = gatt_data.split_rows(list(records), cfg.seed)
    dialogues, more = gatt_data.make_dialogues(rows, cfg.turns, cfg.dialogues, cfg.seed)
    counts |= more | stage.plain_counts(records.counts)
    model = load_model(cfg.model, dtype, world.device)
    check_chat(model, cfg.model)
    limit = longest(cfg, model)
    check_dialogues(dialogues, questions, model, limit, cfg, dtype)
    stage.begin(
        out, f"gatt: {len(dialogues)} dialogues, {len(questions)} held-out questions; {why}", counts, world
    )
    if world.is_main:
        counts |= prepare(out, dialogues, questions, model, cfg)
    del model
    distributed.barrier(world)
    sampled = out.path / "dialogues.jsonl"
    job = sampling(cfg, dtype, cfg.model, out.path / "instructions.jsonl", sampled, k=cfg.k)
    play_file(
        job, limit, lambda row: gatt_data.sampling_script(row, cfg.k),
        lambda row, played: gatt_data.keep_dialogue(row, played, cfg.select == "rules"), "sampling dialogues", world,
    )  # fmt: skip
    ask("before", cfg.model, cfg, dtype, limit, out, world)
    counts |= write_train_rows(out, world)
    counts |= train(cfg, dtype, out, world)
    ask("after", str(out.path / "model"), cfg, dtype, limit, out, world)
    if world.is_main:
        report(cfg, dtype, limit, counts, len(questions), out, world.device)
    out.finish(counts)
    if world.is_main:
        say(f"gatt: wrote {out.path / 'model'} and {out.path / 'report.html'}")
    distributed.barrier(world)


def opening(cfg) -> str:
    probes = " ".join(map(str, cfg.eval_turns))
    return (
        f"hpsafety gatt --demo: {cfg.model}, {cfg.dialogues} dialogues of everyday questions.\n"
        f"  1. the model lists hobbies and public figures; instructions are made of them and of {len(cfg.languages)} "
        "languages\n"
        "  2. it answers every dialogue turn by turn, with the instruction in every user turn\n"
        f"  3. baseline: {4 * cfg.eval_dialogues} dialogues with the instruction in the first turn only, probed at "
        f"turns {probes}\n"
        "  4. fine-tuning with the instruction in the first turn only, loss on the last answer\n"
        "  5. the same questions again, and how much attention falls on the instruction\n"
        f"Expect 2 to 5 minutes on two cores, under 4 GB of memory.\nOutput: {cfg.out}/\n"
    )


def check_dialogues(dialogues: list[dict], questions: list[str], model, limit: int, cfg, dtype) -> None:
    """InputError where the model's chat template takes no such dialogue, where not one leaves room for an answer, and
    where --kv-memory is too small. A dialogue that is too long is dropped and counted when it gets there."""
    stand_in = write(dict.fromkeys(FAMILIES, "a name of some length"), terse=False)
    engine = Engine(model, engine_settings(sampling(cfg, dtype, cfg.model, "-", "-"), model))
    lengths = []
    for row in dialogues:
        script = gatt_data.sampling_script(row | {"instruction": stand_in})
        try:
            lengths.append(
                first_prompt(model.tokenizer, gatt_data.sampling_script(row | {"instruction": ""}))
            )
            check_memory(engine, script, limit)
        except InputError as error:
            raise InputError(f"dialogue {row['id']!r}: {error}") from None
    room = limit - cfg.max_new_tokens
    if min(lengths) > room:
        raise InputError(
            f"no dialogue leaves room for an answer: the shortest first turn has {min(lengths)} tokens and {room} are "
            "left; lower --max-new-tokens, raise --max-length or give shorter dialogues"
        )
    engine = Engine(
        model,
        engine_settings(sampling(cfg, dtype, cfg.model, "-", "-", max_new_tokens=cfg.eval_tokens), model),
    )
    check_memory(engine, Script([stand_in, *questions[: max(cfg.eval_turns)]]), limit)


def prepare(out: RunDir, dialogues: list[dict], questions: list[str], model, cfg) -> dict:
    """Writes lists.json, instructions.jsonl and probes.jsonl; a fresh start inherits nothing. Counts of the lists."""
    if out.fresh:
        for path in [p for name in OURS for p in out.path.glob(f"{name}*")]:
            if path.is_file():
                path.unlink()
        for part in out.path.glob("*.jsonl.part"):
            for path in part.iterdir():
                path.unlink()
            part.rmdir()
    lists = read_lists(out, model, cfg)
    values = {part["family"]: part["items"] for part in lists} | {"language": list(cfg.languages)}
    drawn = draw(len(dialogues), values, cfg.seed)
    rows = [gatt_data.with_instruction(d, i) for d, i in zip(dialogues, drawn, strict=True)]
    write_records(out.path / "instructions.jsonl", rows)
    probes = gatt_probes.probe_rows(values, questions, cfg.eval_turns, cfg.eval_dialogues, cfg.seed)
    write_records(out.path / "probes.jsonl", probes)
    found = {f"listed_{part['family']}": len(part["items"]) for part in lists}
    return found | {f"short_{part['family']}": part["short"] for part in lists}


def read_lists(out: RunDir, model, cfg) -> list[dict]:
    """What the model named (GATT-4): of this run's lists.json, or asked for now and written there."""
    path = out.path / "lists.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    settings = Settings(
        max_new_tokens=gatt_lists.LIST_TOKENS, temperature=gatt_lists.TEMPERATURE, top_p=cfg.top_p,
        stop=stop_ids(model), seed=(cfg.seed + gatt_lists.SEED_STEP) % 2**63, max_batch=cfg.max_batch,
        kv_memory=memory_bytes(cfg.kv_memory),
    )  # fmt: skip
    lists = gatt_lists.make_lists(model, cfg.list_size, settings)
    for part in lists:
        say(f"{part['family']}: the model named {', '.join(part['items'])}")
        if part["short"]:
            times = len(part["raw"])
            say(
                f"{part['family']}: {part['short']} fewer than --list-size, asked {times} times; these have to do"
            )
    with atomic_write(path) as handle:
        json.dump(lists, handle, ensure_ascii=False, indent=1)
    return lists


def sampling(cfg, dtype: torch.dtype, model: str, rows, out, **changes) -> SampleConfig:
    """What `hpsafety sample` would be told."""
    values = {
        "model": model, "data": (str(rows),), "out": str(out), "temperature": cfg.temperature, "top_p": cfg.top_p,
        "top_k": cfg.top_k, "max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed, "kv_memory": cfg.kv_memory,
        "max_batch": cfg.max_batch, "device": cfg.device, "precision": precision.name(dtype),
    }  # fmt: skip
    return SampleConfig(**(values | changes))


def ask(name: str, model: str, cfg, dtype: torch.dtype, limit: int, out: RunDir, world) -> None:
    """Plays the probes with one model into recall-NAME.jsonl: drawn as the training's answers are, since greedy answers
    of a small model repeat each other, and with the same keys for both models."""
    job = sampling(
        cfg, dtype, model, out.path / "probes.jsonl", out.path / f"recall-{name}.jsonl",
        max_new_tokens=cfg.eval_tokens, seed=(cfg.seed + PROBE_SEED) % 2**63,
    )  # fmt: skip
    play_file(job, limit, gatt_probes.probe_script, gatt_probes.keep_probe, f"asking the model {name}", world)


def read_rows(path) -> list[dict]:
    return [row for _, row in iter_json_lines(path)]


def write_train_rows(out: RunDir, world) -> dict:
    """train.jsonl from the dialogues that were sampled to their end; counts. Raises InputError where there is none."""
    plain, sampled = (read_rows(out.path / f"{name}.jsonl") for name in ("instructions", "dialogues"))
    lost = gatt_data.dropped(sampled)
    rows = [gatt_data.training_row(p, s) for p, s in zip(plain, sampled, strict=True) if "dropped" not in s]
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in lost.items())
        raise InputError(f"no dialogue is left to train on ({reasons}); see {out.path / 'dialogues.jsonl'}")
    if world.is_main:
        write_records(out.path / "train.jsonl", rows)
        for reason, count in lost.items():
            say(f"{count} of {len(plain)} dialogues were dropped: {reason}")
    distributed.barrier(world)
    cut = sum(row["finish"] == "length" for row in rows)
    return {"trained_dialogues": len(rows), "cut_answers": cut} | {
        f"dropped: {r}": n for r, n in lost.items()
    }


def train(cfg, dtype: torch.dtype, out: RunDir, world) -> dict:
    """Fine-tunes the model on train.jsonl, loss on last answers only (GATT-2); counts."""
    model = load_model(cfg.model)  # fp32: the masters of a bf16 run
    rows = read_rows(out.path / "train.jsonl")
    groups, counts = build_groups(rows, model.tokenizer, longest(cfg, model), train="last")
    counts["trained_tokens"] = count_trained(groups)
    done = finetune(model, groups, [], cfg, dtype, out, world, "fine-tuning")
    distributed.barrier(world)  # rank 0 has written the model that all will ask
    return counts | done


def report(
    cfg, dtype: torch.dtype, limit: int, counts: dict, held_questions: int, out: RunDir, device
) -> None:
    """report.json and report.html; the table is also shown."""
    asked = {name: read_rows(out.path / f"recall-{name}.jsonl") for name in ("before", "after")}
    turns = sorted(set(cfg.eval_turns))
    pictured, tokens = pick_dialogues(asked["before"]), None
    mass = {}
    for name, path in (("before", cfg.model), ("after", str(out.path / "model"))):
        model = load_model(path, dtype, device)
        tokens = tokens or tokens_per_turn(pictured, model.tokenizer)
        if pictured:
            mass[name] = mean_mass(model, pictured, mass["before"]["sinks"] if mass else None)
        del model
    result = {
        "model": cfg.model, "eval_turns": turns, "eval_tokens": cfg.eval_tokens,
        "temperature": cfg.temperature, "held_questions": held_questions,
        "limit": limit, "context_turns": int(limit / tokens) if tokens else None, "counts": counts,
        "language_judge": recall.judge(), "lists": json.loads((out.path / "lists.json").read_text(encoding="utf-8")),
        "recall": {name: gatt_probes.summarise(rows, cfg.eval_turns) for name, rows in asked.items()},
        "adherence": gatt_probes.adherence(read_rows(out.path / "dialogues.jsonl")),
        "attention": mass, "samples": pick_answers(asked),
    }  # fmt: skip
    with atomic_write(out.path / "report.json") as handle:
        json.dump(result, handle, ensure_ascii=False, indent=1, allow_nan=False)
    write_page(result, out.path / "report.html")
    show_table(result)


def pick_dialogues(rows: list[dict]) -> list[dict]:
    """Of each kind of instruction the dialogue with most turns, PICTURED in all."""
    longest_of: dict[str, dict] = {}
    for row in rows:
        best = longest_of.get(row["family"])
        if not row["control"] and row["said"] and (best is None or len(row["said"]) > len(best["said"])):
            longest_of[row["family"]] = row
    return list(longest_of.values())[:PICTURED]


def tokens_per_turn(rows: list[dict], tokenizer) -> float | None:
    """Mean tokens of a turn, question and answer, of the dialogues given."""
    total = turns = 0
    for row in rows:
        script = gatt_probes.probe_script(row)
        n = len(row["said"])
        total += len(encode_prompt(tokenizer, script.messages(row["said"][:-1], script.users[n - 1])))
        turns += n
    return total / turns if turns else None


def pick_answers(asked: dict[str, list[dict]]) -> list[dict]:
    """SHOWN probed answers of both models, those whose verdict changed first, two of each kind of instruction."""
    both = zip(asked["before"], asked["after"], strict=True)
    found = [
        (b["answers"][t]["holds"] == a["answers"][t]["holds"], b, a, t)
        for b, a in both if not b["control"]
        for t in sorted(b["answers"].keys() & a["answers"].keys(), key=int, reverse=True)
    ]  # fmt: skip
    shown: list[dict] = []
    for _, b, a, t in sorted(found, key=lambda item: item[0]):
        if len(shown) < SHOWN and sum(s["family"] == b["family"] for s in shown) < 2:
            script = gatt_probes.probe_script(b)
            sides = [{"model": name, **row["answers"][t]} for name, row in (("before", b), ("after", a))]
            question = script.asked.get(int(t)) or script.users[int(t) - 1]
            shown.append({
                "family": b["family"], "instruction": b["instruction"], "turn": int(t), "question": question,
                "answers": sides,
            })  # fmt: skip
    return shown
