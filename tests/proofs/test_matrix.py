"""The parity matrix: what its cases are, what it says of them, and a covering sample of it run for real."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from labkit.cli import main
from labkit.experiment import Experiment
from labkit.experiment.layout import AXES, Layout
from labkit.experiment.schedules import SCHEDULES
from labkit.launch import warm
from labkit.proofs import cases as made
from labkit.proofs import matrix, matrix_follow
from labkit.proofs.matrix import Case, Result, cases, run
from labkit.proofs.matrix_follow import follow
from labkit.proofs.matrix_log import MatrixLog
from labkit.runs import Run
from tests.launch.helpers import FAULTY, wait_until

pytestmark = pytest.mark.timeout(900)  # listing all cases takes minutes of processor time


@pytest.fixture(
    scope="module",
    params=[pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.exhaustive)],
)
def most_ranks(request: pytest.FixtureRequest) -> int:
    """Up to how many ranks a layout of the matrix has."""
    return int(request.param)


@pytest.fixture(scope="module")
def all_cases(most_ranks: int) -> list[Case]:
    return matrix.cases(ranks=most_ranks)


with_4_ranks = pytest.mark.parametrize("most_ranks", [4], indirect=True, scope="module")
"""For a test that runs cases: it needs no more."""


def test_products_are_all_ordered_factorizations() -> None:
    counts = dict.fromkeys(range(1, 9), 0)
    for text in made.products(8):
        counts[Layout.parse(text).world_size] += 1
    # Of p: one axis of six. Of 4: 6 + 15 pairs; of 6: 6 · 6; of 8: 6 + 30 + 20.
    assert counts == {1: 1, 2: 6, 3: 6, 4: 21, 5: 6, 6: 36, 7: 6, 8: 56}


def test_every_product_of_so_many_ranks_is_a_case(all_cases: list[Case], most_ranks: int) -> None:
    shown = {case.product for case in all_cases if case.family.startswith("gpt")}
    assert shown >= set(made.products(most_ranks))


def test_the_experiment_of_a_case_is_the_one_that_its_settings_make(all_cases: list[Case]) -> None:
    """Experiments are put together from sections that have been checked before."""
    for case in all_cases[::20]:
        checked = Experiment.from_dict(case.experiment.to_dict())
        assert checked == case.experiment
        assert checked.to_json() == case.experiment.to_json()
        chosen = {name: value for name, value in case.settings.items() if name != made.PRODUCT}
        assert {name: checked.get(name) for name in chosen} == chosen
        assert str(checked.layout) == case.product


def test_legal_cases_are_legal_and_the_others_are_refused(all_cases: list[Case]) -> None:
    for case in all_cases:
        assert bool(case.experiment.problems()) is bool(case.problems), str(case)
        idle = [warning for warning in case.experiment.warnings() if "no effect" in warning.reason]
        assert case.problems or not {warning.field for warning in idle} & set(case.settings), str(case)


def test_no_case_comes_twice(all_cases: list[Case]) -> None:
    legal = [case.experiment.to_json() for case in all_cases if not case.problems]
    assert len(set(legal)) == len(legal)


def test_new_schedules_axes_and_options_enter_by_themselves(all_cases: list[Case]) -> None:
    legal = [case for case in all_cases if not case.problems]
    met = {(case.family, case.experiment.layout.schedule, case.experiment.layout.tp) for case in legal}
    for schedule in SCHEDULES.values():
        assert (("gpt", schedule.key, 2) in met) is not schedule.asynchronous, "stale gradients are not equal"
    for axis in AXES:
        assert any(getattr(case.experiment.layout, axis) > 1 for case in legal)
    for name in set(Layout.model_fields) - set(AXES) - set(made.OF_ASYNCHRONOUS_SCHEDULES):
        varied = made.factors("gpt", 8, ["fp64"])[f"layout.{name}"]
        assert len(varied) > 1, f"layout.{name} is not varied"


def test_a_sample_holds_every_setting(all_cases: list[Case]) -> None:
    chosen = matrix.sample(all_cases)
    assert matrix.sample(all_cases) == chosen
    assert matrix.sample(all_cases, seed=1) != chosen
    legal = [case for case in all_cases if not case.problems and case.experiment.layout.world_size <= 4]
    held = [case for case in chosen if not case.problems]

    def settings(cases: list[Case], name: str, family: str | None = None) -> set[str]:
        return {repr(case.settings[name]) for case in cases if name in case.settings and family in (None, case.family)}

    for family in made.FAMILIES:
        own = [name for name in made.factors(family, 4, ["fp64", "fp32"]) if name.startswith("workload.")]
        for name in [*own, made.PRECISION]:
            assert settings(held, name, family) == settings(legal, name, family), (family, name)
    for name in {name for case in legal for name in case.settings} - {made.PRODUCT}:
        assert settings(held, name) == settings(legal, name), name


@pytest.mark.slow
@pytest.mark.timeout(900)
@with_4_ranks
def test_a_covering_sample_is_equal_to_one_process_or_refused(all_cases: list[Case]) -> None:
    warm(60)
    results = list(matrix.run(matrix.sample(all_cases)))
    assert {result.outcome for result in results} == {"equal", "refused"}, "\n".join(
        f"{result.case}: {result.outcome}: {result.reason}" for result in results if result.outcome not in matrix.GOOD
    )
    for result in results:
        if result.outcome == "equal":
            assert result.parity is not None
            assert result.parity.max_metric_difference is not None
            assert result.parity.steps == made.STEPS


# -- what is not good is said -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case() -> Case:
    few = matrix.cases(["resnet"], ranks=2)
    return next(case for case in few if case.product == "dp2" and not case.problems)


def outcome(case: Case, **changes: Any) -> Result:
    experiment = case.experiment.set({name.replace("__", "."): value for name, value in changes.items()})
    [result] = matrix.run([dataclasses.replace(case, experiment=experiment)])
    return result


def test_a_layout_that_computes_something_else_differs(case: Case) -> None:
    path = Path(__file__).parent.parent / "training" / "odd_task.py"  # batch normalisation
    assert outcome(case).outcome == "equal"
    workload = {"name": "custom", "path": f"{path}:make"}
    result = outcome(case, workload=workload)
    assert result.outcome == "DIFFERS"
    assert result.run_id is not None
    assert Run.attach(result.run_id).state == "finished"
    assert "DIFFERS from one process at step" in result.reason


def test_a_crash_and_a_standstill_are_told_apart(case: Case) -> None:
    crash = outcome(case, workload={"name": "custom", "path": f"{FAULTY}:raises_beside_others"})
    assert (crash.outcome, crash.run_id is None) == ("FAILED", False)
    hung = outcome(case, workload={"name": "custom", "path": f"{FAULTY}:hangs_beside_others"}, launch__timeout_s=1.0)
    assert hung.outcome == "HUNG"
    assert "silent" in hung.reason


def test_runs_that_are_equal_are_removed(case: Case, labkit_home: Path) -> None:
    assert outcome(case).run_id is None
    assert Run.all() == []


def test_the_table_names_counts_reasons_and_cases() -> None:
    all_cases = matrix.cases(["vit"], ranks=2)
    refused = [Result(case, "refused", str(case.problems[0])) for case in all_cases if case.problems]
    text = matrix.markdown(
        [*refused, Result(all_cases[0], "HUNG", "rank 1 has been silent | still")], len(all_cases), "x", 60
    )
    assert f"| {len(refused) + 1} | 0 | {len(refused)} | 0 | 0 | 1 |" in text
    assert "HUNG: rank 1 has been silent \\| still" in text
    assert f"Interrupted: {len(all_cases) - len(refused) - 1} cases were not run." in text
    grouped = text.partition("## Refused")[2].partition("## Run")[0].splitlines()[4:]
    assert sum(int(line.split("|")[2]) for line in grouped if line.startswith("|")) == len(refused)


# -- the command ------------------------------------------------------------------------------------------------------

FEW = ["check", "--matrix", "--workload", "resnet", "--ranks", "1", "--precision", "fp64", "--json"]


def test_the_command_writes_the_table(labkit_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "PARITY.md"
    assert main([*FEW, "-o", str(file)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["asked"] == len(found["cases"]) == found["equal"] + found["refused"] > 1
    assert "labkit check --matrix --workload resnet --ranks 1 --precision fp64 -o" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--matrix", "some"], "invalid choice: 'some'"),
        (["--matrix", "--workload", "alexnet"], "the matrix has no workload 'alexnet'; known: gpt,"),
        (["--matrix", "--steps", "3"], "takes no recipe and no --steps"),
        (["--matrix", "-o", "nowhere/at/all.md"], "there is no folder nowhere/at"),
        (["--workload", "gpt"], "belong to --matrix"),
    ],
)
def test_a_wrong_request_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_ctrl_c_prints_what_is_there(labkit_home: Path) -> None:
    command = [sys.executable, "-m", "labkit", "check", "--matrix", "--workload", "resnet", "--ranks", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(Run.all()) > 1, 200, "the second run")  # all cases are listed first
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted:" in said
    assert all(run.done for run in Run.all())


def test_a_matrix_goes_on_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    legal = [case for case in cases(["resnet"], 2, ("fp64",), {}) if not case.problems][:2]
    path = tmp_path / "matrix.jsonl"
    first: list[Result] = []
    follow(legal[:1], first, quiet=True, log=MatrixLog(path))
    path.write_text(path.read_text() + '{"case": "half a li')  # as a killed process leaves it
    seen: list[str] = []

    def only_what_is_left(found: Sequence[Case]) -> Iterator[Result]:
        seen.extend(map(str, found))
        yield from run(found)

    monkeypatch.setattr(matrix_follow, "run", only_what_is_left)
    again: list[Result] = []
    follow(legal, again, quiet=True, log=MatrixLog(path))
    assert seen == [str(legal[1])]
    assert [result.outcome for result in again] == ["equal", "equal"]
    assert again[0].parity is not None
    assert first[0].parity is not None
    assert again[0].parity.max_loss_difference == first[0].parity.max_loss_difference
    assert len(MatrixLog(path).reusable_results(legal)) == 2, "a torn line costs that line only"


def test_a_file_of_other_versions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "matrix.jsonl"
    path.write_text('{"labkit": "0.0.1", "torch": "1.0"}\n')
    with pytest.raises(ValueError, match="was not made by labkit"):
        MatrixLog(path)
