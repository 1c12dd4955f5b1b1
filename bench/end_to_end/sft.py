"""SFT, the same work in hpsafety, TRL and a plain transformers loop: python -m bench.end_to_end.sft [--help].

Runs alternate (A B C A B C), each in a process of its own, so that peak memory is its own and noise hits all alike.
Nothing is reported unless the first-step losses agree. See bench/README.md for how to read the table.
"""

from bench.end_to_end import alternate
from bench.end_to_end.common import Settings

CONTENDERS = ("hpsafety", "trl", "transformers", "trl-padded")


def main(arguments: list[str] | None = None) -> None:
    p = alternate.parser("sft", __doc__, CONTENDERS, list(CONTENDERS[:3]))
    p.add_argument(
        "--pairs", type=int, default=256, help="prompt/response pairs; 32 for a quick look (default: 256)"
    )
    p.add_argument("--batch", type=int, default=32, help="pairs per optimiser step (default: 32)")
    options = alternate.parse(p, arguments)
    if alternate.bf16_is_pointless(options):
        return
    settings = Settings(
        model=alternate.model_directory(options.model), groups=options.pairs, batch=options.batch,
        tokens_per_batch=options.tokens_per_batch, peer_tokens_per_batch=options.peer_tokens_per_batch,
        precision=options.precision, threads=options.threads,
    )  # fmt: skip
    alternate.compete(options, settings)


if __name__ == "__main__":
    main()
