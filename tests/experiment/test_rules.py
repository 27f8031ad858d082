"""What goes together, and what this machine can run: a table of rules on machines that are made up."""

from __future__ import annotations

import pytest

from labkit.experiment import Experiment, ExperimentError, Machine
from labkit.experiment.machine import Gpu, visible

CPU = Machine(cores=2, cores_total=2, memory_bytes=2**33, gpu_reason="no driver")
GPUS = tuple(Gpu(index, f"GPU-{index}a0{index}", "H100", 80 * 2**30, 0) for index in range(4))
SERVER = Machine(cores=32, cores_total=64, memory_bytes=2**38, gpus=GPUS)


def problems(changes: str, machine: Machine = CPU) -> list[str]:
    return [problem.field for problem in Experiment().replace(*changes.split()).problems(machine)]


@pytest.mark.parametrize(
    ("changes", "machine", "fields"),
    [
        ("training.steps=3", CPU, []),
        ("layout=dp32 training.global_batch=32", CPU, []),
        ("layout=dp33 training.global_batch=33", CPU, ["layout"]),
        ("layout=dp64 launch.device=cuda", SERVER, []),
        ("layout=dp65 launch.device=cuda training.global_batch=65", SERVER, ["layout"]),
        ("launch.device=cuda", CPU, ["launch.device"]),
        ("launch.device=cuda", SERVER, []),
        ("layout=dp4 training.global_batch=3", CPU, ["training.global_batch"]),
        ("layout=dp4 training.global_batch=4", CPU, []),
        ("layout=dp2 gradients.accumulation=3 training.global_batch=5", CPU, ["training.global_batch"]),
        ("layout=dp2 gradients.accumulation=3 training.global_batch=6", CPU, []),
        ("layout=cp2", CPU, ["layout.cp"]),
        # Ranks that share a GPU talk over gloo, which sends no tensors of a GPU from one rank to another.
        ("layout=pp8 layout.microbatches=8 workload.depth=8 launch.device=cuda", SERVER, ["launch.device"]),
        ("layout=pp4 layout.microbatches=4 launch.device=cuda", SERVER, []),
        (
            "layout=dp8 gradients.update.method=gossip gradients.update.graph=ring launch.device=cuda",
            SERVER,
            ["launch.device"],
        ),
        ("layout=dp8 gradients.update.method=gossip launch.device=cuda", SERVER, []),
        ("layout=dp4 gradients.update.method=gossip gradients.update.graph=ring launch.device=cuda", SERVER, []),
        ("layout=tp2 launch.compile=blocks", CPU, ["launch.compile"]),
        ("layout=shard2 launch.compile=blocks", CPU, []),
        ("layout=dp2·tp2 launch.isolated=true", CPU, ["launch.isolated"]),
        ("layout=dp2 launch.isolated=true", CPU, []),
        ("layout=tp3 workload.name=language", CPU, ["layout.tp", "layout.tp"]),
        # Three ranks divide the heads, not the vocabulary of 256 bytes.
        ("layout=tp3 workload.name=language workload.heads=3 workload.width=96", CPU, ["layout.tp"]),
        ("layout=tp2 layout.sequence_parallel=true", CPU, ["layout.sequence_parallel"]),
        ("layout=pp2 layout.microbatches=1", CPU, ["layout.microbatches"]),
        ("layout=pp2 layout.microbatches=5", CPU, ["training.global_batch"]),
        ("layout=pp2 layout.schedule=zbv layout.microbatches=4", CPU, ["layout.stages_per_rank"]),
        ("layout=pp2 layout.schedule=gpipe layout.stages_per_rank=2", CPU, ["layout.stages_per_rank"]),
        ("layout=pp8 layout.microbatches=8", CPU, ["layout.pp"]),
        (
            "layout=pp2 layout.schedule=interleaved_1f1b layout.stages_per_rank=2 layout.microbatches=5 "
            "training.global_batch=50",
            CPU,
            ["layout.microbatches"],
        ),
        ("optimizer.state_bits=8", CPU, []),
        ("optimizer.state_bits=8 optimizer.name=sgd", CPU, ["optimizer.name"]),
        ("sparsity.method=rigl", CPU, ["sparsity.target"]),
        ("gradients.update.method=diloco", CPU, ["gradients.update.method"]),
        ("quantization.training=fp8", CPU, ["quantization.training"]),
        ("quantization.after_training=int8_dynamic", CPU, ["quantization.after_training"]),
        ("quantization.after_training=int8_dynamic workload.name=language", CPU, []),
        ("quantization.training=fp64", CPU, []),
        ("layout=dp-1·tp3", SERVER, ["layout"]),
    ],
)
def test_rules(changes: str, machine: Machine, fields: list[str]) -> None:
    assert problems(changes, machine) == fields


@pytest.mark.parametrize(
    ("changes", "machine", "said"),
    [
        ("layout=dp2", CPU, []),
        ("layout=dp3", CPU, ["oversubscribed: 3 threads on 2 cores"]),
        ("layout=dp2 launch.threads_per_rank=2", CPU, ["oversubscribed: 4 threads on 2 cores"]),
        ("layout=dp8 launch.device=cuda", SERVER, ["8 ranks share 4 GPU(s)"]),
        ("layout=dp4 launch.device=cuda", SERVER, []),
        ("layout.microbatches=4", CPU, ["no effect without pipeline"]),
        ("sparsity.target=0.5", CPU, ["no effect while sparsity.method is none"]),
        ("launch.isolated=true", CPU, ["no effect on one rank"]),
        ("layout.sequence_parallel=true", CPU, ["no effect without tensor parallelism"]),
        ("layout=pp2 layout.schedule=naive layout.microbatches=4", CPU, ["the naive schedule has a single microbatch"]),
        ("optimizer.warmup_steps=200", CPU, ["does not reach its peak in 100 steps"]),
    ],
)
def test_an_option_that_does_nothing_warns(changes: str, machine: Machine, said: list[str]) -> None:
    experiment = Experiment().replace(*changes.split())
    found = [str(warning) for warning in experiment.warnings(machine)]
    assert len(found) == len(said)
    assert all(words in text for words, text in zip(said, found, strict=True))
    assert not experiment.problems(machine)


@pytest.mark.parametrize(
    ("changes", "machine", "layout", "device"),
    [
        ("layout=dp-1", CPU, "dp2", "cpu"),
        ("layout=dp-1", SERVER, "dp4", "cuda"),
        ("layout=dp-1 launch.device=cpu", SERVER, "dp32", "cpu"),
        ("layout=dp-1·tp2", SERVER, "dp2·tp2", "cuda"),
        ("layout=dp3", SERVER, "dp3", "cuda"),
    ],
)
def test_resolve_leaves_nothing_open(changes: str, machine: Machine, layout: str, device: str) -> None:
    resolved = Experiment().replace(*changes.split()).resolve(machine)
    assert (str(resolved.layout), resolved.launch.device) == (layout, device)
    assert resolved.resolve(machine) == resolved


def test_resolve_with_a_number_of_ranks() -> None:
    assert str(Experiment().replace("layout=dp-1").resolve(CPU, world_size=6).layout) == "dp6"
    with pytest.raises(ExperimentError, match="but world_size is 6"):
        Experiment().replace("layout=dp4").resolve(CPU, world_size=6)


def test_check_raises_every_reason() -> None:
    with pytest.raises(ExperimentError) as refused:
        Experiment().replace("layout=cp2", "launch.device=cuda", "sparsity.method=set").check(CPU)
    assert len(refused.value.problems) == 3
    assert len(str(refused.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("0", [0]),
        ("2,0", [2, 0]),
        (" 1 , 3 ", [1, 3]),
        ("0,9,1", [0]),  # CUDA cuts the list at the first invalid entry
        ("-1", []),
        ("0,-1,1", [0]),
        ("NoDevFiles", []),
        ("GPU-1a01", [1]),
        ("GPU-3a,GPU-0a", [3, 0]),
        ("GPU-9", []),
        ("GPU-", []),  # which one?
        ("1,1", []),
        ("0,1,0", []),
        ("0,GPU-0a", []),
        ("all", []),
    ],
)
def test_visible_gpus_are_those_that_cuda_shows(wanted: str | None, found: list[int]) -> None:
    gpus, reason = visible(GPUS, wanted)
    assert [gpu.index for gpu in gpus] == found
    assert bool(reason) == (not found)


def test_a_slice_of_a_gpu_is_one_device() -> None:
    gpus, reason = visible(GPUS, "MIG-11111111-2222-3333-4444-555555555555")
    assert [gpu.uuid for gpu in gpus] == ["MIG-11111111-2222-3333-4444-555555555555"]
    assert not reason


def test_no_gpu_has_a_reason() -> None:
    assert visible((), None) == ((), "the NVIDIA driver reports no GPU")


def test_this_machine_is_probed_without_torch() -> None:
    here = Machine.here()
    assert 1 <= here.cores <= here.cores_total
    assert here.memory_bytes > 2**28
    assert bool(here.gpus) != bool(here.gpu_reason)
    assert here.device("auto") == ("cuda" if here.gpus else "cpu")


@pytest.mark.parametrize(("limit", "cores"), [("1", 1), ("0.5", 1), ("10000", None), ("many", None)])
def test_the_limit_of_a_hub_counts(limit: str, cores: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from labkit.experiment import machine

    monkeypatch.delenv("CPU_LIMIT", raising=False)
    free = machine._usable_cores()
    monkeypatch.setenv("CPU_LIMIT", limit)
    assert machine._usable_cores() == (free if cores is None else cores)
    monkeypatch.setenv("MEM_LIMIT", str(2**20))
    assert machine._usable_memory() == 2**20
