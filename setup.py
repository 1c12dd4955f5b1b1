"""Build of hpsafety: `hpsafety._C` (schemas, build information), one kernel library per CPU capability, and, where nvcc
is, libhpsafety_cuda.so.

Every file of csrc/cpu is compiled once per capability, with the compiler flags and with the CPU_CAPABILITY macros
that at::vec looks at (without the macros it silently falls back to generic code). `hpsafety.ops.backends` loads the
one that fits the running CPU. Without a compiler the package installs all the same and serves the reference ops.

The files of csrc/cuda know nothing of torch or Python: they are compiled for each chip of CUDA_ARCHS, on machines
without a GPU too, and opened by hpsafety/cuda_kernels/library.py at the first call.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mavx2", "-mf16c"],
}
CUDA = ROOT / "csrc" / "cuda"
CUDA_ARCHS = ("80", "90a")
CUDA_CODE = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC"]


def nvcc() -> str | None:
    """CUDA's compiler: HPSAFETY_NVCC, or the one on the path or in CUDA_HOME; None where there is none."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which(os.environ.get("HPSAFETY_NVCC") or "nvcc") or shutil.which(f"{home}/bin/nvcc")


def cuda_texts(source: Path) -> dict[str, str]:
    """A file of csrc/cuda and the headers beside it: name -> text."""
    return {path.name: path.read_text(encoding="utf-8") for path in (source, *sorted(CUDA.glob("*.cuh")))}


def cuda_objects(program: str, folder: Path, jobs: int) -> dict[Path, Path]:
    """Every file of csrc/cuda and its object, with code for all of CUDA_ARCHS, compiled where it is not in `folder`."""
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        texts = [part for pair in cuda_texts(source).items() for part in pair]
        parts = "\0".join([version, *CUDA_CODE, *CUDA_FLAGS, source.name, *texts])
        path = folder / f"{source.stem}.{hashlib.sha256(parts.encode()).hexdigest()[:16]}.o"
        if not path.exists():
            fresh = path.with_suffix(f".{os.getpid()}")
            subprocess.run(
                [program, *CUDA_FLAGS, *CUDA_CODE, "-c", str(source), "-o", str(fresh)], check=True
            )
            fresh.replace(path)
        return path

    sources = sorted(CUDA.glob("*.cu"))
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(sources, pool.map(compile_one, sources), strict=True))


def build_cuda(out: Path, folder: Path, jobs: int) -> bool:
    """Links csrc/cuda into the library `out`; objects are kept in `folder` by content. False without nvcc."""
    program = nvcc()
    if os.environ.get("HPSAFETY_CUDA") == "0" or program is None:
        why = "HPSAFETY_CUDA=0 is set" if program else (
            "no nvcc found; the CUDA toolkit brings one (developer.nvidia.com/cuda-downloads), or 'pip install "
            "nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl', and HPSAFETY_NVCC names it"
        )  # fmt: skip
        print(f"hpsafety: going without the CUDA kernels ({why}); the Triton kernels serve on a GPU")
        return False
    objects = [str(path) for path in cuda_objects(program, folder, jobs).values()]
    record = folder / f"{out.parent.name}.{out.name}.objects"
    if out.exists() and record.exists() and record.read_text() == "\n".join(objects):
        return True
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_suffix(f".{os.getpid()}")
    link = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL", *CUDA_CODE]
    subprocess.run([program, *link, *objects, "-o", str(fresh)], check=True)
    fresh.replace(out)
    record.write_text("\n".join(objects))
    return True


def compiler() -> str | None:
    """The C++ compiler that will be used, or None."""
    named = os.environ.get("CXX")
    return (
        shutil.which(named)
        if named
        else shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    )


def openmp_flags() -> tuple[list[str], list[str]]:
    if (
        sys.platform == "darwin"
    ):  # Apple's clang has no -fopenmp of its own; at::parallel_for then runs serially
        return ["-Wno-unknown-pragmas"], []
    return ["-fopenmp"], ["-fopenmp"]


def capabilities() -> dict[str, list[str]]:
    """Capability name -> extra compiler flags."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return {
            name: [*flags, f"-DCPU_CAPABILITY={name.upper()}", f"-DCPU_CAPABILITY_{name.upper()}"]
            for name, flags in X86.items()
        }
    return {"default": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]}


def extensions() -> list[Extension]:
    from torch.utils.cpp_extension import CppExtension

    compile_openmp, link_openmp = openmp_flags()
    common = [
        "-O3",
        "-g0",
        "-std=c++20",
        "-fno-math-errno",
        "-ffp-contract=off",  # a multiply-add is fused only where the source says so: the same bits on every CPU
        "-Wno-psabi",
        "-fvisibility=hidden",
        *compile_openmp,
    ]
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("**/*.h"))
    out = [CppExtension("hpsafety._C", ["csrc/bindings.cpp"], extra_compile_args=common, depends=headers)]
    for name, flags in capabilities().items():
        out.append(
            CppExtension(
                f"hpsafety._cpu_{name}",
                sources,
                extra_compile_args=[*common, *flags],
                extra_link_args=link_openmp,
                depends=headers,
            )
        )
    return out


def build_command():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """One object folder per extension: the same source is compiled with different flags."""

        def build_extension(self, ext):
            base = self.build_temp
            self.build_temp = os.path.join(base, ext.name.rsplit(".", 1)[-1])
            os.makedirs(self.build_temp, exist_ok=True)
            try:
                super().build_extension(ext)
            finally:
                self.build_temp = base

        def run(self):
            super().run()
            package = ROOT if self.inplace else Path(self.build_lib)
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            build_cuda(package / "hpsafety" / "libhpsafety_cuda.so", ROOT / "build" / "cuda", jobs)

    return Build


def wanted() -> bool:
    if os.environ.get("HPSAFETY_NO_EXT") == "1":
        return False
    if compiler() is None:
        print(
            "hpsafety: no C++ compiler found; installing with the reference ops only (slow). A compiler comes with "
            "'apt install g++', 'dnf install gcc-c++' or 'xcode-select --install'; then run the same command again."
        )
        return False
    return True


if __name__ == "__main__":  # the mutation tests import the flags
    build = wanted()
    packages = find_namespace_packages(include=["hpsafety", "hpsafety.*"], exclude=["*.__pycache__"])
    if build and not os.environ.get("CXX"):
        os.environ["CXX"] = compiler()
    setup(
        # Most folders need no __init__.py. Two stand at the root and are the package's too: kernels beside csrc (their
        # own name belongs to another package), and the pipelines that come with it.
        packages=sorted({*packages, "hpsafety.triton_kernels", "hpsafety.configs"}),
        package_dir={"hpsafety.triton_kernels": "triton_kernels", "hpsafety.configs": "configs"},
        ext_modules=extensions() if build else [],
        cmdclass={"build_ext": build_command() if build else build_ext},
    )
