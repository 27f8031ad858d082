"""One event a line, whole or not at all; JSON without NaN."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.experiment.events import EVENTS
from labkit.experiment.safe_files import finite
from labkit.launch.board import HeartbeatTable
from labkit.runs.checked import checked_fields
from labkit.training.events import EventWriter
from labkit.training.meter import SPANS, Meter
from tests.launch.helpers import events, start, tiny

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=20,
)


@settings(deadline=None)
@given(anything)
def test_what_is_no_number_becomes_null_at_any_depth(value: Any) -> None:
    assert json.loads(json.dumps(finite(value), allow_nan=False)) == finite(value)


def test_finite_leaves_numbers_alone() -> None:
    assert finite({"a": [1, 2.5, math.nan, (math.inf, "x")], 3: None}) == {"a": [1, 2.5, None, [None, "x"]], "3": None}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_event_has_rank_and_both_clocks(tmp_path: Path) -> None:
    path = tmp_path / "rank-3.jsonl"
    writer = EventWriter(path, 3)
    writer.write("evaluation", step=1, metrics={"loss": math.nan})
    writer.write("error", type="ValueError", message="line\nbreak \u2028 ü", traceback="")
    writer.close()
    first, second = read(path)
    assert (first["event"], first["rank"], first["metrics"]) == ("evaluation", 3, {"loss": None})
    assert abs(first["time"] - time.time()) < 60
    assert first["monotonic"] <= second["monotonic"]
    assert second["message"] == "line\nbreak \u2028 ü"
    assert path.stat().st_mode & 0o777 == 0o600


def test_two_threads_do_not_tear_lines(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.jsonl"
    writer = EventWriter(path, 0)

    def write() -> None:
        for step in range(200):
            writer.write("evaluation", step=step, metrics={"text": "x" * 5000})

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read(path)) == 800


WRITES_TILL_FULL = """
import resource, signal, sys
from pathlib import Path
from labkit.training.events import EventWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = EventWriter(Path(sys.argv[1]), 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
count = 0
try:
    while True:
        writer.write("evaluation", step=count, metrics={})
        count += 1
except OSError as error:
    print(count, error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.write("end", step=count, reason="finished")
"""


def test_a_full_disk_leaves_whole_lines_only(tmp_path: Path) -> None:
    """A limit on the file's size stands for the disk: the write that meets it is cut short."""
    path = tmp_path / "rank-0.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", WRITES_TILL_FULL, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    count, number = map(int, done.stdout.split())
    assert number in (errno.EFBIG, errno.ENOSPC)
    events = read(path)
    assert [event["step"] for event in events] == [*range(count), count]
    assert events[-1]["event"] == "end", "what comes after, once there is room again, is not spoiled"
    assert 5 < count < 20
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


# -- the meter --------------------------------------------------------------------------------------------------------


def one_step(meter: Meter, number: int, losses: list[tuple[float, int]]) -> None:
    meter.begin(number, lr=0.1)
    for index, (loss, samples) in enumerate(losses):
        if index:
            meter.phase("data")
        meter.phase("forward")
        time.sleep(0.002)
        meter.phase("backward")
        meter.loss(torch.tensor(loss), samples)
    meter.phase("optimizer")
    meter.end()


def test_the_meter_writes_every_step_once_with_its_spans(tmp_path: Path) -> None:
    writer, board = EventWriter(tmp_path / "rank-0.jsonl", 0), HeartbeatTable(1)
    with Meter(writer, 0, board, requested=time.monotonic() - 5) as meter:
        for number in range(40):
            one_step(meter, number, [(1.0, 3), (4.0, 1)] if number != 7 else [(math.nan, 4)])
            time.sleep(0.01)
    events = read(tmp_path / "rank-0.jsonl")
    assert events[0]["event"] == "first_step"
    assert 5 < events[0]["seconds"] < 10
    batches = [event for event in events if event["event"] == "steps"]
    assert len(batches) >= 2, "written while it runs, not at the end"
    numbers = [event["first"] + index for event in batches for index in range(len(event["loss"]))]
    assert numbers == list(range(40))
    losses = [loss for event in batches for loss in event["loss"]]
    assert losses[:7] == [1.75] * 7, "weighted by the samples of each pass"
    assert losses[7] is None
    for event in batches:
        assert all(len(event[name]) == len(event["loss"]) for name in ("samples", "seconds", "lr", *SPANS))
        assert event["samples"] == [4] * len(event["loss"])
        for index, seconds in enumerate(event["seconds"]):
            assert seconds == pytest.approx(sum(event[name][index] for name in SPANS), abs=1e-5)
            assert event["forward"][index] >= 0.002
    assert board.rank_status(0).step == 39
    assert board.rank_status(0).memory_bytes > 2**20
    assert {event["event"] for event in events} <= set(EVENTS)


def test_a_rank_other_than_the_first_writes_no_learning_rate(tmp_path: Path) -> None:
    with Meter(EventWriter(tmp_path / "rank-1.jsonl", 1), 1, HeartbeatTable(2), 0.0) as meter:
        one_step(meter, 0, [(1.0, 2)])
    events = read(tmp_path / "rank-1.jsonl")
    assert [event["event"] for event in events] == ["steps"]
    assert "lr" not in events[0]


def test_the_steps_before_a_fault_are_written(tmp_path: Path) -> None:
    def train() -> None:
        with Meter(EventWriter(tmp_path / "rank-0.jsonl", 0), 0, HeartbeatTable(1), 0.0) as meter:
            one_step(meter, 0, [(1.0, 2)])
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        train()
    assert any(event["event"] == "steps" for event in read(tmp_path / "rank-0.jsonl"))


def test_a_disk_that_fills_up_behind_the_meter_ends_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = EventWriter(tmp_path / "rank-0.jsonl", 0)

    def full(event: str, **fields: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def train() -> None:
        with Meter(writer, 1, HeartbeatTable(2), 0.0) as meter:
            monkeypatch.setattr(writer, "write", full)
            for number in range(1000):
                one_step(meter, number, [(1.0, 2)])

    with pytest.raises(OSError, match="No space left"):
        train()


GPT = {"name": "language", "model": "gpt", "depth": 2, "width": 32, "heads": 2, "context": 16}


@pytest.mark.alone
@pytest.mark.parametrize(
    "changes",
    [
        {"training.evaluate_every": 10, "training.checkpoint_every": 10, "sparsity": {"method": "rigl", "target": 0.8}},
        {"workload": GPT, "layout": {"pp": 2, "microbatches": 2}, "training.trace_step": 5},
        {"workload": GPT, "quantization.after_training": "int8_dynamic", "quantization.qat": "int8"},
        {"workload": GPT, "sparsity": {"method": "static", "target": 0.8, "export": True}},
        {"gradients.update": {"method": "parameter_server"}},
    ],
    ids=["masks", "pipeline", "quantized", "exported", "queue"],
)
def test_every_field_of_a_run_is_declared_and_of_its_kind(changes: dict[str, Any], labkit_home: Path) -> None:
    run = start(tiny(2, 24).set(changes)).wait(120)
    assert run.state == "finished"
    for event in (event for rank in range(2) for event in events(run, rank)):
        read = checked_fields(EVENTS[event["event"]], event)
        assert not {name: value for name, value in event.items() if value is not None and name not in read}
