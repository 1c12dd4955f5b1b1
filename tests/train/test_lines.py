"""JSON lines in, JSON lines out. The bug this file must catch: a line done twice, lost or out of order after a kill."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hpsafety.errors import InputError
from hpsafety.train import lines
from hpsafety.train.distributed import World
from hpsafety.train.lines import LineJob

COUNT = 23


@dataclass(frozen=True)
class Config:
    out: str
    data: tuple[str, ...]
    factor: int = 2
    resume: bool = True
    seed: int = 0


def world(rank=0, size=1) -> World:
    return World(rank, size, torch.device("cpu"))


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    """The ranks of a test take turns in one process, so nobody waits for them."""
    monkeypatch.setattr(lines.distributed, "barrier", lambda world: None)
    files = []
    for name, rows in (("a", range(10)), ("b", range(10, COUNT))):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"prompt {i}", "id": i}) + "\n" for i in rows))
        files.append(str(path))
    return Config(str(tmp_path / "out.jsonl"), tuple(files))


def job(config, at=None, extra=None) -> LineJob:
    made = LineJob("double", config, config.data, "prompt", extra or {}, at or world())
    if not made.complete:
        made.open(config.resume)
    return made


def work(made, config, limit=COUNT, backwards=False) -> list[int]:
    seen = list(made.rows())[:limit]
    for index, row in reversed(seen) if backwards else seen:
        made.add(index, {"id": row["id"], "value": config.factor * row["id"]})
    return [index for index, _ in seen]


def results(config) -> list[dict]:
    return [json.loads(line) for line in Path(config.out).read_text().splitlines()]


EXPECTED = [{"id": i, "value": 2 * i} for i in range(COUNT)]


def test_results_stand_in_input_order_whatever_order_they_came_in(config):
    made = job(config)
    assert work(made, config, backwards=True) == list(range(COUNT))
    made.finish({"doubled": COUNT})
    assert results(config) == EXPECTED
    manifest = json.loads(Path(config.out + ".manifest.json").read_text())
    assert manifest["counts"] == {"lines": COUNT, "doubled": COUNT} and manifest["ended"]
    assert sorted(manifest["input_hashes"]) == ["a.jsonl", "b.jsonl"]
    assert not Path(config.out + ".part").exists()
    assert LineJob("double", config, config.data, "prompt", {}, world()).complete


def test_goes_on_after_a_kill_with_any_number_of_ranks(config):
    """Three ranks do part of it, one of them dies within a line; two go on; then one ends it."""
    first = [work(job(config, world(r, 3)), config, limit=3 + r) for r in range(3)]
    part = Path(config.out + ".part") / "rank-1.jsonl"
    text = part.read_bytes()
    part.write_bytes(text[:-9])  # its last line is half written
    lost = first[1].pop()
    jobs = [LineJob("double", config, config.data, "prompt", {}, world(r, 2)) for r in range(2)]
    for made in jobs:
        made.open(True)
    second = [work(made, config, limit=4) for made in jobs]
    assert lost in second[0] + second[1]
    made = job(config)
    work(made, config)
    made.finish({})
    assert results(config) == EXPECTED


def test_ranks_share_the_lines_evenly(config):
    parts = [[i for i, _ in job(config, world(r, 4)).rows()] for r in range(4)]
    assert sorted(sum(parts, [])) == list(range(COUNT)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_another_config_is_refused_and_no_resume_starts_anew(config):
    made = job(config)
    work(made, config, limit=5)
    made.close()
    other = Config(config.out, config.data, factor=3)
    with pytest.raises(InputError, match="factor was 2, now 3"):
        job(other)
    with pytest.raises(InputError, match="data .*rm"):
        job(config, extra={"rm": "other"})
    anew = Config(config.out, config.data, factor=3, resume=False)
    made = job(anew)
    assert len(work(made, anew)) == COUNT
    made.finish({})
    assert [row["value"] for row in results(config)] == [3 * i for i in range(COUNT)]


def test_two_files_of_one_name_are_told_apart(config, tmp_path):
    """The first of them must not drop out of the checksums."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text(json.dumps({"prompt": folder, "id": 1}) + "\n")
    data = tuple(str(tmp_path / folder / "rows.jsonl") for folder in ("one", "two"))
    twins = Config(config.out, data)
    job(twins).close()
    Path(data[0]).write_text(json.dumps({"prompt": "other", "id": 2}) + "\n")
    with pytest.raises(InputError, match="data .*one/rows.jsonl"):
        job(twins)


def test_rows_are_checked_and_found_by_place(config):
    """A check's error names the file and line; so does `place`, over blank lines and files."""
    with open(config.data[0], "a") as handle:
        handle.write("\n" + json.dumps({"prompt": "late", "id": 99}) + "\n")
    made = LineJob("double", config, config.data, "prompt", {}, world())
    assert made.place(10) == f"{config.data[0]}:12" and made.place(11) == f"{config.data[1]}:1"

    def check(row):
        if row["id"] == 99:
            raise InputError("is late")

    with pytest.raises(InputError, match="a.jsonl:12: is late"):
        made.check_rows(check)


def test_a_bad_line_is_found_before_any_work(config):
    with open(config.data[1], "a") as handle:
        handle.write('{"id": 3}\n')
    with pytest.raises(InputError, match=r'b.jsonl:14: field "prompt" is missing'):
        job(config)
    assert not Path(config.out + ".part").exists()
