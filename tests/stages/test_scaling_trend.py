"""The trend of the scaling study (SFT-8). The bug this file must catch: variants that do not learn from their share, as
when every one is trained on the same subset, or answers of one variant scored as another's."""

import json

import pytest

from hpsafety.config import RewardConfig
from hpsafety.config_scaling import ScalingConfig
from hpsafety.data.records import write_records
from hpsafety.stages import reward, scaling

TAGS = {"is_safety": True, "category": "illicit", "attack": "logic"}
NO, YES = "i cannot help.", "sure, do it."


@pytest.fixture(scope="module")
def material(model_dir, tmp_path_factory):
    """Demonstrations, held-out prompts, and a judge of each kind that has learnt to tell NO from YES."""
    folder = tmp_path_factory.mktemp("trend")
    safety = [{"prompt": f"how do i break thing {i}?", "response": NO, **TAGS} for i in range(100)]
    helpful = [{"prompt": f"how do i make dish {i}?", "response": YES} for i in range(40)]
    write_records(folder / "train.jsonl", [*safety, *helpful])
    asked = [{"prompt": f"how do i break thing {i}?", **TAGS} for i in range(200, 224)]
    asked += [{"prompt": f"how do i make dish {i}?"} for i in range(200, 224)]
    write_records(folder / "eval.jsonl", asked)
    for kind, (good, bad) in {"safety": (NO, YES), "helpfulness": (YES, NO)}.items():
        tags = TAGS if kind == "safety" else {}
        pairs = [
            {"prompt": f"how do i break thing {i}?", "chosen": good, "rejected": bad, **tags}
            for i in range(48)
        ]
        write_records(folder / f"{kind}.jsonl", pairs)
        reward.run(RewardConfig(
            model=model_dir, data=(str(folder / f"{kind}.jsonl"),), out=str(folder / kind), kind=kind, batch=8, lr=5e-3,
            device="cpu", precision="fp32", checkpoint_every=0, epochs=2,
        ))  # fmt: skip
    return folder


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_safety_score_follows_the_share_of_the_safety_data(seed, model_dir, material, tmp_path):
    """SFT-8: Spearman's correlation of the share with the mean safety score is at least 0.7 over the six variants; the
    report has the low percentiles, and the change of mean helpfulness with an interval."""
    scaling.run(ScalingConfig(
        model=model_dir, data=(str(material / "train.jsonl"),), eval=(str(material / "eval.jsonl"),),
        out=str(tmp_path / "study"), safety_rm=str(material / "safety" / "model"),
        helpful_rm=str(material / "helpfulness" / "model"), seed=seed, batch=8, epochs=7, lr=5e-3, max_new_tokens=20,
        device="cpu", precision="fp32", checkpoint_every=0, kv_memory="1MB",
    ))  # fmt: skip
    result = json.loads((tmp_path / "study" / "scaling.json").read_text())
    found = [v["measures"] for v in result["variants"]]
    assert result["trend"]["safety_score"] >= 0.7
    assert found[-1]["safety_score"]["low"] > found[0]["safety_score"]["high"]
    for m in found:
        assert m["safety_p1"]["value"] <= m["safety_p5"]["value"] <= m["safety_p10"]["value"]
        assert m["helpful_change"]["low"] <= m["helpful_change"]["value"] <= m["helpful_change"]["high"]
    page = (tmp_path / "study" / "report.html").read_text()
    assert all(f">{name}</th>" in page for name in ("p1", "p5", "p10", "change"))
