"""`hpsafety sample`: K responses per prompt, a group record per line of the prompt files."""

from hpsafety.safety.sampling_job import sample_file
from hpsafety.train import stage


def run(cfg) -> None:
    """hpsafety sample: see SampleConfig. Writes cfg.out and its manifest."""
    with stage.ranks(cfg.device) as world:
        sample_file(cfg, world)
