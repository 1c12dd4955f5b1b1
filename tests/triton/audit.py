"""What Triton kernels do to memory, seen in the interpreter: every access, by program, to the byte.

    with audit(x=x, y=y) as seen:      # every tensor the kernels may touch, by name
        launch(...)
    seen.check()                       # raises on what must not happen, see below
    seen.traffic["x"]                  # Traffic of one tensor

Reported: an access outside the named tensors; two programs that store one element, or one that loads what another
stored, in one launch, without atomics; one store that hits an element twice; a load of what nothing has written, for
the tensors named in `fresh`. `seed` draws the order in which programs run, so a kernel that leans on the interpreter's
0, 1, 2, ... gives other results.

Not seen: caches, coalescing, races inside a program.
"""

import dataclasses
import random

import numpy as np
import torch
import triton.runtime.interpreter as stock

NOBODY = -1


@dataclasses.dataclass
class Traffic:
    """Bytes as issued (masked lanes not counted), and distinct bytes."""

    load_bytes: int = 0
    store_bytes: int = 0
    atomic_bytes: int = 0
    load_unique: int = 0
    store_unique: int = 0
    most_loads: int = 0  # of one element


class Region:
    """One storage under watch."""

    def __init__(self, name: str, tensor: torch.Tensor, fresh: bool):
        storage = tensor.untyped_storage()
        self.name, self.keep = name, tensor
        self.base, self.bytes, self.item = storage.data_ptr(), storage.nbytes(), tensor.element_size()
        self.traffic = Traffic()
        self.loads = np.zeros(self.bytes, np.int32)
        self.stored = np.zeros(self.bytes, bool)
        self.known = np.full(self.bytes, not fresh)
        self.new_launch()

    def new_launch(self) -> None:
        """What one launch stored is there for the next."""
        self.writer = np.full(self.bytes, NOBODY, np.int64)
        self.reader = np.full(self.bytes, NOBODY, np.int64)
        self.by_atomic = np.zeros(self.bytes, bool)


class Audit:
    """Everything that was seen between enter and exit."""

    def __init__(self, seed: int | None, fresh: tuple[str, ...], tensors: dict):
        self.regions = [Region(n, t, n in fresh) for n, t in tensors.items() if t is not None and t.numel()]
        self.seed, self.errors, self.launches, self.program = seed, [], 0, 0
        self.order, self.grid = None, (1, 1, 1)

    @property
    def traffic(self) -> dict[str, Traffic]:
        return {region.name: region.traffic for region in self.regions}

    def check(self) -> None:
        assert self.launches, "nothing was launched"
        if self.errors:
            raise AssertionError("\n".join(self.errors))

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor that a wrapper allocated during the audit: its content is not known yet."""
        if tensor.numel():
            self.regions.append(Region(name, tensor, True))

    def report(self, message: str) -> None:
        if len(self.errors) < 30 and message not in self.errors:
            self.errors.append(message)

    def begin(self, grid: tuple[int, int, int]) -> None:
        self.grid, self.order = grid, None
        if self.seed is not None:
            self.order = list(range(grid[0] * grid[1] * grid[2]))
            random.Random(self.seed + self.launches).shuffle(self.order)
        self.launches += 1
        for region in self.regions:
            region.new_launch()

    def enter_program(self, x: int, y: int, z: int) -> tuple[int, int, int]:
        """The program that runs in the place of (x, y, z)."""
        _, ny, nz = self.grid
        program = (x * ny + y) * nz + z
        self.program = program if self.order is None else self.order[program]
        return self.program // (ny * nz), self.program // nz % ny, self.program % nz

    def access(self, pointers, mask, size: int, kind: str) -> None:
        addresses = np.asarray(pointers).astype(np.int64).ravel()
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask).astype(bool), np.shape(pointers)).ravel()]
        outside = np.ones(addresses.size, bool)
        for region in self.regions:
            inside = (addresses >= region.base) & (addresses + size <= region.base + region.bytes)
            if inside.any():
                outside &= ~inside
                getattr(self, kind)(region, addresses[inside] - region.base, size)
        if outside.any():
            self.report(f"program {self.program}: {kind} outside of every tensor, {self._near(addresses[outside][0])}")

    def _near(self, address: int) -> str:
        def off(region):
            return address - region.base if address < region.base else address - region.base - region.bytes

        region = min(self.regions, key=lambda r: abs(off(r)))
        return f"{off(region):+d} bytes from {region.name}"

    def load(self, region: Region, at, size: int) -> None:
        region.traffic.load_bytes += at.size * size
        np.add.at(region.loads, at, 1)
        writer = region.writer[at]
        other = (writer != NOBODY) & (writer != self.program)
        if other.any():
            self.report(
                f"program {self.program} loads {region.name} at byte {at[other][0]}, which program {writer[other][0]}"
                " stored in the same launch"
            )
        if not region.known[at].all():
            self.report(
                f"program {self.program} loads {region.name} at byte {at[~region.known[at]][0]}, never written"
            )
        for byte in range(size):
            region.reader[at + byte] = self.program

    def store(self, region: Region, at, size: int) -> None:
        region.traffic.store_bytes += at.size * size
        if np.unique(at).size != at.size:
            self.report(f"program {self.program} stores one element of {region.name} twice in one store")
        for what, owner in (("stored", region.writer[at]), ("loaded", region.reader[at])):
            other = (owner != NOBODY) & (owner != self.program)
            if other.any():
                self.report(
                    f"program {self.program} stores {region.name} at byte {at[other][0]}, which program"
                    f" {owner[other][0]} {what} in the same launch"
                )
        if region.by_atomic[at].any():
            self.report(f"program {self.program} stores {region.name} where another access is atomic")
        for byte in range(size):
            region.writer[at + byte], region.known[at + byte], region.stored[at + byte] = self.program, True, True

    def atomic(self, region: Region, at, size: int) -> None:
        region.traffic.atomic_bytes += at.size * size
        if not region.known[at].all():
            self.report(f"program {self.program} adds to {region.name} at byte {at[0]}, never written")
        if ((region.writer[at] != NOBODY) & (region.writer[at] != self.program)).any():
            self.report(f"program {self.program} adds to {region.name} where another program stores")
        for byte in range(size):
            region.by_atomic[at + byte] = region.stored[at + byte] = True

    def close(self) -> None:
        for region in self.regions:
            loaded = region.loads[region.loads > 0]
            region.traffic.load_unique = int(loaded.size) * region.item
            region.traffic.most_loads = int(loaded.max()) if loaded.size else 0
            region.traffic.store_unique = int(region.stored.sum())


class audit:
    """Context manager around the calls that are watched; see the module's docstring.

    Tensors that torch.empty and its relatives allocate within are watched too, as "new0", "new1", ... in the order of
    their allocation, and count as never written. Autograd's thread is not seen: call a backward's function itself.
    """

    def __init__(self, seed: int | None = None, fresh: tuple[str, ...] = (), **tensors):
        self.seen = Audit(seed, fresh, tensors)

    def __enter__(self) -> Audit:
        seen, builder = self.seen, stock.InterpreterBuilder
        self.saved = {}

        def replace(name, make):
            self.saved[name] = getattr(builder, name)
            setattr(builder, name, make(self.saved[name]))

        def size(pointer):
            return pointer.get_element_ty().primitive_bitwidth // 8 or 1

        def watch(kind, value_first):
            def make(stock_method):
                def method(this, pointer, *rest):
                    mask = rest[1] if value_first else rest[0]
                    seen.access(pointer.data, mask.data, size(pointer), kind)
                    return stock_method(this, pointer, *rest)

                return method

            return make

        replace("create_masked_load", watch("load", False))
        replace("create_masked_store", watch("store", True))
        replace(
            "create_atomic_rmw",
            lambda stock_method: lambda this, op, pointer, value, mask, *rest: (
                seen.access(pointer.data, mask.data, size(pointer), "atomic"),
                stock_method(this, op, pointer, value, mask, *rest),
            )[1],
        )
        replace(
            "create_atomic_cas",
            lambda stock_method: lambda this, pointer, *rest: (
                seen.access(pointer.data, None, size(pointer), "atomic"),
                stock_method(this, pointer, *rest),
            )[1],
        )
        replace(
            "set_grid_dim",
            lambda stock_method: lambda this, *grid: (seen.begin(grid), stock_method(this, *grid))[1],
        )
        replace(
            "set_grid_idx",
            lambda stock_method: lambda this, *at: stock_method(this, *seen.enter_program(*at)),
        )
        self.allocations = _Allocations(seen)
        self.allocations.__enter__()
        return seen

    def __exit__(self, *error) -> None:
        self.allocations.__exit__(*error)
        for name, method in self.saved.items():
            setattr(stock.InterpreterBuilder, name, method)
        self.seen.close()


class _Allocations(torch.overrides.TorchFunctionMode):
    """Adds what torch allocates to the watched tensors."""

    MAKERS = {"empty", "empty_like", "new_empty", "zeros", "zeros_like", "new_zeros", "full", "new_full"}

    def __init__(self, seen: Audit):
        super().__init__()
        self.seen, self.count = seen, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name in self.MAKERS and isinstance(result, torch.Tensor) and result.numel():
            self.seen.add(f"new{self.count}", result)
            if "empty" not in name:
                self.seen.regions[-1].known[:] = True
            self.count += 1
        return result
