"""Design section 2: imports go downwards only, nobody takes the bare name triton_kernels, and files stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What each room of the package stands on. Rooms of one line never import each other; those of the last line may.
LAYERS = [
    {"errors", "files", "config"},
    {
        "config_audit",
        "config_gatt",
        "config_ppo",
        "config_report",
        "config_sampling",
        "config_scaling",
        "config_tools",
    },
    {"config_distill", "config_eval", "config_pipeline", "config_redteam"},
    {"reference", "triton_kernels", "_C"},
    {"cuda_kernels"},  # of triton_kernels it takes attention_tiles, which knows nothing of Triton
    {"ops"},
    {"model", "data"},
    {"train", "rollout"},
    {"safety"},
    {"stages"},
    {
        "pipeline",
        "pipeline_file",
        "pipeline_plan",
        "pipeline_sizes",
        "pipeline_state",
        "pipeline_work",
        "planner",
        "report",
        "demo",
        "demo_parts",
        "scaling",
        "chat",
        "profile",
        "flags",
        "doctor",
        "doctor_ranks",
        "bench_command",
        "cli",
        "__main__",
    },
]
MAX_LINES = 400
TEST_ONLY = {"transformers", "trl", "pytest", "hypothesis"}
OTHERS_MODELS = {
    "hpsafety.safety.hf_classifier": "transformers"
}  # runs a classifier that is not ours, by a flag


def room(module: str) -> str:
    """'hpsafety.ops.rope' -> 'ops'; 'hpsafety' itself -> ''."""
    return module.partition(".")[2].split(".")[0]


def level(name: str) -> int:
    return next((index for index, layer in enumerate(LAYERS) if name in layer), -1)


def imports(path: Path, module: str, source: str | None = None) -> set[str]:
    """Modules a file imports, at any depth of nesting; `from hpsafety.ops import rope` counts as hpsafety.ops.rope."""
    found = set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if source is None else source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{stem}.{alias.name}" for alias in node.names}
    return found


def package_files() -> dict[str, Path]:
    """Module name -> file, of hpsafety and of triton_kernels, which is imported as hpsafety.triton_kernels."""
    out = {}
    for folder, prefix in (("hpsafety", ""), ("triton_kernels", "hpsafety.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            out[prefix + ".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


def wrong_import(module: str, imported: str) -> str | None:
    """Why `module` must not import `imported`; None when it may."""
    top = imported.split(".")[0]
    if top == "triton_kernels":
        return "the bare name triton_kernels belongs to another package; use hpsafety.triton_kernels"
    if top in ("bench", "tests"):
        return f"nobody imports {top}; hpsafety/bench_command.py loads it by name"
    if top in TEST_ONLY and OTHERS_MODELS.get(module) != top:
        return f"{top} is a test dependency"
    if top != "hpsafety" or imported == "hpsafety" or room(module) == "":
        return None
    mine, theirs = room(module), room(imported)
    if level(theirs) < 0:  # a name of the package itself, as __version__
        return None if theirs.startswith("__") else f"{theirs} is no room of LAYERS, or a lazy name"
    if mine == theirs == "stages":
        return None if module.split(".")[:3] == imported.split(".")[:3] else "stages never import each other"
    if mine == theirs or level(theirs) < level(mine):
        return None
    if level(mine) == level(theirs) == len(LAYERS) - 1 or (
        level(mine) == level(theirs) == 0 and theirs == "errors"
    ):
        return None
    return f"{mine} may not import {theirs}"


def test_imports_go_downwards():
    modules = package_files()
    faults = []
    for module, path in modules.items():
        if room(module) and level(room(module)) < 0:
            faults.append(f"{path.relative_to(ROOT)}: {room(module)} has no place in LAYERS")
        for imported in sorted(imports(path, module)):
            why = wrong_import(module, imported)
            if why:
                faults.append(f"{path.relative_to(ROOT)} imports {imported}: {why}")
    assert len(modules) > 10 and not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "module, source, ok",
    [
        ("hpsafety.model.llama", "import hpsafety.data.groups", False),
        ("hpsafety.data.groups", "def f():\n    from ..model import io", False),
        ("hpsafety.ops.rope", "from hpsafety import train", False),
        ("hpsafety.train.step", "from hpsafety.rollout import engine", False),
        ("hpsafety.stages.sft", "from hpsafety.stages import ppo", False),
        ("hpsafety.stages.sft", "import triton_kernels.rope", False),
        ("hpsafety.safety.judges", "from transformers import AutoModel", False),
        ("hpsafety.safety.hf_classifier", "import transformers", True),
        ("hpsafety.safety.hf_classifier", "import trl", False),
        ("hpsafety.files", "from hpsafety import ops", False),
        ("hpsafety.train.step", "from hpsafety import load_model", False),
        ("hpsafety.cli", "from bench.harness import run", False),
        ("hpsafety.demo", "from hpsafety.stages import sft\nfrom hpsafety import report", True),
        ("hpsafety.train.step", "from hpsafety.data.groups import pack\nimport torch", True),
        ("hpsafety.cli", "from hpsafety import __version__, doctor", True),
        ("hpsafety.ops.rope", "from hpsafety.triton_kernels import rope", True),
    ],
)
def test_the_rule_itself(module, source, ok):
    faults = [wrong_import(module, name) for name in imports(Path("x.py"), module, source)]
    assert (not any(faults)) == ok, faults


def test_nobody_imports_bare_triton_kernels():
    """Also outside the package: with the repository root on sys.path the bare name would work by accident."""
    for folder in ("tests", "bench", "make"):
        for path in (ROOT / folder).rglob("*.py"):
            names = {name.split(".")[0] for name in imports(path, path.stem)}
            assert "triton_kernels" not in names, path.relative_to(ROOT)


def source_files() -> list[Path]:
    folders = ("hpsafety", "csrc", "triton_kernels", "tests", "bench", "make")
    endings = {".py", ".cpp", ".h", ".cu", ".cuh", ".sh"}
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in endings]
    return [*inside, ROOT / "setup.py", ROOT / "Makefile"]


def test_no_file_exceeds_400_lines_without_a_reason():
    files = source_files()
    long = {path: path.read_text(encoding="utf-8").splitlines() for path in files}
    faults = [
        f"{path.relative_to(ROOT)}: {len(lines)} lines; split it, or say why at its top: 'over 400 lines: ...'"
        for path, lines in long.items()
        if len(lines) > MAX_LINES and "over 400 lines:" not in "\n".join(lines[:10])
    ]
    assert len(files) > 20 and not faults, "\n".join(faults)


def test_every_room_is_a_package():
    """setuptools leaves a folder without __init__.py out of a wheel; from the source tree nobody notices."""
    rooms = {path.parent for path in (ROOT / "hpsafety").rglob("*.py") if "triton_kernels" not in path.parts}
    assert rooms and not [str(room) for room in rooms if not (room / "__init__.py").exists()]
