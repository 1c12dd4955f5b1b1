"""The corpus audit end to end. The bug this file must catch: an interrupted audit counts a block twice or never."""

import dataclasses
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpsafety import cli
from hpsafety.config import AuditConfig
from hpsafety.data import corpus
from hpsafety.data.corpus import Place, corpus_files, documents, read_blocks
from hpsafety.errors import InputError, RunError
from hpsafety.safety import audit_job, audit_pool, toxicity
from hpsafety.safety.audit import language_identifier, language_of
from hpsafety.safety.audit_sample import sampling_key
from hpsafety.safety.audit_terms import find, load_lists
from hpsafety.stages import audit
from tests.stages.test_sft import ROOT

RESULTS = ("audit.json", "toxicity.jsonl", "faults.jsonl", "report.html")
WORDS = """she he they it was a good day in the town and her friend said that we should go to see the American painter
who is Christian and gay I think you are a stupid shit idiot the black walls were new of with for""".split()


def text(rng: random.Random) -> str:
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(0, 30))) for _ in range(rng.randint(1, 5))]
    return "\n".join(lines) or "x"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """240 documents in four files of four forms, a few of them in another language."""
    import pyarrow
    import pyarrow.parquet

    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(1)
    texts = [text(rng) + " end" for _ in range(240)]
    for i in range(0, 240, 9):
        texts[i] = "Dies ist ein deutscher Satz, der von einem langen Tag in der Stadt erzählt."
    rows = [json.dumps({"text": t}) + "\n" for t in texts]
    (folder / "a.jsonl").write_text("".join(rows[:90]))
    with gzip.open(folder / "b.json.gz", "wt") as handle:
        handle.writelines(rows[90:150])
    (folder / "c.txt").write_text("\n\n".join(t.replace("\n", " ") for t in texts[150:180]))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[180:]}), folder / "d.parquet", row_group_size=20)
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Some forty blocks, so that an audit of the corpus can be cut in many places."""
    monkeypatch.setattr(corpus, "BLOCK", 1500)
    monkeypatch.setattr(corpus, "ROWS", 8)


@pytest.fixture
def no_page(monkeypatch):
    """Figures take most of a small audit's time."""
    monkeypatch.setattr(audit, "write_page", lambda result, path: path.write_text("no page"))


def config(files, out, **changes) -> AuditConfig:
    return AuditConfig(
        **{"data": (str(files),), "out": str(out), "workers": 1, "toxicity_sample": 0.2} | changes
    )


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    """OUT of one audit by one process, with blocks of the usual size."""
    out = tmp_path_factory.mktemp("audit") / "out"
    audit.run(config(files, out))
    return out


def result_of(out) -> dict:
    return json.loads((Path(out) / "audit.json").read_text())


def assert_same(one: Path, other: Path, names=RESULTS) -> None:
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_every_number_made_again(files, whole):
    """AUD-2, AUD-4, AUD-5: the tables against a plain count of the documents, the sample against plain sorting."""
    import profanity_check

    found, lists = result_of(whole), load_lists()
    rows = [
        (block, line, t)
        for block in read_blocks(corpus_files([str(files)]), Place(), 10**7)
        for line, t in documents(block, 10**7)
    ]
    assert found["corpus"]["counts"]["documents"] == len(rows) == 240
    languages = [language_of(t, language_identifier()) for _, _, t in rows]
    assert found["languages"]["all"] == {name: languages.count(name) for name in found["languages"]["all"]}
    assert found["languages"]["all"].keys() == set(languages) >= {"en", "de"}
    listed = [*found["languages"]["listed"], found["languages"]["unknown"], found["languages"]["rarer"]]
    assert abs(sum(row["share"] for row in listed) - 1) < 1e-4
    english = [row for row, language in zip(rows, languages, strict=True) if language == "en"]
    for scope, part in (("all", rows), ("english", english)):
        mentions = [find(t, lists) for _, _, t in part]
        she = sum(("gender", "she") in m.groups for m in mentions)
        any_gender = sum(any(f == "gender" for f, _ in m.groups) for m in mentions)
        row = found["pronouns"][scope]["families"]["gender"]["groups"]["she"]
        assert row["of_documents"] == {"count": she, "of": len(part), "share": she / len(part)}
        assert row["of_family"] == {"count": she, "of": any_gender, "share": she / any_gender}
        american = sum(("nationality", "american") in m.terms for m in mentions)
        assert found["identity"][scope]["axes"]["nationality"]["terms"] == {"american": american}
        assert "black" not in json.dumps(found["identity"])
    # AUD-4: the smallest keys are the sample, each score the mean of its lines.
    size = int(0.2 * len(english) + 0.5)
    keys = sorted((sampling_key(0, block.file, line), block.path, line, t) for block, line, t in english)[
        :size
    ]
    sampled = [json.loads(line) for line in (whole / "toxicity.jsonl").read_text().splitlines()]
    assert {(row["file"], row["line"]) for row in sampled} == {(path, line) for _, path, line, _ in keys}
    places = {(path, line): t for _, path, line, t in keys}
    for row in sampled:
        lines = [line for line in places[row["file"], row["line"]].split("\n") if line.strip()]
        own = profanity_check.predict_prob(lines)
        assert row["lines"] == len(lines) and abs(row["score"] - sum(own) / len(own)) < 1e-6
    toxic = sum(row["score"] >= 0.5 for row in sampled)
    told = found["toxicity"]
    assert (told["documents"], told["share"]["count"], told["population_documents"]) == (
        size,
        toxic,
        len(english),
    )
    assert told["share"]["value"] == toxic / size and sum(told["histogram"]) == size and 0 < toxic < size
    assert told["mean"] == pytest.approx(sum(row["score"] for row in sampled) / size, abs=1e-9)


def test_names_and_checksums(files, whole):
    """AUD-6: judges stand beside their numbers, the manifest holds the hashes of all inputs, which did not change."""
    found = result_of(whole)
    assert found["toxicity"]["judge"].startswith("alt-profanity-check 1.9.1")
    assert (
        found["languages"]["judge"].startswith("py3langid")
        and found["pronouns"]["judge"] == found["identity"]["judge"]
    )
    manifest = json.loads((whole / "manifest.json").read_text())
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files.iterdir()}
    assert (
        hashes.items() <= manifest["input_hashes"].items() and "terms/drop.toml" in manifest["input_hashes"]
    )
    outputs = {name: hashlib.sha256((whole / name).read_bytes()).hexdigest() for name in RESULTS}
    assert (
        manifest["output_hashes"] == outputs and manifest["counts"]["documents"] == 240 and manifest["ended"]
    )
    page = (whole / "report.html").read_text()
    for part in ("languages", "pronouns", "identity", "toxicity"):
        assert found["tools"].get(part, "whole words").split(",")[0].replace("'", "&#39;") in page
    assert page.count('<svg role="img" aria-label="') == 5 and "<script" not in page
    assert sorted(p.name for p in whole.iterdir()) == sorted([*RESULTS, "log.txt", "manifest.json"])


@pytest.mark.slow
def test_workers_change_no_byte(files, whole, tmp_path):
    audit.run(config(files, tmp_path / "three", workers=3))
    assert_same(tmp_path / "three", whole)


def test_the_seed_draws_the_sample(files, whole, tmp_path, no_page):
    audit.run(config(files, tmp_path / "other", seed=1))
    assert (tmp_path / "other" / "toxicity.jsonl").read_bytes() != (whole / "toxicity.jsonl").read_bytes()
    for name in ("languages", "pronouns", "identity", "corpus"):
        assert result_of(tmp_path / "other")[name] == result_of(whole)[name]


@pytest.mark.parametrize("name, count", [("measure_block", 0), ("measure_block", 23), ("score_block", 11)])
def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(
    files, whole, tmp_path, monkeypatch, no_page, name, count
):
    cfg, real = config(files, tmp_path / "cut"), getattr(audit_job, name)
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == count + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(audit_job, name, counted)
    with pytest.raises(
        KeyboardInterrupt, match="what is counted is kept in .*cut: run the same command again"
    ):
        audit.run(cfg)
    calls.clear()
    calls += [1] * 1000
    audit.run(cfg)
    assert_same(tmp_path / "cut", whole, RESULTS[:3])
    assert ("resumed: " in (tmp_path / "cut" / "log.txt").read_text()) == (count > 0)


SCRIPT = """
import json, os, signal, sys
from hpsafety.config import AuditConfig
from hpsafety.data import corpus
from hpsafety.safety import audit_job
from hpsafety.stages import audit
corpus.BLOCK, corpus.ROWS, audit_job.SAVE_S = 1500, 8, 0.0
real, calls = audit_job.save_state, []
def save(*args):
    real(*args)
    calls.append(1)
    if len(calls) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
audit_job.save_state = save
audit.run(AuditConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[1]).items()}))
"""


def test_killed_two_workers_go_on_to_the_same_bytes_and_leave_no_process(files, whole, tmp_path):
    """kill -9 of the parent while two workers count: they end too. The same command goes on, with the bytes of one."""
    cfg = config(files, tmp_path / "cut", workers=2)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", SCRIPT, json.dumps(dataclasses.asdict(cfg))]
    # communicate() waits for the end of the pipes, which the workers hold too.
    killed = subprocess.run(words, capture_output=True, text=True, timeout=600, env=env, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "cut" / "audit.json").exists()
    with open(tmp_path / "cut" / "faults.jsonl", "a") as handle:
        handle.write('{"half a line')
    audit.run(cfg)
    assert "resumed: counting" in (tmp_path / "cut" / "log.txt").read_text()
    assert_same(tmp_path / "cut", whole)


def test_a_complete_audit_is_left_alone(files, whole, capsys):
    before = (whole / "audit.json").stat().st_mtime_ns
    audit.run(config(files, whole, workers=2, keep_going=True))  # neither changes what was found
    assert "nothing to do" in capsys.readouterr().err and before == (whole / "audit.json").stat().st_mtime_ns
    with pytest.raises(InputError, match=r"another config \(seed was 0, now 5\)"):
        audit.run(config(files, whole, seed=5))


# ---- bad input ----


@pytest.fixture
def broken(tmp_path) -> Path:
    """A corpus with one fault of every kind, 20 good documents and a file behind the broken one."""
    folder = tmp_path / "broken"
    folder.mkdir()
    good = [json.dumps({"text": f"She said it was day {i} in the town."}).encode() for i in range(20)]
    bad = [
        b'{"text": "\xff\xfe"}',
        b'{"text": ""}',
        b'{"txt": "<b>x</b>"}',
        b'{"text": "' + b"y" * 30_000 + b'"}',
    ]
    lines = [*good[:5], bad[0], *good[5:8], bad[1], bad[2], *good[8:10], bad[3]]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    packed = gzip.compress(b"\n".join(good[10:15]) + b"\n") + gzip.compress(b"\n".join(good * 20))
    (folder / "b.jsonl.gz").write_bytes(packed[:-9])
    (folder / "c.jsonl").write_bytes(b"\n".join(good[15:]))
    return folder


def test_broken_input_is_counted_and_named(broken, tmp_path):
    """Every kind of fault under --keep-going: counted, named with FILE:LINE, and in the report; the rest is whole."""
    out = tmp_path / "out"
    audit.run(config(broken, out, keep_going=True, max_line="20KB"))
    found = result_of(out)["corpus"]
    kinds = ("broken encoding", "empty document", "broken record", "giant line", "broken file")
    assert {kind: found["faults"][kind]["count"] for kind in found["faults"]} == dict.fromkeys(kinds, 1)
    named = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    a, b = broken / "a.jsonl", broken / "b.jsonl.gz"
    starts = [f"{a}:6: not UTF-8", f'{a}:10: field "text" is empty', f'{a}:11: field "text" is missing',
              f"{a}:14: a line of more than 20,480 bytes", f"{b}: broken after line "]  # fmt: skip
    assert [row["kind"] for row in named] == list(kinds)
    assert all(row["message"].startswith(start) for row, start in zip(named, starts, strict=True)), named
    after = int(named[-1]["message"].split("after line ")[1].split(":")[0])
    assert found["counts"]["documents"] == 10 + after + 5
    assert [found["faults"][kind]["first"][0] for kind in kinds] == [row["message"] for row in named]
    page = (out / "report.html").read_text()
    assert "What could not be measured" in page and all(kind in page for kind in kinds)


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_input_ends_the_audit(broken, tmp_path, workers):
    """Without --keep-going the first fault in order stops it, whichever worker is first; nothing is half-written."""
    with pytest.raises(
        InputError, match=r"a.jsonl:6: not UTF-8.*\. --keep-going counts and names such input"
    ):
        audit.run(config(broken, tmp_path / "out", workers=workers, max_line="20KB"))
    assert not (tmp_path / "out").exists()


def test_it_goes_on_from_the_fault_with_keep_going(broken, tmp_path, monkeypatch, no_page):
    """What was counted before the fault is kept; the same command with --keep-going takes it up, and one without
    refuses what has been counted with it."""
    monkeypatch.setattr(corpus, "BLOCK", 200)
    cfg, out = config(broken, tmp_path / "out", max_line="20KB"), tmp_path / "out"
    with pytest.raises(InputError, match="a.jsonl:6"):
        audit.run(cfg)
    assert (out / "state.json").exists() and not (out / "audit.json").exists()
    real, calls = audit_job.measure_block, []

    def counted(*args, **kwargs):
        calls.append(args[0].first)
        if args[0].file == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(audit_job, "measure_block", counted)
    with pytest.raises(KeyboardInterrupt):
        audit.run(dataclasses.replace(cfg, keep_going=True))
    assert calls[0] > 1
    monkeypatch.setattr(audit_job, "measure_block", real)
    with pytest.raises(InputError, match="a.jsonl:6: not UTF-8.*keep-going"):
        audit.run(cfg)
    audit.run(dataclasses.replace(cfg, keep_going=True))
    audit.run(config(broken, tmp_path / "whole", keep_going=True, max_line="20KB"))
    assert_same(out, tmp_path / "whole")


def test_a_corpus_that_changes_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "They went to the old town on a long day."}\n' * 3)
    real = audit_job.score_block

    def change(*args, **kwargs):
        (tmp_path / "a.jsonl").write_text("x")
        return real(*args, **kwargs)

    monkeypatch.setattr(audit_job, "score_block", change)
    with pytest.raises(RunError, match="was changed while it was read"):
        audit.run(config(tmp_path / "a.jsonl", tmp_path / "out", toxicity_sample=1.0))


def test_nothing_to_measure(tmp_path):
    """A corpus without documents has shares of None and no figure; a file that is empty is no fault."""
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "b.txt").write_text("")
    cfg = config(
        tmp_path / "a.jsonl", tmp_path / "out", data=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt"))
    )
    audit.run(cfg)
    found = result_of(tmp_path / "out")
    assert found["corpus"]["counts"]["documents"] == 0 and found["toxicity"]["share"]["value"] is None
    assert (
        found["languages"]["unknown"]["share"] is None
        and "nan" not in (tmp_path / "out" / "audit.json").read_text()
    )


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(RunError, match="a worker process ended before its work was done"):
        with audit_pool.processes(2) as pool:
            list(audit_pool.in_order(os._exit, range(5, 10), pool))


def test_command_line(files, tmp_path, capsys, monkeypatch):
    """Flags reach the audit; wrong ones, torchrun and a missing package are one line."""
    words = ["audit", "--data", str(files / "a.jsonl"), "--out", str(tmp_path / "out")]
    for more, message in (
        (["--toxicity-sample", "1.5"], "--toxicity-sample must be from 0 to 1, got 1.5"),
        (["--max-line", "long"], "--max-line must be a size such as 16MB"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--classifier", str(tmp_path / "none")], "cannot be loaded"),
        (["--data", str(tmp_path / "none.jsonl")], "none.jsonl: no such file"),
    ):
        assert cli.main([*words, *more]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("hpsafety audit: ") and message in error
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(words) == 2 and "without torchrun" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    toxicity.load_classifier.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(words) == 2 and 'pip install "hpsafety[audit]"' in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main([*words, "--toxicity-sample", "0.5", "--seed", "7", "--workers", "1"]) == 0
    assert result_of(tmp_path / "out")["toxicity"]["fraction"] == 0.5
    out = capsys.readouterr().out
    assert all(title in out for title in ("languages", "pronouns", "identity terms", "toxicity"))


def test_an_audit_of_public_documents(shared_data, tmp_path, no_page):
    """c4_demo_docs: nearly all English, a tenth of it scored, nothing filtered."""
    audit.run(config(shared_data / "c4_demo_docs.jsonl", tmp_path / "out", toxicity_sample=0.1))
    found = result_of(tmp_path / "out")
    assert (
        found["corpus"]["counts"]["documents"] == 300 and found["languages"]["listed"][0]["language"] == "en"
    )
    assert found["toxicity"]["documents"] == int(0.1 * found["corpus"]["counts"]["english_documents"] + 0.5)
    person = found["pronouns"]["english"]["families"]["person"]["groups"]
    assert 0.5 < person["first"]["of_documents"]["share"] < 0.9
