"""A GPT trained by a loop written by hand, as fast as plain torch makes it: what labkit's own loop is measured against.

    python -m tests.gpu.by_hand OUT.jsonl [SIZE …] [VARIANT …]

Model FLOPs per token are 6·N + 6·L·T·d for N parameters without the position table (PaLM's convention, Chowdhery et al.
2022, appendix B, with a causal mask counted as half of the scores); MFU is their rate over the card's measured product
rate in bf16.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from labkit.workloads.models.gpt import gpt
from tests.gpu.facts import products

SIZES = {
    "0.4 B": {"width": 2048, "depth": 8, "heads": 16, "context": 1024, "batch": 16},
    "1.2 B": {"width": 2048, "depth": 24, "heads": 16, "context": 2048, "batch": 8},
    "tiny": {"width": 64, "depth": 2, "heads": 4, "context": 32, "batch": 4},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "autocast, eager": {},
    "autocast, blocks compiled": {"compiled": True},
    "bf16 weights, blocks compiled": {"compiled": True, "weights": torch.bfloat16},
    "fp8, blocks compiled": {"compiled": True, "fp8": True},
}
STEPS, WARM_UP = 12, 4
VOCABULARY = 256


def model_flops(parameters: int, size: dict[str, int]) -> float:
    """Return the model FLOPs of one step, by the convention above."""
    tokens = size["batch"] * size["context"]
    return tokens * (6.0 * parameters + 6.0 * size["depth"] * size["context"] * size["width"])


def measure(
    size: dict[str, int],
    compiled: bool = False,
    weights: torch.dtype = torch.float32,
    fp8: bool = False,
) -> dict[str, Any]:
    """Train some steps and return the median step time (ms), tokens per second, rate (TFLOP/s) and memory (GiB)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch._dynamo.reset()
    model: Any = gpt(VOCABULARY, size["context"], size["width"], size["depth"], size["heads"]).to(device, weights)
    if fp8:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig(pad_inner_dim=True)
        convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: "head" not in name)
    if compiled:
        for block in model.blocks.values():
            block.compile()
    position = size["context"] * size["width"]
    parameters = sum(parameter.numel() for parameter in model.parameters()) - position
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(VOCABULARY, (2, size["batch"], size["context"]), device=device)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=weights == torch.float32):
            scores = model(tokens[0])
            loss = functional.cross_entropy(scores.flatten(0, 1).float(), tokens[1].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    begun = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    finish()
    warm = time.perf_counter() - begun
    seconds = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        step()
        finish()
        seconds.append(time.perf_counter() - begun)
    median = statistics.median(seconds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {
        "parameters": parameters,
        "step_ms": round(1000 * median, 2),
        "warm_up_s": round(warm, 1),
        "tokens_per_second": round(size["batch"] * size["context"] / median),
        "teraflops": round(model_flops(parameters, size) / median / 1e12, 1),
        "peak_gib": round(peak, 1),
    }


def main() -> int:
    """Measure the named variants at the named sizes (all, if none is named); append a line each to the file."""
    cuda = torch.cuda.is_available()
    ceiling = products()["bf16"] if cuda else float("nan")
    chosen = [text for text in sys.argv[2:] if text in VARIANTS] or list(VARIANTS)
    sizes = [text for text in sys.argv[2:] if text in SIZES] or (["0.4 B", "1.2 B"] if cuda else ["tiny"])
    out = Path(sys.argv[1])
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    measured = {(row["by_hand"], row["size"]) for row in rows if "failed" not in row}
    with out.open("a", buffering=1) as file:
        for name in sizes:
            for variant in chosen:
                if (variant, name) in measured:
                    continue
                row: dict[str, Any] = {"by_hand": variant, "size": name, "bf16_products_teraflops": ceiling}
                try:
                    row |= measure(SIZES[name], **VARIANTS[variant])
                    row["mfu"] = round(row["teraflops"] / ceiling, 3)
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {error}"[:400]
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                print(json.dumps(row), flush=True)
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
