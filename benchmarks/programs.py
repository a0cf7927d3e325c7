"""What a compiled program does, read off its final text: bytes, kernels, collectives.

XLA's own ``cost_analysis`` counts branches that are never taken and buffers that never
leave the chip. Here only the instructions that every run executes are counted.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# An instruction, as in "ROOT %sum = f32[8]{0:T(128)S(1)} add(%x, %y), metadata=...".
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<opcode>[a-z][\w\-]*)\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_ON_CHIP = re.compile(r"S\([1-9]")  # On a TPU, memory space 0 is HBM, and 1 is VMEM.
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?"
)

# Names and views of buffers, and control flow.
_FREE = frozenset(
    "after-all bitcast call conditional constant get-tuple-element opt-barrier "
    "parameter partition-id replica-id tuple while".split()
)
# Copies that run while the kernels do, such as prefetches into VMEM.
_TRANSFERS = frozenset({"copy-start", "slice-start", "async-start"})


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
      kind: such as "all-reduce".
      numbers: how many numbers each device contributes.
    """

    kind: str
    numbers: int


class Program(NamedTuple):
    """What one run of a compiled program costs one device.

    Bytes, kernels and cycles are those of the entry computation and what it calls. The
    body of a ``while`` counts once, and the branches of a ``conditional`` not at all: a
    test that bounds these counts must forbid both. An operand counts as read in full.

    Attributes:
      read_bytes: read from HBM.
      written_bytes: written to HBM.
      kernels: instructions that compute or copy. A TPU's arithmetic on single scalars
        is left out: it has a unit of its own for them.
      cycles: the compiler's own estimate; ``None`` where it makes none.
      conditionals: in all computations.
      whiles: in all computations.
      collectives: in all computations.
    """

    read_bytes: int
    written_bytes: int
    kernels: int
    cycles: int | None
    conditionals: int
    whiles: int
    collectives: tuple[Collective, ...]

    @property
    def hbm_bytes(self) -> int:
        """Read and written."""
        return self.read_bytes + self.written_bytes


class _Array(NamedTuple):
    """One buffer of an instruction's result."""

    dtype: str
    size: int
    layout: str

    @property
    def in_hbm(self) -> bool:
        return not _ON_CHIP.search(self.layout)

    @property
    def is_tpu_scalar(self) -> bool:
        return self.size == 1 and self.layout.startswith(":T(")

    @property
    def num_bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return self.size * max(1, int(bits[0]) // 8 if bits else 1)


class _Instruction(NamedTuple):
    """One line of a computation."""

    opcode: str
    result: tuple[_Array, ...]
    operands: tuple[str, ...]
    attributes: str


_Computation = dict[str, _Instruction]


def parse(text: str) -> Program:
    """Counts what is in the text of a compiled program."""
    entry, computations = _computations(text)
    running = list(_running(entry, computations))
    traffic = [_traffic(each, body) for body in running for each in body.values()]
    everything = [each for body in computations.values() for each in body.values()]
    opcodes = [each.opcode for each in everything]
    cycles = [_CYCLES.search(each.attributes) for b in running for each in b.values()]
    return Program(
        read_bytes=sum(read for read, _ in traffic),
        written_bytes=sum(written for _, written in traffic),
        kernels=sum(_is_kernel(each, b) for b in running for each in b.values()),
        cycles=sum(int(found[1]) for found in cycles if found) or None,
        conditionals=opcodes.count("conditional"),
        whiles=opcodes.count("while"),
        collectives=tuple(
            found for body in computations.values() for found in _collectives(body)
        ),
    )


# --- From text to instructions.


def _computations(text: str) -> tuple[str, dict[str, _Computation]]:
    """The name of the entry computation, and all computations by name."""
    entry, found = "", {}
    body: _Computation = {}
    for line in text.splitlines():
        if heading := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            body = found[heading[2]] = {}
            entry = heading[2] if heading[1] else entry
        elif match := _INSTRUCTION.match(line):
            body[match["name"]] = _instruction(match, line[match.end() :])
    return entry, found


def _instruction(match: re.Match[str], rest: str) -> _Instruction:
    # Layouts in operands hold parentheses, but none that a comma follows.
    operands, _, attributes = rest.partition("), ")
    return _Instruction(
        match["opcode"],
        tuple(_arrays(match["shape"])),
        tuple(re.findall(r"%([\w.\-]+)", operands)),
        attributes,
    )


def _arrays(shape: str) -> Iterator[_Array]:
    for dtype, sizes, layout in _ARRAY.findall(shape):
        size = math.prod(int(s.removeprefix("<=")) for s in sizes.split(",") if s)
        yield _Array(dtype, size, layout)


def _running(
    entry: str, computations: dict[str, _Computation]
) -> Iterator[_Computation]:
    """The entry computation, those that it calls, and the bodies of its loops."""
    yield computations[entry]
    for instruction in computations[entry].values():
        if instruction.opcode in ("call", "while"):
            called = re.search(
                r"(?:to_apply|body)=%?([\w.\-]+)", instruction.attributes
            )
            assert called is not None
            yield from _running(called[1], computations)


# --- What one instruction does.


def _is_kernel(instruction: _Instruction, body: _Computation) -> bool:
    opcode = instruction.opcode
    return not (
        opcode.endswith("-done")
        or opcode in _FREE | _TRANSFERS
        or _is_view(instruction)
        or (opcode != "fusion" and _is_scalar(instruction, body))
    )


def _is_view(instruction: _Instruction) -> bool:
    """Whether a TPU only names slices that it has prefetched side by side."""
    return 'custom_call_target="ConcatBitcast"' in instruction.attributes


def _is_scalar(instruction: _Instruction, body: _Computation) -> bool:
    """Whether a TPU calculates one number from others."""
    arrays = [*instruction.result, *_operands(instruction, body)]
    return all(array.is_tpu_scalar for array in arrays)


def _operands(instruction: _Instruction, body: _Computation) -> list[_Array]:
    names = [name for name in instruction.operands if name in body]
    return [array for name in names for array in body[name].result]


def _traffic(instruction: _Instruction, body: _Computation) -> tuple[int, int]:
    """How many bytes it reads from HBM and writes to it."""
    if instruction.opcode in _TRANSFERS:
        return _transferred(instruction, body)
    if not _is_kernel(instruction, body):
        return 0, 0
    return _in_hbm(_operands(instruction, body)), _in_hbm(instruction.result)


def _transferred(instruction: _Instruction, body: _Computation) -> tuple[int, int]:
    """A slice reads no more than it writes, though its operand is the whole array."""
    source = body[instruction.operands[0]].result
    # "(destination, source, context)" of a copy, "((source), destination, context)".
    place = 0 if instruction.opcode == "copy-start" else len(instruction.operands)
    destination = instruction.result[place]
    moved = destination.num_bytes
    return moved * source[0].in_hbm, moved * destination.in_hbm


def _in_hbm(arrays: Iterable[_Array]) -> int:
    return sum(array.num_bytes for array in arrays if array.in_hbm)


def _collectives(body: _Computation) -> Iterator[Collective]:
    for instruction in body.values():
        if kind := _COLLECTIVE.fullmatch(instruction.opcode):
            arrays = _operands(instruction, body)
            yield Collective(kind[1], sum(array.size for array in arrays))
