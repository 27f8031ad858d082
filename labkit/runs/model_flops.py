"""How fast a run computes: model FLOPs per second, and on GPUs the share of their peak (MFU).

Model FLOPs follow a convention (training/rehearsal/model_flops.py): 3 × the products of one forward pass. MFU is model
FLOPs per second divided by the peak rate of the cards in the number format that trains (PaLM, arXiv:2204.02311,
appendix B). Ranks that share a GPU count it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from labkit.experiment import Experiment
from labkit.experiment.registry import registry
from labkit.runs.data import RunData
from labkit.runs.peaks import peak_flops

CONVENTION = "model FLOPs: 3 × the products of one forward pass"
"""The convention in words, shown beside each figure."""


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """Model FLOPs of a run, and how they compare with what its GPUs can do."""

    per_sample: float | None
    """Model FLOPs of one sample; null if they are not known (`notes` gives the reason)."""
    per_second: float | None
    """Model FLOPs per second over all ranks, at the median step time after the warm-up."""
    mfu: float | None
    """Model FLOPs per second divided by the peak of the GPUs; null on CPUs and for unknown cards."""
    cards: str | None
    """The distinct GPUs, such as `2 × NVIDIA H200`; null on CPUs."""
    number_format: str | None
    """Number format of most products, to whose peak rate the MFU refers; null on CPUs, and if it is not known."""
    peak_flops: float | None
    """Peak rate of these GPUs together for dense products in that format (FLOP/s); null if it is not known."""


def model_flops(
    per_sample: float | None, samples_per_second: float | None, starts: Sequence[dict[str, Any]], experiment: Experiment
) -> ModelFlops:
    """Return the model FLOPs of a run, from those of a sample and from what its ranks reported when they started."""
    rate = None if per_sample is None or samples_per_second is None else per_sample * samples_per_second
    cards = _cards(starts)
    if not cards:
        return _on_cpu(per_sample, rate)
    number_format = products_format(experiment)
    peaks = [peak_flops(card, number_format) for card in cards]
    peak = None if None in peaks else sum(each for each in peaks if each is not None)
    return ModelFlops(
        per_sample=per_sample,
        per_second=rate,
        mfu=None if rate is None or not peak else rate / peak,
        cards=_listed(cards),
        number_format=number_format or None,
        peak_flops=peak,
    )


def model_flops_of(data: RunData, experiment: Experiment, samples_per_second: float | None) -> ModelFlops:
    """Return the model FLOPs of a run at a throughput over all ranks."""
    return model_flops(data.model_flops_per_sample, samples_per_second, data.rank_starts, experiment)


def _on_cpu(per_sample: float | None, rate: float | None) -> ModelFlops:
    """Return the model FLOPs of a run on CPUs, for which there is no peak rate."""
    return ModelFlops(per_sample=per_sample, per_second=rate, mfu=None, cards=None, number_format=None, peak_flops=None)


def _cards(starts: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the distinct GPUs on which ranks train; [] on CPUs, or before all ranks have started."""
    by_device = {start.get("device", ""): start.get("card", "") for start in starts}
    on_gpus = bool(by_device) and all(device.startswith("cuda") for device in by_device)
    return [by_device[device] for device in sorted(by_device)] if on_gpus else []


def _listed(cards: Sequence[str]) -> str:
    """Return cards in words: `2 × NVIDIA H200`."""
    return " + ".join(f"{cards.count(card)} × {card or 'unknown GPU'}" for card in sorted(set(cards)))


def products_format(experiment: Experiment) -> str:
    """Return the format of most matrix products of the experiment, as data sheets name it; "" if it is not known.

    Only what a number format declares itself counts: a class derived from another one may multiply anything.
    """
    method = registry("quantization.training")[experiment.quantization.training]
    return str(vars(method.load()).get("products", "")) if method.is_loaded else ""


def peak_of(flops: ModelFlops) -> str | None:
    """Return the GPUs and the number format of the peak in words; None on CPUs."""
    return None if flops.cards is None else f"{flops.cards}, {flops.number_format or 'no format of data sheets'}"


def why_no_mfu(flops: ModelFlops) -> str | None:
    """Return in one sentence why a run on GPUs has a rate and no MFU; None if it has one, or needs none."""
    if flops.cards is None or flops.per_second is None or flops.mfu is not None:
        return None
    if flops.number_format is None:
        return "there is no MFU: this number format has no peak rate in data sheets"
    return f"there is no MFU: labkit knows no peak rate of {flops.cards} in {flops.number_format}"


def rate_text(flops_per_second: float) -> str:
    """Return a rate in words with a fitting unit: `412 TFLOP/s`, `3.2 GFLOP/s`."""
    for factor, unit in ((1e12, "TFLOP/s"), (1e9, "GFLOP/s")):
        if flops_per_second >= 0.1 * factor:
            return f"{flops_per_second / factor:.3g} {unit}"
    return f"{flops_per_second / 1e6:.3g} MFLOP/s"
