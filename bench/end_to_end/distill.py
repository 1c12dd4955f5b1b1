"""Distillation's optimiser steps (forward KL to a preprompted teacher of the same weights), in hpsafety and in a plain
torch loop over full logits: python -m bench.end_to_end.distill [--help]. Nothing is reported unless the first-step
losses agree.
"""

from bench.end_to_end import alternate
from bench.end_to_end.common import Settings

CONTENDERS = ("hpsafety", "transformers")


def main(arguments: list[str] | None = None) -> None:
    p = alternate.parser("distill", __doc__, CONTENDERS, list(CONTENDERS))
    p.add_argument("--prompts", type=int, default=64, help="prompts; 16 for a quick look (default: 64)")
    p.add_argument("--k", type=int, default=2, help="kept samples per prompt (default: 2)")
    p.add_argument("--batch", type=int, default=16, help="prompts per optimiser step (default: 16)")
    p.add_argument(
        "--preprompt-tokens", type=int, default=80, help="before the teacher's prompts (default: 80)"
    )
    options = alternate.parse(p, arguments)
    if alternate.bf16_is_pointless(options):
        return
    settings = Settings(
        model=alternate.model_directory(options.model), work="distill", groups=options.prompts, k=options.k,
        batch=options.batch, preprompt_tokens=options.preprompt_tokens, response_tokens=96, spread=0.7,
        tokens_per_batch=options.tokens_per_batch, peer_tokens_per_batch=options.peer_tokens_per_batch,
        precision=options.precision, threads=options.threads,
    )  # fmt: skip
    alternate.compete(options, settings)


if __name__ == "__main__":
    main()
