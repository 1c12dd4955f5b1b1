"""Reward-model training on preference pairs, the same work in hpsafety, TRL and a plain transformers loop:
python -m bench.end_to_end.reward [--help]. Nothing is reported unless the first-step losses agree.
"""

from bench.end_to_end import alternate
from bench.end_to_end.common import Settings

CONTENDERS = ("hpsafety", "trl", "transformers")


def main(arguments: list[str] | None = None) -> None:
    p = alternate.parser("reward", __doc__, CONTENDERS, list(CONTENDERS))
    p.add_argument(
        "--pairs", type=int, default=128, help="preference pairs; 16 for a quick look (default: 128)"
    )
    p.add_argument("--batch", type=int, default=16, help="pairs per optimiser step (default: 16)")
    options = alternate.parse(p, arguments)
    if alternate.bf16_is_pointless(options):
        return
    settings = Settings(
        model=alternate.model_directory(options.model), work="reward", groups=options.pairs, k=2,
        batch=options.batch, prompt_tokens=128, response_tokens=64, spread=0.7,
        reward_models=alternate.reward_directories(options.model, 1), tokens_per_batch=options.tokens_per_batch,
        peer_tokens_per_batch=options.peer_tokens_per_batch, precision=options.precision, threads=options.threads,
    )  # fmt: skip
    alternate.compete(options, settings)


if __name__ == "__main__":
    main()
