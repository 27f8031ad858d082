"""Peak rates of NVIDIA's cards for dense products, by number format, from NVIDIA's data sheets.

Data sheets state tensor-core rates with 2:4 sparsity from Ampere on, often only so; the rates here are those without,
which is half of them. `fp32` is the rate outside of tensor cores, all others are those of the tensor cores. For
GeForce cards, 16-bit and fp8 products are summed in 32 bits, as training does.

A card is recognised by the whole name that CUDA reports. A name that only begins like one in the table may be a slower
card, such as a laptop's, a part of a card (MIG) or a virtual one, so it counts as unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FORMATS = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8")
"""The columns of the table."""
_TERA = 1e12


@dataclass(frozen=True)
class Card:
    """One kind of card: its peak rates (TFLOP/s, dense), where they come from, and what CUDA calls it."""

    title: str
    """Name of the card."""
    names: str
    """Regular expression of the names that CUDA reports, without a leading `NVIDIA` or `Tesla`."""
    rates: tuple[float | None, ...]
    """Peak rate in each of FORMATS (TFLOP/s); None where the card has no such products."""
    source: str
    """The data sheet."""


_GB = r"\d+ ?GB"
_HOPPER = (67.0, 494.7, 989.4, 989.4, 1978.9, 1978.9)
_HOPPER_NVL = (60.0, 417.5, 835.5, 835.5, 1670.5, 1670.5)

CARDS = (
    Card("V100 SXM", rf"V100-SXM[23](-{_GB})?", (15.7, None, None, 125.0, None, None), "V100 data sheet, 2020"),
    Card("V100 PCIe", rf"V100-PCIE-{_GB}", (14.0, None, None, 112.0, None, None), "V100 data sheet, 2020"),
    Card("V100S PCIe", rf"V100S-PCIE-{_GB}", (16.4, None, None, 130.0, None, None), "V100 data sheet, 2020"),
    Card("T4", r"T4", (8.1, None, None, 65.0, None, 130.0), "T4 data sheet, 2019"),
    Card("A10", r"A10", (31.2, 62.5, 125.0, 125.0, None, 250.0), "A10 data sheet, 2021"),
    Card("A10G", r"A10G", (31.5, 35.0, 70.0, 70.0, None, 140.0), "A10G data sheet, 2022"),
    Card("A30", r"A30", (10.3, 82.0, 165.0, 165.0, None, 330.0), "A30 data sheet, 2021"),
    Card(
        "A100",
        rf"A100(-SXM4|-PCIE|-PG50[69])?[- ]{_GB}( PCIe)?",
        (19.5, 156.0, 312.0, 312.0, None, 624.0),
        "A100 data sheet, 2021",
    ),
    Card("L4", r"L4", (30.3, 60.0, 121.0, 121.0, 242.5, 242.5), "L4 data sheet, 2023"),
    Card("L40", r"L40", (90.5, 90.5, 181.05, 181.05, 362.0, 362.0), "L40 data sheet, 2023"),
    Card("L40S", r"L40S", (91.6, 183.0, 362.05, 362.05, 733.0, 733.0), "L40S data sheet, 2023"),
    Card(
        "RTX 4090",
        r"GeForce RTX 4090",
        (82.6, 82.6, 165.2, 165.2, 330.3, 660.6),
        "Ada GPU architecture, appendix A, 2023",
    ),
    Card("H100 PCIe", r"H100 PCIe", (51.0, 378.0, 756.5, 756.5, 1513.0, 1513.0), "H100 data sheet, 2022"),
    Card("H100 NVL", r"H100 NVL", _HOPPER_NVL, "H100 data sheet, 2024"),
    Card("H100 SXM", rf"H100 {_GB} HBM[23]e?", _HOPPER, "H100 data sheet, 2024"),
    Card("GH200", rf"GH200 {_GB}", _HOPPER, "GH200 data sheet, 2024"),
    Card("H200 NVL", r"H200 NVL", _HOPPER_NVL, "H200 data sheet, 2024"),
    Card("H200 SXM", r"H200", _HOPPER, "H200 data sheet, 2024"),
    Card("B200", r"B200", (75.0, 1125.0, 2250.0, 2250.0, 4500.0, 4500.0), "HGX B200 data sheet, 2025"),
)


def card_of(name: str) -> Card | None:
    """Return the card that CUDA calls `name`, such as `NVIDIA H100 80GB HBM3`; None if it is not in the table."""
    bare = re.sub(r"^(NVIDIA |Tesla |NVIDIA Tesla )", "", name)
    return next((card for card in CARDS if re.fullmatch(card.names, bare)), None)


def peak_flops(name: str, number_format: str) -> float | None:
    """Return the peak rate of dense products of a card in a number format (FLOP/s); None if it is unknown."""
    card = card_of(name)
    rate = card.rates[FORMATS.index(number_format)] if card is not None and number_format in FORMATS else None
    return None if rate is None else _TERA * rate
