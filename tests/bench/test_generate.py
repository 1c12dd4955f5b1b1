"""bench/end_to_end/generate.py: both contenders do the same work, and no time counts when they do not.

The bug this file must catch: transformers' padding taken for prompt tokens.
"""

import pytest

from bench.end_to_end import generate
from bench.end_to_end.generate_run import Settings, run
from hpsafety.model.io import save_model
from tests.tiny import tiny_model


def test_contenders_agree(tmp_path):
    pytest.importorskip("transformers")
    save_model(tiny_model(seed=6, init_std=0.5, max_positions=256), str(tmp_path / "m"))
    settings = Settings(model=str(tmp_path / "m"), prompts=5, k=2, new_tokens=8)
    runs = [run(name, settings) for name in ("hpsafety", "transformers")]
    assert generate.check_texts(runs, "fp32") == 1.0
    rows = generate.summarise(runs, 5 * 2 * 8)
    assert rows["hpsafety"]["greedy"]["hpsafety_speedup"] == 1.0
    ratio = runs[1]["sampled"]["seconds"] / runs[0]["sampled"]["seconds"]
    assert rows["transformers"]["sampled"]["hpsafety_speedup"] == pytest.approx(ratio)


def test_different_texts_stop_the_benchmark():
    texts = [[i, i + 1, i + 2, 4, 5] for i in range(20)]
    same = {"texts": texts}
    assert generate.check_texts([same, {"texts": [*texts[:19], [0] * 5]}], "fp32") == 0.95
    with pytest.raises(SystemExit, match="90 % of the greedy texts agree"):
        generate.check_texts([same, {"texts": [*texts[:18], [0] * 5, [0] * 5]}], "fp32")
    late = {"texts": [[*text[:4], 99] for text in texts]}
    assert generate.check_texts([same, late], "bf16") == 1.0
    with pytest.raises(SystemExit):
        generate.check_texts([same, late], "fp32")


@pytest.mark.parametrize("words", [["--k", "0"], ["--top-p", "0"], ["--runs", "0"], ["--new-tokens", "-1"]])
def test_bad_values(words, capsys):
    with pytest.raises(SystemExit) as stop:
        generate.parse(words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err
