"""Parity: a data-parallel layout computes what one process computes, and the proof notices when it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labkit.experiment import Experiment
from labkit.experiment.run_directory import RunDirectory, write_json
from labkit.proofs.parity import TOLERANCE, check, compare_losses
from labkit.runs import Run, RunFailed
from tests.launch.helpers import SMALLEST, changed_ranks, tiny

STEPS = 6


def experiment(ranks: int, passes: int = 1, batch: int = 12, **changes: Any) -> Experiment:
    return tiny(
        ranks=ranks,
        workload=SMALLEST | {"image_size": 16, "width": 8},
        training__global_batch=batch,
        gradients__accumulation=passes,
        **changes,
    )


# 13 and 29 are divided evenly by none of the rank counts, nor by the passes.
@pytest.mark.parametrize(("ranks", "passes", "batch"), [(2, 1, 12), (2, 2, 13), (3, 1, 13), (3, 3, 29), (4, 2, 29)])
def test_a_layout_computes_what_one_process_computes(ranks: int, passes: int, batch: int) -> None:
    found = check(experiment(ranks, passes, batch), steps=STEPS)
    assert found["parity"] is True, found["text"]
    for precision, tolerance in TOLERANCE.items():
        figures = found["precisions"][precision]
        assert figures["parity"] is True
        assert figures["max_loss_difference"] <= tolerance
        assert figures["max_gradient_norm_difference"] <= tolerance
        assert figures["first_step_beyond"] is None
    assert (found["steps"], found["world_size"], found["global_batch"], found["accumulation"]) == (
        STEPS,
        ranks,
        batch,
        passes,
    )
    layout, alone = Run.attach(found["run_id"]), Run.attach(found["reference_run_id"])
    assert (layout.experiment.layout.world_size, alone.experiment.layout.world_size) == (ranks, 1)
    assert alone.experiment.gradients.accumulation == 1
    losses = layout.data().loss
    assert len(losses) == STEPS
    assert len(set(losses)) == STEPS, "the losses move"


def test_a_name_of_full_length_can_be_checked() -> None:
    assert check(experiment(2, name="x" * 200), steps=2, precisions=("fp64",))["parity"] is True


# Each of these is a mistake that somebody has made in a real data-parallel code.
MISTAKES = {
    "the mean is weighted as if the batch were even": (
        "import labkit.training.weights as broken\nbroken.share_weight = lambda samples, batch, ranks: 1.0\n"
    ),
    "gradients are not averaged at all": (
        "import labkit.parallel.replicate as broken\n"
        "broken.Replicate.apply = staticmethod(lambda accelerator, model: model)\n"
        "broken.ReplicatedModel.use_shared_memory = lambda self, folder, timeout_s: None\n"
    ),
    "shared memory adds up all ranks but one": (
        "from labkit.parallel.shared_memory import SharedMemory\n"
        "SharedMemory.all_reduce = lambda self, flat: self._barrier()\n"
    ),
    "gradients are added instead of averaged": (
        "import labkit.training.weights as broken\n"
        "right = broken.share_weight\n"
        "broken.share_weight = lambda samples, batch, ranks: right(samples, batch, ranks) * ranks\n"
    ),
    "the last pass alone is exchanged and counted": (
        "import contextlib\n"
        "import labkit.gradients.updates.synchronous as broken\n"
        "broken.Synchronous.forward_backward = lambda self, model, last, step: contextlib.nullcontext()\n"
        "import labkit.training.trainer as trainer\n"
        "from labkit.training.sampling import BatchOrder\n"
        "right = BatchOrder.micro_batches\n"
        "BatchOrder.micro_batches = lambda self, step, rank, n, m, w=None: [right(self, step, rank, n, m)[-1]] * m\n"
    ),
    "every rank sees the same samples": (
        "from labkit.training.sampling import BatchOrder\n"
        "right = BatchOrder.micro_batches\n"
        "BatchOrder.micro_batches = lambda self, step, rank, ranks, n, weights=None: right(self, step, 0, ranks, n)\n"
    ),
    "a rank is a millionth off": (
        "import labkit.training.weights as broken\n"
        "right = broken.share_weight\n"
        "broken.share_weight = lambda samples, batch, ranks: right(samples, batch, ranks) * (1 + 1e-6 * (ranks > 1))\n"
    ),
}


@pytest.fixture(scope="module")
def breakable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A standby whose runs make the mistake that the environment names."""
    with changed_ranks(tmp_path_factory.mktemp("breakable")):
        yield


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_average_fails_the_proof(breakable: None, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_TEST_CHANGE", MISTAKES[mistake])
    found = check(experiment(2, passes=2, batch=13), steps=4, precisions=("fp64",))
    assert found["parity"] is False
    assert found["max_loss_difference"] > 1e-9 or found["max_gradient_norm_difference"] > 1e-9
    assert 1 <= found["first_step_beyond"] <= 4
    assert "DIFFERS from one process at step" in found["text"][0]


def test_without_a_mistake_the_same_proof_holds(breakable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_TEST_CHANGE", "pass")
    assert check(experiment(2, passes=2, batch=13), steps=4, precisions=("fp64",))["parity"] is True


# -- the verdict ------------------------------------------------------------------------------------------------------


def recorded(path: Path, losses: list[float | None], norms: list[float | None]) -> Run:
    """A finished one-rank run with these numbers."""
    import json

    path.mkdir()
    directory = RunDirectory(path)
    write_json(directory.experiment, Experiment().to_dict())
    write_json(directory.status, {"state": "finished", "world_size": 1, "steps": len(losses)})
    count = len(losses)
    columns = {"loss": losses, "samples": [4] * count, "seconds": [0.1] * count, "grad_norm": norms}
    event = {"event": "steps", "rank": 0, "time": 1.0, "monotonic": 1.0, "first": 0} | columns
    directory.events(0).write_text(json.dumps(event) + "\n")
    return Run(directory)


@pytest.mark.parametrize(
    ("losses", "norms", "parity", "beyond"),
    [
        ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], True, None),
        ([1.0, 2.0 + 1e-8, 3.0], [1.0, 1.0, 1.0], False, 2),
        ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0 + 1e-8], False, 3),
        ([1.0, None, 3.0], [1.0, 1.0, 1.0], False, 2),
        ([1.0, 2.0, 3.0], [None, 1.0, 1.0], False, 1),
        ([1.0 + 5e-10, 2.0, 3.0], [1.0, 1.0, 1.0], True, None),
    ],
)
def test_the_verdict(
    losses: list[float | None], norms: list[float | None], parity: bool, beyond: int | None, tmp_path: Path
) -> None:
    one = recorded(tmp_path / "one", losses, norms)
    other = recorded(tmp_path / "other", [1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    verdict = compare_losses(one, other, 3, "fp64")
    assert (verdict.parity, verdict.first_step_beyond) == (parity, beyond)


def test_nan_on_both_sides_is_no_agreement(tmp_path: Path) -> None:
    runs = [recorded(tmp_path / name, [1.0, None], [1.0, None]) for name in ("one", "other")]
    assert compare_losses(runs[0], runs[1], 2, "fp64").parity is False


def test_a_run_cut_short_proves_nothing(tmp_path: Path) -> None:
    runs = [recorded(tmp_path / name, [1.0] * count, [1.0] * count) for name, count in (("one", 2), ("other", 3))]
    with pytest.raises(RunFailed, match="3 steps were requested, but the runs have 2 and 3"):
        compare_losses(runs[0], runs[1], 3, "fp64")


def test_gradient_norms_are_compared_relatively_above_one(tmp_path: Path) -> None:
    one = recorded(tmp_path / "one", [1.0], [1e6 * (1 + 1e-10)])
    other = recorded(tmp_path / "other", [1.0], [1e6])
    verdict = compare_losses(one, other, 1, "fp64")
    assert verdict.parity
    np.testing.assert_allclose(verdict.max_gradient_norm_difference, 1e-10, rtol=1e-3)
