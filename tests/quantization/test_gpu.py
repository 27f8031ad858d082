"""Formats that need a GPU; each test skips, with the reason, where there is none that has them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from labkit.experiment.machine import Machine
from labkit.launch import launch
from labkit.quantization.fp8 import Float8
from tests.gpu.beside import beside
from tests.quantization.networks import wanted

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("ranks", [1, 2])
def test_float16_learns_with_a_scaled_loss(ranks: int) -> None:
    losses = {}
    for training in ("fp32", "fp16"):
        run = launch(
            wanted(f"quantization.training={training}", "launch.device=cuda", f"layout=dp{ranks}"), baseline=None
        )
        run.result(300)
        losses[training] = run.data().loss
    effective = run.summary()["effective"]
    assert effective["activations"] == effective["products"] == "float16"
    assert float(effective["loss_scale"]) >= 1
    assert int(effective["updates_left_out"]) <= 4
    assert losses["fp16"][-1] == pytest.approx(losses["fp32"][-1], abs=0.2)


def test_fp8_layers_are_converted_and_learn() -> None:
    missing = Float8.missing(Machine.here())
    if missing:
        pytest.skip(missing)
    run = launch(wanted("quantization.training=fp8", "launch.device=cuda", "workload.width=64"), baseline=None)
    run.result(600)
    assert int(run.summary()["effective"]["float8_layers"]) > 0
    assert run.data().loss[-1] < run.data().loss[0] - 0.3


@pytest.mark.parametrize("training", ["int8", "bitnet", "pure_bf16", "int8_weights"])
def test_formats_of_the_cpu_learn_on_a_gpu(training: str) -> None:
    run = launch(wanted(f"quantization.training={training}", "launch.device=cuda"), baseline=None)
    run.result(300)
    assert run.data().loss[-1] < run.data().loss[0] - 0.3


AMPERE = (8, 0)
PROOF: dict[str, tuple[str, str]] = {
    "bf16": ("activations", "bfloat16"),
    "pure_bf16": ("weights", "bfloat16"),
    "int8": ("int8_products", "72.0"),
    "fp8": ("float8_layers", ""),
}
"""What `effective` says where a format was on: of int8, three products in each of the 24 layers of the blocks."""


@pytest.mark.parametrize("training", PROOF)
def test_formats_beside_float32_on_one_gpu(training: str, record_property: Callable[[str, object], None]) -> None:
    """Step time and loss are written down; what is claimed is that the format was on, and that it learns alike."""
    machine = Machine.here()
    if training == "fp8" and (missing := Float8.missing(machine)):
        pytest.skip(missing)
    if machine.capability is None or machine.capability < AMPERE:
        pytest.skip(f"{training} needs a GPU of compute capability 8.0 or more, here is {machine.capability}")
    narrow, plain = beside(training, [f"quantization.training={training}"], [], record_property)
    key, value = PROOF[training]
    effective = narrow.summary()["effective"]
    assert effective[key] == value if value else int(effective[key]) > 0
    assert "narrow_layers" not in plain.summary()["effective"]
    assert plain.data().loss[-1] < plain.data().loss[0] - 0.5
    losses = [run.data().evaluations[-1][2]["loss"] for run in (narrow, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=0.2)
