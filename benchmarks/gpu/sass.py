"""What the machine code of csrc/step_cuda.cu says of a step's time, where no GPU is at hand.

    nvcc -O3 -std=c++17 --fmad=false -arch=sm_90 -DLLC_WITH_CUDA -cubin -o step.cubin csrc/step_cuda.cu
    cuobjdump -res-usage step.cubin >step.usage; nvdisasm -c -hex step.cubin >step.sass
    python benchmarks/gpu/sass.py step.sass step.usage

For each float32 kernel: how many sums it takes, registers, resident warps of a multiprocessor, and of the usual path of
a warp through four elements a thread (all 16-byte accesses and the noise, past every other access, in the innermost
loop that holds them): instructions, the clocks they take a warp that is alone and waits for no memory, reads of the
table of segments, and instructions by unit. Then milliseconds for 10⁸ parameters on an H100: to issue them, or those of
the busiest unit, and to move the bytes of the floor at 3.0 TB/s.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import re
from collections import Counter
from pathlib import Path

INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d+ +)?([A-Z0-9_.]+)\s*(.*?) *;.*\n\s*/\* 0x(\w{16})|(\.L_x_\d+):"
)
KERNEL = re.compile(r"\.text\.(\w*step_kernelILj(\d+)ENS_\w*?\d([A-Z]\w+?)IfEEfE\w*)")
PHILOX = "-0x2daee0ad"
FLOOR = {"SGLD": 16, "PreconditionedSGLD": 20, "RMSpropSGLD": 24, "AdamSGLD": 32, "SGHMC": 24, "SGNHT": 24}
UNITS = {  # operations, and clocks of a scheduler for a warp of them: the programming guide's throughputs of 9.0
    "FP32": (r"F(ADD|MUL|FMA|CHK)\b", 1),
    "IMAD": (r"IMAD\b", 2),
    "ALU": (r"(LOP3|V?IADD3?|V?I?(ADDMNMX|MNMX)|[IF]SETP|F?SEL|SHF|LEA|PRMT|I2FP|PLOP3|P2R|R2P|MOV|CS2R)\b", 2),
    "MUFU": (r"(MUFU|F2F|F2I|I2F)\b", 8),
    "FP64": (r"D(ADD|MUL|FMA|SETP)\b", 2),
}
Block = list[tuple[str, str, str, int]]  # predicate, operation, operands, clocks until the next (bits 105 to 108)


def blocks_of(text: str) -> tuple[list[Block], list[list[int]]]:
    """Basic blocks of a kernel, and the blocks that may follow each."""
    blocks: list[Block] = [[]]
    starts: dict[str, int] = {}
    for predicate, operation, operands, high, label in INSTRUCTION.findall(text):
        if label:
            blocks += [[]] if blocks[-1] else []
            starts[label] = len(blocks) - 1
            continue
        blocks[-1].append((predicate, operation, operands, int(high, 16) >> 41 & 15))
        if re.match("BRA|EXIT|RET", operation):
            blocks.append([])
    after: list[list[int]] = []
    for k, block in enumerate(blocks):
        predicate, operation, operands, _ = block[-1] if block else ("", "", "", 0)
        jump = re.search(r"`\((\.L_x_\d+)\)", operands) if operation.startswith("BRA") else None
        always = re.match("BRA|EXIT|RET", operation) and not predicate and not re.match(r"!?U?P\d", operands)
        after.append([starts[jump[1]]] if jump else [])
        after[k] += [k + 1] if not always and k + 1 < len(blocks) else []
    return blocks, after


def is_wanted(block: Block) -> bool:
    """Whether the usual path goes through a block: 16-byte accesses, noise, or four stores where one would do."""
    text = [f"{operation} {operands}" for predicate, operation, operands, _ in block if not predicate]
    narrow = sum(bool(re.match(r"STG?\.E ", t)) for t in text)
    return narrow == 4 or any(re.match(r"(LD|ST)G?\.E\.128", t) or PHILOX in t for t in text)


def cost(block: Block) -> int:
    rare = sum(bool(re.match(r"CALL|(LD|ST)G?\.E(\.U8|\.U16| )", f"{operation} ")) for _, operation, *_ in block)
    return len(block) + 10_000 * rare * (not is_wanted(block))


def shortest(blocks: list[Block], after: list[list[int]], start: int, goal: int) -> list[int]:
    """The cheapest path from one block to another, the first left out."""
    queue: list[tuple[int, int, list[int]]] = [(0, start, [])]
    seen: set[int] = set()
    while queue:
        so_far, at, path = heapq.heappop(queue)
        if goal in after[at]:
            return [*path, goal]
        for k in set(after[at]) - seen:
            seen.add(k)
            heapq.heappush(queue, (so_far + cost(blocks[k]), k, [*path, k]))
    raise ValueError(f"no way from block {start} to block {goal}")


def usual_path(blocks: list[Block], after: list[list[int]]) -> Block:
    """One iteration of the innermost loop that holds all wanted blocks."""
    wanted = [k for k, block in enumerate(blocks) if is_wanted(block)]
    _, head, tail = min((k - j, j, k) for k, js in enumerate(after) for j in js if j <= wanted[0] and k >= wanted[-1])
    stops = [head, *(k for k in wanted if k != head), *([tail] if tail != wanted[-1] else [])]
    path = [head]
    for start, goal in itertools.pairwise(stops):
        path += shortest(blocks, after, start, goal)
    return [instruction for k in path for instruction in blocks[k]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sass", type=Path)
    parser.add_argument("usage", type=Path)
    arguments = parser.parse_args()
    usage = re.findall(r"Function (\S+):\s+REG:(\d+)", arguments.usage.read_text())
    registers = {name: int(count) for name, count in usage}
    units_named = "".join(f"{unit:>6}" for unit in UNITS)
    print(f"rule                   sums  regs  warps  instr  clocks  tables {units_named}   ms")
    for section in re.split(r"\n(?=\s*\.section\s+\.text\.)", arguments.sass.read_text()):
        if not (name := KERNEL.search(section.partition("\n")[0])):
            continue
        path, rule, sums = usual_path(*blocks_of(section)), name[3], int(name[2]).bit_count()
        warps = 65536 // (-(-registers[name[1]] // 8) * 8 * 256) * 8
        tables = sum(operation.startswith("LDG.E.64") for _, operation, *_ in path)
        units = Counter(unit for _, op, *_ in path for unit, (named, _) in UNITS.items() if re.match(named, op))
        clocks = max(len(path), *(units[u] * each for u, (_, each) in UNITS.items()))
        to_issue, to_move = 1e8 / 4 / 32 * clocks / (132 * 4 * 1.755e9), 1e8 * FLOOR[rule] / 3.0e12
        counts = "".join(f"{units[unit]:>6}" for unit in UNITS)
        print(
            f"{rule:<20}{sums:>7}{registers[name[1]]:>6}{warps:>7}{len(path):>7}{sum(p[3] for p in path):>8}"
            f"{tables:>8} {counts}  {1e3 * to_issue:.2f} of {1e3 * to_move:.2f}"
        )


if __name__ == "__main__":
    main()
