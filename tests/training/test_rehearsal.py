"""Before step 1 every rank tries its task, and all compare what they have built (issue 11, A4, A15, B 01 to 24)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labkit.cli import main
from labkit.experiment import Experiment
from labkit.launch import launch, rehearse
from labkit.proofs.cases import FAMILIES
from labkit.runs import Run
from labkit.training.rehearsal.fingerprint import Fingerprint, compared_indices, digest
from labkit.training.rehearsal.unseeded import ClockWatch
from labkit.workloads.restore import restored
from tests.launch.helpers import changed_ranks, events
from tests.training import odd_tasks

TASKS = Path(odd_tasks.__file__)
WITHOUT = """
import labkit.training.setup as setup
from labkit.training.rehearsal.result import RehearsalResult
setup.rehearse = lambda *given: RehearsalResult()
"""


def custom(function: str, layout: str | dict[str, int] = "dp2", **changes: Any) -> Experiment:
    fields = {
        "workload": {"name": "custom", "path": f"{TASKS}:{function}"},
        "training.steps": 4,
        "training.global_batch": 8,
        "training.checkpoint_every": 0,
        "training.gradient_norm": True,
        "optimizer.schedule": "constant",
        "launch.device": "cpu",
        "launch.timeout_s": 20,
        "launch.max_duration_s": 100,
    }
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    laid_out = (
        Experiment().replace(f"layout={layout}") if isinstance(layout, str) else Experiment().set({"layout": layout})
    )
    return laid_out.set(fields | changed)


def run(experiment: Experiment) -> Run:
    return launch(experiment, baseline=None).wait(120)


def sentence(experiment: Experiment) -> str:
    """What the run says that cannot be trained."""
    ended = run(experiment)
    assert ended.state == "failed", ended.state
    cause = ended.cause
    assert cause is not None
    assert cause["kind"] == "task", cause
    assert not cause["log"]
    assert cause["exception"] is None
    assert "\n" not in cause["message"]
    assert "Traceback" not in cause["message"]
    assert "Traceback" in ended.logs(cause["rank"], 200), "the stack is in the log"
    assert ended.data().steps == 0
    return str(cause["message"])


# -- what is wrong is named --------------------------------------------------------------------------------------------

SHARDED = "shard2"
WRONG: list[tuple[str, str, str]] = [
    ("everything_frozen", "dp1", "nothing to train: all 4 parameters are frozen"),
    ("lazy", "dp2", "0.weight has no shape yet \\(a lazy layer\\): call the model once on a few samples"),
    ("lazy_convolution", "dp1", "1.weight has no shape yet \\(a lazy layer\\): call the model once"),
    ("lazy_norm", SHARDED, "1.running_mean has no shape yet \\(a lazy layer\\): call the model once"),
    ("lazy_buffer", "dp1", "scale has no shape yet \\(a lazy layer\\): call the model once"),
    ("synchronized_norm", "dp2", "1 is a SyncBatchNorm, which works on GPUs only: use nn.BatchNorm"),
    ("one_number", SHARDED, "temperature is a scalar \\(no dimensions\\), .*give it the shape \\(1,\\)"),
    ("empty_parameter", SHARDED, "nothing is empty \\(shape \\[0, 4\\]\\), which ZeRO 3 cannot shard"),
    ("integer_parameter", SHARDED, "places is a parameter of int64, .* make it a buffer"),
    ("sparse_rows", "dp1", "0.weight has sparse gradients .* remove sparse=True; the results stay the same"),
    ("sparse_rows", "dp2", "0.weight has sparse gradients .* remove sparse=True; the results stay the same"),
    ("sparse_rows", SHARDED, "0.weight has sparse gradients .* remove sparse=True"),
    ("two_outputs", "dp2", "must give one tensor in eval mode, but it gives a tuple of 2: return the logits alone"),
    ("two_outputs_in_training", "dp2", "in training mode, but it gives a tuple of 2: return the logits alone"),
    ("two_outputs_in_training", "dp1", "must give one tensor in training mode, but it gives a tuple of 2"),
    ("text_for_output", "dp1", "must give one tensor in eval mode, but it gives a str"),
    ("loss_for_each_sample", "dp1", "must give the mean over the samples, one number; it gives shape \\[2\\]"),
    ("loss_as_float", "dp1", "must give the mean over the samples, one number; it gives float"),
    ("detached_loss", "dp1", "the loss does not depend on any parameter that is trained"),
    ("loss_twice", "dp1", "loss_fn from loss_twice fails for outputs"),
    ("input_of_bytes", "dp1", "x is uint8: convert it to float32"),
    (
        "label_missing",
        "dp2",
        "sample 31 of train from label_missing: its y must be a tensor, an array or a number, but it is None",
    ),
    ("label_as_text", "dp1", "sample 0 of train .* its y must be a tensor, an array or a number, but it is str"),
    ("ragged", "dp1", "samples \\d+ and \\d+ of train from ragged cannot be stacked: their x have the shapes"),
    ("broken_file", "dp1", "sample 29 of train from broken_file cannot be read: image file is truncated"),
    ("inputs_in_a_dict", "dp1", "sample 0 of train .* its x must be a tensor, an array or a number, but it is dict"),
    ("sometimes", SHARDED, "extra.* is used by some ranks and not by others in the same pass, so ZeRO 3"),
    ("by_chance", SHARDED, "extra.* is used by some ranks and not by others in the same pass, so ZeRO 3"),
]


@pytest.mark.parametrize(("function", "layout", "says"), WRONG, ids=[f"{case[0]}-{case[1]}" for case in WRONG])
def test_what_cannot_be_trained_is_named_before_the_first_step(function: str, layout: str, says: str) -> None:
    import re

    assert re.search(says, sentence(custom(function, layout)))


@pytest.mark.parametrize(
    ("layout", "passes", "batch", "enough"), [("dp1", 3, 4, 6), (SHARDED, 2, 6, 8), ("dp2", 2, 7, 8)]
)
def test_a_pass_of_a_single_sample_that_comes_later_is_tried_before(
    layout: str, passes: int, batch: int, enough: int
) -> None:
    """Passes of 2, 1 and 1 samples (random experiments of seed 11): batch normalisation fails in the second one."""
    settings = {"gradients__accumulation": passes, "training__global_batch": batch}
    words = sentence(custom("with_state", layout, **settings))
    assert "Expected more than 1 value per channel when training" in words
    assert f"passes of this run have only 1: set training.global_batch to {enough} or more (now {batch})" in words
    settings["training__global_batch"] = enough
    assert run(custom("with_state", layout, **settings)).state == "finished"


def test_methods_that_copy_or_convert_a_model_name_what_they_cannot() -> None:
    copied = {"gradients__update__method": "parameter_server"}
    assert "the old torch.nn.utils.weight_norm" in sentence(custom("old_weight_norm", **copied))
    converted = {"quantization__after_training": "int8_dynamic", "layout": "dp1"}
    assert "finds no linear layer to convert" in sentence(custom("new_weight_norm", **converted))
    for setting in ({"quantization__training": "int8"}, {"quantization__qat": "int8"}):
        assert "the old torch.nn.utils.weight_norm" in sentence(custom("old_weight_norm", "dp1", **setting))


def test_sparse_gradients_train_as_dense_ones_where_they_can() -> None:
    """issue 11, B 14: ZeRO 1 adds them to the buffer of a shard."""
    sharded = {"layout": {"dp_shard": 2, "zero_stage": 1}, "quantization__training": "fp64"}
    sparse, dense = (
        run(custom("sparse_rows", **sharded)),
        run(custom("dense_rows", "dp1", quantization__training="fp64")),
    )
    assert sparse.state == dense.state == "finished", (sparse.cause, dense.cause)
    assert np.abs(sparse.data().loss - dense.data().loss).max() < 1e-12
    assert "remove sparse=True" in sentence(custom("sparse_rows", {"dp_shard": 2, "zero_stage": 2}))


def test_a_sample_that_breaks_in_a_loader_process_is_named() -> None:
    far = custom("broken_file", "dp1", training__loader_workers=1)
    assert "sample 29 of train from broken_file cannot be read: image file is truncated" in sentence(far)


# -- all ranks built the same ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "layout", "says"),
    [
        ("other_weights", "dp2", "the weights of head.weight differ between rank 0 and rank 1: draw"),
        ("other_weights", "shard2", "the weights of head.weight differ between rank 0 and rank 1"),
        ("other_buffer", "dp2", "the buffer born differs between rank 0 and rank 1"),
        ("other_split", "dp2", "sample 0 of train differs between rank 0 and rank 1, as do"),
        ("other_length", "dp2", "the number of samples in train differs between rank 0 and rank 1 (80 and 81)"),
    ],
)
def test_ranks_that_built_different_tasks_are_named(function: str, layout: str, says: str) -> None:
    assert says in sentence(custom(function, layout))


def test_so_are_they_where_ranks_hold_parts_or_send_later() -> None:
    """issue 11, B 01: there nothing would have made the replicas one model again."""
    says = "differ between rank 0 and rank 1"
    pipelined = custom("other_weights_in_blocks", {"dp_replicate": 2, "pp": 2, "microbatches": 2})
    assert "the weights of " in (text := sentence(pipelined))
    assert says in text
    assert says in sentence(custom("other_weights", gradients__update={"method": "delayed"}))


def test_augmentation_that_no_seed_reaches_is_noted() -> None:
    ended = run(custom("other_augmentation", training__evaluate_every=0))
    assert ended.state == "finished", ended.cause
    assert any("samples of train come from an unseeded generator" in note for note in ended.summary()["notes"])


def test_a_model_that_reads_the_clock_is_noted() -> None:
    """issue 11: the hour is the same in all passes of a rehearsal, so comparing them would not show it."""
    ended = run(custom("fades_by_the_hour"))
    assert ended.state == "finished", ended.cause
    notes = [note for note in ended.summary()["notes"] if "datetime.now" in note]
    assert len(notes) == 1
    assert "Net2.forward calls datetime.now, which no seed controls" in notes[0]


@pytest.mark.parametrize(
    ("call", "name"),
    [(time.time, "time.time"), (time.perf_counter_ns, "time.perf_counter_ns"), (date.today, "date.today")],
)
def test_every_clock_is_seen(call: Callable[[], Any], name: str) -> None:
    watch = ClockWatch()
    with watch.watching():
        call()
    assert f"calls {name}" in watch.reader


def test_what_libraries_read_for_themselves_is_not_noted() -> None:
    import logging

    watch = ClockWatch()
    with watch.watching():
        logging.getLogger("labkit-test").error("with the time of day")
        torch.randn(8, 8).softmax(-1).sum().item()
    assert watch.notes() == []
    assert sys.getprofile() is None


def test_a_fingerprint_sees_type_shape_and_one_number() -> None:
    tensor = torch.arange(6.0)
    other = tensor.clone()
    other[3] += 1e-6
    others = (other, tensor.double(), tensor.reshape(2, 3), -tensor, tensor.to(torch.bfloat16), torch.zeros(()))
    assert len({digest(each) for each in (tensor, *others)}) == 7
    assert digest(tensor) == digest(torch.stack([tensor, tensor], 1)[:, 0])
    assert digest(torch.complex(tensor, tensor)) != digest(torch.complex(tensor, -tensor))
    long = torch.randn(1_000_000)
    assert digest(long) == digest(long.clone()) != digest(long + 1)


def test_samples_of_short_and_long_data_are_compared() -> None:
    from labkit.workloads.base import TensorData

    assert compared_indices(TensorData(x=torch.zeros(1))) == [0]
    assert compared_indices(TensorData(x=torch.zeros(3))) == [0, 1, 2]
    long = compared_indices(TensorData(x=torch.zeros(1000)))
    assert long[0] == 0
    assert long[-1] == 999


# -- unused parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["unused", "alternating"])
def test_parameters_that_a_pass_leaves_out_are_trained_as_in_one_process(function: str) -> None:
    exact = {"quantization__training": "fp64"}
    alone = run(custom(function, "dp1", **exact)).data()
    for layout, changes in (("dp2", {}), ("dp2", {"launch__transport": "network"}), ("shard2", {})):
        together = run(custom(function, layout, **exact, **changes))
        assert together.state == "finished", together.cause
        assert np.abs(together.data().loss - alone.loss).max() < 1e-12
        assert np.abs(together.data().grad_norm - alone.grad_norm).max() < 1e-12
    compressed = run(custom(function, gradients__compression__method="int8"))
    assert compressed.state == "finished", compressed.cause


@pytest.mark.parametrize("function", ["sometimes", "by_chance"])
def test_a_way_that_differs_between_ranks_hangs_nobody(function: str) -> None:
    for layout, changes in (("dp2", {}), ("shard2", {"layout__zero_stage": 2}), ("dp4", {})):
        ended = run(custom(function, layout, training__steps=12, launch__timeout_s=10, **changes))
        assert ended.state == "finished", ended.cause
        assert any("the control flow of the model depends on" in note for note in ended.summary()["notes"])


# -- nothing moves -----------------------------------------------------------------------------------------------------


def test_losses_are_the_same_to_the_last_bit_without_a_rehearsal(tmp_path: Path) -> None:
    small = {"training.steps": 4, "training.global_batch": 8, "training.evaluate_every": 4, "launch.device": "cpu"}
    built_in = [
        Experiment().set({"workload": family.workload, "layout.dp_replicate": 2} | small)
        for family in FAMILIES.values()
    ]
    cases = [*built_in, custom("with_state"), custom("alternating", "shard2")]
    with changed_ranks(tmp_path):
        rehearsed = [run(case) for case in cases]
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("LABKIT_TEST_CHANGE", WITHOUT)
            plain = [run(case) for case in cases]
    for one, other in zip(rehearsed, plain, strict=True):
        assert one.state == other.state == "finished", (one.cause, other.cause)
        assert [event["event"] for event in events(other, 0)].count("rehearsal") == 1
        assert list(one.data().loss) == list(other.data().loss), one.title
        assert one.data().evaluations[-1][2] == other.data().evaluations[-1][2]


def test_weights_that_are_too_large_to_be_copied_stay_as_they_are(tmp_path: Path) -> None:
    """A rehearsal must not change what it cannot restore: neither the weights nor the buffers behind them."""
    cases = [custom("with_state"), custom("batch_norm_at_the_end")]
    with changed_ranks(tmp_path), pytest.MonkeyPatch.context() as patched:
        patched.setenv("LABKIT_TEST_CHANGE", WITHOUT)
        plain = [run(case) for case in cases]
        patched.setenv(
            "LABKIT_TEST_CHANGE", "import labkit.workloads.restore as r; r.MAX_WEIGHT_BYTES = r.LARGE_TENSOR = 300"
        )
        rehearsed = [run(case) for case in cases]
    for before, after in zip(plain, rehearsed, strict=True):
        assert before.state == after.state == "finished", (before.cause, after.cause)
        assert list(before.data().loss) == list(after.data().loss), before.title
        assert before.data().evaluations[-1][2] == after.data().evaluations[-1][2]


def test_everything_that_a_task_holds_is_put_back() -> None:
    task = odd_tasks.with_state()
    model, data = task["model"], task["train"]
    model.odd = {"list": [1, 2], "set": {1}, "array": np.zeros(3), "tensor": torch.zeros(3)}
    held = [0]

    def closing() -> int:
        held.append(len(held))
        return held[-1]

    model.closing = closing
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = data.own.bit_generator.state
    random_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    buffer = model.mean
    with restored(task, model, data, device=torch.device("cpu")) as snapshot:
        assert not snapshot.changed()
        model.train()
        model(torch.stack([data[index][0] for index in range(4)])).sum().backward()
        with torch.no_grad():
            model.head.weight.add_(1)
        model.odd["list"].append(3)
        model.odd["set"].add(2)
        model.odd["array"] += 1
        model.odd["tensor"] += 1
        model.odd["new"] = model.new = 1
        model.eval()
        closing()
        assert snapshot.changed()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (model.passes, model.history, model.training, held) == (0, [0], True, [0])
    assert not hasattr(model, "new")
    assert (model.odd["list"], model.odd["set"], list(model.odd)) == ([1, 2], {1}, ["list", "set", "array", "tensor"])
    assert model.odd["array"].sum() == model.odd["tensor"].sum() == 0
    assert model.mean is buffer
    assert data.own.bit_generator.state == own
    assert torch.equal(torch.get_rng_state(), random_state[0])
    assert np.array_equal(np.random.get_state()[1], random_state[1])


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_numpy_and_random_start_from_the_seed() -> None:
    for function in ("drawn_by_numpy_and_random", "augmented"):
        first, again, other = (run(custom(function, training__seed=seed)) for seed in (1, 1, 2))
        assert first.state == "finished", first.cause
        assert list(first.data().loss) == list(again.data().loss)
        assert list(first.data().loss) != list(other.data().loss)


def test_loader_processes_draw_by_step_and_share_whatever_their_number() -> None:
    alone, one, two = (run(custom("augmented", training__loader_workers=count)) for count in (0, 1, 2))
    assert list(alone.data().loss) == list(one.data().loss) == list(two.data().loss)


def test_shares_draw_other_numbers_and_ranks_of_one_share_the_same() -> None:
    from labkit.training.samples import MicroBatch, MicroBatchDataset

    task = odd_tasks.augmented()
    from labkit.workloads.custom_task import as_task

    loaded = MicroBatchDataset(as_task(task, "augmented").train, lambda seed: None)
    batches = [loaded.__getitems__(MicroBatch([1, 2], seed, 0)) for seed in (5, 5, 6)]
    assert torch.equal(batches[0]["x"], batches[1]["x"])  # type: ignore[index]
    assert not torch.equal(batches[0]["x"], batches[2]["x"])  # type: ignore[index]


def test_ranks_of_a_run_draw_numbers_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """issue 11, B 03: ranks are forks of one process, and drew the same augmentation."""
    monkeypatch.setenv("LABKIT_TEST_DRAWS", str(tmp_path))
    for workers in (0, 1):
        ended = run(custom("noted_draws", training__loader_workers=workers, training__evaluate_every=0))
        assert ended.state == "finished", ended.cause
        by_rank = [(tmp_path / str(rank)).read_text().split()[-16:] for rank in (0, 1)]
        assert len({*by_rank[0], *by_rank[1]}) == 32, "four updates of four samples on each of two ranks"


# -- before any run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def home(labkit_home: Path) -> Path:
    return labkit_home


def validate(capsys: pytest.CaptureFixture[str], function: str, *more: str) -> tuple[int, dict[str, Any], str]:
    workload = json.dumps({"name": "custom", "path": f"{TASKS}:{function}"})
    code = main(["validate", "--rehearse", "--json", "--set", f"workload={workload}", *more])
    shown = capsys.readouterr()
    return code, json.loads(shown.out.splitlines()[-1]), shown.err


def test_validate_rehearses_before_any_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer, _ = validate(capsys, "unused", "--set", "layout=dp2")
    assert (code, answer["valid"]) == (0, True)
    code, answer, err = validate(capsys, "other_weights", "--set", "layout=dp2")
    assert (code, answer["valid"]) == (2, False)
    assert answer["problems"][0]["reason"].startswith("the weights of head.weight differ between rank 0 and rank 1")
    assert "labkit: workload: the weights of head.weight differ" in err
    assert not list(home.glob("runs/*")), "nothing was launched"


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("hangs_while_built", "rank 0 hangs in building the task"),
        ("hangs_in_a_sample", "rank 0 hangs in fetching samples of the data set"),
    ],
)
def test_what_hangs_is_named_within_bounds(function: str, says: str) -> None:
    problem = rehearse.rehearse(custom(function, "dp1"), limit_s=10)
    assert problem is not None
    assert problem.reason.startswith(says)


def test_a_check_shares_no_random_state_with_its_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The order of a set of strings is the same in two forks of one process."""
    (tmp_path / "sets.py").write_text(
        "def make():\n"
        "    import torch\n"
        "    from torch import nn\n"
        "    names = list({f'feature{n}' for n in range(12)})\n"
        "    x = torch.stack([torch.sin(torch.arange(100.) * (int(name[7:]) + 1)) for name in names], 1)\n"
        "    return nn.Linear(12, 2), (x[:80], (x[:80, 0] > 0).long()), (x[80:], (x[80:, 0] > 0).long()), "
        "nn.CrossEntropyLoss()\n"
    )
    workload = json.dumps({"name": "custom", "path": f"{tmp_path}/sets.py:make"})
    code = main(
        ["check", "--set", f"workload={workload}", "--set", "layout=dp2", "--steps", "2", "--precision", "fp64"]
    )
    assert code == 1
    assert "the two runs did not build the same task" in capsys.readouterr().out


def test_a_fingerprint_of_a_task_is_the_same_twice() -> None:
    from labkit.workloads.custom_task import as_task

    task = as_task(odd_tasks.augmented(), "augmented")
    once, again = Fingerprint.of(task, 3), Fingerprint.of(task, 3)
    assert once == again
    shared = once.more.keys() & again.more.keys()  # how many there is time for differs
    assert shared
    assert all(once.more[name] == again.more[name] for name in shared)
    assert Fingerprint.of(task, 3).total != Fingerprint.of(task, 4).total
