"""Ring attention on two ranks, forward and backward: torch's fused kernel beside products that hold all scores.

One layer of 8 heads of 64 numbers, one sequence, of which each rank has half. The same ring computes with both kernels
(labkit.parallel.attention), in turn; every measurement is a new pair of processes, so that its memory is its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import arguments, interleave, report

LENGTHS, FORMATS, KERNELS = (1024, 4096), ("float32", "bfloat16"), ("Dense", "FlashOnCpu")
HEADS, HEAD, PASSES = 8, 64, 5


def rank(rank: int, store: str, length: int, dtype: str, kernel: str) -> None:
    """Run as one of two ranks; the first prints the median time of a pass (s) and what it took of memory (bytes)."""
    import torch
    import torch.distributed as dist

    from labkit.experiment.process_memory import peak_resident_bytes, resident_bytes
    from labkit.parallel import attention, context

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    context.kernel_for = lambda query: getattr(attention, kernel)()  # type: ignore[attr-defined]
    assert dist.group.WORLD is not None
    ring, shape = context.Ring(dist.group.WORLD), (1, HEADS, length // 2, HEAD)
    torch.manual_seed(rank)
    leaves = [torch.randn(shape, dtype=getattr(torch, dtype), requires_grad=True) for _ in range(3)]
    before, seconds = resident_bytes(), []
    for _ in range(PASSES):
        dist.barrier()
        begun = time.perf_counter()
        ring(*leaves, is_causal=True).sum().backward()
        seconds.append(time.perf_counter() - begun)
    if rank == 0:
        print(json.dumps([statistics.median(seconds[1:]), peak_resident_bytes() - before]))


def measured(length: int, dtype: str, kernel: str) -> list[float]:
    """Return seconds and bytes of a pass on two new ranks."""
    with tempfile.TemporaryDirectory() as folder:
        given = [str(Path(folder, "store")), str(length), dtype, kernel]
        command = [sys.executable, __file__, "--rank"]
        ranks = [subprocess.Popen([*command, str(n), *given], stdout=subprocess.PIPE, text=True) for n in range(2)]
        output = [process.communicate(timeout=600)[0] for process in ranks]
    figures: list[float] = json.loads(output[0])
    return figures


def compared(length: int, dtype: str, repeats: int) -> dict[str, list[float]]:
    """Return by kernel the medians of seconds and bytes."""
    results: dict[str, list[list[float]]] = {kernel: [] for kernel in KERNELS}

    def case(kernel: str) -> float:
        results[kernel].append(measured(length, dtype, kernel))
        return results[kernel][-1][0]

    interleave({kernel: lambda kernel=kernel: case(kernel) for kernel in KERNELS}, repeats)  # type: ignore[misc]
    return {
        kernel: [statistics.median(column) for column in zip(*rows, strict=True)] for kernel, rows in results.items()
    }


def main() -> int:
    """Compare both kernels by length and format; exit 1 if the fused one is slower or takes more memory."""
    options = arguments(__doc__ or "", repeats=3)
    rows, claims, data = [], [], {}
    for length in LENGTHS:
        for dtype in FORMATS:
            medians = compared(length, dtype, options.repeats)
            (dense, dense_bytes), (fused, fused_bytes) = (medians[kernel] for kernel in KERNELS)
            name = f"T {length}, {dtype}"
            data[name] = medians
            mib = f"{dense_bytes / 2**20:.0f} and {fused_bytes / 2**20:.0f} MiB"
            rows.append((name, f"all scores {1000 * dense:.1f} ms, fused {1000 * fused:.1f} ms; {mib}"))
            claims.append((f"{name}: speed of the fused kernel", dense / fused, ">=", 1.0))
            claims.append((f"{name}: its memory", fused_bytes / dense_bytes, "<=", 1.0))
    return report("Ring attention on 2 ranks, forward and backward", rows, claims, options, data)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        number, store, length, dtype, kernel = sys.argv[2:]
        rank(int(number), store, int(length), dtype, kernel)
    else:
        raise SystemExit(main())
