"""A seeded part of record files within a budget of tokens, so that a pipeline's stages see data of their own.

OUT/rows.jsonl      the rows, in the order in which they were chosen, then those with split valid
OUT/manifest.json   checksums of what was read and written; how many rows of which kind, and their tokens
"""

from collections import Counter

from hpsafety.data.records import TRAIN_SPLITS, normalise_prompt, write_records
from hpsafety.data.selection import in_blocks, in_turn, kind_of, row_tokens, shuffled, within
from hpsafety.data.sources import load_rows, raw_rows
from hpsafety.errors import InputError
from hpsafety.model.io import describe_model
from hpsafety.train import distributed, stage
from hpsafety.train.metrics import say

ROWS = "rows.jsonl"


def run(cfg) -> None:
    """hpsafety select: see SelectConfig. Writes the files above to cfg.out."""
    with stage.ranks("cpu") as world:
        _run(cfg, world)


def _run(cfg, world) -> None:
    # A prompt may be taken from any record that holds one.
    read_as = {"document": "demonstration"}.get(cfg.record, cfg.record)
    rows = list(load_rows(cfg.data, read_as))
    excluded = excluded_prompts(cfg.exclude)
    out = stage.run_directory(cfg, "select", [*cfg.data, *cfg.exclude], world)
    if out is None:
        return
    tokenizer = None if cfg.model is None else describe_model(cfg.model)[1]
    if cfg.model is not None and tokenizer is None:
        raise InputError(f"--model {cfg.model} has no tokenizer to count --tokens with")
    chosen, held, counts = choose(rows, excluded, tokenizer, cfg)
    if not chosen:
        raise InputError(
            f"no row is left of {len(rows)}: --tokens {cfg.tokens} is too small for one, or --kinds, --exclude and "
            "the rows' split leave none"
        )
    stage.begin(out, f"select: {len(chosen)} of {len(rows)} rows", counts, world)
    if world.is_main:
        write_records(out.path / ROWS, chosen + held)
    out.finish(counts, (ROWS,))
    if world.is_main:
        out.checkpoints.rmdir()  # a selection has none
        say(f"select: wrote {out.path / ROWS}")
    distributed.barrier(world)


def excluded_prompts(files: tuple[str, ...]) -> set[str]:
    """The prompts of record files of any kind, normalised."""
    return {normalise_prompt(row["prompt"]) for path in files for _, row in raw_rows(path) if "prompt" in row}


def choose(rows: list[dict], excluded: set[str], tokenizer, cfg) -> tuple[list[dict], list[dict], dict]:
    """(rows chosen, rows held out, counts for the manifest) of a SelectConfig."""
    fresh = [row for row in rows if normalise_prompt(row["prompt"]) not in excluded]
    wanted = [row for row in fresh if kind_of(row) in cfg.kinds]
    usable = [row for row in wanted if row.get("split") in (None, *TRAIN_SPLITS)]
    held = shuffled([row for row in wanted if row.get("split") == "valid"], cfg.seed)[: cfg.valid]

    def size(block: list[dict]) -> int:
        return sum(
            row_tokens(tokenizer, as_record(row, cfg.record), cfg.record) + cfg.extra_tokens for row in block
        )

    blocks = (
        in_blocks(usable, cfg.shares, cfg.seed)
        if cfg.shares
        else [[row] for row in in_turn(usable, cfg.seed)]
    )
    if cfg.tokens is not None:
        blocks = within(blocks, size, cfg.tokens)
    chosen = [row for block in blocks for row in block]
    counts = {
        "rows": len(rows),
        "excluded": len(rows) - len(fresh),
        "chosen": len(chosen),
        "held_out": len(held),
    }
    counts |= {kind: number for kind, number in sorted(Counter(map(kind_of, chosen)).items())}
    if tokenizer is not None:
        counts["tokens"] = sum(map(size, blocks))
    return (
        [as_record(row, cfg.record) for row in chosen],
        [as_record(row, cfg.record) for row in held],
        counts,
    )


def as_record(row: dict, record: str) -> dict:
    """A row as it is written: a prompt without what was answered, a document as its text alone."""
    if record == "prompt":
        return {name: value for name, value in row.items() if name != "response"}
    if record == "document":
        prompt = (
            row["prompt"]
            if isinstance(row["prompt"], str)
            else "\n".join(m["content"] for m in row["prompt"])
        )
        return {"id": row.get("id"), "text": f"{prompt}\n{row['response']}"}
    return row
