"""Real runs: every number format learns on every layout that the rules allow, shows that it was on, and can go on."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from labkit.experiment import Experiment
from labkit.launch import launch, warm
from labkit.runs import Run
from tests.quantization.networks import wanted

LAYOUTS: dict[str, tuple[str, ...]] = {
    "dp2": ("layout=dp2",),
    "zero 1": ("layout=shard2", "layout.zero_stage=1"),
    "zero 3": ("layout=shard2", "layout.zero_stage=3"),
    "tp2": ("layout=tp2",),
    "pp2": ("layout=pp2", "layout.microbatches=2"),
    "dp2·pp2": ("layout=dp2·pp2", "layout.microbatches=2"),
}
FORMATS: dict[str, tuple[str, ...]] = {
    "bf16": ("quantization.training=bf16",),
    "pure_bf16": ("quantization.training=pure_bf16",),
    "int8": ("quantization.training=int8",),
    "int8_weights": ("quantization.training=int8_weights",),
    "bitnet": ("quantization.training=bitnet",),
    "qat int8": ("quantization.qat=int8",),
    "qat int4": ("quantization.qat=int4",),
    "8 bits of state": ("optimizer.state_bits=8", "workload.width=64"),
}
PROOF = {
    "bf16": "activations",
    "pure_bf16": "rounded_against_nearest",
    "int8": "int8_products",
    "int8_weights": "weights_on_grid",
    "bitnet": "ternary",
    "qat int8": "weight_values",
    "qat int4": "weight_values",
    "8 bits of state": "optimizer_state_bits",
}


def ran(experiment: Experiment, **options: Any) -> Run:
    warm(60)
    run = launch(experiment, baseline=None, **options)
    run.result(timeout=120)
    return run


@lru_cache
def reference(format: str) -> Run:
    """On one rank."""
    return ran(wanted(*FORMATS[format]))


@pytest.mark.parametrize("format", FORMATS)
def test_alone_it_learns_and_shows_that_it_was_on(format: str) -> None:
    run = reference(format)
    data = run.data()
    assert data.loss[-1] < data.loss[0] - 0.3
    assert PROOF[format] in run.summary()["effective"]


def crossed(formats: Iterable[str], layouts: Iterable[str]) -> list[Any]:
    """Return every format on every layout, of which all formats on replicas and int8 on all layouts always run."""
    return [
        pytest.param(format, layout, marks=() if layout == "dp2" or format == "int8" else pytest.mark.exhaustive)
        for format, layout in product(formats, layouts)
    ]


@pytest.mark.parametrize(("format", "layout"), crossed(FORMATS, LAYOUTS))
def test_on_a_layout_it_learns_the_same_up_to_rounding_or_is_refused(format: str, layout: str) -> None:
    experiment = wanted(*FORMATS[format], *LAYOUTS[layout])
    if experiment.problems():
        assert (format, layout) == ("bitnet", "tp2")
        return
    run = ran(experiment)
    data, alone = run.data(), reference(format).data()
    assert data.loss[0] == pytest.approx(alone.loss[0], abs=0.05)
    assert data.loss[-1] == pytest.approx(alone.loss[-1], abs=0.25)
    assert data.loss[-1] < data.loss[0] - 0.3
    assert PROOF[format] in run.summary()["effective"]


# -- one weight on all ranks ------------------------------------------------------------------------------------------

# What ranks hold twice must stay equal to the bit, whatever was rounded at random.
_COMPARE = """
from labkit.training.reporter import Reporter
import torch, torch.distributed as dist
write = Reporter.write_figures
def compared(self, first, done):
    for name, parameter in self.setup.model.unwrapped.named_parameters():
        other = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(other, parameter.detach().contiguous())
        assert all(torch.equal(parameter, one) for one in other), name
    write(self, first, done)
Reporter.write_figures = compared
"""


@pytest.mark.parametrize("format", ["pure_bf16", "int8", "int8_weights", "8 bits of state"])
def test_replicas_stay_equal(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.launch.helpers import changed_ranks

    monkeypatch.setenv("LABKIT_TEST_CHANGE", _COMPARE)
    with changed_ranks(tmp_path):
        ran(wanted(*FORMATS[format], "layout=dp2"))


# -- going on ---------------------------------------------------------------------------------------------------------


def halves(*changes: str) -> tuple[Run, Run]:
    """A whole run, and one of its first half that left a checkpoint."""
    lasting = (*changes, "optimizer.schedule=constant", "training.checkpoint_every=6")
    return ran(wanted(*lasting)), ran(wanted(*lasting, "training.steps=6"))


@pytest.mark.parametrize(
    ("format", "layout"),
    crossed(["pure_bf16", "int8", "int8_weights", "8 bits of state", "qat int4"], ["dp2", "zero 1", "zero 3", "tp2"]),
)
def test_a_resumed_run_repeats_the_whole_one(format: str, layout: str) -> None:
    whole, half = halves(*FORMATS[format], *LAYOUTS[layout])
    rest = ran(whole.experiment, resume=half.id)
    assert rest.data().first == 6
    assert np.array_equal(rest.data().loss, whole.data().loss[6:])
    ends = [load_file(run.directory.checkpoint(12) / "model.safetensors") for run in (whole, rest)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_moments_of_8_bits_go_on_in_another_layout() -> None:
    """Checkpoints hold them unpacked, by name."""
    whole, half = halves(*FORMATS["8 bits of state"], "layout=dp2")
    kept = load_file(half.directory.checkpoint(6) / "optimizer.safetensors")
    assert not [name for name in kept if "codes" in name]
    for other in (LAYOUTS["zero 3"], LAYOUTS["tp2"]):
        rest = ran(whole.experiment.replace(*other), resume=half.id)
        assert rest.data().loss == pytest.approx(whole.data().loss[6:], abs=0.05)


# -- bytes ------------------------------------------------------------------------------------------------------------


def test_bytes_of_the_state_and_of_pure_bf16_are_those_of_the_formula() -> None:
    from labkit.experiment.recipes import language_ddp

    base = language_ddp().set({"layout": "dp2", "training.steps": 5, "training.evaluate_every": 0})
    found = {}
    for name, change in (("fp32", "optimizer.state_bits=32"), ("8 bits", "optimizer.state_bits=8")):
        memory = ran(base.replace(change)).summary()["memory"]
        found[name] = memory["measured"][0]["optimizer"]
        assert memory["measured"][0]["optimizer"] == pytest.approx(memory["formula"][0]["optimizer"], rel=0.2)
    assert found["8 bits"] <= 0.3 * found["fp32"]
    memory = ran(base.replace("quantization.training=pure_bf16")).summary()["memory"]
    for kind in ("parameters", "gradients", "optimizer"):
        assert memory["measured"][0][kind] == pytest.approx(memory["formula"][0][kind], rel=0.02)
    assert memory["measured"][0]["optimizer"] == pytest.approx(found["fp32"], rel=0.01), "moments are float32"
    assert 2 * memory["measured"][0]["parameters"] == pytest.approx(memory["measured"][0]["optimizer"] / 2, rel=0.01)


# -- int8 -------------------------------------------------------------------------------------------------------------


def test_int8_products_of_an_update_are_counted_to_the_last() -> None:
    """Two layers with six linear layers each, three products each, one pass; with two passes twice as many."""
    assert float(reference("int8").summary()["effective"]["int8_products"]) == 36
    fewer = ran(wanted(*FORMATS["int8"], "quantization.weight_gradient=false", "gradients.accumulation=2"))
    assert float(fewer.summary()["effective"]["int8_products"]) == 48
    halves = ran(wanted(*FORMATS["int8"], "layout=tp2"))
    assert float(halves.summary()["effective"]["int8_products"]) == 36, "every rank multiplies its part of each layer"


def test_a_schedule_that_splits_the_backward_pass_splits_int8_products_rightly() -> None:
    split = ran(
        wanted(
            *FORMATS["int8"],
            "workload.depth=6",
            "layout=pp2",
            "layout.schedule=zbv",
            "layout.stages_per_rank=2",
            "layout.microbatches=4",
        )
    )
    alone = ran(wanted(*FORMATS["int8"], "workload.depth=6"))
    assert split.data().loss[-1] == pytest.approx(alone.data().loss[-1], abs=0.25)
    assert split.data().loss[-1] < split.data().loss[0] - 0.3


# -- after training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "layout", "smaller", "worse"),
    [
        ("int8_dynamic", "layout=dp2", 3.3, 0.02),
        ("int8_static", "layout=dp2", 3.3, 0.02),
        ("int8_weight_only", "layout=shard2", 3.3, 0.02),
        ("int4_weight_only", "", 5.0, 0.2),
    ],
)
def test_the_trained_network_is_quantized_beside_itself(method: str, layout: str, smaller: float, worse: float) -> None:
    changes = [f"quantization.after_training={method}", *([layout, "layout.zero_stage=2"] if layout else [])]
    run = ran(wanted(*changes))
    found = run.summary()["quantized"]
    assert found["method"] == method
    assert found["layers"] == 12
    assert found["layer_bytes"]["float"] > smaller * found["layer_bytes"]["quantized"]
    assert found["bytes"]["float"] > found["bytes"]["quantized"]
    last = run.data().evaluations[-1][2]
    assert found["metrics"]["float"]["loss"] == pytest.approx(last["loss"], abs=1e-4)
    assert 0 < abs(found["metrics"]["quantized"]["loss"] - last["loss"]) < worse
    assert set(found["latency_seconds"]) == {"1", "32", "512"}
    assert len(found["sensitivity"]) == 12
    assert all(abs(change) < worse for _, change in found["sensitivity"])


def test_a_network_trained_for_its_grid_loses_nothing_when_it_is_put_there() -> None:
    """The evaluation during training rounds as conversion does."""
    for bits, method in (("int4", "int4_weight_only"), ("int8", "int8_dynamic")):
        run = ran(wanted(f"quantization.qat={bits}", f"quantization.after_training={method}"))
        found = run.summary()["quantized"]
        assert found["qat"] == bits
        assert found["metrics"]["quantized"]["loss"] == pytest.approx(run.data().evaluations[-1][2]["loss"], abs=1e-4)


def test_other_trainings_are_quantized_too() -> None:
    for training in ("bf16", "pure_bf16", "int8", "int8_weights"):
        run = ran(wanted(f"quantization.training={training}", "quantization.after_training=int8_dynamic"))
        metrics = run.summary()["quantized"]["metrics"]
        assert metrics["quantized"]["loss"] == pytest.approx(metrics["float"]["loss"], abs=0.02), training
