"""Runs a recorded launch again in a program of its own, where sanitizers can look at it.

A call that Python made on the emulated library becomes a program: its tensors' storages as heap blocks of their exact
size, the launcher, and a comparison of every byte with what the recorded call left. Built with ThreadSanitizer it is a
race check, with AddressSanitizer a bounds check; with fibers and SIMT_SEED it runs in other orders of threads and
blocks; and always every written tensor is watched for bytes that two blocks write.
"""

import contextlib
import dataclasses
import re
import struct
import sys
import tempfile
from pathlib import Path

import torch

from hpsafety.cuda_kernels import library
from tests.cuda import emulation, programs

C_NAMES = {"p": "void*", "i": "int", "l": "long", "f": "float", "d": "double"}
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include "device.cuh"
extern "C" int NAME(TYPES void*);
constexpr char POISON = (char)simt::POISON;  // what is written is not seen in an output, as simt/block.h says
int main(int, char** argv) {
  FILE* in = fopen(argv[1], "rb");
  auto number = [&] { long x; if (fread(&x, 8, 1, in) != 1) abort(); return x; };
  long count = number();
  struct Storage { char* at; long bytes; long written; std::vector<char> before, expected; };
  std::vector<Storage> storages;
  for (long i = 0; i < count; i++) {
    Storage s{nullptr, number(), number(), {}, {}};
    if (posix_memalign((void**)&s.at, 256, s.bytes ? s.bytes : 1)) abort();
    s.expected.resize(s.bytes);
    if (s.bytes && fread(s.at, s.bytes, 1, in) != 1) abort();
    s.before.assign(s.at, s.at + s.bytes);
    if (s.bytes && fread(s.expected.data(), s.bytes, 1, in) != 1) abort();
    storages.push_back(std::move(s));
  }
  for (auto& s : storages)
    if (s.written) simt::watch(s.at, s.bytes, "an output", s.written == 2);
  ARGUMENTS
  int code = NAME(VALUES nullptr);
  simt::end_watch();
  if (code) { fprintf(stderr, "the launcher returned %d\\n", code); return 3; }
  if (simt::conflicts) return 4;
  for (size_t i = 0; i < storages.size(); i++)
    for (long k = 0; k < storages[i].bytes; k++)
      if (auto& s = storages[i]; s.at[k] != s.expected[k] && (s.at[k] != s.before[k] || s.expected[k] != POISON)) {
        fprintf(stderr, "tensor %zu differs at byte %ld\\n", i, k);
        return 5;
      }
  printf("the same bytes\\n");
  return 0;
}
"""


@dataclasses.dataclass(slots=True)
class Recorded:
    """A call and its storages' bytes before and after."""

    call: library.Call
    storages: list  # torch.UntypedStorage, distinct
    before: list[bytes]
    after: list[bytes]


def _bytes(storage) -> bytes:
    return (
        bytes(storage.tolist())
        if storage.nbytes() < 64
        else torch.tensor([], dtype=torch.uint8).set_(storage).numpy().tobytes()
    )


@contextlib.contextmanager
def recorded():
    """Collects a Recorded for each launch within, in order."""
    found: list[Recorded] = []
    launch = library.launch

    def watched(name, signature, *arguments):
        call = library.Call(name, signature, arguments)
        storages = {}
        for x in arguments:
            if isinstance(x, torch.Tensor):
                storages.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage())
        one = Recorded(call, list(storages.values()), [_bytes(s) for s in storages.values()], [])
        launch(name, signature, *arguments)
        one.after = [_bytes(s) for s in one.storages]
        found.append(one)

    modules = [
        m for n, m in sys.modules.items() if n.startswith("hpsafety.cuda_kernels.") and hasattr(m, "launch")
    ]
    saved = [(m, m.launch) for m in modules]
    try:
        for module in modules:
            module.launch = watched
        yield found
    finally:
        for module, one in saved:
            module.launch = one


def _program(one: Recorded, read_back: tuple[int, ...]) -> tuple[str, bytes]:
    """(C++ text, the file it reads)."""
    letters = one.call.signature.replace(" ", "")
    at = {s.data_ptr(): i for i, s in enumerate(one.storages)}
    lines, values = [], []
    for i, (letter, x) in enumerate(zip(letters, one.call.arguments, strict=True)):
        if letter == "p" and x is None:
            value = "nullptr"
        elif letter == "p":
            storage = x.untyped_storage()
            offset = x.data_ptr() - storage.data_ptr()
            value = f"storages[{at[storage.data_ptr()]}].at + {offset}" if storage.nbytes() else "nullptr"
        elif letter in "il":
            value = str(int(x))
        else:
            value = (
                float(x).hex() if float(x) == float(x) and abs(float(x)) != float("inf") else repr(float(x))
            )
        lines.append(f"{C_NAMES[letter]} a{i} = ({C_NAMES[letter]})({value});")
        values.append(f"a{i},")
    text = PROGRAM.replace("NAME", one.call.name).replace(
        "TYPES", "".join(C_NAMES[x] + ", " for x in letters)
    )
    text = text.replace("ARGUMENTS", "\n  ".join(lines)).replace("VALUES", " ".join(values))
    parts = [struct.pack("<q", len(one.storages))]
    read = {at[one.call.arguments[i].untyped_storage().data_ptr()] for i in read_back}
    for i, (before, after) in enumerate(zip(one.before, one.after, strict=True)):
        parts.append(struct.pack("<qq", len(before), (before != after) * (1 if i in read else 2)))
        parts += [before, after]
    return text, b"".join(parts)


def source_of(name: str, files: dict[str, str]) -> str:
    """The .cu that defines a launcher."""
    found = [
        n for n, text in files.items() if n.endswith(".cu") and re.search(rf'extern "C" int {name}\(', text)
    ]
    if len(found) != 1:
        raise ValueError(f"{name} is defined in {found}")
    return found[0]


def run(
    one: Recorded, mode: str, seed: int | None = None, read_back: tuple[int, ...] = (),
    files: dict[str, str] | None = None, seconds: float = 240,
) -> None:  # fmt: skip
    """AssertionError, with what the program said, unless it ends with the same bytes and without a finding.

    read_back  positions of arguments that the call both writes and reads. Of those a second block's write of the same
               value is not seen; of all others it is
    files      other sources than the checkout's: a mutant's
    """
    files = emulation.texts() if files is None else files
    text, content = _program(one, read_back)
    own = source_of(one.call.name, files)
    main = f"cuda/replay_{one.call.name}.cu"
    objects = [
        emulation.make_object(own, files, mode),
        emulation.make_object(main, files | {main: text}, mode),
    ]
    with tempfile.TemporaryDirectory() as folder:
        program, data = Path(folder) / "replay", Path(folder) / "data"
        data.write_bytes(content)
        programs.link(objects, mode, program)
        done = programs.execute(program, mode, str(data), seed=seed, seconds=seconds)
    assert done.returncode == 0, (
        f"{one.call.name} under {mode}: exit {done.returncode}\n{done.stderr[-3000:]}"
    )
