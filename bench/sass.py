"""Read a kernel's machine code (SASS): instructions, where they branch to, loops, and what a loop waits for.

The disassembler is the one that comes with Triton.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import networkx as nx

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:(@!?\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_\w+|[$\w.]+):\s*$")
TARGET = re.compile(r"`\(([^)]+)\)")
SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)|\.(16)(8)(8|16|32)\b")
"""HGMMA.64x64x16.F32.BF16 or HMMA.16816.F32.BF16"""

ENDS = ("EXIT", "RET", "KILL")
INDIRECT = ("BRX", "BRXU", "JMX", "JMXU")
TENSOR = ("HGMMA", "HMMA", "IGMMA", "IMMA", "QGMMA", "DMMA")
SPIN = {"SYNCS", "BRA", "NANOSLEEP", "NOP"}
"""Of a loop that does nothing but try again whether a barrier was passed; such a loop is not counted as one."""


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
    def ends(self) -> bool:
        """Whether what stands below it is never next: EXIT, or BRA without a condition (P, UP or convergence)."""
        jumps = self.name == "BRA" and self.operands == f"`({self.target})"
        return not self.predicate and (jumps or self.name in ENDS)

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

    @cached_property
    def flow(self) -> nx.DiGraph:
        """From each place that can be executed, and so neither from padding nor the trap behind the end, to the next.

        A call goes on behind it and at its target; what is called ends at its return, and so belongs to no loop. BSYNC
        goes on where the BSSY of its barrier says. The way of a warp whose threads are apart (BRA.DIV) is not followed.
        """
        graph, meetings = nx.DiGraph(), {}
        graph.add_nodes_from(range(len(self.instructions)))
        for x in self.instructions:
            if x.name == "BSSY":
                meetings.setdefault(x.operands.split(",")[0], []).append(self.labels[x.target])
        for place, x in enumerate(self.instructions):
            after = [] if x.ends or place + 1 == len(self.instructions) else [place + 1]
            if x.name in ("BRA", "CALL") and x.target and ".DIV" not in x.opcode:
                if x.target not in self.labels:
                    raise ValueError(f"the listing has no label {x.target}, to which an instruction jumps")
                after.append(self.labels[x.target])
            if x.name == "BSYNC":
                after += meetings.get(x.operands, [])
            graph.add_edges_from((place, other) for other in after)
        return graph.subgraph({0} | nx.descendants(graph, 0)).copy()

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """All loops in the order of their heads. A jump back to a place that dominates it closes a loop."""
        before = dict(nx.immediate_dominators(self.flow, 0))
        bodies: dict[int, set[int]] = {}
        for tail, head in self.flow.edges:
            place: int | None = tail
            while place not in (head, 0, None):
                place = before[place]
            if place == head:
                inside = self.flow.subgraph(self.flow.nodes - {head})
                body = {tail} | (nx.ancestors(inside, tail) if tail != head else set())
                bodies.setdefault(head, {head}).update(body)
        bodies = {h: body for h, body in bodies.items() if not {self.instructions[i].name for i in body} <= SPIN}
        return tuple(self._loop(head, body, bodies) for head, body in sorted(bodies.items()))

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
        runs = []
        inside = self.flow.subgraph(self.flow.nodes - {own[0]})
        for place in own:
            stop = self.labels.get(self.instructions[place].target or "", 0)
            if self.instructions[place].name != "BRA" or stop not in own:
                continue
            run = set(own).intersection(range(place + 1, stop))
            later = {stop} | (nx.descendants(inside, stop) if stop in inside else set())
            if run.isdisjoint(later) and any(self.instructions[i].name == "FSEL" for i in run):
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
        return tuple(self.instructions[place] for place in sorted(self.flow.nodes - inside))


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
