"""docs/: commands, flags, links, anchors and named code exist, and every page stands in the site's list."""

import dataclasses
import re
from pathlib import Path

import pytest

from hpsafety import cli, config
from hpsafety.config import flag

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
OTHERS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
EXAMPLE = "shorten"  # the stage that add-a-stage.md adds
# Pages that name no command: lists of what docstrings say.
DOCS = [path for path in [*PAGES, ROOT / "docs" / "sft.sbatch"] if path.parent.name != "reference"]
LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")
CALL = re.compile(r"(?:-m |bin/|\bhpsafety:cpu |[`\s])hpsafety ([a-z][a-z-]*)((?:[^\n`\\]|\\\n)*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def flags_of(command: str, rest: str) -> set[str]:
    """The flags that `hpsafety command rest` may have."""
    own = {"--help", "--config"}
    names = [cli.COMMANDS[command][1]]
    if command == "profile":
        stage = rest.split()[0] if rest.split() else ""
        names = ["ProfileConfig", *([cli.COMMANDS[stage][1]] if stage in cli.COMMANDS else [])]
    for name in filter(None, names):
        for field in dataclasses.fields(getattr(config, name)):
            own |= {flag(field.name), "--no-" + flag(field.name)[2:]}
    return own


def faults(text: str) -> list[str]:
    out = []
    for call in CALL.finditer(text):
        command, rest = call[1], call[2]
        if command == EXAMPLE:
            continue
        if command not in cli.COMMANDS:
            out.append(f"no command {command!r}: {call[0].strip()}")
            continue
        unknown = set(FLAG.findall(rest)) - flags_of(command, rest)
        out += [f"{command} has no flag {word}: {call[0].strip()}" for word in sorted(unknown)]
    return out


# Flags of other programs that the text names on their own.
FOREIGN = {
    "--check",
    "--write",
    "--attention",
    "--gpus-per-node",
    "--cpus-per-task",
    "--shutdown-timeout",
    "--shm-size",
    "--ipc",
}


@pytest.mark.parametrize("path", [path for path in DOCS if path.suffix == ".md"], ids=lambda p: p.name)
def test_flags_named_on_their_own_exist(path):
    ours = set().union(*(flags_of(command, "") for command in cli.COMMANDS))
    named = set(re.findall(r"`(--[a-z][a-z-]+)", path.read_text(encoding="utf-8")))
    assert not named - ours - FOREIGN, named - ours - FOREIGN


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_commands_and_flags_exist(path):
    text = path.read_text(encoding="utf-8")
    assert CALL.search(text) and not faults(text), "\n".join(faults(text))


def anchors(path: Path) -> set[str]:
    """The ids a page's headings get."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in heads}


def broken(path: Path, text: str) -> list[str]:
    """Relative links of a page that lead nowhere."""
    out = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        to = (path.parent / name).resolve() if name else path
        if not to.exists() or (anchor and to.suffix == ".md" and anchor not in anchors(to)):
            out.append(target)
    return out


@pytest.mark.parametrize("path", [*PAGES, *OTHERS], ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    assert not broken(path, path.read_text(encoding="utf-8"))


def test_every_page_stands_in_the_sites_list():
    listed = re.findall(r"- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "docs")) for path in PAGES)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "reference").iterdir()), ids=lambda p: p.name)
def test_the_reference_names_what_there_is(path):
    import importlib

    names = re.findall(r"^::: (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert names
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert getattr(importlib.import_module(module), attribute).__doc__, name


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    import subprocess
    import sys

    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'class="doc ' in (tmp_path / "site" / "reference" / "ops.html").read_text(encoding="utf-8")


def test_the_check_itself():
    assert broken(ROOT / "README.md", "[a](docs/none.md) [b](docs/ppo.md#nowhere)") == [
        "docs/none.md",
        "docs/ppo.md#nowhere",
    ]
    assert not broken(ROOT / "README.md", "[a](docs/ppo.md#advantages) [b](https://example.org)")
    assert not faults("`hpsafety profile sft --model m --profile-steps 2` and torchrun -m hpsafety doctor")
    assert faults("torchrun -m hpsafety sft --model m \\\n  --modle x")
    assert faults(" hpsafety fly --high") and faults("`hpsafety doctor --all`")


def test_the_job_file_is_bash():
    import shutil
    import subprocess

    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    done = subprocess.run(["bash", "-n", str(ROOT / "docs" / "sft.sbatch")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
