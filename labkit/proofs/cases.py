"""The cases of the parity matrix: workload × layout × schedule × options.

They are generated, not chosen by hand: every product of axis sizes up to a number of ranks, and every pair of settings
that the rules allow (`covering.py`). Values come from the schema and the registries, so that a new axis, schedule or
option is included automatically. A pair that no legal case contains is a case too: it must be refused with a reason.

The models are tiny, which does not change what is computed on which rank.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, product
from math import prod
from typing import Any, Literal, get_args, get_origin

from labkit.experiment import Experiment, Problem
from labkit.experiment.layout import AXES, Layout
from labkit.experiment.registry import registry
from labkit.experiment.schedules import SCHEDULES
from labkit.proofs.covering import CoveringArray, Row, greedy_cover
from labkit.proofs.parity import TOLERANCE, parity_config

STEPS = 10
DEADLINE_S = 300.0
"""Maximum duration of a case (s), which takes seconds on an idle machine."""
SILENCE_S = 60.0
"""Time without progress after which a case ends (s)."""

# 24 samples are divisible by 2, 3, 4, 6 and 8 ranks or micro-batches; 5 and 7 ranks get uneven shares.
COMMON = {
    "training.global_batch": 24,
    "optimizer.lr": 3e-3,
    "launch.max_duration_s": DEADLINE_S,
    "launch.timeout_s": SILENCE_S,
    "launch.grace_s": 2.0,
}
TEXT = {"name": "language", "context": 48, "max_characters": 20_000}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Family:
    """A network that is tried in all layouts."""

    workload: dict[str, Any]
    ranks: int = 4
    """Maximum world size of its layouts."""
    expert_ranks: int = 0
    """Maximum world size of layouts with ep > 1; without ep the same network without experts covers them."""
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Options of the workload and the values to try, as far as this version has them."""


FAMILIES: dict[str, Family] = {
    "gpt": Family(
        TEXT | {"width": 32, "depth": 6, "heads": 8}, 8, options={"tied": [False, True], "mlp_growth": [1.0, 3.0]}
    ),
    "gpt with experts": Family(
        TEXT | {"width": 16, "depth": 2, "heads": 4, "experts": 8},
        4,
        8,
        {"capacity": [0.0, 1.25], "balance_loss": [0.0, 0.01], "experts_per_token": [2, 1]},
    ),
    "llama": Family(TEXT | {"model": "transformers", "transformers_config": LLAMA}),
    "resnet": Family({"name": "vision", "depth": 2, "width": 8, "image_size": 16}),
    "vit": Family({"name": "vision", "model": "vit", "width": 32, "image_size": 16, "patch": 4}),
    "driver": Family({"name": "driving", "width": 32, "depth": 6, "episodes": 1}),
}

# Values of settings for which the schema lists none, or which are not part of the layout.
VALUES: dict[str, Sequence[Any]] = {
    "layout.microbatches": [1, 2, 3, 4, 8],
    "layout.stages_per_rank": [1, 2, 3],
    "layout.stage_blocks": [None, (3, 5), (1, 3, 3, 1)],
    "gradients.accumulation": [1, 2],
    "gradients.bucket_mb": [25.0, 0.01],
    "gradients.overlap": [True, False],
    "training.shares": ["equal", "speed"],
    "optimizer.name": ["adamw", "sgd"],
    "optimizer.clip_norm": [None, 0.5],
    "launch.transport": ["auto", "shared_memory", "network"],
}
PRODUCT = "layout"
"""The factor whose values are products of axis sizes."""
STRUCTURE = (PRODUCT, "layout.schedule", "layout.stages_per_rank", "layout.microbatches")
"""These settings define a pipeline together; the rules are applied once all of them are chosen."""
PRECISION = "quantization.training"
OF_ASYNCHRONOUS_SCHEDULES = ("weight_stashing", "weight_prediction")
"""Settings of the layout for schedules that use stale gradients, which are not equal to one process."""
# Without this axis the option has no effect, and a case with it would duplicate another.
REQUIRED_AXIS = {"zero_stage": "dp_shard", "sequence_parallel": "tp"} | dict.fromkeys(
    ("schedule", "stages_per_rank", "microbatches", "balance", "stage_blocks"), "pp"
)


@dataclass(frozen=True)
class Case:
    """One experiment of the matrix; `problems` are the reasons if it is refused."""

    family: str
    experiment: Experiment
    settings: Row
    problems: tuple[Problem, ...] = ()

    @property
    def product(self) -> str:
        """The product of axes in its short form."""
        return str(self.settings[PRODUCT])

    @property
    def precision(self) -> str:
        """The precision of the training."""
        return str(self.settings[PRECISION])

    @property
    def options(self) -> str:
        """The settings besides the product of axes and the precision that are not the default, as for --set."""
        assignments = []
        for name, value in self.settings.items():
            if name not in (PRODUCT, PRECISION) and value != _default(self.family, name):
                assignments.append(f"{name.rpartition('.')[2]}={value}")
        return ", ".join(assignments)

    def __str__(self) -> str:
        return " ".join(part for part in (self.family, self.product, self.options, self.precision) if part)


def products(ranks: int, expert_ranks: int | None = None) -> list[str]:
    """Return every layout of up to `ranks` ranks in its short form: all ordered factorizations.

    Layouts with ep > 1 may have up to `expert_ranks` ranks instead.
    """

    def factorizations(axes: Sequence[str], limit: int) -> Iterator[dict[str, int]]:
        if not axes:
            yield {}
            return
        for size in range(1, limit + 1):
            for rest in factorizations(axes[1:], limit // size):
                yield {axes[0]: size} | rest

    expert_ranks = ranks if expert_ranks is None else expert_ranks
    all_sizes = sorted(factorizations(AXES, max(ranks, expert_ranks)), key=lambda sizes: prod(sizes.values()))
    return [
        str(Layout(**sizes))
        for sizes in all_sizes
        if prod(sizes.values()) <= (expert_ranks if sizes["ep"] > 1 else ranks)
    ]


def factors(family: str, ranks: int, precisions: Sequence[str]) -> dict[str, Sequence[Any]]:
    """Return every setting that is varied for a family, by name, with its values; the default comes first."""
    varied: dict[str, Sequence[Any]] = {PRODUCT: _products(family, ranks), **{name: [] for name in STRUCTURE[1:]}}
    for name, info in Layout.model_fields.items():
        key = f"layout.{name}"
        if name in AXES or name in OF_ASYNCHRONOUS_SCHEDULES:
            continue
        if key == "layout.schedule":
            values: Sequence[Any] = [name for name, schedule in SCHEDULES.items() if not schedule.asynchronous]
        elif info.annotation is bool:
            values = [False, True]
        elif get_origin(info.annotation) is Literal:
            values = get_args(info.annotation)
        else:
            values = VALUES[key]  # a KeyError here means that VALUES lacks a new field
        varied[key] = [info.default, *(value for value in values if value != info.default)]
    defaults = Experiment().to_dict()
    for key, values in VALUES.items():
        section, _, name = key.partition(".")
        if section != "layout" and name in defaults[section]:
            varied[key] = values
    for name, values in FAMILIES[family].options.items():
        if name in _workload_options(family):
            varied[f"workload.{name}"] = values
    return varied | {PRECISION: precisions}


def _products(family: str, ranks: int) -> list[str]:
    """Return the layouts of a family, of up to `ranks` ranks."""
    limits = FAMILIES[family]
    return products(min(ranks, limits.ranks), min(ranks, max(limits.ranks, limits.expert_ranks)))


def _workload_options(family: str) -> dict[str, Any]:
    """Return the options of the family's workload and their defaults."""
    fields = registry("workload").options(FAMILIES[family].workload["name"]).model_fields
    return {name: info.default for name, info in fields.items()}


@cache
def _default(family: str, name: str) -> Any:
    """Return the value that a family uses for a setting unless it is varied."""
    section, _, option = name.partition(".")
    if section == "workload":
        return FAMILIES[family].workload.get(option, _workload_options(family)[option])
    return Experiment().get(name)


def violations(experiment: Experiment, row: Row) -> tuple[Problem, ...]:
    """Return why the experiment of a row is refused; if it is not, which settings of the row have no effect."""
    problems = tuple(experiment.problems())
    if problems:
        return problems
    return tuple(warning for warning in experiment.warnings() if is_noop(warning) and warning.field in row)


def is_noop(problem: Problem) -> bool:
    """Return whether a problem only states that a setting has no effect, rather than that it is invalid."""
    return "no effect" in problem.reason


class CaseRules:
    """Applies the rules to rows of one family, and caches the answers because the same row is checked often."""

    def __init__(self, family: str, changes: Mapping[str, Any]) -> None:
        self.family = family
        base = Experiment().set({"workload": FAMILIES[family].workload} | COMMON)
        self.base = parity_config(base, STEPS, "fp64").set({"training.checkpoint_every": 0} | dict(changes))
        self._problems: dict[str, tuple[Problem, ...]] = {}
        self._sections: dict[str, Any] = {}

    def experiment(self, row: Row) -> Experiment:
        """Return the experiment of a row.

        Rows have few different sections, so each is checked once, and experiments are put together from them.
        """
        fields: dict[str, dict[str, Any]] = {"layout": {PRODUCT: row[PRODUCT]}}
        for name, value in row.items():
            fields.setdefault(name.partition(".")[0], {})[name] = value
        return self.base.model_copy(update={name: self._section(name, chosen) for name, chosen in fields.items()})

    def _section(self, name: str, fields: Mapping[str, Any]) -> Any:
        key = repr(fields)
        if key not in self._sections:
            changes = dict(fields)
            if name == "layout":
                layout = Layout.parse(changes.pop(PRODUCT)).model_dump()
                changes = {"layout": layout | {field.partition(".")[2]: value for field, value in changes.items()}}
            self._sections[key] = getattr(self.base.set(changes), name)
        return self._sections[key]

    def allowed(self, row: Row) -> bool:
        """Return whether a row may be a case; a partial row is allowed unless its settings already exclude that."""
        if PRODUCT not in row or self.has_noop(row):
            return PRODUCT not in row
        return not all(name in row for name in STRUCTURE) or not self.problems(row)

    def problems(self, row: Row) -> tuple[Problem, ...]:
        """Return the violations of a row."""
        key = repr(row)
        if key not in self._problems:
            self._problems[key] = violations(self.experiment(row), row)
        return self._problems[key]

    def has_noop(self, row: Row) -> bool:
        """Return whether a setting of the row has no effect with its layout."""
        layout = Layout.parse(row[PRODUCT])
        for option, axis in REQUIRED_AXIS.items():
            name = f"layout.{option}"
            if getattr(layout, axis) == 1 and name in row and row[name] != _default(self.family, name):
                return True
        return False


def cases(
    families: Iterable[str] = tuple(FAMILIES),
    ranks: int = 8,
    precisions: Sequence[str] = tuple(TOLERANCE),
    changes: Mapping[str, Any] | None = None,
) -> list[Case]:
    """Return all cases, by family: first those that must be equal to one process, then those that must be refused.

    `changes` are applied to every experiment, e.g. {"launch.device": "cuda"}.
    """
    generated = []
    for family in families:
        rules = CaseRules(family, changes or {})
        varied = factors(family, ranks, precisions)
        covering = CoveringArray(varied, rules.allowed)
        generated += [Case(family, rules.experiment(row), row) for row in covering.rows]
        refused = (_refused_case(rules, varied, partial_row) for partial_row in covering.infeasible)
        generated += [case for case in refused if case is not None]
    return generated


def _refused_case(rules: CaseRules, varied: Mapping[str, Sequence[Any]], partial_row: Row) -> Case | None:
    """Return the case with the fewest problems that contains `partial_row`; None if a setting of it has no effect."""
    best: Case | None = None
    rest = {name: values[0] for name, values in varied.items() if name not in STRUCTURE} | partial_row
    choices = [[partial_row[name]] if name in partial_row else varied[name] for name in STRUCTURE]
    if PRODUCT not in partial_row:
        choices[0] = [layout for layout in choices[0] if Layout.parse(layout).world_size <= 4]
    for structure in product(*choices):
        row = dict(zip(STRUCTURE, structure, strict=True)) | {n: v for n, v in rest.items() if n not in STRUCTURE}
        if rules.has_noop(row):
            continue
        problems = tuple(each for each in rules.problems(row) if not is_noop(each))
        if not problems:
            return None
        if best is None or len(problems) < len(best.problems):
            best = Case(rules.family, rules.experiment(row), row, problems)
            if len(problems) == 1:
                break
    return best


def sample(candidates: Sequence[Case], seed: int = 0, ranks: int = 4) -> list[Case]:
    """Return a sample of the cases with up to `ranks` ranks.

    It has, for each family, every pair of axes and every option of its workload; and every setting of the layout and of
    the training in at least one family, because all families share the code behind it.
    """
    small = [case for case in candidates if case.experiment.layout.world_size <= ranks]
    random.Random(seed).shuffle(small)
    chosen = []
    for legal in (True, False):
        chosen += greedy_cover((case, _covered_elements(case)) for case in small if legal is not bool(case.problems))
    return chosen


def _covered_elements(case: Case) -> set[Any]:
    """Return what a case contributes to a sample."""
    if case.problems:
        return {(case.family, problem.field) for problem in case.problems}
    axes = [axis for axis in AXES if getattr(case.experiment.layout, axis) > 1]
    pairs = {(case.family, *subset) for size in (1, 2) for subset in combinations(axes, size)}
    family_settings = {name for name in case.settings if name.startswith("workload.")} | {PRECISION}
    return pairs | {
        (case.family if name in family_settings else "", name, repr(value))
        for name, value in case.settings.items()
        if name != PRODUCT
    }
