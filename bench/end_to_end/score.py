"""Best-of-K scoring by two reward models, the same work in hpsafety and in transformers with sorted padded batches:
python -m bench.end_to_end.score [--help]. Nothing is reported unless every score agrees.
"""

import sys

from bench.end_to_end import alternate
from bench.end_to_end.common import Settings

CONTENDERS = ("hpsafety", "transformers")
# Largest difference of a score (a logit). In bf16 both round every product to 8 bits, each in its own order.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}


def check_scores(runs: list[dict], tolerance: float) -> None:
    """Exits 1 unless all scores of all runs agree with the first run's."""
    for run in runs[1:]:
        worst = max(abs(a - b) for a, b in zip(runs[0]["values"], run["values"], strict=True))
        if not worst <= tolerance:
            sys.exit(
                f"scores of {run['contender']} and {runs[0]['contender']} differ by {worst:.2e}, more than "
                f"{tolerance}; this is not the same work, so no timing counts"
            )


def main(arguments: list[str] | None = None) -> None:
    p = alternate.parser("score", __doc__, CONTENDERS, list(CONTENDERS))
    p.add_argument("--groups", type=int, default=32, help="prompts; 4 for a quick look (default: 32)")
    p.add_argument("--k", type=int, default=8, help="responses per prompt (default: 8)")
    options = alternate.parse(p, arguments)
    if alternate.bf16_is_pointless(options):
        return
    settings = Settings(
        model=alternate.model_directory(options.model), work="score", groups=options.groups, k=options.k, batch=2,
        prompt_tokens=256, response_tokens=64, spread=0.5,
        reward_models=alternate.reward_directories(options.model, 2), tokens_per_batch=options.tokens_per_batch,
        peer_tokens_per_batch=options.peer_tokens_per_batch, precision=options.precision, threads=options.threads,
    )  # fmt: skip
    tolerance = TOLERANCE[options.precision]
    alternate.compete(options, settings, lambda runs: check_scores(runs, tolerance), tolerance)


if __name__ == "__main__":
    main()
