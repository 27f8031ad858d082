"""The experiment as data: JSON in, the same JSON out, changed copies, reasons in words."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from annotated_types import Le, Lt
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from labkit.experiment import Experiment, ExperimentError, Layout, Machine
from labkit.experiment.assignment import parse_assignment
from labkit.experiment.choice import Choice
from labkit.experiment.fields import fields
from labkit.experiment.layout import AXES
from labkit.experiment.machine import Gpu
from labkit.experiment.recipes import RECIPES, recipe
from labkit.experiment.registry import registries, registry
from labkit.experiment.sections import Training

reals = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def bounded(low: float, high: float, **more: Any) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, **more)


workloads = st.one_of(
    st.fixed_dictionaries(
        {
            "name": st.just("vision"),
            "width": st.none() | st.integers(4, 2048),
            "model": st.sampled_from(["resnet", "vit"]),
        }
    ),
    st.fixed_dictionaries({"name": st.just("custom"), "path": text}),
    st.just({"name": "language"}),
    st.just({"name": "driving"}),
)
lengths = st.one_of(
    st.fixed_dictionaries({"steps": st.integers(1, 10_000_000), "epochs": st.none()}),
    st.fixed_dictionaries({"steps": st.none(), "epochs": bounded(0, 1e5, exclude_min=True)}),
)
trainings = st.builds(
    dict,
    lengths,
    global_batch=st.integers(1, 10_000_000),
    evaluate_every=st.none() | st.integers(0, 10_000_000),
    seed=st.integers(0, 2**31 - 1),
    gradient_norm=st.booleans(),
)
experiments = st.fixed_dictionaries(
    {
        "name": text,
        "workload": workloads,
        "layout": st.fixed_dictionaries({axis: st.integers(1, 8) for axis in AXES} | {"zero_stage": st.integers(1, 3)}),
        "gradients": st.fixed_dictionaries(
            {"compression": st.sampled_from(registry("gradients.compression").names()).map(lambda key: {"method": key})}
        ),
        "optimizer": st.fixed_dictionaries(
            {"lr": bounded(0, 1e3, exclude_min=True), "clip_norm": st.none() | bounded(0, 1e9, exclude_min=True)}
        ),
        "quantization": st.fixed_dictionaries({"training": st.sampled_from(registry("quantization.training").names())}),
        "training": trainings,
        "launch": st.fixed_dictionaries(
            {"network": st.none() | st.fixed_dictionaries({"rate_mbit": bounded(0, 1e6, exclude_min=True)})}
        ),
    }
)


@settings(deadline=None)
@given(experiments)
def test_any_legal_experiment_survives_json(data: dict[str, Any]) -> None:
    experiment = Experiment.from_dict(data)
    again = Experiment.from_json(experiment.to_json())
    assert again == experiment
    assert again.to_json() == experiment.to_json()
    assert json.loads(experiment.to_json())["schema_version"] == 1
    assert again.workload.options == experiment.workload.options
    assert Experiment.from_dict(json.loads(json.dumps(experiment.to_dict(), allow_nan=False))) == experiment


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_legal_and_say_what_they_are(name: str) -> None:
    experiment = recipe(name)
    assert Experiment.from_json(experiment.to_json()) == experiment
    assert not experiment.problems(), experiment.problems()
    assert (RECIPES[name].__doc__ or "").strip().endswith(".")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train_in_bf16_on_gpus_that_compute_in_it(name: str) -> None:
    experiment = recipe(name)

    def chosen(experiment: Experiment, capability: tuple[int, int] | None) -> str:
        gpus = (Gpu(0, "GPU-0", "a GPU", 1, 0, capability),) if capability else ()
        return experiment.resolve(Machine(2, 2, 2**33, gpus)).quantization.training

    assert [chosen(experiment, capability) for capability in (None, (7, 5), (8, 0), (9, 0))] == [
        *("fp32", "fp32", "bf16", "bf16")
    ]
    assert chosen(experiment.replace("launch.device=cpu"), (9, 0)) == "fp32"
    assert chosen(experiment.replace("quantization.qat=int8"), (9, 0)) == "fp32"
    assert chosen(experiment.replace("quantization.training=tf32"), (9, 0)) == "tf32"
    assert chosen(Experiment(), (9, 0)) == "fp32"


@settings(deadline=None, max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | reals | text,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*Experiment.model_fields, "steps", "method", "name", "x"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_whatever_is_read_gives_an_experiment_or_reasons(data: Any) -> None:
    problems = []
    try:
        assert Experiment.from_dict(data).to_json()
    except ExperimentError as error:
        problems = [str(problem) for problem in error.problems] or ["no reason at all"]
    for problem in problems:
        assert problem.endswith(".")
        assert "\n" not in problem
        assert len(problem) < 1000


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "field", ["optimizer.lr", "gradients.bucket_mb", "launch.grace_s", "training.epochs", "sparsity.target"]
)
def test_no_field_takes_what_is_no_number(field: str, value: float) -> None:
    with pytest.raises(ExperimentError, match=field):
        Experiment().set({field: value})


def test_an_experiment_is_frozen_and_copies_leave_it_alone() -> None:
    experiment = recipe("vision-ddp")
    before = experiment.to_json()
    with pytest.raises(ValidationError):
        experiment.training.steps = 3  # type: ignore[misc]
    changed = experiment.replace("layout.dp_replicate=4", "training.steps=7", name="new")
    assert (changed.layout.dp_replicate, changed.training.steps, changed.name) == (4, 7, "new")
    assert experiment.to_json() == before
    assert changed.workload == experiment.workload


def test_steps_and_epochs_exclude_each_other() -> None:
    experiment = Experiment().replace("training.epochs=2")
    assert (experiment.training.steps, experiment.training.epochs) == (None, 2)
    experiment = experiment.replace("training.steps=9")
    assert (experiment.training.steps, experiment.training.epochs) == (9, None)
    for wrong in ({}, {"steps": 1, "epochs": 1}):
        with pytest.raises(ValidationError):
            Training(**wrong)


def test_another_method_drops_the_options_of_the_old_one() -> None:
    experiment = Experiment().replace("workload.width=8")
    assert experiment.workload.options["width"] == 8
    other = experiment.replace("workload.name=language")
    assert "image_size" not in other.workload.options
    assert experiment.replace("workload.name=vision").workload.options["width"] == 8, "the same method keeps them"


def test_a_layout_is_read_from_its_short_form() -> None:
    assert Experiment().replace("layout=dp2·tp2").layout == Layout(dp_replicate=2, tp=2)
    assert Experiment().replace("layout=dp2", "layout.tp=2").layout == Layout(dp_replicate=2, tp=2)
    assert Experiment.from_dict({"layout": "dp3"}).layout == Layout(dp_replicate=3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=2", 2),
        ("a.b=2.5", 2.5),
        ("a.b=null", None),
        ("a.b=true", True),
        ("a.b=word", "word"),
        ('a.b="2"', "2"),
        ("a.b=x=y", "x=y"),
        ("a.b=", ""),
        ("a.b=[1]", [1]),
    ],
)
def test_an_assignment_is_json_or_a_word(text: str, value: Any) -> None:
    assert parse_assignment(text) == ("a.b", value)


def test_problems_name_the_field_and_the_nearest_value() -> None:
    with pytest.raises(ExperimentError) as refused:
        Experiment.from_dict({"training": {"stepz": 3}, "optimizer": {"lr": -1}, "workload": {"name": "vison"}})
    by_field = {problem.field: problem for problem in refused.value.problems}
    assert by_field["training.stepz"].nearest == "steps"
    assert by_field["workload.name"].nearest == "vision"
    assert "greater than 0" in by_field["optimizer.lr"].reason


# -- everything is described ------------------------------------------------------------------------------------------


def sections(model: type[BaseModel] = Experiment) -> set[type[BaseModel]]:
    found = {model}
    for info in model.model_fields.values():
        for kind in (info.annotation, *get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= sections(kind)
    return found


@pytest.mark.parametrize(
    "model", sorted(sections(), key=lambda model: model.__name__), ids=lambda model: model.__name__
)
def test_every_field_has_a_description_and_every_section_forbids_what_it_does_not_know(model: type[BaseModel]) -> None:
    assert (model.__doc__ or "").strip()
    for name, info in model.model_fields.items():
        is_section = any(
            isinstance(kind, type) and issubclass(kind, BaseModel)
            for kind in (info.annotation, *get_args(info.annotation))
        )
        description = (info.description or "").strip()
        assert description or (is_section and name != "network"), f"{model.__name__}.{name} has no description"
        assert "\n" not in description
    assert model.model_config.get("extra") == "forbid" or issubclass(model, Choice)
    assert model.model_config.get("frozen")


def test_every_field_can_be_listed_and_read() -> None:
    described = fields()
    assert len(described) > 50
    for field in described:
        assert field.description.strip(), field.name
        assert field.kind, field.name
        json.dumps(field.to_dict())
    assert "workload.heads" in {field.name for field in described}, "options of the methods too"


@pytest.mark.parametrize(("knob", "key"), [(knob, method.key) for knob, room in registries() for method in room])
def test_every_line_of_a_registry_loads(knob: str, key: str) -> None:
    method = registry(knob)[key]
    assert method.summary
    assert not method.summary.endswith(".")
    loaded = method.load()
    assert (loaded.__doc__ or "").strip(), f"{loaded} says nothing about itself"
    options = registry(knob).options(key)
    for name, info in options.model_fields.items():
        assert (info.description or "").strip(), f"{knob} {key}: {name} has no description"
    for bad in (math.nan, math.inf):
        for name, info in options.model_fields.items():
            if info.annotation is float:
                with pytest.raises(ValidationError):
                    options(**{name: bad})
    with pytest.raises(ValidationError):
        options(**{"no such option": 1})


def test_a_registry_knows_its_names() -> None:
    for knob, room in registries():
        names = room.names()
        assert len(names) == len(set(names)), knob
        # Without pipeline stages there is no schedule to choose.
        assert room.names() or knob == "layout.schedule", f"{knob} has nothing to choose"
    with pytest.raises(KeyError, match="did you mean vision"):
        registry("workload")["visoin"]


def test_what_is_given_to_a_change_stays_as_it_is() -> None:
    given = {"method": "static", "target": 0.8}
    changed = Experiment().set({"sparsity": given, "sparsity.target": 0.5})
    assert changed.sparsity.target == 0.5
    assert given == {"method": "static", "target": 0.8}


def whole_numbers(model: type[BaseModel], place: str) -> Iterator[tuple[str, FieldInfo]]:
    """Every field of a model, and of the sections in it, that takes a whole number."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from whole_numbers(kind, f"{place}{name}.")
        elif kind in (int, int | None):
            yield f"{place}{name}", field


def test_every_whole_number_has_an_upper_bound() -> None:
    """Without one, an experiment could be legal and yet its file unreadable: numbers of 31 digits are not read."""
    numbers = dict(whole_numbers(Experiment, ""))
    for knob, methods in registries():
        for method in methods:
            numbers |= dict(whole_numbers(methods.options(method.key), f"{knob} {method.key}: "))
    assert len(numbers) > 60
    bounded = {name for name, field in numbers.items() if any(isinstance(bound, Le | Lt) for bound in field.metadata)}
    assert set(numbers) - bounded == {"schema_version"}  # it has one value


@pytest.mark.parametrize(
    ("field", "value"),
    [("training.evaluate_every", 10**30), ("layout.stage_blocks", [10**30, 1]), ("launch.slowdown", {10**30: 2.0})],
)
def test_a_number_too_large_for_its_file_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ExperimentError, match=field.replace(".", r"\.")):
        Experiment().set({field: value})


def test_the_momentum_of_adamw_is_called_beta1_now() -> None:
    old = {"optimizer": {"name": "adamw", "momentum": 0.8, "lr": 0.1}}
    with pytest.warns(FutureWarning, match=r"set optimizer\.beta1"):
        read = Experiment.from_dict(old)
    assert (read.optimizer.beta1, read.optimizer.momentum) == (0.8, 0.9)
    with pytest.warns(FutureWarning, match=r"set optimizer\.beta1"):
        assert Experiment().replace("optimizer.momentum=0.8").optimizer.beta1 == 0.8
    with pytest.warns(FutureWarning, match=r"set optimizer\.beta1"):
        assert Experiment().set({"optimizer.momentum": 0.8}).optimizer.beta1 == 0.8


def test_no_other_momentum_is_taken_for_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sgd = Experiment().set({"optimizer.momentum": 0.8, "optimizer.name": "sgd"})
        assert (sgd.optimizer.momentum, sgd.optimizer.beta1) == (0.8, 0.9)
        back = sgd.set({"optimizer.name": "adamw"})
        assert Experiment.from_json(back.to_json()).optimizer.beta1 == 0.9
        Experiment.from_dict({"optimizer": {"name": "adamw", "momentum": 0.9}})
    [warning] = [warning for warning in back.warnings() if warning.field == "optimizer.momentum"]
    assert "has no effect with adamw" in warning.reason


@pytest.mark.parametrize("rule", ["gradients.update.method=synchronous", "gradients.update.method=local_sgd"])
def test_another_rule_in_the_place_of_pipedream_leaves_it_with_a_warning(rule: str) -> None:
    pipedream = Experiment().set({"layout": {"pp": 2, "schedule": "pipedream"}})
    with pytest.warns(FutureWarning, match="choosing another rule sets layout.schedule to 1f1b"):
        changed = pipedream.replace(rule)
    assert changed.layout.schedule == "1f1b"
    assert changed.gradients.update.method == rule.rpartition("=")[2]
    assert pipedream.replace("training.steps=5").layout.schedule == "pipedream"
    assert pipedream.replace("layout.schedule=pipedream", rule).layout.schedule == "pipedream"


@pytest.mark.parametrize("change", ["gradients=5", "gradients.update=null", 'gradients={"update": 3}'])
def test_nonsense_in_the_place_of_pipedream_is_one_sentence(change: str) -> None:
    pipedream = Experiment().set({"layout": {"pp": 2, "schedule": "pipedream"}})
    with pytest.raises(ExperimentError, match="gradients"):
        pipedream.replace(change)
