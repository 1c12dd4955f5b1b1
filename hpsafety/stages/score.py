"""Batched reward scoring: groups of responses in, one `score` record per input line out (design.md section 8)."""

from hpsafety.safety.scoring_job import score_file
from hpsafety.train import stage


def run(cfg) -> None:
    """hpsafety score: see ScoreConfig. Writes cfg.out in the order of the input lines."""
    with stage.ranks(cfg.device) as world:
        score_file(cfg, world)
