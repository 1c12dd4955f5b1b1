"""Reads the machine code of a compiled kernel: what stands in its loops, and which pipe of the chip they fill.

Everything is counted in the code, nothing is run. An "eq" is tensor-core work of one warp in units of HMMA.16816 (2048
multiply-adds), so that HMMA and HGMMA kernels compare: an HGMMA.64xNx16 is N/8. Counts of a loop are per iteration
and warp. A loop is a natural loop (its header dominates a block that branches back), so that a wait written out of
line does not widen it.
"""

import collections
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

INSTRUCTION = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)\s*(.*?)\s*;"
)
TENSOR = re.compile(r"(H|I|Q|D|B|O)G?MMA")
SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")
PACKED = {"16816": 1.0, "1688": 0.5, "1684": 0.25, "884": 0.125, "8816": 0.5, "16832": 2.0, "16864": 4.0}
FP32 = {"FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSET", "FSETP", "FCHK", "FSWZADD"}
LOADS = {"LDG": "ldg", "LD": "ldg", "LDGSTS": "ldgsts", "LDS": "lds"}
STORES = {"STG": "stg", "ST": "stg", "STS": "sts"}
ATOMICS = {"ATOM", "ATOMG", "RED", "REDG"}
BARRIERS = {"BAR", "SYNCS"}
MATRIX_BYTES = 4  # LDSM and STSM move 4 bytes a lane for each 8x8 matrix


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """opcode "LDG.E.128" has the base "LDG" and the modifiers ("E", "128")."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]

    @property
    def target(self) -> int | None:
        """The address a branch names."""
        found = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(found[-1], 16) if found else None

    @property
    def tensor(self) -> bool:
        return TENSOR.fullmatch(self.base) is not None

    @property
    def bytes(self) -> int:
        """What a load or store moves for each lane."""
        for word in self.modifiers:
            if word in ("64", "128", "256"):
                return int(word) // 8
            if word in ("U16", "S16", "16"):
                return 2
            if word in ("U8", "S8", "8"):
                return 1
        return 4

    @property
    def matrices(self) -> int:
        """8x8 matrices that an LDSM or STSM moves."""
        last = self.modifiers[-1] if self.modifiers else ""
        return int(last) if last.isdigit() and int(last) in (2, 4) else 1

    @property
    def eq(self) -> float:
        for word in self.modifiers:
            shape = SHAPE.fullmatch(word)
            if shape:  # of a warp group: a warp does a quarter
                rows, columns, depth = map(int, shape.groups())
                return rows / 4 * columns * depth / 2048
            if word in PACKED:
                return PACKED[word]
        return 1.0


def parse(text: str) -> dict[str, list[Instruction]]:
    """The functions of `cuobjdump -sass`, without the padding behind their last instruction."""
    functions, current = {}, None
    for line in text.splitlines():
        name = re.search(r"Function : (\S+)", line)
        if name:
            current = functions.setdefault(name[1], [])
        found = INSTRUCTION.match(line)
        if found and current is not None:
            current.append(Instruction(int(found[1], 16), (found[2] or "").strip(), found[3], found[4]))
    for code in functions.values():
        while code and (
            code[-1].base == "NOP" or (code[-1].base == "BRA" and code[-1].target == code[-1].address)
        ):
            code.pop()
    return functions


class Graph:
    """Basic blocks of a function (ranges of its instructions) and which follows which."""

    def __init__(self, code: list[Instruction]):
        self.code = code
        place = {one.address: index for index, one in enumerate(code)}
        joins = collections.defaultdict(list)  # of a barrier register: where diverged lanes meet again
        leaders = {0}
        for index, one in enumerate(code):
            if one.base == "BSSY" and one.target in place:
                joins[one.operands.partition(",")[0].strip()].append(place[one.target])
                leaders.add(place[one.target])
            if one.base in ("BRA", "JMP") and one.target in place:
                leaders.add(place[one.target])
            if one.base in ("BRA", "JMP", "BRX", "EXIT", "RET", "BSYNC"):
                leaders.add(index + 1)
        starts = sorted(leader for leader in leaders if leader < len(code))
        ends = [*starts[1:], len(code)] if starts else []
        self.blocks = [range(a, b) for a, b in zip(starts, ends, strict=True)]
        self._of = {block.start: index for index, block in enumerate(self.blocks)}
        self.after = [self._successors(block, place, joins) for block in self.blocks]

    def _successors(self, block: range, place: dict, joins: dict) -> list[int]:
        last, behind = self.code[block[-1]], block.stop
        following = [self._of[behind]] if behind in self._of else []
        if last.base in ("BRA", "JMP"):
            # BRA P0, 0x.. and BRA.DIV take the branch in some lanes only, as @P0 BRA does
            some = (
                last.predicate or re.match(r"!?U?P\d", last.operands) or {"DIV", "CONV"} & {*last.modifiers}
            )
            return [self._of[place[last.target]]] * (last.target in place) + (following if some else [])
        if last.base in ("EXIT", "RET"):
            return following if last.predicate else []
        if last.base == "BRX":  # a table of targets: any block behind it
            return [index for index, other in enumerate(self.blocks) if other.start >= behind]
        if last.base == "BSYNC":
            meet = joins.get(last.operands.partition(",")[0].strip(), [])
            later = [self._of[at] for at in meet if at > behind]
            return following if behind in meet or not later else [min(later)]
        return following

    def _reachable(self) -> list[int]:
        """Blocks in reverse postorder from the entry."""
        seen, order, stack = {0}, [], [(0, iter(self.after[0]))]
        while stack:
            block, rest = stack[-1]
            fresh = next((other for other in rest if other not in seen), None)
            if fresh is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(fresh)
                stack.append((fresh, iter(self.after[fresh])))
        return order[::-1]

    def loops(self) -> list[frozenset[int]]:
        """Natural loops, as sets of blocks; back edges to one header are one loop."""
        if not self.code:
            return []
        order = self._reachable()
        before = collections.defaultdict(list)
        for block in order:
            for other in self.after[block]:
                before[other].append(block)
        dominators = dict.fromkeys(order, (1 << len(self.blocks)) - 1)  # bit sets
        dominators[0], changed = 1, True
        while changed:
            changed = False
            for block in order[1:]:
                common = -1
                for other in before[block]:
                    common &= dominators[other]
                changed |= dominators[block] != (common | 1 << block)
                dominators[block] = common | 1 << block
        bodies: dict[int, set[int]] = {}
        for block in order:
            for header in self.after[block]:
                if dominators[block] >> header & 1:
                    body, work = bodies.setdefault(header, {header}), [block]
                    while work:
                        inside = work.pop()
                        if inside not in body:
                            body.add(inside)
                            work.extend(before[inside])
        return [frozenset(body) for body in bodies.values()]

    def instructions(self, body: frozenset[int]) -> list[Instruction]:
        return [self.code[index] for block in sorted(body) for index in self.blocks[block]]


def spilled(code: list[Instruction]) -> int:
    """Bytes a lane moves between registers and its stack."""
    return sum(one.bytes for one in code if one.base in ("LDL", "STL"))


def count(code: list[Instruction]) -> dict:
    """What stands in a stretch of code. Ratios to eq are there only where there is tensor-core work."""
    tensor = [one for one in code if one.tensor]
    bases = collections.Counter(one.base for one in code)
    widths = collections.defaultdict(
        collections.Counter
    )  # "ldg" -> bits of a lane, as JSON has keys -> instructions
    for one in code:
        kind = LOADS.get(one.base) or STORES.get(one.base)
        if kind:
            widths[kind][str(one.bytes * 8)] += 1
    out = {
        "instructions": len(code),
        "mma": len(tensor),
        "eq": sum(one.eq for one in tensor),
        "mufu": bases["MUFU"],
        "barriers": sum(bases[base] for base in BARRIERS),
        "ldsm": bases["LDSM"],
        "tma": bases["UTMALDG"],
        "atomics": sum(bases[base] for base in ATOMICS),
        "spill": spilled(code),
        "widths": {
            kind: dict(sorted(bits.items(), key=lambda one: int(one[0])))
            for kind, bits in sorted(widths.items())
        },
    }
    if tensor:
        out["non_mma_per_eq"] = round((len(code) - len(tensor)) / out["eq"], 3)
        out["mufu_per_eq"] = round(bases["MUFU"] / out["eq"], 3)
    return out


def pipes(code: list[Instruction], arch: int) -> dict:
    """A MODEL: cycles that each pipe of one of an SM's four schedulers needs, and the tensor pipe's share at best.

    From published pipe widths, per warp: an issue slot each; an eq 8 cycles on sm_80, 4 by HGMMA and 6.4 by HMMA on
    sm_90; MUFU 8; fp32 arithmetic 2 and 1; the port of shared memory gives the four together 128 bytes a cycle. It
    leaves out latencies, bank conflicts and what HGMMA and LDGSTS move by that port. Good for ranking two versions.
    """
    tensor = mufu = fp32 = shared = 0.0
    for one in code:
        if one.tensor:
            tensor += one.eq * (8 if arch < 90 else 4 if one.base.endswith("GMMA") else 6.4)
        elif one.base == "MUFU":
            mufu += 8
        elif one.base in FP32:
            fp32 += 2 if arch < 90 else 1
        elif one.base in ("LDS", "STS"):
            shared += max(4, one.bytes)
        elif one.base in ("LDSM", "STSM"):
            shared += MATRIX_BYTES * one.matrices
    cycles = {"issue": len(code), "tensor": tensor, "mufu": mufu, "fp32": fp32, "shared": shared}
    bound = max(cycles, key=cycles.get)
    use = round(tensor / (cycles[bound] or 1), 3)
    return {name: round(value, 1) for name, value in cycles.items()} | {"bound": bound, "tensor_use": use}


def hot(graph: Graph) -> tuple[list[Instruction], int]:
    """The loop a kernel spends its time in, and the largest spill in any loop.

    It is the innermost loop with the most tensor-core work; of equals the shortest, as the loop over full tiles is
    beside the one over masked tiles. Without tensor cores the longest innermost loop; without loops the whole kernel.
    """
    loops = [(body, graph.instructions(body)) for body in graph.loops()]
    spill = max((spilled(code) for _, code in loops), default=0)
    weigh = {body: sum(one.eq for one in code if one.tensor) for body, code in loops}
    busy = [(body, code) for body, code in loops if weigh[body]] or loops
    inner = [(body, code) for body, code in busy if not any(other < body for other, _ in busy)]
    if not inner:
        return graph.code, spill
    if any(weigh.values()):
        return max(inner, key=lambda one: (weigh[one[0]], -len(one[1])))[1], spill
    return max(inner, key=lambda one: len(one[1]))[1], spill


# Of one SM: warps, blocks, bytes of shared memory, and bytes a block may ask for; it takes 1 KiB more.
LIMITS = {80: (64, 32, 164 * 1024, 163 * 1024), 90: (64, 32, 228 * 1024, 227 * 1024)}
REGISTERS, REGISTER_UNIT, RESERVED = 65536, 256, 1024


def occupancy(arch: int, registers: int, warps: int, shared: int) -> dict:
    """Blocks and warps that one SM holds at a time, and what it runs out of first."""
    most_warps, most_blocks, memory, _ = LIMITS[arch]
    each = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    fits = {
        "registers": REGISTERS // each // warps if registers else most_blocks,
        "warps": most_warps // warps,
        "blocks": most_blocks,
        "shared": memory // (shared + RESERVED),
    }
    limit = min(fits, key=fits.get)
    return {"blocks": fits[limit], "warps": fits[limit] * warps, "limited_by": limit}


def tool(name: str) -> str:
    """cuobjdump of the triton wheel."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassemble(cubin: bytes) -> str:
    """Machine code and resource usage of a cubin, as cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), "-sass", "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def profile(cubin: bytes, arch: int, warps: int, shared: int) -> dict:
    """The figures of a cubin's one kernel. `shared` is what a launch asks for, in bytes; the code does not say it."""
    text = disassemble(cubin)
    (name, code), *rest = parse(text).items()
    assert not rest, f"one kernel in a cubin, not {[name, *(other for other, _ in rest)]}"
    return figures(code, *usage(text)[name], arch, warps, shared)


def usage(text: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of stack of each function, of `cuobjdump -res-usage`."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", text)
    return {name: (int(registers), int(stack)) for name, registers, stack in found}


def figures(code: list[Instruction], registers: int, stack: int, arch: int, warps: int, shared: int) -> dict:
    """A kernel's figures as they stand in static.json."""
    loop, spill = hot(Graph(code))
    whole, inside = count(code), count(loop)
    out = {"registers": registers, "stack": stack, "shared": shared, "warps": warps, "loop_spill": spill}
    out["occupancy"] = occupancy(arch, registers, warps, shared)
    out["whole"], out["hot"] = whole, inside
    out["model"] = pipes(loop, arch)
    return out
