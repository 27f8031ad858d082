"""What compressors do among real ranks: demonstrations for `tests.parallel.below.on_ranks`, each on every rank."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from labkit.experiment.registry import registry
from labkit.gradients.compression.compressor import Compressor, GradientBucket
from labkit.gradients.compression.hierarchical import Hierarchical
from labkit.gradients.compression.plain import Uncompressed
from labkit.gradients.compression.topk import TopK
from labkit.gradients.exchange import CommHook
from labkit.gradients.wire import Communicator

SHAPES: tuple[tuple[int, ...], ...] = ((6, 5), (7,), (4, 3, 2), (1,), (9, 8))
STEPS = 20
AT_ONCE = {"start_step": 0}
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "fp16": {},
    "bf16": {"sum_in": "fp32"},
    "int8": {"chunk": 10},
    "sign": AT_ONCE,
    "ternary": AT_ONCE,
    "topk": {"ratio": 0.1, "warmup_steps": 0} | AT_ONCE,
    "randomk": {"ratio": 0.1, "error_feedback": True} | AT_ONCE,
    "powersgd": {"rank": 1, "min_saving": 1.0} | AT_ONCE,
}
"""All but 1-bit Adam, which needs an optimizer."""


def make(key: str, steps: int = STEPS, **options: Any) -> Compressor:
    """The compressor called `key`, among all ranks."""
    method = registry("gradients.compression")[key].load()
    made: Compressor = method(method.Options(**options), Communicator(), steps, 0)
    return made


class Gradients:
    """Gradients of a few parameters, others on every rank and in every step, in two bundles."""

    def __init__(self, dtype: torch.dtype = torch.float64, whole: bool = False) -> None:
        self.dtype, self.whole = dtype, whole
        self.parameters = [torch.zeros(shape) for shape in SHAPES]

    def own(self, step: int, rank: int) -> Tensor:
        """Of one rank, flat."""
        random = torch.Generator().manual_seed(1000 * step + rank)
        count = sum(parameter.numel() for parameter in self.parameters)
        values = torch.randn(count, generator=random, dtype=torch.float64)
        return ((8 * values).round() if self.whole else values).to(self.dtype)

    def mean(self, step: int) -> Tensor:
        """Over all ranks."""
        return torch.stack([self.own(step, rank) for rank in range(dist.get_world_size())]).mean(0)

    def exchange(self, exchange: CommHook, step: int) -> Tensor:
        """What comes out of a step."""
        flat, sizes = self.own(step, dist.get_rank()), [parameter.numel() for parameter in self.parameters]
        border = sum(sizes[:3])
        for part, group in ((flat[:border], slice(0, 3)), (flat[border:], slice(3, None))):
            exchange.start_reduce(part, self.parameters[group], [torch.Size(shape) for shape in SHAPES[group]])
        exchange.wait()
        exchange.end_update()
        return flat


def _spread(key: str, whole: bool = False, **options: Any) -> float:
    """The largest difference to the true mean in three steps."""
    exchange, gradients = CommHook(make(key, **options)), Gradients(whole=whole)
    return max(float((gradients.exchange(exchange, step) - gradients.mean(step)).abs().max()) for step in range(3))


def limits() -> dict[str, float]:
    """With nothing left out, every method gives the mean."""
    # min_saving 0: a matrix is factored even where that makes it larger.
    whole_rank = {"rank": 99, "min_saving": 0.0} | AT_ONCE
    return {
        "none": _spread("none"),
        "topk": _spread("topk", ratio=1.0, **AT_ONCE),
        "topk without feedback": _spread("topk", ratio=1.0, error_feedback=False, **AT_ONCE),
        "randomk": _spread("randomk", ratio=1.0, **AT_ONCE),
        "randomk with feedback": _spread("randomk", ratio=1.0, error_feedback=True, **AT_ONCE),
        "powersgd": _spread("powersgd", **whole_rank),
        "fp16 of small whole numbers": _spread("fp16", whole=True),
        "fp16 summed in fp32": _spread("fp16", whole=True, sum_in="fp32"),
        "bf16 of small whole numbers": _spread("bf16", whole=True),
        "bf16 summed in fp32": _spread("bf16", whole=True, sum_in="fp32"),
        "int8 with 32767 levels": _spread("int8", levels=32767),
    }


def counted() -> dict[str, list[int]]:
    """By method, the bytes counted and those of the formula, asked for without an exchange."""
    found = {}
    for key, options in METHODS.items():
        compressor = make(key, **options)
        exchange, gradients = CommHook(compressor), Gradients(torch.float32)
        for step in range(3):
            gradients.exchange(exchange, step)
        buckets, ranks = [SHAPES[:3], SHAPES[3:]], dist.get_world_size()
        formula = sum(compressor.wire_bytes(compressor.options, buckets, ranks, step, STEPS) for step in range(3))
        counters = exchange.counters()
        assert counters.formula_bytes is not None
        found[key] = [counters.bytes, formula, counters.formula_bytes]
    return found


def digests() -> dict[str, str]:
    """By method, what all ranks must agree on to the last bit."""
    found = {}
    for key, options in METHODS.items():
        exchange, gradients = CommHook(make(key, **options)), Gradients(torch.float32)
        together = torch.cat([gradients.exchange(exchange, step) for step in range(4)])
        found[key] = hashlib.sha256(together.numpy().tobytes()).hexdigest()
    return found


def overlap() -> dict[str, bool]:
    """By method: is it the same whether buckets are sent at once or when the last one is there?"""
    found = {}
    for key, options in METHODS.items():
        both = []
        for beside in (True, False):
            exchange, gradients = CommHook(make(key, **options), overlap=beside), Gradients(torch.float32)
            both.append(torch.cat([gradients.exchange(exchange, step) for step in range(3)]))
        found[key] = torch.equal(*both)
    return found


def kept() -> dict[str, float]:
    """With error feedback: how far all results and the mean of what is left miss the sum of all gradients."""
    found = {}
    for key in ("sign", "topk", "randomk", "powersgd"):
        compressor = make(key, **METHODS[key] | ({"values": "fp16"} if key == "topk" else {}))
        exchange, gradients = CommHook(compressor), Gradients()
        results = sum(gradients.exchange(exchange, step) for step in range(STEPS))
        errors: Any = compressor
        left = torch.cat([errors._errors._views[parameter].flatten() for parameter in gradients.parameters])
        dist.all_reduce(left)
        whole = sum(gradients.mean(step) for step in range(STEPS))
        found[key] = float((results + left / dist.get_world_size() - whole).abs().max())
    return found


def summed() -> float:
    """An exchange that adds up: how far it misses the sum."""
    exchange, gradients = CommHook(make("topk", ratio=1.0, **AT_ONCE), summed=True), Gradients()
    return float((gradients.exchange(exchange, 0) - dist.get_world_size() * gradients.mean(0)).abs().max())


# -- what is known of single methods ----------------------------------------------------------------------------------


def unbiased() -> dict[str, list[float]]:
    """Mean of many exchanges of the same gradients: its largest distance to the true mean, in standard errors, and the
    standard deviation of one exchange (that it is not zero).
    """
    found: dict[str, list[float]] = {}
    draws = 400
    for key, options in (
        ("int8", {"levels": 2}),
        ("ternary", {"clip_sigma": 0.0} | AT_ONCE),
        ("randomk", {"ratio": 0.5} | AT_ONCE),
    ):
        compressor, gradients, results = make(key, **options), Gradients(), []
        for step in range(draws):
            flat = gradients.own(0, dist.get_rank())
            bucket = GradientBucket(flat, tuple(gradients.parameters), SHAPES, step, 0)
            results.append(compressor.start_reduce(bucket)().clone())
        table = torch.stack(results)
        spread = table.std(0)
        # What is always sent alike (the largest number of all ranks) has no spread.
        distance = (table.mean(0) - gradients.mean(0)).abs() / (spread / draws**0.5).clamp(min=1e-9)
        found[key] = [float(distance[spread > 1e-12].max()), float(spread.mean())]
    return found


def feedback() -> dict[str, list[float]]:
    """Where descent ends on two problems of the literature, with and without error feedback.

    sign: f = ε|x₁+x₂| + |x₁-x₂| (Karimireddy et al. 2019, counterexample 2): the signs of its gradients are (1, -1) or
    (-1, 1) wherever it is, so without feedback x₁+x₂ never changes. topk: ranks pull the first number each its own way,
    harder than all pull the second together (so that it never is the largest on any rank).
    """
    found: dict[str, list[float]] = {}
    for feeds in (True, False):
        sign = make("sign", scale="bucket", error_feedback=feeds, **AT_ONCE)
        x = _descend(sign, _ridge, torch.tensor([1.0, 1.0]), 400, 0.02)
        found.setdefault("sign", []).append(float(0.5 * (x[0] + x[1]).abs() + (x[0] - x[1]).abs()))
        top = make("topk", ratio=0.5, warmup_steps=0, error_feedback=feeds, **AT_ONCE)
        x = _descend(top, _tug_of_war, torch.zeros(2), 400, 0.02)
        found.setdefault("topk", []).append(float((x[1] - 1).abs()))
    return found


def _ridge(x: Tensor) -> Tensor:
    along, across = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
    return 0.5 * (x @ along).sign() * along + (x @ across + 1e-9).sign() * across


def _tug_of_war(x: Tensor) -> Tensor:
    side = 1.0 if dist.get_rank() % 2 else -1.0
    return torch.stack([x[0] + 10 * side, x[1] - 1])


def _descend(compressor: Compressor, gradient: Any, x: Tensor, steps: int, rate: float) -> Tensor:
    parameter = torch.zeros(2)
    for step in range(steps):
        bucket = GradientBucket(gradient(x).clone(), (parameter,), ((2,),), step, 0)
        x = x - rate * (1 - step / steps) * compressor.start_reduce(bucket)()
    return x


def many_buckets() -> list[float]:
    """PowerSGD with forty buckets under way at once, 60 times; how far a gradient of rank one is missed each time."""
    exchange = CommHook(make("powersgd", rank=2, min_saving=1.0, **AT_ONCE))
    parameters = [torch.zeros(8 + number % 3, 6) for number in range(40)]
    worst = []
    for step in range(60):
        flats, means = [], []
        for number, parameter in enumerate(parameters):
            random = torch.Generator().manual_seed(100 * step + number)
            left = torch.randn(len(parameter), 1, generator=random, dtype=torch.float64)
            right = torch.randn(1, 6, generator=random, dtype=torch.float64)
            # Ranks differ in size only, so their mean has rank one too.
            flats.append(((1 + dist.get_rank()) * left @ right).flatten())
            means.append(((1 + dist.get_world_size()) / 2 * left @ right).flatten())
            exchange.start_reduce(flats[-1], [parameter], [parameter.shape])
        exchange.wait()
        exchange.end_update()
        worst.append(max(float((flat - mean).abs().max()) for flat, mean in zip(flats, means, strict=True)))
    return worst


def storeys() -> dict[str, Any]:
    """Sums in two storeys, two hosts of two ranks: distance to the mean; bytes counted, by the formula, by storey."""
    found: dict[str, Any] = {}
    for name, method, options in (("none", Uncompressed, {}), ("topk", TopK, {"ratio": 1.0} | AT_ONCE)):
        compressor = Hierarchical(method, method.Options(**options), 2, STEPS, 0)
        exchange, gradients = CommHook(compressor), Gradients()
        distance = max(
            float((gradients.exchange(exchange, step) - gradients.mean(step)).abs().max()) for step in range(3)
        )
        counters = exchange.counters()
        found[name] = [distance, counters.bytes, counters.formula_bytes, [comm.sent_bytes for comm in compressor.comms]]
    return found
