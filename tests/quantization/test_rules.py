"""What cannot work is refused with a sentence, and what does nothing says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from labkit.experiment.machine import Gpu, Machine
from labkit.experiment.registry import registry
from labkit.quantization import fp8
from tests.quantization.networks import wanted

VNNI = frozenset({"avx512_vnni", "avx512_bf16", "avx2"})
CPU = Machine(cores=2, cores_total=2, memory_bytes=8 << 30, gpu_reason="there is none", cpu_flags=VNNI)
OLD = Machine(cores=2, cores_total=2, memory_bytes=8 << 30, gpu_reason="there is none", cpu_flags=frozenset({"avx2"}))
GPU = Machine(cores=8, cores_total=8, memory_bytes=8 << 30, gpus=(Gpu(0, "GPU-1", "H100", 80 << 30, 0),) * 4)
RESNET = "workload.name=vision"
ALL = [method.key for method in registry("quantization.training")]


def fields(changes: str, machine: Machine = CPU) -> list[str]:
    found = wanted(*changes.split(), "layout.microbatches=2").problems(machine)
    assert all(len(problem.reason.split()) > 5 for problem in found)
    return [problem.field for problem in found]


@pytest.mark.parametrize("key", ["fp32", "fp64", "bf16", "pure_bf16", "int8", "int8_weights"])
@pytest.mark.parametrize("layout", ["dp2", "shard2", "tp2", "pp2", "dp2·pp2", "tp2·pp2", "cp2"])
def test_formats_of_the_cpu_go_with_every_layout(key: str, layout: str) -> None:
    assert fields(f"quantization.training={key} layout={layout}") == []


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        # without a GPU
        ("quantization.training=fp16", ["quantization.training"]),
        ("quantization.training=fp8", ["quantization.training"]),
        # ternary weights are whole
        ("quantization.training=bitnet layout=dp2·pp2", []),
        ("quantization.training=bitnet layout=tp2", ["layout.tp"]),
        # nothing to narrow
        (f"{RESNET} quantization.training=int8", ["quantization.training"]),
        (f"{RESNET} quantization.training=int8 quantization.head=true", []),
        (f"{RESNET} workload.model=vit quantization.training=int8", []),
        (f"{RESNET} quantization.training=bitnet", ["quantization.training"]),
        (f"{RESNET} quantization.training=int8_weights", ["quantization.training"]),
        (f"{RESNET} quantization.qat=int8", ["quantization.qat"]),
        (f"{RESNET} quantization.after_training=int8_dynamic", ["quantization.after_training"]),
        # who moves weights
        ("quantization.training=pure_bf16 layout=dp2 gradients.update.method=local_sgd", ["quantization.training"]),
        ("quantization.training=int8_weights layout=dp2 gradients.update.method=diloco", ["quantization.training"]),
        ("quantization.training=int8 layout=dp2 gradients.update.method=local_sgd", []),
        # what combines gradients
        (
            "quantization.training=pure_bf16 layout=dp2 gradients.compression.method=fp16",
            ["gradients.compression.method"],
        ),
        ("quantization.training=int8 layout=dp2 gradients.compression.method=fp16", []),
        # copies of a tied weight
        ("quantization.training=pure_bf16 layout=pp2 workload.tied=true", ["quantization.training"]),
        ("quantization.training=pure_bf16 layout=dp2 workload.tied=true", []),
        ("quantization.training=int8_weights layout=pp2 workload.tied=true", []),
        (
            "quantization.training=int8_weights layout=pp2 workload.tied=true quantization.head=true",
            ["quantization.training"],
        ),
        ("optimizer.state_bits=8 layout=pp2 workload.tied=true", ["optimizer.state_bits"]),
        # quantization-aware training
        ("quantization.qat=int4 layout=dp2·tp2", []),
        ("quantization.qat=int8 quantization.training=bf16", ["quantization.training"]),
        ("quantization.qat=int8 quantization.after_training=int8_dynamic", []),
        ("quantization.qat=int4 quantization.after_training=int4_weight_only", []),
        ("quantization.qat=int8 quantization.after_training=int8_static", ["quantization.after_training"]),
        ("quantization.qat=int8 quantization.after_training=int4_weight_only", ["quantization.after_training"]),
        ("quantization.qat=int4 quantization.after_training=int8_dynamic", ["quantization.after_training"]),
        # conversion
        *((f"quantization.after_training=int8_dynamic layout={one}", []) for one in ("dp2", "dp2·shard2")),
        *(
            (f"quantization.after_training=int8_dynamic layout={one}", ["quantization.after_training"])
            for one in ("tp2", "pp2", "cp2", "shard2")
        ),
        ("quantization.after_training=int8_dynamic quantization.training=bitnet", ["quantization.after_training"]),
        ("quantization.after_training=int8_dynamic launch.isolated=true", ["quantization.after_training"]),
        # moments of 8 bits
        ("optimizer.state_bits=8 layout=dp2·tp2", []),
        ("optimizer.state_bits=8 optimizer.name=sgd", ["optimizer.name"]),
        ("optimizer.state_bits=8 quantization.training=fp64", ["optimizer.state_bits"]),
        ("optimizer.state_bits=8 layout=dp2 gradients.update.method=local_sgd", ["optimizer.state_bits"]),
        ("optimizer.state_bits=8 layout=dp2 gradients.compression.method=int8", []),
        ("optimizer.state_bits=8 layout=dp2 gradients.compression.method=onebit_adam", ["optimizer.state_bits"]),
        ("optimizer.state_bits=8 layout=dp2 gradients.compression.method=sign", ["optimizer.state_bits"]),
    ],
)
def test_refusals(changes: str, found: list[str]) -> None:
    if "dp2·shard2" in changes:
        changes += " layout.zero_stage=1"
    assert fields(changes) == found


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ("quantization.training=fp16", []),
        ("quantization.training=fp16 layout=dp2", []),
        ("quantization.training=tf32 launch.device=cpu", ["quantization.training"]),
        ("quantization.training=fp16 launch.device=cpu", ["quantization.training"]),
        ("quantization.training=fp16 layout=tp2", ["quantization.training"]),
        ("quantization.training=fp16 layout=dp2 gradients.update.method=local_sgd", ["quantization.training"]),
        ("quantization.training=fp16 layout=dp2 gradients.compression.method=bf16", ["gradients.compression.method"]),
        ("quantization.training=fp16 workload.experts=4 workload.balance_loss=0.1", ["workload.balance_loss"]),
        ("quantization.training=fp16 optimizer.state_bits=8", ["optimizer.state_bits"]),
    ],
)
def test_refusals_with_gpus(changes: str, found: list[str]) -> None:
    device = "" if "launch.device" in changes else " launch.device=cuda"
    assert fields(changes + device, GPU) == found


def test_fp8_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = wanted("quantization.training=fp8", "launch.device=cuda")
    for capability, torchao, said in (
        (None, True, "capability 8.9"),
        ((8, 0), True, "is 8.0"),
        ((9, 0), False, "torchao"),
    ):
        gpu = replace(GPU, gpus=tuple(replace(one, capability=capability) for one in GPU.gpus))
        monkeypatch.setattr(fp8, "find_spec", lambda name, torchao=torchao: object() if torchao else None)
        [problem] = asked.problems(gpu)
        assert said in problem.reason
        assert problem.nearest == "bf16"
    monkeypatch.setattr(fp8, "find_spec", lambda name: object())
    gpu = replace(GPU, gpus=tuple(replace(one, capability=(9, 0)) for one in GPU.gpus))
    assert asked.problems(gpu) == []
    assert [problem.field for problem in asked.replace("layout=tp2").problems(gpu)] == ["quantization.training"]


def on_gpus(capability: tuple[int, int]) -> Machine:
    return replace(GPU, gpus=tuple(replace(gpu, capability=capability) for gpu in GPU.gpus))


def test_tf32_needs_tensor_cores_that_have_it_and_then_goes_with_every_layout() -> None:
    asked = wanted("quantization.training=tf32", "launch.device=cuda")
    [problem] = asked.problems(on_gpus((7, 5)))
    assert "is 7.5" in problem.reason
    assert problem.nearest == "fp32"
    for layout in ("1", "dp2", "shard2", "tp2", "pp2 layout.microbatches=2"):
        assert asked.replace(*f"layout={layout}".split()).problems(on_gpus((8, 0))) == []


def test_float32_on_a_gpu_with_tensor_cores_is_warned_of_once() -> None:
    asked = wanted("quantization.training=fp32", "launch.device=cuda")
    [warning] = asked.warnings(on_gpus((9, 0)))
    assert "tf32 and bf16 are many times faster" in warning.reason
    assert asked.warnings(on_gpus((7, 0))) == []
    for training in ("tf32", "fp64", "bf16", "int8"):
        assert asked.replace(f"quantization.training={training}").warnings(on_gpus((9, 0))) == []


@pytest.mark.parametrize(
    ("changes", "machine", "said"),
    [
        ("quantization.training=bf16", CPU, []),
        ("quantization.training=bf16", OLD, ["no instructions for bfloat16"]),
        ("quantization.training=pure_bf16", OLD, ["no instructions for bfloat16"]),
        ("quantization.training=int8", OLD, ["no instructions for int8 products"]),
        ("quantization.training=bitnet", OLD, ["no instructions for int8 products"]),
        ("quantization.training=int8", CPU, []),
        ("quantization.rounding=nearest", CPU, ["only int8 training"]),
        ("quantization.weight_gradient=false", CPU, ["only int8 training"]),
        ("quantization.training=int8 quantization.rounding=nearest", CPU, []),
        ("quantization.qat_start=0.5", CPU, ["without quantization.qat"]),
        ("quantization.head=true", CPU, ["no number format for linear layers"]),
        ("quantization.head=true quantization.qat=int4", CPU, []),
        ("quantization.qat=int4 layout=tp2", CPU, ["its own scales"]),
    ],
)
def test_warnings(changes: str, machine: Machine, said: list[str]) -> None:
    found = wanted(*changes.split()).warnings(machine)
    assert len(found) == len(said)
    for warning, words in zip(found, said, strict=True):
        assert words in warning.reason


def test_every_format_says_what_it_is() -> None:
    assert "(emulated)" in registry("quantization.training")["int8_weights"].summary
    assert len(ALL) == 11
