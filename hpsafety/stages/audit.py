"""The corpus safety audit (spec section 1, AUD-1 to AUD-6): languages, pronouns, identity terms, toxicity.

OUT/audit.json        every measure with its counts, denominators, sample sizes and the tools behind it
    report.html       the same with figures
    toxicity.jsonl    the sampled documents by place in the corpus, each with its number of lines and its score
    faults.jsonl      every piece of broken input that --keep-going counted
    manifest.json     checksums of the corpus, the word lists and the outputs

It runs on processes of its own (--workers), not under torchrun. While it works, state.json says how far it has come.
"""

import json
import logging
import os
import shutil
import time
from pathlib import Path

from hpsafety.data.corpus import corpus_files
from hpsafety.errors import InputError
from hpsafety.files import atomic_write
from hpsafety.safety.audit import identifier_name
from hpsafety.safety.audit_job import FAULTS, SAMPLE, STATE, Audit, State, load_state
from hpsafety.safety.audit_page import show_tables, write_page
from hpsafety.safety.audit_pool import cores
from hpsafety.safety.audit_report import summarise, write_sample
from hpsafety.safety.audit_terms import list_hashes
from hpsafety.safety.toxicity import INSTALL, load_classifier
from hpsafety.train import stage
from hpsafety.train.metrics import peak_rss_mb, say
from hpsafety.train.rundir import tree_hashes

OUTPUTS = ("audit.json", "report.html", "toxicity.jsonl", FAULTS)
MB_PER_WORKER = 4  # a process takes a second to start, and counts about as much in it
log = logging.getLogger("hpsafety")


def run(cfg) -> None:
    """hpsafety audit: see AuditConfig. Writes the files named above to cfg.out."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            "an audit runs on processes of its own: start it without torchrun, and see --workers"
        )
    with stage.ranks("cpu") as world:
        _run(cfg, world)


def _run(cfg, world) -> None:
    files = corpus_files(cfg.data)
    try:
        tools = {
            "language": identifier_name(),
            "toxicity": load_classifier(cfg.classifier, cfg.toxic_label).name,
        }
    except ModuleNotFoundError as error:
        raise InputError(f"an audit needs the package {error.name}: {INSTALL}") from None
    size = sum(path.stat().st_size for path in files) / 1e6
    say(f"audit: checksums of {len(files)} files, {size:,.1f} MB")
    classifier = Path(cfg.classifier)
    model = tree_hashes(classifier) if classifier.is_dir() else {}
    out = stage.run_directory(cfg, "audit", files, world, list_hashes() | model)
    if out is None:
        return
    made = not out.path.exists()
    state = None if out.fresh else load_state(out.path)
    workers = cfg.workers or min(cores(), 1 + int(size) // MB_PER_WORKER)
    stage.begin(
        out, f"audit: {len(files)} files, {size:,.1f} MB, {workers} processes; {tools['toxicity']}", {}, world
    )
    if state is None:
        for name in (*OUTPUTS, STATE, SAMPLE):
            (out.path / name).unlink(missing_ok=True)
        state = State()
    else:
        log.info("resumed: %s, file %d, line %d", "scoring" if state.scoring else "counting", *_place(state))
    started, before = time.monotonic(), state.counts.bytes
    try:
        sample = Audit(cfg, files, out.path, workers, state).run()
    except InputError:
        if made and state.fresh:  # nothing was counted that the same command could go on from
            shutil.rmtree(out.path)
        raise
    seconds = time.monotonic() - started
    write_sample(out.path, sample)
    result = summarise(state, out.path, cfg, tools, [str(path) for path in files])
    with atomic_write(out.path / "audit.json") as handle:
        json.dump(result, handle, ensure_ascii=False, indent=1, allow_nan=False)
    write_page(result, out.path / "report.html")
    show_tables(result)
    out.finish(result["corpus"]["counts"], OUTPUTS)
    for name in (STATE, SAMPLE):
        (out.path / name).unlink(missing_ok=True)
    out.checkpoints.rmdir()  # an audit has none
    read = (state.counts.bytes - before) / 1e6
    say(
        f"audit: {read:,.1f} MB of text in {seconds:.1f} s, {read / seconds:.1f} MB/s; {peak_rss_mb():.0f} MB at most"
    )
    say(f"audit: wrote {out.path / 'report.html'} and audit.json")


def _place(state: State) -> tuple[int, int]:
    return state.place.file + 1, state.place.line
