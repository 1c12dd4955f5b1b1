"""One run in a process of its own: python -m bench.end_to_end.worker CONTENDER SETTINGS.json RESULT.json."""

import dataclasses
import functools
import importlib
import logging
import sys

import torch

from bench.end_to_end.common import peak_rss_mb, read_settings, write_json

VARIANTS = {
    "trl-padded": {"padding_free": False},
    "transformers-rows": {"response_rows": True},
    "hpsafety-critic": {"advantages": "gae"},
}


def _load(work: str, name: str):
    module = importlib.import_module(f"bench.end_to_end.{work}_{name.partition('-')[0]}")
    return functools.partial(module.run, **VARIANTS.get(name, {}))


def main(name: str, settings_path: str, result_path: str) -> None:
    settings = read_settings(settings_path)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    result = dataclasses.asdict(_load(settings.work, name)(settings))
    write_json(result_path, {"contender": name, **result, "peak_rss_mb": peak_rss_mb()})


if __name__ == "__main__":
    main(*sys.argv[1:])
