"""RunData reads whatever lies in a run directory, never fails on it, and never counts a step too early."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.experiment.run_directory import RunDirectory, write_json
from labkit.runs.columns import GrowingArray
from labkit.runs.data import RunData
from labkit.runs.events import MAX_LAYERS
from labkit.runs.reader import MAX_LINE_BYTES
from labkit.runs.steps import MAX_GAP


class Writer:
    """Writes a run directory as the supervisor and the ranks do."""

    def __init__(self, path: Path, world_size: int = 2, state: str = "running", steps: int = 100) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.directory = RunDirectory(path)
        self.world_size = world_size
        self.state(state, steps=steps)

    def state(self, state: str, **more: Any) -> None:
        write_json(self.directory.status, {"state": state, "world_size": self.world_size, **more})

    def raw(self, rank: int, text: str) -> None:
        with open(self.directory.events(rank), "a", encoding="utf-8") as file:
            file.write(text)

    def event(self, rank: int, kind: str, **fields: Any) -> None:
        self.raw(rank, json.dumps({"event": kind, "rank": rank, "time": 1.0, "monotonic": 0.0} | fields) + "\n")

    def steps(self, rank: int, first: int, loss: list[Any], samples: int = 4, **fields: Any) -> None:
        count = len(loss)
        columns = {"loss": loss, "samples": [samples] * count, "seconds": [0.1] * count}
        self.event(rank, "steps", first=first, **(columns | fields))


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path / "run")


def test_global_loss_is_the_mean_over_samples_and_waits_for_every_rank(writer: Writer) -> None:
    data = RunData(writer.directory)
    writer.steps(0, 0, [1.0, 2.0, 3.0], samples=3)
    assert data.refresh()
    assert data.steps == 0
    assert len(data.loss) == 0
    writer.steps(1, 0, [5.0, 6.0], samples=1)
    data.refresh()
    assert data.steps == 2
    np.testing.assert_allclose(data.loss, [2.0, 3.0])
    np.testing.assert_array_equal(data.samples, [4, 4])
    np.testing.assert_array_equal(data.step, [1, 2])
    assert data.rank_steps == [3, 2]


def test_a_torn_last_line_is_read_once_it_is_whole(writer: Writer) -> None:
    writer.world_size = 1
    writer.state("running")
    line = json.dumps({"event": "steps", "first": 0, "loss": [1.5], "samples": [2], "seconds": [0.1]})
    writer.raw(0, line[:20])
    data = RunData(writer.directory)
    assert data.refresh()
    assert data.steps == 0
    assert data.skipped_lines == 0
    writer.raw(0, line[20:])
    assert data.refresh()
    assert data.steps == 0
    writer.raw(0, "\n")
    assert data.refresh()
    assert list(data.loss) == [1.5]


def test_a_missing_rank_holds_back_a_living_run_only(writer: Writer) -> None:
    writer.steps(0, 0, [1.0, 2.0])
    data = RunData(writer.directory)
    data.refresh()
    assert data.steps == 0
    assert data.world_size == 2
    writer.state("failed")
    data.refresh()
    assert data.steps == 2
    assert list(data.loss) == [1.0, 2.0]


def test_losing_rank_zero_keeps_the_curve_and_its_clock(writer: Writer) -> None:
    writer.steps(1, 0, [1.0, 2.0])
    writer.state("failed")
    data = RunData(writer.directory)
    data.refresh()
    np.testing.assert_allclose(data.elapsed, [0.1, 0.2], rtol=1e-6)
    assert np.isnan(data.grad_norm).all()
    assert len(data.grad_norm) == 2


def test_without_a_status_the_files_tell_the_number_of_ranks(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run")
    writer.directory.status.unlink()
    writer.steps(0, 0, [1.0])
    writer.steps(1, 0, [3.0])
    (writer.directory.path / "rank-99999999.jsonl").write_text("")
    data = RunData(writer.directory)
    data.refresh()
    assert data.world_size == 2
    assert list(data.loss) == [2.0]
    assert data.total_steps is None


def test_garbage_between_good_lines_is_counted_and_left_out(writer: Writer) -> None:
    writer.world_size = 1
    writer.state("running")
    writer.steps(0, 0, [1.0])
    for line in ('{"event"', "[]", "17", '{"event": "unheard of"}', '{"event": ["steps"]}', "\x00\x01", "[" * 100_000):
        writer.raw(0, line + "\n")
    with open(writer.directory.events(0), "ab") as file:
        file.write(b"\xff\xfe\xff\n")
    writer.raw(0, "\n")
    writer.steps(0, 1, [2.0])
    data = RunData(writer.directory)
    assert data.refresh()
    assert list(data.loss) == [1.0, 2.0]
    assert data.skipped_lines == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"first": "0", "seconds": [0.1], "loss": [1.0], "samples": [1]},
        {"first": True, "seconds": [0.1], "loss": [1.0], "samples": [1]},
        {"first": -1, "seconds": [0.1], "loss": [1.0], "samples": [1]},
        {"first": 10**30, "seconds": [0.1], "loss": [1.0], "samples": [1]},
        {"first": MAX_GAP + 5, "seconds": [0.1], "loss": [1.0], "samples": [1]},
        {"first": 0, "seconds": "0.1", "loss": [1.0], "samples": [1]},
        {"first": 0, "seconds": {"0": 1}, "loss": [1.0], "samples": [1]},
        {"first": 0, "seconds": [], "loss": [], "samples": []},
        {"seconds": [0.1], "loss": [1.0], "samples": [1]},
    ],
)
def test_steps_of_the_wrong_shape_are_left_out(tmp_path: Path, fields: dict[str, Any]) -> None:
    writer = Writer(tmp_path / "run", world_size=1)
    writer.event(0, "start", first=0)
    writer.event(0, "steps", **fields)
    data = RunData(writer.directory)
    assert data.refresh()
    assert data.steps == 0
    assert data.skipped_lines == 1


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ([1.0, "2.0", 3.0], [1.0, np.inf, 3.0]),
        ([1.0, None, 3.0], [1.0, np.inf, 3.0]),
        ([1.0, [2.0], 3.0], [1.0, np.inf, 3.0]),
        ([1.0, 10**400, 3.0], [1.0, np.inf, 3.0]),
        ([1.0, float("nan"), float("inf")], [1.0, np.inf, np.inf]),
        ([1e308, 2, 3], [np.inf, 2.0, 3.0]),
    ],
)
def test_a_loss_that_is_no_finite_number_shows_as_infinite(tmp_path: Path, loss: list[Any], expected: Any) -> None:
    writer = Writer(tmp_path / "run", world_size=1)
    writer.steps(0, 0, loss)
    data = RunData(writer.directory)
    with np.errstate(all="raise"):
        data.refresh()
    np.testing.assert_array_equal(data.loss, expected)


def test_a_rank_without_samples_adds_nothing(writer: Writer) -> None:
    writer.steps(0, 0, [2.0], samples=4)
    writer.steps(1, 0, [float("nan")], samples=0)
    data = RunData(writer.directory)
    data.refresh()
    assert list(data.loss) == [2.0]
    assert list(data.samples) == [4]


def test_lost_lines_and_repeated_lines(writer: Writer) -> None:
    writer.world_size = 1
    writer.state("running")
    writer.steps(0, 0, [1.0, 2.0])
    writer.steps(0, 0, [1.0, 2.0])  # repeated whole: ignored
    writer.steps(0, 1, [2.0, 3.0])  # overlaps by one
    writer.steps(0, 5, [6.0])  # steps 3 and 4 are lost
    data = RunData(writer.directory)
    data.refresh()
    np.testing.assert_allclose(data.loss, [1.0, 2.0, 3.0, 3.0, 3.0, 6.0])
    assert list(data.samples) == [4, 4, 4, 0, 0, 4]
    assert np.isnan(data.seconds[0][3:5]).all()
    assert (np.diff(data.elapsed) >= 0).all()


def test_a_resumed_run_starts_where_the_first_one_stopped(writer: Writer) -> None:
    for rank in range(2):
        writer.event(rank, "start", first=40, device="cpu", pid=1, threads=1, parameters=9)
        writer.steps(rank, 40, [1.0, 2.0])
    data = RunData(writer.directory)
    data.refresh()
    assert data.first == 40
    assert data.steps == 2
    assert list(data.step) == [41, 42]


def test_the_clock_counts_what_lies_between_steps(writer: Writer) -> None:
    writer.world_size = 1
    writer.state("running")
    writer.steps(0, 0, [1.0, 1.0], monotonic=1000.2)
    writer.event(0, "evaluation", step=2, metrics={"accuracy": 0.5, "note": "text"}, monotonic=1003.0)
    writer.steps(0, 2, [1.0], monotonic=1005.0)
    writer.steps(0, 3, [1.0], monotonic="later")
    data = RunData(writer.directory)
    data.refresh()
    np.testing.assert_allclose(data.elapsed, [0.1, 0.2, 5.0, 5.1], atol=1e-6)
    [(step, at, metrics)] = data.evaluations
    assert (step, metrics) == (2, {"accuracy": 0.5})
    assert at == pytest.approx(3.0)


def test_everything_else_that_ranks_tell(writer: Writer) -> None:
    metric = {"key": "accuracy", "title": "Held-out accuracy", "higher_is_better": True, "unit": "%"}
    writer.event(
        0, "start", first=0, device="cpu", pid=7, threads=1, parameters=5, metric=metric, facts={"classes": 10}
    )
    writer.steps(0, 0, [1.0], data=[0.01], forward=[0.02], backward=[0.03], optimizer=[0.04], grad_norm=[2.5], lr=[0.1])
    writer.steps(1, 0, [1.0])
    writer.event(0, "communication", bytes_per_step=100, exposed_seconds_per_step=0.5)
    writer.event(1, "communication", bytes_per_step=300, exposed_seconds_per_step=0.1)
    writer.event(1, "memory", peak_bytes=11)
    writer.event(1, "error", type="ValueError", message="m", traceback="t")
    writer.event(0, "end", step=1, reason="finished")
    write_json(writer.directory.progress, {"ranks": []})
    write_json(writer.directory.summary, {"status": "finished"})
    data = RunData(writer.directory)
    data.refresh()
    assert data.metric == metric
    assert data.facts == {"classes": 10}
    assert data.rank_starts[0]["pid"] == 7
    assert {name: round(float(span[0]), 3) for name, span in data.spans.items()} == {
        "data": 0.01,
        "forward": 0.02,
        "backward": 0.03,
        "optimizer": 0.04,
    }
    assert data.grad_norm[0] == 2.5
    assert data.lr[0] == pytest.approx(0.1)
    assert data.communication == {"bytes_per_step": 300.0, "exposed_seconds_per_step": 0.5}
    assert data.peak_memory == {1: 11}
    assert data.errors[0]["type"] == "ValueError"
    assert data.summary == {"status": "finished"}
    assert data.progress == {"ranks": []}
    assert data.skipped_lines == 0


@pytest.mark.parametrize("world", ["2", True, 10**9, -1, None, 1.5])
def test_a_nonsense_number_of_ranks_is_not_believed(tmp_path: Path, world: Any) -> None:
    writer = Writer(tmp_path / "run")
    write_json(writer.directory.status, {"world_size": world, "state": ["running"], "steps": "many"})
    writer.steps(0, 0, [1.0])
    data = RunData(writer.directory)
    data.refresh()
    assert data.world_size == 1
    assert data.steps == 1
    assert data.state == "starting"
    assert data.total_steps is None


def test_a_line_without_end_does_not_fill_the_memory(writer: Writer) -> None:
    writer.world_size = 1
    writer.state("running")
    writer.raw(0, "x" * (2 * MAX_LINE_BYTES + 10))
    writer.raw(0, "\n")
    writer.steps(0, 0, [1.0])
    data = RunData(writer.directory)
    assert data.refresh()
    assert data.steps == 1
    assert data.skipped_lines == 1


def test_what_was_found_in_force_completes_what_was_said_at_the_start(writer: Writer) -> None:
    writer.event(0, "start", effective={"dtype": "float32", "activations": "?"})
    writer.event(0, "effective", found={"int8_products": 36.0, "activations": "float32", "x" * 300: ["y"]})
    writer.event(0, "effective", found={f"more {number}": 1 for number in range(100)})
    writer.event(0, "effective", found=[1])
    data = RunData(writer.directory)
    data.refresh()
    effective = data.rank_starts[0]["effective"]
    assert (effective["dtype"], effective["int8_products"], effective["activations"]) == ("float32", "36.0", "float32")
    assert len(effective) == 50
    assert all(len(name) <= 100 for name in effective)
    assert data.skipped_lines == 1


def test_a_quantized_network_is_read_once_and_only_as_numbers(writer: Writer) -> None:
    both = {"float": 4.0, "quantized": 1.0}
    good = {
        "method": "int8_dynamic",
        "qat": "none",
        "layers": 3,
        "samples": 10,
        "seconds": 1.5,
        "metrics": {"float": {"loss": 2.0}, "quantized": {"loss": 2.5, "accuracy": None, "text": "x"}},
        "bytes": both,
        "layer_bytes": {"float": -1, "quantized": 1},
        "latency_seconds": {"1": both, "32": {"float": 1.0}, "-1": both, "many": both},
        "sensitivity": [["head", 0.5], ["x" * 500, "y"], "z", [1]],
    }
    writer.event(1, "quantized", **good)
    writer.event(0, "quantized", metrics=3)
    writer.event(0, "quantized", **good)
    writer.event(0, "quantized", **(good | {"method": "another"}))
    data = RunData(writer.directory)
    data.refresh()
    assert data.skipped_lines == 3
    assert data.quantized["method"] == "int8_dynamic"
    nothing = data.quantized["metrics"]["quantized"].pop("accuracy")
    assert np.isnan(nothing)  # ranks write null where a figure is not finite
    assert data.quantized["metrics"] == {"float": {"loss": 2.0}, "quantized": {"loss": 2.5}}
    assert data.quantized["bytes"] == both
    assert data.quantized["layer_bytes"] == {}
    assert data.quantized["latency_seconds"] == {1: both}
    assert data.quantized["sensitivity"] == [("head", 0.5), ("x" * 200, None)]


SIDE = {"kind": "int8", "factor": "int8", "zeros": 0.25, "share": "row", "numbers": 8, "counts": [1, 2, 1]}
LAYER = {
    "name": "a",
    "stage": 0,
    "shape": [2, 4],
    "part": "",
    "stored": "float32",
    "answers": "float32",
    "input": SIDE,
    "weight": SIDE | {"kind": "ternary"},
}


def test_numbers_of_all_stages_are_joined_and_only_as_numbers(writer: Writer) -> None:
    writer.event(1, "numbers", layers=[LAYER | {"name": "b", "stage": 1}], multiplied={"int8 × ternary": 1, "x": -1})
    bad = [
        LAYER | {"weight": SIDE | {"counts": counts}}
        for counts in ([1, 2], [], ["x"], [-1, 0, 1], [0] * 99_999, [None, 1, 2])
    ]
    bad += [LAYER | {"name": 3}, LAYER | {"stage": -1}, LAYER | {"shape": ["x"]}, LAYER | {"input": 1}, [], None]
    bad += [LAYER | {"input": SIDE | {"zeros": zeros}} for zeros in (2, float("nan"), "x")]
    writer.event(0, "numbers", layers=[LAYER | {"name": "n" * 999}, *bad], multiplied={"int8 × ternary": 2})
    writer.event(0, "numbers", layers=[LAYER | {"name": "n" * 200}])
    writer.event(0, "numbers", layers={"a": 1})
    data = RunData(writer.directory)
    data.refresh()
    assert [layer.name for layer in data.numbers] == ["n" * 200, "b"]
    assert data.multiplied == {"int8 × ternary": 3}
    assert data.skipped_lines == 2, "what is known already, and what cannot be read"
    layer = data.numbers[1]
    assert (layer.multiplied, layer.shape, layer.input.zeros) == ("int8 × ternary", (2, 4), 0.25)
    assert layer.weight.counts.tolist() == [1, 2, 1]


def test_numbers_of_many_ranks_stay_bounded(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", world_size=40)
    for rank in range(40):
        writer.event(rank, "numbers", layers=[LAYER | {"name": f"{rank}.{at}"} for at in range(100)])
    data = RunData(writer.directory)
    data.refresh()
    assert len(data.numbers) == 16 * MAX_LAYERS


KIND = {
    "layers": ["a", "b"],
    "count": 2,
    "shape": [4, 8],
    "rows": 10,
    "multiplied": "int8 × int8",
    "weights": 32,
    "nonzero": 16.0,
    "bytes": [1, 1, 4],
    "dense_seconds": 0.004,
    "seconds": 0.001,
    "measured": 0.5,
}


def test_kernels_are_read_once_and_only_as_numbers(writer: Writer) -> None:
    bad = [KIND | change for change in ({"count": 0}, {"nonzero": 33}, {"bytes": [1, 1]}, {"bytes": [0, 1, 1]})]
    bad += [KIND | {"rows": "x"}, KIND | {"weights": None}, KIND | {"layers": 1}, 7, None]
    unmeasured = KIND | {"dense_seconds": None, "seconds": "soon", "measured": -3}
    writer.event(1, "kernels", kinds=[KIND])
    writer.event(0, "kernels", kinds=3)
    writer.event(0, "kernels", kinds=[KIND, unmeasured, *bad], left_out=-1)
    writer.event(0, "kernels", kinds=[KIND])
    data = RunData(writer.directory)
    data.refresh()
    assert data.skipped_lines == 3
    assert len(data.kernels) == 2
    one, other = data.kernels
    assert (one.theory, one.kernel, one.dense_flops, one.flops) == (4.0, 4.0, 1920.0, (320.0,) * 3)
    assert (other.seconds, other.kernel, other.measured) == (None, None, 1.0)
    assert data.without_kernel == 0


def test_an_exported_network_is_read_once_and_only_as_numbers(writer: Writer) -> None:
    good = {
        "samples": 10,
        "seconds": 1.5,
        "saved": "csr",
        "file_bytes": 100,
        "metrics": {"dense": {"loss": 2.0, "text": "x"}, "csr": {"loss": 2.0}, "<b>": {"loss": 1.0}, "smaller": 3},
        "bytes": {"dense": 100, "csr": 20, "<b>": 1, "smaller": -1, "two_four": "x"},
        "layers": {"dense": 0, "csr": 3},
        "csr_layers": {"1": 0, "32": 3, "many": 1},
        "latency_seconds": {
            "1": {"dense": 0.1},
            "32": {"dense": 0.2, "csr": 0.1, "x": 0.0},
            "-1": {"dense": 1},
            "2": 1,
        },
        "fastest": {"1": "csr", "32": "x"},
    }
    writer.event(1, "exported", **good)
    writer.event(0, "exported", metrics=3)
    writer.event(0, "exported", **good)
    writer.event(0, "exported", **(good | {"saved": "another"}))
    data = RunData(writer.directory)
    data.refresh()
    assert data.skipped_lines == 3
    found = data.exported
    assert found["metrics"] == {"dense": {"loss": 2.0}, "csr": {"loss": 2.0}, "smaller": {}}
    assert found["bytes"] == {"dense": 100, "csr": 20}
    assert found["latency_seconds"] == {1: {"dense": 0.1}, 32: {"dense": 0.2, "csr": 0.1}}
    assert found["fastest"] == {1: "dense", 32: "csr"}, "as the numbers have it"
    assert found["csr_layers"] == {1: 0, 32: 3}
    assert (found["saved"], found["file_bytes"], found["layers"]) == ("csr", 100, {"dense": 0, "csr": 3})


def test_a_form_that_is_no_text_is_not_believed(writer: Writer) -> None:
    writer.event(0, "exported", metrics={}, latency_seconds={}, saved=["csr"], bytes=[1], layers=None, csr_layers=7)
    data = RunData(writer.directory)
    data.refresh()
    assert data.exported["saved"] == ""
    assert data.exported["bytes"] == data.exported["csr_layers"] == data.exported["fastest"] == {}


def test_nothing_there_at_all(tmp_path: Path) -> None:
    data = RunData(RunDirectory(tmp_path / "nowhere"))
    assert data.refresh(0.0)
    assert data.steps == 0
    assert data.world_size == 0
    assert data.status == {}
    assert len(data.elapsed) == 0


def test_arrays_handed_out_cannot_be_changed(writer: Writer) -> None:
    for rank in range(2):
        writer.steps(rank, 0, [1.0])
    data = RunData(writer.directory)
    data.refresh()
    with pytest.raises(ValueError, match="read-only"):
        data.samples[0] = 7


@pytest.mark.alone
def test_a_budget_spreads_the_reading_and_loses_nothing(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", world_size=64, steps=2000)
    for rank in range(64):
        for first in range(0, 2000, 50):
            writer.steps(rank, first, [float(rank)] * 50)
    data, rounds, longest = RunData(writer.directory), 0, 0.0
    finished = False
    while not finished:
        begun = time.perf_counter()
        finished = data.refresh(0.005)
        longest, rounds = max(longest, time.perf_counter() - begun), rounds + 1
        assert rounds < 10_000
    assert rounds > 3
    assert data.steps == 2000
    np.testing.assert_allclose(data.loss, 31.5)
    assert data.skipped_lines == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=40),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            ),
            st.fixed_dictionaries(
                {
                    "event": st.sampled_from(
                        [
                            "start",
                            "steps",
                            "evaluation",
                            "communication",
                            "memory",
                            "error",
                            "end",
                            "effective",
                            "quantized",
                            "numbers",
                            "kernels",
                            "exported",
                        ]
                    )
                },
                optional={
                    key: st.none()
                    | st.integers()
                    | st.floats()
                    | st.text(max_size=3)
                    | st.lists(st.floats() | st.none())
                    for key in (
                        "first",
                        "loss",
                        "samples",
                        "seconds",
                        "step",
                        "metrics",
                        "peak_bytes",
                        "monotonic",
                        "lr",
                        "found",
                        "latency_seconds",
                        "sensitivity",
                        "layers",
                        "multiplied",
                        "kinds",
                        "left_out",
                        "csr_layers",
                        "saved",
                    )
                },
            ),
        ),
        max_size=12,
    )
)
def test_no_content_makes_the_reader_fail(tmp_path_factory: pytest.TempPathFactory, events: list[Any]) -> None:
    writer = Writer(tmp_path_factory.mktemp("fuzz") / "run", world_size=1)
    for event in events:
        writer.raw(0, (event if isinstance(event, str) else json.dumps(event)) + "\n")
    data = RunData(writer.directory)
    assert data.refresh()
    assert len(data.loss) == len(data.elapsed) == len(data.samples) == len(data.grad_norm) == data.steps
    assert not np.isnan(data.loss).any()
    assert (np.diff(data.elapsed) >= 0).all()


def test_growing_array_keeps_what_it_holds() -> None:
    array = GrowingArray(np.float32)
    for start in range(0, 5000, 7):
        array.write(start, np.arange(start, start + 5), fill=-1)
    expected = np.arange(len(array.values))
    gaps = expected % 7 > 4
    np.testing.assert_array_equal(array.values[~gaps], expected[~gaps])
    assert (array.values[gaps] == -1).all()


@pytest.mark.alone
@pytest.mark.slow
def test_64_ranks_of_100000_steps_fit_into_300_mb(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", world_size=64, steps=100_000, state="finished")
    columns = {name: [0.01234] * 500 for name in ("loss", "seconds", "data", "forward", "backward", "optimizer")}
    for rank in range(64):
        with open(writer.directory.events(rank), "w") as file:
            for first in range(0, 100_000, 500):
                file.write(json.dumps({"event": "steps", "first": first, "samples": [1] * 500, **columns}) + "\n")
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from labkit.experiment.run_directory import RunDirectory
        from labkit.runs.data import RunData
        data = RunData(RunDirectory(Path(sys.argv[1])))
        while not data.refresh(0.05): pass
        assert data.steps == 100_000 and len(data.seconds) == 64, data.steps
        # Not ru_maxrss: a process starts with that of the one that started it.
        print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(writer.directory.path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert int(done.stdout) * 1024 < 300e6
