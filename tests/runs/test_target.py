"""A target loss counts from the step on from which the running mean stays below it, in samples, seconds and bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from labkit.runs.data import RunData
from labkit.runs.methods import is_plain, key, period
from labkit.runs.target import DEFAULT_MARGIN, default_target, final_loss, reached, reference, running_loss, window
from tests.plots.fake_run import EXPERIMENT, FakeRun, combined, drawn


def run(root: Path, loss: list[float], **columns: float) -> RunData:
    """Two ranks that took these losses: 2 s a step, 4 samples a rank and step."""
    one = FakeRun(root, "run", EXPERIMENT.replace(f"training.steps={len(loss)}"))
    each = {"samples": 4, "seconds": 2.0} | columns
    for rank in range(2):
        filled = {name: [value] * len(loss) for name, value in each.items()}
        one.event(rank, "steps", first=0, loss=loss, **filled)
    return read(one.end("finished"))


def read(one: FakeRun) -> RunData:
    data = RunData(one.directory)
    data.refresh()
    return data


def test_the_first_step_from_which_on_it_stays_below(tmp_path: Path) -> None:
    data = run(tmp_path, [5, 1, 5, 1, 1, 1, 1, 1], bytes=10)
    hit = reached(data, target=1.0, over=1)
    assert hit is not None
    assert (hit.step, hit.samples, hit.seconds, hit.bytes) == (4, 4 * 8, 8.0, 4 * 20)


def test_a_running_mean_is_meant_and_the_first_steps_have_none(tmp_path: Path) -> None:
    data = run(tmp_path, [4, 2, 2, 2, 2])
    assert running_loss(data, 2).tolist() == [4, 3, 2, 2, 2]
    hit = reached(data, target=2.0, over=2)
    assert hit is not None
    assert hit.step == 3
    assert hit.bytes is None, "nobody counted"
    early = reached(data, target=9.0, over=3)
    assert early is not None
    assert early.step == 3, "no mean of three steps before the third"


def test_what_does_not_stay_below_has_not_reached_it(tmp_path: Path) -> None:
    assert reached(run(tmp_path, [3, 1, 1, 3]), target=2.0, over=1) is None


def test_a_loss_that_is_no_number_reaches_nothing(tmp_path: Path) -> None:
    data = run(tmp_path, [3, 1, float("nan"), 1, 1, 1])
    assert reached(data, target=2.0, over=1) is None
    assert final_loss(data, over=1) is None


def test_a_run_without_steps_reaches_nothing(tmp_path: Path) -> None:
    data = read(FakeRun(tmp_path, "empty"))
    assert reached(data, target=2.0) is None
    assert final_loss(data) is None
    assert default_target(data) is None


def test_the_default_target_lies_a_little_above_where_the_plain_run_ends(tmp_path: Path) -> None:
    data = run(tmp_path, [8, 4, 2, 2, 2, 2, 2, 2, 2, 2])
    assert default_target(data, over=4) == DEFAULT_MARGIN * 2
    assert [window(steps) for steps in (10, 100, 1000)] == [5, 5, 50]


def test_the_reference_is_the_first_plain_run_of_several_ranks(tmp_path: Path) -> None:
    power = combined(tmp_path, "power", "gradients.compression.method=powersgd", steps=20)
    local = combined(tmp_path, "local", "gradients.update.method=local_sgd", steps=20)
    one, two = combined(tmp_path, "one", steps=20, ranks=1), combined(tmp_path, "two", steps=20)

    def of(*runs: FakeRun) -> int | None:
        return reference([(one.experiment, read(one)) for one in runs])

    assert of(power, one, local, two) == 3
    assert of(power, one) == 1
    assert of(power, local) is None


def test_evaluations_are_no_training_time(tmp_path: Path) -> None:
    rounds = read(combined(tmp_path, "rounds", steps=40))
    own = [np.cumsum(seconds, dtype=np.float64) for seconds in rounds.seconds]
    assert rounds.training_seconds == pytest.approx(np.max(own, axis=0))
    pieces = read(drawn(tmp_path, "pieces", "gradients.update.method=gossip", stale=[1], steps=40))
    assert pieces.elapsed[-1] == pytest.approx(40 * 0.02 + 5.0, abs=0.01), "one evaluation of 5 s before the last step"
    assert pieces.training_seconds[-1] == pytest.approx(40 * 0.02, abs=0.01)
    assert pieces.training_seconds[19] == pytest.approx(20 * 0.02, abs=0.01)
    assert np.median(pieces.seconds[0]) == pytest.approx(0.02, abs=0.001)


def test_bytes_are_those_of_all_ranks(tmp_path: Path) -> None:
    data = read(combined(tmp_path, "local", "gradients.update.method=local_sgd", sent=1000, every=8, steps=40))
    assert data.sent.tolist() == [2000.0 if (step + 1) % 8 == 0 else 0.0 for step in range(40)]
    assert data.exchanged["bytes"].sum() == 5000
    pieces = read(drawn(tmp_path, "pieces", "gradients.update.method=gossip", stale=[1], steps=20))
    assert pieces.sent.tolist() == [2000.0] * 20
    assert len(pieces.spans["forward"]) == len(pieces.exchanged["exposed"]) == 40, "of every piece"
    assert read(combined(tmp_path, "one", ranks=1, steps=20)).sent.tolist() == [0.0] * 20
    assert np.isnan(read(FakeRun(tmp_path, "bare").train(20)).sent).all()


def test_bytes_that_are_no_counts_are_none(tmp_path: Path) -> None:
    one = FakeRun(tmp_path, "odd", ranks=2)
    for rank, sent in ((0, [-5, float("nan")]), (1, [7, "much"])):
        one.event(rank, "steps", first=0, loss=[1, 1], samples=[1, 1], seconds=[1, 1], bytes=sent)
    assert read(one).sent.tolist() == [7, 0]


@pytest.mark.parametrize(
    ("changes", "plain", "every", "named"),
    [
        ([], True, 1, "plain"),
        (["gradients.overlap=false"], True, 1, "plain"),
        (["gradients.compression.method=topk"], False, 1, "topk"),
        (["gradients.update.method=local_sgd", "gradients.update.every=6"], False, 6, "local_sgd"),
    ],
)
def test_what_a_reader_knows_of_a_method(changes: list[str], plain: bool, every: int, named: str) -> None:
    experiment = EXPERIMENT.replace("layout.dp_replicate=2", *changes)
    assert (is_plain(experiment), period(experiment), key(experiment)) == (plain, every, named)
