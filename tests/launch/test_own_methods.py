"""Methods that do not come with labkit: from a cell, a file, a package; where their code runs and where it must not."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import labkit
from labkit.experiment import Experiment, ExperimentError, own_methods
from labkit.experiment.cell_source import NotSelfContainedError
from labkit.experiment.registry import registry
from labkit.experiment.resume import carried_code
from labkit.plots import plot_grid, plot_sparsity, plot_timeline
from labkit.plots.wording import method as method_in_words
from labkit.proofs.cases import TEXT
from labkit.ui.form import ExperimentForm
from tests.launch.helpers import start, tiny
from tests.launch.own_classes import Checkerboard, Doubled, EveryThird, FoldedGPipe, Halves, LastFirst, WaitsForever

FILE = Path(__file__).parent / "own_classes.py"


@pytest.fixture(autouse=True)
def as_in_a_new_kernel() -> Iterator[None]:
    """No class of a cell is known before a test or after it."""
    before = dict(own_methods._LOADED)
    own_methods._LOADED.clear()
    yield
    own_methods._LOADED.clear()
    own_methods._LOADED.update(before)


def forgotten(experiment: Experiment) -> Experiment:
    """The experiment as another process reads it, which knows none of its classes."""
    text = experiment.to_json()
    own_methods._LOADED.clear()
    return Experiment.from_json(text)


# -- in runs ----------------------------------------------------------------------------------------------------------


def test_a_compressor_of_a_cell_trains_and_sends_the_bytes_of_its_formula() -> None:
    section = labkit.from_notebook(Halves)
    experiment = tiny(steps=12).set({"gradients.compression": {**section, "scale": 512.0}})
    assert experiment.problems() == []
    run = start(experiment).wait(60)
    assert run.state == "finished", run.cause
    plain = start(tiny(steps=12)).wait(60)
    assert run.data().loss.tolist() != plain.data().loss.tolist(), "rounding is felt"
    assert run.data().loss.tolist() == pytest.approx(plain.data().loss.tolist(), rel=1e-2)
    sent = run.summary()["communication"]
    assert sent["counted_bytes_per_step"] == sent["formula_bytes_per_step"] > 0
    assert sent["method"] == "Halves"
    assert "Halves" in " ".join(method_in_words(run.experiment))


def test_a_file_and_an_earlier_run_need_no_cell() -> None:
    experiment = tiny(steps=6).set({"gradients.compression": {"method": f"{FILE}:Halves", "scale": 512.0}})
    assert experiment.problems() == []
    assert any("checked only on the ranks" in str(warning) for warning in experiment.warnings())
    by_file = start(experiment).wait(60)
    assert by_file.state == "finished", by_file.cause
    by_cell = tiny(steps=6).set({"gradients.compression": {**labkit.from_notebook(Halves), "scale": 512.0}})
    again = start(forgotten(by_cell)).wait(60)
    assert again.state == "finished", again.cause
    assert again.data().loss.tolist() == by_file.data().loss.tolist()


def test_an_update_rule_of_a_cell_trains() -> None:
    run = start(tiny(steps=9).set({"gradients.update": labkit.from_notebook(EveryThird)})).wait(60)
    assert run.state == "finished", run.cause
    plain = start(
        tiny(steps=9).set({"gradients.update": {"method": "local_sgd", "every": 3, "rate_factor": 1.0}})
    ).wait(60)
    assert run.data().loss.tolist() == pytest.approx(plain.data().loss.tolist(), rel=1e-6)


def test_a_sparsity_method_of_a_cell_trains() -> None:
    experiment = tiny(steps=6).set({"sparsity": {**labkit.from_notebook(Checkerboard), "target": 0.5}})
    run = start(experiment).wait(60)
    assert run.state == "finished", run.cause
    assert run.summary()["effective"]["sparsity"] == pytest.approx(0.5, abs=0.02)


def test_a_number_format_of_a_cell_trains() -> None:
    run = start(tiny(steps=4).set({"quantization.training": labkit.from_notebook(Doubled)})).wait(60)
    assert run.state == "finished", run.cause
    double = start(tiny(steps=4).set({"quantization.training": "fp64"})).wait(60)
    assert run.data().loss.tolist() == double.data().loss.tolist()


def pipeline(schedule: Any, ranks: int = 2, stages: int = 1, **changes: Any) -> Experiment:
    """A pipeline of four micro-batches under a schedule."""
    network = TEXT | {"width": 16, "depth": 4, "heads": 2, "context": 16}
    layout = {"pp": ranks, "schedule": schedule, "stages_per_rank": stages, "microbatches": 4}
    return tiny(steps=4).set({"workload": network, "layout": layout, "training.trace_step": 2, **changes})


@pytest.mark.parametrize(("schedule", "stages"), [(LastFirst, 1), (FoldedGPipe, 2)])
def test_a_schedule_of_a_cell_computes_what_one_process_computes(schedule: type, stages: int) -> None:
    experiment = pipeline(labkit.from_notebook(schedule), stages=stages)
    assert experiment.problems() == []
    verdict = labkit.check(experiment, steps=4)
    assert verdict["precisions"]["fp64"]["parity"] is True, verdict["text"]


def test_a_schedule_of_a_cell_runs_in_its_own_order_and_is_drawn() -> None:
    run = start(pipeline(labkit.from_notebook(LastFirst))).wait(60)
    assert run.state == "finished", run.cause
    for pp_rank, actions in run.data().timeline.items():
        computed = [f"{action.stage}{action.kind}{action.microbatch}" for action in actions]
        assert computed == list(LastFirst.actions(pp_rank, 2, [pp_rank], 4))
    assert "LastFirst" in plot_timeline(run).summary


def test_a_schedule_of_a_file_runs_and_one_that_is_not_loaded_requires_nothing() -> None:
    experiment = pipeline(f"{FILE}:FoldedGPipe", stages=2)
    assert experiment.problems() == []
    assert "2 of 4 stages" in plot_grid(experiment.layout).to_json(), "which ones is not known here"
    run = start(experiment).wait(60)
    assert run.state == "finished", run.cause
    own = pipeline(labkit.from_notebook(FoldedGPipe), stages=2)
    assert "stages 0 and 3 of 4" in plot_grid(own.layout).to_json()
    wrong = start(pipeline(f"{FILE}:FoldedGPipe")).wait(60)
    assert wrong.cause is not None
    assert "FoldedGPipe folds the pipeline and needs exactly 2 stages per rank" in wrong.cause["message"]


def test_a_sparsity_method_of_a_cell_is_proved_and_drawn() -> None:
    small = {"name": "vision", "model": "vit", "image_size": 8, "depth": 1}
    method = {**labkit.from_notebook(Checkerboard), "target": 0.5}
    experiment = tiny().set({"workload": small, "sparsity": method})
    verdict = labkit.check(experiment, steps=6)
    assert verdict["precisions"]["fp64"]["parity"] is True, verdict["text"]
    drawn = plot_sparsity([start(experiment).wait(60)])
    assert "Checkerboard" in drawn.to_json() + str(drawn.rows)


def test_what_changes_gradients_claims_no_parity_by_its_name() -> None:
    for field, implementation in (("gradients.compression", Halves), ("gradients.update", EveryThird)):
        with pytest.raises(ExperimentError, match=f"{implementation.__name__} .* claims no parity"):
            labkit.check(tiny().set({field: labkit.from_notebook(implementation)}))


# -- in forms ---------------------------------------------------------------------------------------------------------


def test_a_form_lists_it_and_shows_its_options() -> None:
    key = labkit.from_notebook(Halves)["method"]
    form = ExperimentForm(tiny())
    field = "gradients.compression.method"
    assert ("Halves (yours)", key) in form.entries[field].widget.options
    form.set(field, key)
    assert "gradients.compression.scale" in form.entries
    form.set("gradients.compression.scale", -1.0)
    assert [problem.field for problem in form.problems] == ["gradients.compression.scale"]
    form.set("gradients.compression.scale", 2.0)
    assert form.value.gradients.compression.options == {"scale": 2.0, "mode": "mean"}
    assert "class Halves(Compressor)" in form.value.code[key]


def test_a_form_lists_a_schedule_and_says_why_its_order_is_impossible() -> None:
    key, impossible = labkit.from_notebook(FoldedGPipe), labkit.from_notebook(WaitsForever)
    form = ExperimentForm(pipeline("1f1b"))
    assert ("FoldedGPipe (yours)", key) in form.entries["layout.schedule"].widget.options
    form.set("layout.schedule", key)
    [problem] = form.problems
    assert (problem.field, problem.nearest) == ("layout.stages_per_rank", 2)
    form.set("layout.stages_per_rank", 2)
    assert form.problems == []
    form.set("layout.schedule", impossible)
    [problem] = form.problems
    assert problem.field == "layout.schedule"
    assert "WaitsForever.actions: no rank can go on: rank 0 with 0B0 for 0F0" in problem.reason


def test_a_form_keeps_the_options_of_a_class_that_it_must_not_load() -> None:
    choice = {**labkit.from_notebook(Halves), "scale": 7.0}
    form = ExperimentForm(forgotten(tiny().set({"gradients.compression": choice})))
    form.set("training.steps", 3)
    assert form.value.gradients.compression.options == {"scale": 7.0, "mode": "mean"}


def test_a_class_that_is_defined_again_is_another_method(tmp_path: Path) -> None:
    first = labkit.from_notebook(Halves)["method"]
    knob = "gradients.compression"
    own = own_methods.loaded(knob, first)
    assert own is not None
    second = own_methods.cell_key("Halves", own.source + "\n# changed")
    own_methods.register(knob, second, own)
    assert own_methods.listed(knob) == [second]
    assert registry(knob)[first].load() is Halves, "an older experiment means what it meant"


# -- where code runs --------------------------------------------------------------------------------------------------


def test_reading_an_experiment_runs_no_code(tmp_path: Path) -> None:
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Trap: pass\n"
    (tmp_path / "trap.py").write_text(trap)
    key = own_methods.cell_key("Trap", trap)
    for change, code in (({"method": f"{tmp_path}/trap.py:Trap"}, {}), ({"method": key}, {key: trap})):
        data = tiny().to_dict() | {"code": code}
        data["gradients"]["compression"] = change
        file = tmp_path / "experiment.json"
        file.write_text(json.dumps(data))
        experiment = Experiment.load(file)
        assert experiment.problems() == []
        assert "class Trap" in carried_code(experiment) or "trap.py:Trap" in carried_code(experiment)
        ExperimentForm(experiment)
        for command in (["validate", str(file)], ["show", str(file)]):
            subprocess.run([sys.executable, "-m", "labkit", *command], capture_output=True, timeout=60)
        assert not (tmp_path / "ran").exists()


def test_a_source_that_was_changed_is_refused() -> None:
    experiment = tiny().set({"gradients.compression": labkit.from_notebook(Halves)})
    data = experiment.to_dict()
    [key] = data["code"]
    data["code"][key] += "\nprint('more')\n"
    own_methods._LOADED.clear()
    [problem] = Experiment.from_dict(data).problems()
    assert "has been changed" in str(problem)
    del data["code"]
    [problem] = Experiment.from_dict(data).problems()
    assert "does not contain the source" in str(problem)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class Wrong: pass\n", "is not a subclass of labkit.gradients.compression.compressor.Compressor"),
        ("from labkit.gradients.compression.compressor import Compressor as Wrong\n", "has no reduce"),
        ("raise RuntimeError('broken file')\nclass Wrong: pass\n", "broken file"),
    ],
)
def test_a_class_that_cannot_be_used_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "wrong.py").write_text(text)
    run = start(tiny().set({"gradients.compression.method": f"{tmp_path}/wrong.py:Wrong"})).wait(60)
    assert run.state == "failed"
    assert run.cause is not None
    assert words in run.cause["message"]
    assert "\n" not in run.cause["message"]


def test_options_and_rules_are_checked_on_the_ranks() -> None:
    wrong_option = {"gradients.compression": {"method": f"{FILE}:Halves", "scala": 1.0}}
    wrong_target = {"sparsity": {"method": f"{FILE}:Checkerboard", "target": 0.7}}
    for changes, words in ((wrong_option, "scala"), (wrong_target, "as many black as white")):
        run = start(tiny().set(changes)).wait(60)
        assert run.state == "failed"
        assert run.cause is not None
        assert words in run.cause["message"]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("no/file.py:Halves", "there is no file"),
        (f"{FILE}:Thirds", "does not define Thirds"),
        ("no_module_of_this_name:Halves", "there is no module"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_before_a_launch(method: str, words: str) -> None:
    [problem] = tiny().set({"gradients.compression.method": method}).problems()
    assert (problem.field, words in problem.reason) == ("gradients.compression.method", True)


def test_an_option_that_is_not_json_is_refused() -> None:
    with pytest.raises(ExperimentError, match="is not a JSON value"):
        tiny().set({"gradients.compression": {"method": f"{FILE}:Halves", "scale": {1, 2}}})
    with pytest.raises(ExperimentError):
        tiny().set({"gradients.compression": {"method": f"{FILE}:Halves", "scale": math.nan}})


def test_a_class_serves_the_knob_of_its_base_only() -> None:
    key = labkit.from_notebook(Halves)["method"]
    experiment = tiny().set({"sparsity": {"method": key, "target": 0.5}})
    assert not issubclass(registry("sparsity")[key].load(), Halves)
    [problem] = [problem for problem in experiment.problems() if problem.field == "sparsity.method"]
    assert "does not contain the source" in problem.reason


def test_a_closed_registry_takes_no_class() -> None:
    with pytest.raises(ExperimentError, match="unknown"):
        tiny().set({"quantization.qat": f"{FILE}:Doubled"})


# -- what a cell must be ----------------------------------------------------------------------------------------------


def test_a_class_that_is_no_method_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a subclass of one of"):
        labkit.from_notebook(dict)


def test_a_class_within_a_function_is_refused() -> None:
    class Inner(Halves):
        def reduce(self, bucket: Any) -> Any:
            return super().reduce(bucket)

    with pytest.raises(NotSelfContainedError, match="define it in a cell"):
        labkit.from_notebook(Inner)


def test_what_is_missing_is_named() -> None:
    namespace: dict[str, Any] = {}
    exec(
        "from labkit.gradients.compression.compressor import Compressor\nclass Silent(Compressor):\n    pass", namespace
    )
    with pytest.raises(TypeError, match="Silent has no reduce"):
        labkit.from_notebook(namespace["Silent"])


# -- packages ---------------------------------------------------------------------------------------------------------


def test_an_entry_point_of_a_package_is_a_method_like_labkits_own(tmp_path: Path) -> None:
    (tmp_path / "halving.py").write_text(FILE.read_text())
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    info = tmp_path / "halving-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halving\nVersion: 1.0\n")
    lines = ("halves = halving:Halves", "broken = broken:Class", "other = halving:EveryThird", "topk = halving:Halves")
    (info / "entry_points.txt").write_text("\n".join(["[labkit.gradients.compression]", *lines, ""]))
    program = """
import labkit
from labkit.experiment.registry import registry
names = registry("gradients.compression").names()
assert "halves" in names and "broken" not in names and "other" not in names and names.count("topk") == 1
assert registry("gradients.compression")["halves"].summary == "from the package halving"
experiment = labkit.Experiment().set({"gradients.compression": {"method": "halves", "scale": 3}})
assert experiment.gradients.compression.options == {"scale": 3.0, "mode": "mean"}
assert experiment.code == {}
try:
    experiment.set({"gradients.compression.scale": -1})
except labkit.ExperimentError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    )
    assert done.returncode == 0, done.stderr
    assert "gradients.compression.scale" in done.stdout
    for name, reason in (
        ("broken", "no_such_library"),
        ("other", "not a subclass of Compressor"),
        ("topk", "this name"),
    ):
        assert re.search(rf"{name} of the package halving is left out: .*{reason}", done.stderr), done.stderr
