"""One run in a process of its own: python -m bench.end_to_end.generate_run CONTENDER SETTINGS.json RESULT.json."""

import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.end_to_end.common import peak_rss_mb, write_json

PROMPT_TOKENS = (60, 140)


@dataclass(frozen=True)
class Settings:
    """One benchmark. model is a Hugging Face directory; all prompts and samples are handed over in one call."""

    model: str
    prompts: int = 16
    k: int = 4
    new_tokens: int = 64
    top_p: float = 0.95
    precision: str = "fp32"
    threads: int = 2
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def make_prompts(settings: Settings) -> list[list[int]]:
    """Seeded random token ids of even lengths; the first ids of a vocabulary are special tokens and bytes."""
    rng = np.random.default_rng(settings.seed)
    vocab = json.loads((Path(settings.model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    lengths = rng.integers(*PROMPT_TOKENS, settings.prompts)
    return [rng.integers(vocab // 8, vocab, n).tolist() for n in lengths]


def hpsafety(settings: Settings):
    """(generate(prompts, new tokens, temperature) -> texts, a note). Nothing stops early."""
    from hpsafety import load_model

    model = load_model(settings.model, settings.dtype)

    def generate(prompts, new, temperature):
        rollouts = model.generate(
            prompts, k=settings.k, max_new_tokens=new, temperature=temperature, top_p=settings.top_p, stop=[]
        )
        return [r.tokens for r in rollouts]

    return generate, "paged cache, prompts computed once for their samples, logprob of every token kept"


def transformers(settings: Settings):
    """The same of transformers' generate: one left-padded batch, sdpa, dynamic cache, prompts repeated k times."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=settings.dtype, attn_implementation="sdpa"
    )
    model.eval()

    def generate(prompts, new, temperature):
        rows = [prompt for prompt in prompts for _ in range(settings.k)]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        draw = {"do_sample": False}
        if temperature > 0:
            draw = {"do_sample": True, "temperature": temperature, "top_p": settings.top_p, "top_k": 0}
        options = {"max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(ids, attention_mask=mask, **draw, **options)[:, longest:].tolist()

    return generate, "one left-padded batch, sdpa, dynamic cache; no logprobs"


CONTENDERS = {"hpsafety": hpsafety, "transformers": transformers}


def run(name: str, settings: Settings) -> dict:
    """Greedy, then sampled at temperature 1, each timed after a short call that is not."""
    prompts = make_prompts(settings)
    generate, note = CONTENDERS[name](settings)
    out = {"contender": name, "note": note}
    for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        generate(prompts[:1], 2, temperature)
        start, cpu = time.perf_counter(), time.process_time()
        texts = generate(prompts, settings.new_tokens, temperature)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        assert [len(text) for text in texts] == [settings.new_tokens] * (settings.prompts * settings.k)
        out[mode] = {"seconds": seconds, "cpu_seconds": cpu_seconds}
        if mode == "greedy":
            out["texts"] = texts[:: settings.k]
    return out | {"peak_rss_mb": peak_rss_mb()}


def main(name: str, settings_path: str, result_path: str) -> None:
    settings = Settings(**json.loads(Path(settings_path).read_text(encoding="utf-8")))
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with torch.no_grad():
        write_json(result_path, run(name, settings))


if __name__ == "__main__":
    main(*sys.argv[1:])
