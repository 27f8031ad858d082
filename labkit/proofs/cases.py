"""The cases of the parity matrix: workload × layout × schedule × options.

They are generated, not picked: every product of axis sizes up to a number of ranks, and every pair of two settings
that the rules allow (`covering.py`). Values come from the schema and the registries, so that a new axis, schedule or
option enters by itself. A pair that no legal case holds is a case too: it has to be refused, with the reason.

The models are tiny, which changes nothing in what is computed where.
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
from labkit.proofs.covering import CoveringArray, Row, greedy_cover
from labkit.proofs.parity import TOLERANCE, proof

STEPS = 10
DEADLINE_S = 300.0
"""Longest time of a case, which takes seconds where nobody else works; what stands still ends after SILENCE_S."""
SILENCE_S = 60.0

# 24 samples: divided by 2, 3, 4, 6, 8 ranks or microbatches; 5 and 7 ranks get uneven shares.
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
    """A network of which all layouts are tried."""

    workload: dict[str, Any]
    ranks: int = 4
    """Layouts of up to so many ranks."""
    further: int = 0
    """Up to so many where experts are dealt out: what has no `ep` is the same with experts as without."""
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Options of the workload and the values that are tried, if this version knows them."""


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

# Where the schema gives no list of values, or there is more to vary than the layout.
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
"""These decide together what a pipeline is; the rules are asked once all of them are known."""
PRECISION = "quantization.training"
# Without this axis the option does nothing, and a case with it would be another one twice.
BELONGS_TO = {"zero_stage": "dp_shard", "sequence_parallel": "tp"} | dict.fromkeys(
    ("schedule", "stages_per_rank", "microbatches", "balance", "stage_blocks"), "pp"
)


@dataclass(frozen=True)
class Case:
    """One experiment of the matrix; `problems` says why it is refused, if it is."""

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
        return str(self.settings[PRECISION])

    @property
    def options(self) -> str:
        """What was set beyond the product of axes and the number format, as for --set."""
        said = []
        for name, value in self.settings.items():
            if name not in (PRODUCT, PRECISION) and value != _default(self.family, name):
                said.append(f"{name.rpartition('.')[2]}={value}")
        return ", ".join(said)

    def __str__(self) -> str:
        return " ".join(part for part in (self.family, self.product, self.options, self.precision) if part)


def products(ranks: int, further: int | None = None) -> list[str]:
    """Every layout of up to so many ranks in its short form, `further` with `ep`: all ordered factorizations."""

    def grow(axes: Sequence[str], most: int) -> Iterator[dict[str, int]]:
        if not axes:
            yield {}
            return
        for size in range(1, most + 1):
            for rest in grow(axes[1:], most // size):
                yield {axes[0]: size} | rest

    further = ranks if further is None else further
    sizes = sorted(grow(AXES, max(ranks, further)), key=lambda one: prod(one.values()))
    return [str(Layout(**one)) for one in sizes if prod(one.values()) <= (further if one["ep"] > 1 else ranks)]


def factors(family: str, ranks: int, precisions: Sequence[str]) -> dict[str, Sequence[Any]]:
    """Everything that is varied: the name of the setting and its values, the default first."""
    found: dict[str, Sequence[Any]] = {PRODUCT: _products(family, ranks), **{name: [] for name in STRUCTURE[1:]}}
    for name, about in Layout.model_fields.items():
        key = f"layout.{name}"
        if name in AXES:
            continue
        if key == "layout.schedule":
            values: Sequence[Any] = registry(key).names(available_only=True)
        elif about.annotation is bool:
            values = [False, True]
        elif get_origin(about.annotation) is Literal:
            values = get_args(about.annotation)
        else:
            values = VALUES[key]  # a KeyError here asks for values of a new field
        found[key] = [about.default, *(value for value in values if value != about.default)]
    known = Experiment().to_dict()
    for key, values in VALUES.items():
        section, _, name = key.partition(".")
        if section != "layout" and name in known[section]:
            found[key] = values
    for name, values in FAMILIES[family].options.items():
        if name in _workload_options(family):
            found[f"workload.{name}"] = values
    return found | {PRECISION: precisions}


def _products(family: str, ranks: int) -> list[str]:
    own = FAMILIES[family]
    return products(min(ranks, own.ranks), min(ranks, max(own.ranks, own.further)))


def _workload_options(family: str) -> dict[str, Any]:
    fields = registry("workload").options(FAMILIES[family].workload["name"]).model_fields
    return {name: about.default for name, about in fields.items()}


@cache
def _default(family: str, name: str) -> Any:
    section, _, option = name.partition(".")
    if section == "workload":
        return FAMILIES[family].workload.get(option, _workload_options(family)[option])
    return Experiment().get(name)


def against(experiment: Experiment, row: Row) -> tuple[Problem, ...]:
    """Why the experiment of a row is refused, or which settings of the row do nothing."""
    found = tuple(experiment.problems())
    if found:
        return found
    return tuple(warning for warning in experiment.warnings() if idles(warning) and warning.field in row)


def idles(problem: Problem) -> bool:
    """Does it say that a setting does nothing, rather than that it cannot be?"""
    return "no effect" in problem.reason


class Judge:
    """What the rules say about rows of one family; the same row is asked for often."""

    def __init__(self, family: str, changes: Mapping[str, Any]) -> None:
        self.family = family
        base = Experiment().set({"workload": FAMILIES[family].workload} | COMMON)
        self.base = proof(base, STEPS, "fp64").set({"training.checkpoint_every": 0} | dict(changes))
        self._problems: dict[str, tuple[Problem, ...]] = {}

    def experiment(self, row: Row) -> Experiment:
        layout = Layout.parse(row[PRODUCT]).model_dump()
        layout |= {name.partition(".")[2]: value for name, value in row.items() if name.startswith("layout.")}
        return self.base.set({"layout": layout} | {n: v for n, v in row.items() if not n.startswith("layout")})

    def allowed(self, row: Row) -> bool:
        """May this row be a case? Partial rows are judged as far as they are known."""
        if PRODUCT not in row or self.idle(row):
            return PRODUCT not in row
        return not all(name in row for name in STRUCTURE) or not self.problems(row)

    def problems(self, row: Row) -> tuple[Problem, ...]:
        """Why it is refused."""
        key = repr(row)
        if key not in self._problems:
            self._problems[key] = against(self.experiment(row), row)
        return self._problems[key]

    def idle(self, row: Row) -> bool:
        """Is there a setting that does nothing here?"""
        layout = Layout.parse(row[PRODUCT])
        for option, axis in BELONGS_TO.items():
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
    """All cases: those that must be equal to one process, then those that must be refused.

    `changes` are made to every experiment, e.g. {"launch.device": "cuda"}.
    """
    found = []
    for family in families:
        judge = Judge(family, changes or {})
        varied = factors(family, ranks, precisions)
        covering = CoveringArray(varied, judge.allowed)
        found += [Case(family, judge.experiment(row), row) for row in covering.rows]
        refused = (_refused(judge, varied, part) for part in covering.impossible)
        found += [case for case in refused if case is not None]
    return found


def _refused(judge: Judge, varied: Mapping[str, Sequence[Any]], part: Row) -> Case | None:
    """The case with `part` in it that comes closest to being legal; None if a setting of it does nothing anyway."""
    least: Case | None = None
    rest = {name: values[0] for name, values in varied.items() if name not in STRUCTURE} | part
    choices = [[part[name]] if name in part else varied[name] for name in STRUCTURE]
    if PRODUCT not in part:
        choices[0] = [one for one in choices[0] if Layout.parse(one).world_size <= 4]
    for chosen in product(*choices):
        row = dict(zip(STRUCTURE, chosen, strict=True)) | {n: v for n, v in rest.items() if n not in STRUCTURE}
        if judge.idle(row):
            continue
        problems = tuple(each for each in judge.problems(row) if not idles(each))
        if not problems:
            return None
        if least is None or len(problems) < len(least.problems):
            least = Case(judge.family, judge.experiment(row), row, problems)
            if len(problems) == 1:
                break
    return least


def sample(found: Sequence[Case], seed: int = 0, ranks: int = 4) -> list[Case]:
    """A part of the cases with up to so many ranks.

    For each family every pair of axes and every setting of its own; every setting of the layout and of the training in
    some family: what computes it there computes it everywhere.
    """
    small = [case for case in found if case.experiment.layout.world_size <= ranks]
    random.Random(seed).shuffle(small)
    chosen = []
    for legal in (True, False):
        chosen += greedy_cover((case, _shown(case)) for case in small if legal is not bool(case.problems))
    return chosen


def _shown(case: Case) -> set[Any]:
    """What a case of a sample stands for."""
    if case.problems:
        return {(case.family, problem.field) for problem in case.problems}
    axes = [axis for axis in AXES if getattr(case.experiment.layout, axis) > 1]
    pairs = {(case.family, *some) for count in (1, 2) for some in combinations(axes, count)}
    of_family = {name for name in case.settings if name.startswith("workload.")} | {PRECISION}
    return pairs | {
        (case.family if name in of_family else "", name, repr(value))
        for name, value in case.settings.items()
        if name != PRODUCT
    }
