"""Commands and flags of hpsafety that docs/ mentions exist."""

import dataclasses
import re
from pathlib import Path

import pytest

from hpsafety import cli, config
from hpsafety.config import flag

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(path for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".sbatch"))
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
    assert named and not named - ours - FOREIGN, named - ours - FOREIGN


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_commands_and_flags_exist(path):
    text = path.read_text(encoding="utf-8")
    assert CALL.search(text) and not faults(text), "\n".join(faults(text))


def test_the_check_itself():
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
