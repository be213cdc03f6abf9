"""Read a kernel's machine code (SASS): instructions, where they branch to, loops, and what a loop waits for.

The disassembler is the one that comes with Triton.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:(@!?\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_\w+|[$\w.]+):\s*$")
TARGET = re.compile(r"`\(([^)]+)\)")
SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)|\.(16)(8)(8|16|32)\b")
"""HGMMA.64x64x16.F32.BF16 or HMMA.16816.F32.BF16"""

ENDS = ("EXIT", "RET", "KILL")
INDIRECT = ("BRX", "BRXU", "JMX", "JMXU")
TENSOR = ("HGMMA", "HMMA", "IGMMA", "IMMA", "QGMMA", "DMMA")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its predicate ("" where it has none, else with its @), opcode with modifiers, and operands."""

    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def target(self) -> str | None:
        """The label it may jump to."""
        found = TARGET.search(self.operands)
        return found[1] if found and self.name in ("BRA", "BSSY", "CALL") else None

    @property
    def always_jumps(self) -> bool:
        """Whether what stands below it is never next: BRA without a condition (P, UP or convergence)."""
        return self.name == "BRA" and not self.predicate and self.operands == f"`({self.target})"

    @property
    def flop(self) -> int:
        """Floating-point operations of a tensor-core instruction, of four warps for HGMMA, of one for HMMA."""
        shape = SHAPE.search(self.opcode) if self.name in TENSOR else None
        return 2 * math.prod(int(x) for x in shape.groups() if x) if shape else 0


@dataclass(frozen=True)
class Loop:
    """A natural loop: its instructions from its head on, those of inner loops left out.

    Attributes:
        places: of all its instructions, those of inner loops included.
        own: its instructions outside inner loops.
        branches: numbers of own instructions that only some trips execute, as they mask scores; in the code's order.
        begun: bulk copies (TMA) begun for the first trips: between the last wait above the head and the head.
    """

    places: frozenset[int]
    own: tuple[Instruction, ...]
    branches: tuple[int, ...]
    begun: int

    def count(self, *names: str) -> int:
        """How many of its own instructions have one of these opcodes, modifiers aside."""
        return sum(x.name in names for x in self.own)

    @property
    def tensor(self) -> int:
        """Its own tensor-core instructions."""
        return self.count(*TENSOR)

    def flop(self, warps: int) -> int:
        """Floating-point operations that one trip has the tensor cores do for a program of `warps` warps."""
        return sum(x.flop * (warps // 4 if x.name.endswith("GMMA") else warps) for x in self.own)

    @property
    def groups(self) -> int:
        """What one trip begins to copy: groups of asynchronous copies (cp.async), or bulk copies (TMA)."""
        return self.count("LDGDEPBAR") or self.count("UTMALDG")

    @property
    def waits(self) -> tuple[int, ...]:
        """At each wait for groups of asynchronous copies, from the head on: how many may still be on their way."""
        waits = (x for x in self.own if x.opcode == "DEPBAR.LE" and x.operands.startswith("SB0"))
        return tuple(int(x.operands.split(",")[1], 0) for x in waits)

    @property
    def in_flight(self) -> int:
        """What is on its way behind the wait at the head, in the unit of `groups`; 0 where nothing is copied ahead."""
        if self.count("LDGDEPBAR") and self.waits:
            return self.waits[0]
        return max(self.begun - self.groups, 0) if self.count("UTMALDG") else 0


class Code:
    """A kernel's instructions with their control flow.

    Raises:
        ValueError: the listing holds no instruction, or jumps to where a register points.
    """

    def __init__(self, listing: str) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in listing.splitlines():
            if found := INSTRUCTION.match(line):
                self.instructions.append(Instruction(found[1] or "", found[2], found[3]))
            elif found := LABEL.match(line):
                self.labels[found[1]] = len(self.instructions)
        if not self.instructions:
            raise ValueError("the listing holds no instruction")
        if indirect := [x.opcode for x in self.instructions if x.name in INDIRECT]:
            raise ValueError(f"the kernel jumps to where a register points ({indirect[0]}), which is not followed")

    def successors(self, place: int) -> list[int]:
        """Places that may come next.

        A call goes on behind it and at its target; what is called ends at its return, and so belongs to no loop. BSYNC
        goes on where the BSSY of its barrier says. The way of a warp whose threads are apart (BRA.DIV) is not followed.
        """
        x, after = self.instructions[place], []
        if not (x.always_jumps or (x.name in ENDS and not x.predicate)) and place + 1 < len(self.instructions):
            after.append(place + 1)
        if x.name in ("BRA", "CALL") and x.target and ".DIV" not in x.opcode:
            if x.target not in self.labels:
                raise ValueError(f"the listing has no label {x.target}, to which an instruction jumps")
            after.append(self.labels[x.target])
        if x.name == "BSYNC":
            after += self._meetings.get(x.operands, [])
        return after

    @cached_property
    def _meetings(self) -> dict[str, list[int]]:
        """Where the threads of a convergence barrier meet, by its name."""
        meetings: dict[str, list[int]] = {}
        for x in self.instructions:
            if x.name == "BSSY":
                meetings.setdefault(x.operands.split(",")[0], []).append(self.labels[x.target])
        return meetings

    @cached_property
    def reached(self) -> frozenset[int]:
        """Places that can be executed: neither the padding nor the trap behind the end."""
        return frozenset(_reachable(0, self.successors))

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """All loops in the order of their heads.

        A loop is found by its back edge: a jump to an instruction without which the jump cannot be reached.
        """
        before: dict[int, list[int]] = {}
        for place in self.reached:
            for after in self.successors(place):
                before.setdefault(after, []).append(place)
        bodies: dict[int, set[int]] = {}
        for head, tails in before.items():
            if len(tails) == 1 and head:  # a loop's head is come to from inside and outside
                continue
            around = _reachable(0, self.successors, stop=head) if head else set()
            for tail in tails:
                if tail == head or tail not in around:
                    bodies.setdefault(head, set()).update(_reachable(tail, lambda x: before.get(x, []), stop=head))
        bodies = {head: body for head, body in bodies.items() if not self._spins(body)}
        return tuple(self._loop(head, body, bodies) for head, body in sorted(bodies.items()))

    def _spins(self, body: set[int]) -> bool:
        """Whether a loop does nothing but try again whether a barrier was passed; such a loop is not counted as one."""
        return {self.instructions[place].name for place in body} <= {"SYNCS", "BRA", "NANOSLEEP", "NOP"}

    def _loop(self, head: int, body: set[int], bodies: dict[int, set[int]]) -> Loop:
        inner = {place for other, places in bodies.items() if other != head and other in body for place in places}
        own = sorted(body - inner, key=lambda place: (place < head, place))
        begun = 0
        for x in self.instructions[:head]:
            begun = 0 if x.opcode.startswith("SYNCS.PHASECHK") else begun + (x.name == "UTMALDG")
        return Loop(frozenset(body), tuple(self.instructions[place] for place in own), self._branches(own), begun)

    def _branches(self, own: list[int]) -> tuple[int, ...]:
        """Sizes of the runs of a loop's instructions around which there is a way, if they select values (FSEL).

        Others are copies for some threads: some warp executes them in every trip.
        """
        inside = set(own)
        jumps = [place for place in own if self.instructions[place].name == "BRA"]
        runs = []
        for place in jumps:
            stop = self.labels.get(self.instructions[place].target or "", 0)
            run = inside.intersection(range(place + 1, stop)) if stop in inside else set()
            left_out = run.isdisjoint(_reachable(stop, self.successors, stop=own[0]))
            if left_out and any(self.instructions[i].name == "FSEL" for i in run):
                runs.append(len(run))
        return tuple(runs)

    @property
    def peeled(self) -> int:
        """Tensor-core instructions in no loop."""
        return sum(x.name in TENSOR for x in self.outside)

    @cached_property
    def outside(self) -> tuple[Instruction, ...]:
        """Instructions in no loop."""
        inside = {place for loop in self.loops for place in loop.places}
        return tuple(self.instructions[place] for place in sorted(self.reached - inside))


def _reachable(start: int, neighbours: Callable[[int], Iterable[int]], stop: int | None = None) -> set[int]:
    """Places reached from `start`, itself included. The walk ends at `stop`, which is among them if it was met."""
    seen, waiting = {start}, [start]
    while waiting:
        place = waiting.pop()
        if place != stop:
            fresh = [after for after in neighbours(place) if after not in seen]
            seen.update(fresh)
            waiting += fresh
    return seen


def disassemble(cubin: bytes) -> str:
    """The listing of a compiled kernel.

    Raises:
        subprocess.CalledProcessError: the disassembler does not take it.
    """
    import triton  # here, so that listings are read without it

    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.fspath(nvdisasm), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
