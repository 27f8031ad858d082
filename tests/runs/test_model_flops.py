"""Model FLOPs per second and MFU: which cards, which peak, counted once; and sentences where there is no figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from labkit.experiment import Experiment
from labkit.runs.compare import compare
from labkit.runs.follow import summary_text
from labkit.runs.model_flops import ModelFlops, model_flops, rate_text, why_no_mfu
from labkit.runs.peaks import CARDS, FORMATS, card_of, peak_flops
from labkit.runs.summarize import summarize
from tests.runs.record import record

H200, A100 = "NVIDIA H200", "NVIDIA A100-SXM4-80GB"


def on(*devices: tuple[str, str]) -> list[dict[str, Any]]:
    """What ranks report when they start: device and card."""
    return [{"device": device, "card": card} for device, card in devices]


def measured(*devices: tuple[str, str], training: str = "bf16", per_sample: float | None = 2e9) -> ModelFlops:
    return model_flops(per_sample, 1000.0, on(*devices), Experiment().set({"quantization.training": training}))


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("Tesla V100-SXM2-16GB", "V100 SXM"),
        ("Tesla V100-PCIE-32GB", "V100 PCIe"),
        ("Tesla T4", "T4"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("A100-SXM4-80GB", "A100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_a_card_is_recognised_by_its_whole_name(name: str, title: str) -> None:
    assert getattr(card_of(name), "title", None) == title


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "GRID A100-10C",
        "NVIDIA A1000",
        "NVIDIA L400",
        "",
        "H200\x00",
    ],
)
def test_a_name_that_only_begins_like_a_card_is_unknown(name: str) -> None:
    assert card_of(name) is None
    assert peak_flops(name, "bf16") is None


def test_peaks_are_those_of_dense_products() -> None:
    """Each halving of the bits doubles the rate of tensor cores; a rate with sparsity would double it once more."""
    for card in CARDS:
        rates = dict(zip(FORMATS, card.rates, strict=True))
        if rates["bf16"] and rates["tf32"] and card.title not in ("L40",):
            assert rates["bf16"] == pytest.approx(2 * rates["tf32"], rel=0.03), card.title
        if rates["bf16"] and rates["fp8"]:
            assert rates["fp8"] == pytest.approx(2 * rates["bf16"], rel=0.03), card.title
        assert rates["fp16"] is not None, card.title
        assert card.source


def test_each_name_belongs_to_one_card() -> None:
    assert len({card.title for card in CARDS}) == len({card.names for card in CARDS}) == len(CARDS)


def test_mfu_is_the_rate_divided_by_the_peak_of_all_cards() -> None:
    flops = measured(("cuda:0", H200), ("cuda:1", H200))
    assert flops.per_second == 2e12
    assert flops.mfu == pytest.approx(2e12 / (2 * 989.4e12))
    assert flops.cards == "2 × NVIDIA H200"


def test_ranks_that_share_a_card_count_it_once() -> None:
    assert measured(("cuda:0", H200), ("cuda:0", H200)).mfu == measured(("cuda:0", H200)).mfu


def test_different_cards_add_up() -> None:
    assert measured(("cuda:0", H200), ("cuda:1", A100)).peak_flops == pytest.approx((989.4 + 312) * 1e12)


@pytest.mark.parametrize(
    ("training", "peak"),
    [("fp32", 67), ("tf32", 494.7), ("bf16", 989.4), ("pure_bf16", 989.4), ("fp16", 989.4), ("fp8", 1978.9)],
)
def test_the_peak_is_that_of_the_format_that_trains(training: str, peak: float) -> None:
    assert measured(("cuda:0", H200), training=training).peak_flops == pytest.approx(peak * 1e12)


def test_a_format_of_several_products_has_a_rate_and_no_mfu() -> None:
    flops = measured(("cuda:0", H200), training="bitnet")
    assert (flops.mfu, flops.per_second) == (None, 2e12)
    assert "number format" in str(why_no_mfu(flops))


def test_an_unknown_card_has_a_rate_and_a_sentence_that_names_it() -> None:
    flops = measured(("cuda:0", H200), ("cuda:1", "NVIDIA X1"))
    assert (flops.mfu, flops.per_second) == (None, 2e12)
    assert "NVIDIA X1" in str(why_no_mfu(flops))


def test_cpus_have_a_rate_only_and_need_no_sentence() -> None:
    flops = measured(("cpu", ""))
    assert (flops.per_second, flops.mfu, flops.cards, why_no_mfu(flops)) == (2e12, None, None, None)


def test_without_a_count_there_is_no_figure() -> None:
    flops = measured(("cuda:0", H200), per_sample=None)
    assert (flops.per_second, flops.mfu, why_no_mfu(flops)) == (None, None, None)


@pytest.mark.parametrize(
    ("rate", "text"), [(4.1234e14, "412 TFLOP/s"), (3.2e9, "3.2 GFLOP/s"), (5e6, "5 MFLOP/s"), (2e11, "0.2 TFLOP/s")]
)
def test_rates_have_fitting_units(rate: float, text: str) -> None:
    assert rate_text(rate) == text


def on_gpus(home: Path, per_sample: Any = 1e12) -> Any:
    """A recorded run of 64 samples in 10 ms on an H200, in bf16."""
    directory = record(home, "fast", [0.01] * 40, "quantization.training=bf16")
    head = {"rank": 0, "time": 1.0, "monotonic": 1.0}
    events = [
        {"event": "rehearsal", "seconds": 0.1, "model_flops_per_sample": per_sample},
        {"event": "start", "first": 0, "device": "cuda:0", "card": H200},
    ]
    with directory.events(0).open("a") as file:
        file.write("".join(json.dumps(head | event) + "\n" for event in events))
    return directory


def test_summary_comparison_and_terminal_show_them(labkit_home: Path) -> None:
    directory = on_gpus(labkit_home, 6e10)
    summary = summarize(directory).as_dict()
    assert summary["model_flops_per_second"] == pytest.approx(6400 * 6e10)
    assert summary["mfu"] == pytest.approx(6400 * 6e10 / 989.4e12)
    assert summary["peak_of"] == "1 × NVIDIA H200, bf16"
    text = summary_text(summary)
    assert "384 TFLOP/s (model FLOPs: 3 × the products of one forward pass)" in text
    assert "38.8% of 989 TFLOP/s (1 × NVIDIA H200, bf16, dense)" in text
    table = str(compare([directory]))
    assert "384" in table
    assert "39%" in table


@pytest.mark.parametrize("value", [-1, "1e12", None, True, [1], 1e31])
def test_a_count_that_is_none_is_no_figure(labkit_home: Path, value: Any) -> None:
    assert summarize(on_gpus(labkit_home, value)).model_flops_per_second is None
