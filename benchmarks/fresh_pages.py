"""What memory costs when it is written for the first time: in small and in huge pages, at once and after a pause.

    python benchmarks/fresh_pages.py [--megabytes 170] [--neighbour 4000] [--pause 3] [--rounds 7]

A gradient on the CPU is fresh memory in every step: PyTorch keeps none, and the system hands it out page by page. This
prints what that takes for a gradient's size, after a neighbour has written and given back far more, as a large formula
does. After a pause it may take longer: the host of a virtual machine takes back what is free, and whoever writes there
next waits for the host. The last column counts how often the system stopped to compact memory before it granted a huge
page.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import sys
import time
from pathlib import Path

import numpy as np

HUGE = 2 << 20
SMALL = 4096
VMSTAT = Path("/proc/vmstat")


def huge_pages() -> bool:
    """Whether the system takes the question for huge pages: its kernel may be built without them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return False
    try:
        with mmap.mmap(-1, HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
            area.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return False
    return True


def first_touch(megabytes: int, huge: bool) -> float:
    """Milliseconds to write one byte of every page of so much fresh memory."""
    size = megabytes << 20
    area = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages = np.frombuffer(area, dtype=np.uint8)
    begin = -pages.ctypes.data % HUGE
    # Said of small pages too: a system may be set to give huge ones to whoever does not ask.
    area.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE, 0, len(area))
    before = time.perf_counter()
    pages[begin : begin + size : SMALL] = 1
    took = time.perf_counter() - before
    del pages
    area.close()
    return 1e3 * took


def compactions() -> int:
    """How often the system has stopped somebody to compact memory, since it started; 0 where it does not say."""
    try:
        lines = VMSTAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("compact_stall ")), 0)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=170, help="fresh memory to write, in MiB (default 170)")
    parser.add_argument("--neighbour", type=int, default=4000, help="MiB given back before (default 4000)")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds between the two (default 3)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each row (default 7)")
    options = parser.parse_args(arguments)
    for name in ("megabytes", "neighbour", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if not 0 <= options.pause <= 3600:
        parser.error(f"--pause: expected 0 to 3600 seconds, got {options.pause}")
    if not huge_pages():
        print("fresh_pages: this system has no huge pages to ask for", file=sys.stderr)
        return 2
    try:
        _table(options.megabytes, options.neighbour, options.pause, options.rounds)
    except (OSError, OverflowError) as error:
        print(f"fresh_pages: so much memory cannot be had: {error}", file=sys.stderr)
        return 2
    return 0


def _table(size: int, neighbour: int, later: float, rounds: int) -> None:
    print(f"{size} MiB of fresh memory, after {neighbour} MiB were given back, {rounds} rounds")
    print(f"{'pages':<6} {'when':<18} {'median, ms':>10} {'fastest':>8} {'slowest':>8} {'compactions':>12}")
    ratio = []
    for huge in (False, True):
        for pause in dict.fromkeys((0.0, later)):
            times, stalls = [], compactions()
            for _ in range(rounds):
                first_touch(neighbour, huge=False)
                time.sleep(pause)
                times.append(first_touch(size, huge))
            ratio.append(max(times) / min(times))
            when = f"after {pause:g} s" if pause else "at once"
            print(
                f"{'huge' if huge else 'small':<6} {when:<18} {statistics.median(times):>10.1f} {min(times):>8.1f} "
                f"{max(times):>8.1f} {compactions() - stalls:>12}",
                flush=True,
            )
    print(f"the slowest round took up to {max(ratio):.1f} times as long as the fastest of its row")


if __name__ == "__main__":
    sys.exit(main())
