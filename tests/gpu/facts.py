"""What torch does on this GPU, asked directly: `python -m tests.gpu.facts OUT.jsonl`.

Each line answers one question on which labkit's CUDA code rests: which layouts of int8 operands cuBLAS multiplies, what
fp8, 2:4 and attention kernels give beside the bf16 product (the ceiling of every figure in RESULTS.md), and which
collectives gloo and NCCL have for ranks that share one GPU. Rates are medians of ten timed calls on random data.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

SIZE = 8192
COLLECTIVES = ("sum", "max", "all_gather", "reduce_scatter", "reduce_scatter_mean", "all_to_all", "object", "send")
CHILD = """
import datetime, os, sys
import torch, torch.distributed as dist
backend, rank, ranks, store, what = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
torch.cuda.set_device(0)
dist.init_process_group(backend, init_method="file://" + store, rank=rank, world_size=ranks,
                        timeout=datetime.timedelta(seconds=20))
x = torch.full((1 << 16,), float(rank + 1), device="cuda")
y = x
if what == "sum": dist.all_reduce(x)
if what == "max": dist.all_reduce(x, dist.ReduceOp.MAX)
if what == "all_gather": y = x.new_empty(ranks << 16); dist.all_gather_into_tensor(y, x)
if what == "reduce_scatter": y = x.new_empty((1 << 16) // ranks); dist.reduce_scatter_tensor(y, x)
if what == "reduce_scatter_mean":
    y = x.new_empty((1 << 16) // ranks); dist.reduce_scatter_tensor(y, x, dist.ReduceOp.AVG)
if what == "all_to_all": y = torch.empty_like(x); dist.all_to_all_single(y, x)
if what == "object": held = [rank + 7]; dist.broadcast_object_list(held, 0); y = torch.tensor(held)
if what == "send": dist.send(x, 1) if rank == 0 else dist.recv(x, 0)
print(f"rank {rank} got {y[-1].item()}", flush=True)
os._exit(0)
"""


def milliseconds(call: Callable[[], Any], repeats: int = 10) -> float:
    """Return the median time of a call on the GPU, by events, after three calls that warm up."""
    for _ in range(3):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in itertools.pairwise(marks))


def teraflops(call: Callable[[], Any], rows: int = SIZE, inner: int = SIZE, columns: int = SIZE) -> float:
    """Return how many 10¹² operations per second a product of matrices reaches."""
    return round(2 * rows * inner * columns / milliseconds(call) / 1e9, 1)


def products() -> dict[str, Any]:
    """Return the rates of matrix products by number format, of one size."""
    device = torch.device("cuda")
    x = torch.randn(SIZE, SIZE, device=device, dtype=torch.bfloat16)
    w = torch.randn(SIZE, SIZE, device=device, dtype=torch.bfloat16)
    wide = x.float(), w.float()
    found: dict[str, Any] = {"bf16": teraflops(lambda: x @ w.t())}
    for allow in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allow
        found["tf32" if allow else "fp32"] = teraflops(lambda: wide[0] @ wide[1])
    torch.backends.cuda.matmul.allow_tf32 = False
    eight = [part.to(torch.float8_e4m3fn) for part in (x, w)]
    unit = torch.ones((), device=device)
    found["fp8"] = teraflops(
        lambda: torch._scaled_mm(eight[0], eight[1].t(), unit, unit, out_dtype=torch.bfloat16, use_fast_accum=True)
    )
    return found


def int8_layouts() -> dict[str, Any]:
    """Return for each layout of the two operands whether `_int_mm` is right, and its rate, or its error."""
    found: dict[str, Any] = {}
    for left, right, size in itertools.product(("row", "column"), ("row", "column"), (64, SIZE)):
        a = torch.randint(-127, 128, (size, size), dtype=torch.int8, device="cuda")
        b = torch.randint(-127, 128, (size, size), dtype=torch.int8, device="cuda")
        a, b = (a.t() if left == "column" else a), (b.t() if right == "column" else b)
        name = f"a {left}-major, b {right}-major, {size}"
        try:
            rows = torch._int_mm(a, b)[:64].cpu()
            right_result = torch.equal(rows, a[:64].cpu().int() @ b.cpu().int())
            found[name] = [right_result, teraflops(lambda a=a, b=b: torch._int_mm(a, b), size, size, size)]  # type: ignore[misc]
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0][:160]
    return found


def two_four() -> dict[str, Any]:
    """Return what compressing a weight to 2:4 costs (ms) and its product, counted as if it were dense."""
    from torch.sparse import to_sparse_semi_structured

    x = torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    weight.view(-1, 4)[:, ::2] = 0
    sparse = to_sparse_semi_structured(weight)
    return {
        "compress_ms": round(milliseconds(lambda: to_sparse_semi_structured(weight)), 3),
        "product": teraflops(lambda: functional.linear(x, sparse)),
    }


def attention() -> dict[str, Any]:
    """Return causal attention's rate forward and time forward and backward, by torch's choice and by each kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads = torch.randn(8, 16, 2048, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    flops = 2 * 8 * 16 * 2048**2 * 128  # two products, half of the scores

    def forward() -> torch.Tensor:
        return functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)

    found: dict[str, Any] = {}
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "choice": None}
    for name, kernel in kernels.items():
        try:
            with sdpa_kernel([kernel] if kernel else [k for k in kernels.values() if k]):
                rate = round(flops / milliseconds(forward) / 1e9, 1)
                found[name] = [rate, round(milliseconds(lambda: forward().sum().backward()), 3)]
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0][:160]
    return found


def smaller() -> dict[str, Any]:
    """Return times (ms) of what methods of labkit ask for: ranking groups of four, orthogonalisation."""
    groups = torch.randn(1 << 20, 4, device="cuda")
    gibibyte = torch.empty(2**28, device="cuda")
    tall = torch.randn(2048, 12, device="cuda")
    return {
        "topk(2) of 1 M groups of 4": round(milliseconds(lambda: groups.topk(2, 1)), 3),
        "the same by comparing": round(milliseconds(lambda: (groups.unsqueeze(2) < groups.unsqueeze(1)).sum(2) < 2), 3),
        "qr of 2048 x 12": round(milliseconds(lambda: torch.linalg.qr(tall)), 3),
        "copy 1 GiB (GB/s, read and written)": round(2 * 2**30 / milliseconds(lambda: gibibyte.clone()) / 1e6),
    }


def between_ranks(backend: str, what: str, ranks: int = 2) -> list[str]:
    """Return what each of the ranks that share the GPU got of one collective, or its last line of error."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-c", CHILD, backend]
        children = [
            subprocess.Popen(
                [*command, str(rank), str(ranks), f"{folder}/store", what],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(ranks)
        ]
        answers = []
        for child in children:
            try:
                output, error = child.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                child.kill()
                output, error = child.communicate()
                error += "\nno answer within 60 s"
            lines = error.strip().splitlines() or [f"exit {child.returncode}"]
            answers.append(output.strip() or lines[-1][:200])
    return answers


def main() -> int:
    """Ask everything, print and append it to the file; an answer that fails is written down as its error."""
    questions: dict[str, Callable[[], Any]] = {
        "versions": lambda: {
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name(0),
            "nccl": torch.cuda.nccl.version(),
            "cusparselt": torch.backends.cusparselt.is_available(),
        },
        "products (TFLOP/s)": products,
        "int8 operands": int8_layouts,
        "2:4": two_four,
        "attention (TFLOP/s forward, ms both)": attention,
        "smaller (ms)": smaller,
        "nccl, one rank": lambda: between_ranks("nccl", "sum", 1),
        "nccl, two ranks on one GPU": lambda: between_ranks("nccl", "sum"),
    } | {f"gloo, two ranks on one GPU: {what}": lambda what=what: between_ranks("gloo", what) for what in COLLECTIVES}  # type: ignore[misc]
    with Path(sys.argv[1]).open("a", buffering=1) as file:
        for name, ask in questions.items():
            try:
                answer = ask()
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"[:400]
            print(f"{name}: {answer}", flush=True)
            file.write(json.dumps({"question": name, "answer": answer}, default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
