"""Instructions of a kernel as a flow graph, its loops, and what is counted in them; the same for every architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """One instruction: where it may go on besides the next one, and whether it goes on there at all."""

    opcode: str
    targets: tuple[str, ...] = ()  # labels
    falls_through: bool = True


@dataclass
class Code:
    """A kernel's instructions; labels name indices into them."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Kinds:
    """What an architecture's opcodes mean."""

    wide_load: Callable[[str], bool]  # 16 bytes or more from global memory
    narrow_load: Callable[[str], bool]  # fewer
    wide_store: Callable[[str], bool]
    float64: Callable[[str], bool]  # arithmetic
    conversion: Callable[[str], bool]  # from or to float64
    atomic: Callable[[str], bool]
    local_bytes: Callable[[str], int]  # that the instruction moves per thread to or from local memory


@dataclass(frozen=True)
class Counts:
    """What a kernel's code holds. Loads are those of the main loop, or of all the code where no loop has wide ones;
    conversions those in any loop.
    """

    wide_loads: int
    narrow_loads: int
    wide_stores: int
    float64: int
    conversions: int
    atomics: int
    local_bytes: int


def count(code: Code, kinds: Kinds) -> Counts:
    """Counts over the code, and loads over its main loop."""
    everything = [x.opcode for x in code.instructions]
    loops = loops_of(code)
    repeated = [code.instructions[i].opcode for i in frozenset().union(*loops)]
    loop = [code.instructions[i].opcode for i in main_loop(code, kinds.wide_load, loops)] or everything
    return Counts(
        wide_loads=sum(map(kinds.wide_load, loop)),
        narrow_loads=sum(map(kinds.narrow_load, loop)),
        wide_stores=sum(map(kinds.wide_store, everything)),
        float64=sum(map(kinds.float64, everything)),
        conversions=sum(map(kinds.conversion, repeated)),
        atomics=sum(map(kinds.atomic, everything)),
        local_bytes=sum(map(kinds.local_bytes, everything)),
    )


def main_loop(code: Code, wide: Callable[[str], bool], loops: Iterable[frozenset[int]]) -> list[int]:
    """Indices of the instructions of the innermost loop with the most wide loads; none where no loop has any."""

    def weight(body: frozenset[int]) -> int:
        return sum(wide(code.instructions[i].opcode) for i in body)

    wide_ones = [body for body in loops if weight(body)]
    innermost = [body for body in wide_ones if not any(other < body for other in wide_ones)]
    return sorted(max(innermost, key=lambda body: (weight(body), -len(body)), default=frozenset()))


def loops_of(code: Code) -> list[frozenset[int]]:
    """The natural loops as sets of instruction indices; loops with one header are one.

    A jump back alone makes no loop: compilers move rare paths behind a kernel's end, and those jump back too.
    """
    starts, successors = _blocks(code)
    order = _postorder(successors)
    dominator = _dominators(successors, order)
    predecessors: dict[int, list[int]] = {}
    for block in order:
        for after in successors[block]:
            predecessors.setdefault(after, []).append(block)
    bodies: dict[int, set[int]] = {}
    for block in order:
        for header in successors[block]:
            if not _dominates(dominator, header, block):
                continue
            body = bodies.setdefault(header, {header})
            waiting = [block]
            while waiting:
                inside = waiting.pop()
                if inside not in body:
                    body.add(inside)
                    waiting += predecessors[inside]
    ends = [*starts[1:], len(code.instructions)]
    return [frozenset(i for block in body for i in range(starts[block], ends[block])) for body in bodies.values()]


def _blocks(code: Code) -> tuple[list[int], list[list[int]]]:
    """Where each basic block starts, and its successors."""
    count = len(code.instructions)
    leaders = {0, *(i for i in code.labels.values() if i < count)}
    leaders |= {i + 1 for i, x in enumerate(code.instructions) if (x.targets or not x.falls_through) and i + 1 < count}
    starts = sorted(leaders) if count else []
    block_of = {start: block for block, start in enumerate(starts)}
    successors = []
    for block, end in enumerate([*starts[1:], count]):
        if end == 0:
            continue
        last = code.instructions[end - 1]
        into = [block_of[code.labels[x]] for x in last.targets if code.labels.get(x, count) < count]
        if last.falls_through and block + 1 < len(starts):
            into.append(block + 1)
        successors.append(into)
    return starts, successors


def _postorder(successors: Sequence[Sequence[int]]) -> list[int]:
    """The blocks that can be reached from the first, each after all that it leads to, loops aside."""
    seen, order = {0}, []
    path = [(0, iter(successors[0]))] if successors else []
    while path:
        block, rest = path[-1]
        for after in rest:
            if after not in seen:
                seen.add(after)
                path.append((after, iter(successors[after])))
                break
        else:
            order.append(block)
            path.pop()
    return order


def _dominators(successors: Sequence[Sequence[int]], order: Sequence[int]) -> dict[int, int]:
    """Each reachable block's immediate dominator (Cooper, Harvey, Kennedy 2001); the first block's is itself."""
    rank = {block: i for i, block in enumerate(order)}
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for after in successors[block]:
            predecessors[after].append(block)
    dominator = {0: 0} if order else {}
    changed = True
    while changed:
        changed = False
        for block in reversed(order[:-1]):
            found: int | None = None
            for before in predecessors[block]:
                if before not in dominator:
                    continue
                if found is None:
                    found = before
                    continue
                a, b = found, before
                while a != b:
                    while rank[a] < rank[b]:
                        a = dominator[a]
                    while rank[b] < rank[a]:
                        b = dominator[b]
                found = a
            if found is not None and dominator.get(block) != found:
                dominator[block] = found
                changed = True
    return dominator


def _dominates(dominator: dict[int, int], above: int, block: int) -> bool:
    while block != above:
        if dominator[block] == block:
            return False
        block = dominator[block]
    return True
