"""Combinations of methods: which there are, what is said of them, and a sample of them run for real."""

from __future__ import annotations

import dataclasses
import json
from itertools import combinations as pairs
from pathlib import Path

import pytest

from labkit.cli import main
from labkit.experiment.registry import registry
from labkit.experiment.rules import CHOICES
from labkit.experiment.schedules import SCHEDULES
from labkit.experiment.sections import AUTO
from labkit.launch import warm
from labkit.proofs import combinations
from labkit.proofs.combinations import BASE, Combination, CombinationResult
from labkit.runs import Run
from tests.launch.helpers import changed_ranks

TRAINING = "quantization.training"


@pytest.fixture(scope="module")
def found() -> list[Combination]:
    return combinations.cases()


def test_every_pair_that_may_meet_meets_and_the_others_are_refused(found: list[Combination]) -> None:
    legal = [case for case in found if not case.problems]
    met = {frozenset(pair) for case in legal for pair in pairs(case.row.items(), 2)}
    refused = [frozenset(case.row.items()) for case in found if case.problems]
    alone = {one for case in refused if len(case) == 1 for one in case}
    factors = combinations.factors()
    rules = combinations.CombinationRules()
    for first, second in pairs(factors, 2):
        for one in factors[first]:
            for other in factors[second]:
                pair = frozenset({(first, one), (second, other)})
                row = {first: one, second: other}
                checked = pair in met or pair in refused or bool(alone & pair)
                assert checked or not rules.allowed(row) or not rules.experiment(row).problems(), row
    for case in legal:
        assert not case.experiment.problems(), str(case)


def test_new_methods_enter_by_themselves(found: list[Combination]) -> None:
    named = {value for case in found for value in case.row.values()}
    for knob in set(CHOICES) - {"workload", "layout.schedule"}:
        assert set(registry(knob).names()) - {AUTO} <= named
    assert {name for name, schedule in SCHEDULES.items() if schedule.asynchronous} <= named


def test_the_layouts_and_methods_of_the_issue_meet(found: list[Combination]) -> None:
    for layout in ("shard2", "tp2", "pp2", "dp2·pp2"):
        for field, name in (("sparsity.method", "rigl"), ("quantization.training", "bf16"), (TRAINING, "int8")):
            pairs_wanted = [("layout", layout), (field, name)]
            assert [case for case in combinations.with_settings(found, pairs_wanted) if not case.problems], pairs_wanted


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sample_learns_and_shows_every_method(found: list[Combination]) -> None:
    warm(60)
    results = list(combinations.run(combinations.sample(found)))
    assert {result.outcome for result in results} == {"learns"}, "\n".join(
        f"{result.case}: {result.outcome}: {result.reason}" for result in results if result.outcome != "learns"
    )


def one_with(found: list[Combination], *wanted: tuple[str, str]) -> Combination:
    return next(case for case in combinations.with_settings(found, wanted, 2) if not case.problems)


@pytest.mark.parametrize(
    ("wanted", "off"),
    [
        (("sparsity.method", "rigl"), "import labkit.sparsity.masks as m; m.Masks.mask_gradients = lambda self: None"),
        ((TRAINING, "bf16"), "import accelerate; accelerate.Accelerator.autocast = _nothing"),
        ((TRAINING, "int8_weights"), "import labkit.quantization.arithmetic as m; m.GridArithmetic.round_weight = _no"),
        ((TRAINING, "int8"), "import labkit.quantization.linear as m; m.NarrowLinear.forward = _plainly"),
        (
            ("gradients.compression.method", "sign"),
            "import labkit.gradients.compression.sign as m; m.Sign.reduce = m.Sign.reduce_uncompressed",
        ),
    ],
)
def test_what_is_switched_off_does_not_pass(
    found: list[Combination], wanted: tuple[str, str], off: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mechanism is taken away in the ranks, the setting stays, and the run comes to its end."""
    monkeypatch.setenv("LABKIT_TEST_CHANGE", _TOOLS + off)
    with changed_ranks(tmp_path):
        [result] = combinations.run([one_with(found, ("layout", "dp2"), wanted)])
    assert result.outcome == "OFF", result.reason
    assert wanted[1] in result.reason
    assert result.run_id is not None
    assert Run.attach(result.run_id).state == "finished"


_TOOLS = """
import contextlib
from torch.nn.functional import linear
def _no(self, *given): pass
def _plainly(self, input): return linear(input, self.weight, self.bias)
@contextlib.contextmanager
def _nothing(self, *given, **named): yield
"""


def test_a_method_without_evidence_does_not_pass() -> None:
    experiment = combinations.CombinationRules().experiment({TRAINING: "bf16"})
    shown = {"effective": {"activations": "float32", "sparsity": 0.0}, "communication": None, "staleness": None}
    assert combinations.evidence(experiment, shown) == {"bf16": ""}
    right = shown | {"effective": {"activations": "bfloat16"}}
    assert combinations.evidence(experiment, right) == {"bf16": "activations bfloat16"}


def test_names_stand_for_one_method(found: list[Combination]) -> None:
    assert combinations.parse_setting("rigl") == ("sparsity.method", "rigl")
    assert combinations.parse_setting(f"{TRAINING}=int8") == (TRAINING, "int8")
    with pytest.raises(ValueError, match=r"say which: .*quantization.training=int8"):
        combinations.parse_setting("int8")


def test_what_does_not_learn_is_said(found: list[Combination], monkeypatch: pytest.MonkeyPatch) -> None:
    case = one_with(found, ("layout", "dp1"))
    slow = dataclasses.replace(case, experiment=case.experiment.set({"optimizer.lr": 1e-7}))
    [result] = combinations.run([slow])
    assert result.outcome == "HARDLY"
    assert result.learned is not None
    assert result.learned < 0.1


def test_the_table_and_the_command(
    found: list[Combination], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    refused = [CombinationResult(case, "refused", str(case.problems[0])) for case in found if case.problems]
    text = combinations.markdown(
        [*refused, CombinationResult(found[0], "OFF", "no evidence of rigl | set", 0.9)], len(found), "x", 60
    )
    assert "OFF: no evidence of rigl \\| set" in text
    assert f"Interrupted: {len(found) - len(refused) - 1} were not run." in text
    assert main(["combinations", "--with", "nonsense"]) == 2
    assert "no combination has 'nonsense'" in capsys.readouterr().err
    assert (
        main(
            ["combinations", "--with", "dp1", "--with", "set", "--with", "fp64", "--json", "-o", str(tmp_path / "t.md")]
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["learns"] >= 1
    assert said["asked"] == said["learns"] + said["refused"]
    assert "dp1 + set + fp64" in (tmp_path / "t.md").read_text()
    assert BASE["training.steps"] == combinations.STEPS
