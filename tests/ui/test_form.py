"""The form shows an experiment, gives it back unchanged, and says what is wrong as somebody types."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.experiment import Experiment, ExperimentError, Machine
from labkit.experiment.recipes import RECIPES, recipe
from labkit.experiment.registry import registries, registry
from labkit.netem import rules as slow_link
from labkit.ui.form import ExperimentForm


@pytest.mark.parametrize("name", RECIPES)
def test_a_form_gives_back_what_it_was_given(name: str) -> None:
    experiment = recipe(name)
    form = ExperimentForm(experiment)
    assert form.value == experiment
    assert form.problems == []


changes = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(max_size=30),
        "layout.dp_replicate": st.integers(1, 8),
        "layout.microbatches": st.integers(1, 8),
        "gradients.accumulation": st.integers(1, 8),
        "gradients.bucket_mb": st.floats(0.1, 1000),
        "gradients.compression.method": st.sampled_from(["none", "topk", "powersgd"]),
        "sparsity.target": st.floats(0, 0.99),
        "quantization.training": st.sampled_from(["fp32", "fp64", "bf16"]),
        "optimizer.lr": st.floats(1e-9, 1000),
        "optimizer.clip_norm": st.none() | st.floats(1e-6, 10),
        "optimizer.state_bits": st.sampled_from([32, 8]),
        "training.steps": st.integers(1, 10_000_000),
        "training.evaluate_every": st.none() | st.integers(1, 100),
        "training.seed": st.integers(0, 2**31 - 1),
        "launch.device": st.sampled_from(["auto", "cpu", "cuda"]),
        "launch.isolated": st.booleans(),
        "launch.network": st.none()
        | st.fixed_dictionaries(
            {"rate_mbit": st.floats(1, 1e6), "delay_ms": st.floats(0, 100), "hosts": st.integers(1, 4)}
        ),
        "launch.slowdown": st.dictionaries(st.integers(0, 7).map(str), st.floats(1, 100), max_size=3),
        "workload.width": st.none() | st.integers(8, 64),
    },
)


@settings(max_examples=25, deadline=None)
@given(changes)
def test_any_legal_experiment_survives_the_form(values: dict[str, Any]) -> None:
    experiment = recipe("vision-ddp").set(values)
    assert ExperimentForm(experiment).value == experiment


@settings(max_examples=15, deadline=None)
@given(changes)
def test_entering_values_one_by_one_gives_the_same_experiment(values: dict[str, Any]) -> None:
    form = ExperimentForm(recipe("vision-ddp"))
    for field, value in values.items():
        form.set(field, value)
        if field == "launch.network" and value is not None:
            for name, part in value.items():
                form.set(f"launch.network.{name}", part)
    assert form.value == recipe("vision-ddp").set(values)


@pytest.fixture
def form() -> ExperimentForm:
    return ExperimentForm(recipe("vision-ddp"))


def test_every_field_of_the_experiment_can_be_reached(form: ExperimentForm) -> None:
    def leaves(data: dict[str, Any], prefix: str = "") -> set[str]:
        found = set()
        for key, value in data.items():
            found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
        return found

    assert leaves(recipe("vision-ddp").to_dict()) - set(form.entries) == {"schema_version"}


def test_every_entry_says_what_it_is(form: ExperimentForm) -> None:
    for field, entry in form.entries.items():
        assert entry.widget.description.strip(), field
        assert f"[{field}]" in entry.widget.tooltip
        assert len(entry.widget.tooltip) > len(field) + 12, field


def test_ranges_stand_in_the_tooltip(form: ExperimentForm) -> None:
    assert "at least 1, at most 4096" in form.entries["gradients.accumulation"].widget.tooltip


def test_what_this_machine_cannot_offer_is_marked_with_the_reason(form: ExperimentForm) -> None:
    widget = form.entries["quantization.training"].widget
    shown = {key: label for label, key in widget.options}
    method = registry("quantization.training")["fp16"]
    if Machine.here().gpus:
        assert shown["fp16"] == "fp16"
        return
    assert shown["fp16"] == "fp16 (unavailable here)"
    assert method.missing(Machine.here()) in widget.tooltip
    form.set("quantization.training", "fp16")
    assert [problem.field for problem in form.problems] == ["quantization.training"]
    form.apply_hint(form.problems[0])
    assert form.problems == []


@pytest.mark.parametrize(
    ("field", "value", "words", "fixed"),
    [
        ("training.steps", "0", "at least 1", 1),
        ("training.steps", "many", "whole number", None),
        ("optimizer.clip_norm", "nan", "finite", None),
        ("layout.dp_replicate", 0, "at least 1", None),
        ("training.global_batch", 1, "at least 2 samples", 2),
        ("optimizer.lr", -1.0, "greater than 0", None),
        ("launch.device", "cuda", "no GPU", "cpu"),
    ],
)
def test_what_is_wrong_is_said_and_mended(form: ExperimentForm, field: str, value: Any, words: str, fixed: Any) -> None:
    if field == "launch.device" and not Experiment().replace("launch.device=cuda").problems():
        pytest.skip("this machine has a GPU")
    calls: list[int] = []
    form.on_change(lambda: calls.append(len(form.problems)))
    form.set(field, value)
    assert calls
    problem = form.problems[0]
    assert problem.field == field
    assert words in problem.reason
    if fixed is not None:
        form.apply_hint(problem)
        assert form.problems == []
        assert form.value.get(field) == fixed


def test_an_illegal_entry_makes_no_experiment(form: ExperimentForm) -> None:
    form.set("training.steps", "abc")
    with pytest.raises(ExperimentError, match=r"training\.steps: must be a whole number"):
        _ = form.value


def test_steps_and_epochs_exclude_each_other(form: ExperimentForm) -> None:
    form.set("training.epochs", 2.5)
    assert (form.value.training.steps, form.value.training.epochs) == (None, 2.5)
    form.set("training.steps", 7)
    assert (form.value.training.steps, form.value.training.epochs) == (7, None)


METHODS = [
    (registry.field, method.key)
    for _, registry in registries()
    for method in registry
    if registry.field.startswith("gradients.")
]


@pytest.mark.parametrize(("field", "key"), METHODS)
def test_every_way_to_combine_gradients_shows_its_options(form: ExperimentForm, field: str, key: str) -> None:
    form.set("layout.dp_replicate", 4)
    form.set(field, key)
    section = field.rpartition(".")[0]
    methods = next(registry for _, registry in registries() if registry.field == field)
    fields = methods.options(key).model_fields
    assert {name.rpartition(".")[2] for name in form.entries if name.startswith(f"{section}.")} == {"method", *fields}
    for name, info in fields.items():
        entry = form.entries[f"{section}.{name}"]
        assert entry.read() == info.get_default(call_default_factory=True)
        assert info.description in entry.widget.tooltip
    assert form.value.get(field) == key
    known = (form.problems, form.value.problems())
    assert known[0] == known[1], "what the rules say is what the form shows"
    for problem in form.problems:
        assert problem.reason


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        (
            {"layout.dp_replicate": 1, "gradients.update.method": "local_sgd"},
            "gradients.update.method",
            "more than one rank",
        ),
        (
            {
                "layout.dp_replicate": 2,
                "gradients.update.method": "gossip",
                "gradients.compression.method": "int8",
            },
            "gradients.compression.method",
            "no gradients",
        ),
        (
            {
                "layout.dp_replicate": 2,
                "gradients.update.method": "streaming_diloco",
                "gradients.update.every": 3,
                "gradients.update.fragments": 4,
            },
            "gradients.update.fragments",
            "cannot take turns",
        ),
    ],
)
def test_what_does_not_go_together_is_said_and_mended(
    form: ExperimentForm, changes: dict[str, Any], field: str, words: str
) -> None:
    for name, value in changes.items():
        form.set(name, value)
    problem = next(problem for problem in form.problems if problem.field == field)
    assert words in problem.reason
    assert problem.nearest is not None
    form.apply_hint(problem)
    assert problem.reason not in [other.reason for other in form.problems]


def test_an_option_that_may_be_empty_takes_a_number_and_nothing(form: ExperimentForm) -> None:
    form.set("layout.dp_replicate", 2)
    form.set("gradients.compression.method", "powersgd")
    start = form.entries["gradients.compression.start_step"]
    for text, value in (("7", 7), ("", None)):
        start.widget.value = text
        assert form.value.get("gradients.compression.start_step") == value
    start.widget.value = "soon"
    assert [problem.field for problem in form.problems] == ["gradients.compression.start_step"]


def test_slowed_ranks_are_written_as_a_table(form: ExperimentForm) -> None:
    form.set("layout.dp_replicate", 4)
    entry = form.entries["launch.slowdown"]
    assert entry.widget.value == "{}"
    entry.widget.value = '{"3": 4}'
    assert form.value.launch.slowdown == {3: 4.0}
    assert form.problems == []
    assert ExperimentForm(form.value).value == form.value
    for text, words in (('{"3": 0.5}', "1 to 1000 times slower"), ("{3: 4}", "cannot read"), ('{"7": 2}', "7")):
        entry.widget.value = text
        assert words in form.problems[0].reason
        assert form.problems[0].field.startswith("launch.slowdown")


def test_options_change_with_the_workload(form: ExperimentForm) -> None:
    assert "workload.image_size" in form.entries
    form.set("workload.name", "language")
    assert "workload.context" in form.entries
    assert "workload.image_size" not in form.entries
    assert form.value.workload.name == "language"
    assert form.problems == []


def test_a_whole_section_as_a_knob_comes_with_the_method() -> None:
    """Not only with the method's options, its own row left among the advanced ones."""
    form = ExperimentForm(Experiment(), ["gradients.compression", "training.steps"])
    first, *rest = form.widget.children
    assert form.entries["gradients.compression.method"].widget in (first, *getattr(first, "children", ()))
    assert form.entries["training.steps"].widget not in (first, *getattr(first, "children", ()))
    assert rest


def test_a_section_that_may_be_absent_has_a_switch(form: ExperimentForm) -> None:
    assert "launch.network.rate_mbit" not in form.entries
    form.set("launch.network", {})
    form.set("launch.network.rate_mbit", 50.0)
    assert form.value.launch.network is not None
    assert form.value.launch.network.rate_mbit == 50.0
    form.set("launch.network", None)
    assert form.value.launch.network is None


def test_what_this_machine_cannot_do_is_grey_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_link, "possible", lambda: slow_link.Links("containers forbid it", "no", "no"))
    switch = ExperimentForm(recipe("vision-ddp")).entries["launch.network"].widget
    assert switch.disabled
    assert "containers forbid it" in switch.tooltip
    monkeypatch.setattr(slow_link, "possible", lambda: slow_link.Links(delay="no netem"))
    form = ExperimentForm(recipe("vision-ddp").replace("launch.network.rate_mbit=10"))
    grey = {name: form.entries[f"launch.network.{name}"].widget.disabled for name in ("rate_mbit", "delay_ms", "hosts")}
    assert grey == {"rate_mbit": False, "delay_ms": True, "hosts": False}
    assert "no netem" in form.entries["launch.network.delay_ms"].widget.tooltip
    assert not form.entries["launch.network"].widget.disabled


def test_slowed_ranks_are_typed_as_json() -> None:
    form = ExperimentForm(recipe("vision-ddp"))
    form.set("launch.slowdown", {"1": 4})
    assert form.value.launch.slowdown == {1: 4.0}
    assert form.problems == []
    form.entries["launch.slowdown"].widget.value = '{"7": 4}'
    assert [problem.field for problem in form.problems] == ["launch.slowdown"]


def test_knobs_come_first_and_in_the_order_of_the_lesson() -> None:
    form = ExperimentForm(recipe("vision-ddp"), knobs=["training.global_batch", "layout.dp_replicate"])
    *first, button, advanced = form.widget.children
    assert [row.description for row in first] == ["Global batch", "Data-parallel ranks"]
    assert advanced.layout.display == "none"
    button.click()
    assert advanced.layout.display == ""
    assert button.tooltip == "Hide Advanced"


def test_an_unknown_knob_is_refused() -> None:
    with pytest.raises(ExperimentError, match="no field"):
        ExperimentForm(recipe("vision-ddp"), knobs=["layout.wings"])


def test_setting_the_value_shows_another_experiment(form: ExperimentForm) -> None:
    other = recipe("language-ddp").replace("training.epochs=1.5", "optimizer.clip_norm=null")
    form.value = other
    assert form.value == other
