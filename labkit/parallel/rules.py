"""What an axis of the layout requires of the model and of the batch. Imports no torch: forms and commands read it."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any

from labkit.experiment.layout import Layout
from labkit.experiment.machine import Machine
from labkit.experiment.problem import Problem
from labkit.experiment.schema import Experiment
from labkit.workloads.language import BYTES, is_chain


def _options(experiment: Experiment) -> Any:
    return experiment.workload.load()[1]


def network_kind(experiment: Experiment) -> str:
    """Return the kind of network: gpt, transformers, resnet, vit, driver or custom."""
    kinds = {"driving": "driver", "custom": "custom"}
    name = experiment.workload.name
    return kinds[name] if name in kinds else str(_options(experiment).model)


def num_blocks(experiment: Experiment) -> int | None:
    """Return the length of the chain of blocks; None if only the ranks know it."""
    kind, options = network_kind(experiment), _options(experiment)
    if kind == "resnet":
        return int(3 * options.network_depth + 2)
    if kind == "vit":
        return int(options.network_depth + 2)
    if kind == "transformers" and isinstance(layers := _known_config(options).get("num_hidden_layers"), int):
        return layers + 2
    return int(options.depth + 2) if kind in ("gpt", "driver") else None


def _known_config(options: Any) -> dict[str, Any]:
    """Return the known config of a model of transformers; empty for a pretrained one, which only the ranks read."""
    return dict(options.transformers_config or {})


def unsplittable_model(experiment: Experiment) -> str | None:
    """Name the model if it cannot be split into blocks; None if it can, or if only the ranks know."""
    kind, options = network_kind(experiment), _options(experiment)
    if kind != "transformers" or options.pretrained or is_chain(_known_config(options), options.context):
        return None
    return f"a {_known_config(options).get('model_type')} model of transformers"


NO_SEQUENCE = "this network has no sequence to cut"


def sequence_length(experiment: Experiment) -> int:
    """Return the length of the sequence that the network attends to."""
    options = _options(experiment)
    return int((options.image_size // options.patch) ** 2 if network_kind(experiment) == "vit" else options.context)


def _nearest(size: int, *numbers: int) -> int:
    """Return the largest number up to `size` that divides all `numbers`."""
    divisible = gcd(*numbers)
    return max(divisor for divisor in range(1, size + 1) if divisible % divisor == 0)


class Shard:
    """The axis dp_shard: ZeRO."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        layout = experiment.layout
        if layout.cpu_offload and layout.zero_stage != 3:
            yield Problem(
                "layout.cpu_offload", "only what ZeRO stage 3 shards can be offloaded to the host's memory", "false"
            )


def _cut_by_tp(experiment: Experiment) -> dict[str, int]:
    """Map each thing that tensor parallelism distributes over ranks, in words, to how many of it there are."""
    kind, options = network_kind(experiment), _options(experiment)
    if kind == "transformers":
        names = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
        config = _known_config(options)
        sizes = {"vocab_size": BYTES} | config if config else {}
        return {f"{name} {size}": size for name in names if isinstance(size := sizes.get(name), int)}
    if kind == "resnet":
        width = options.network_width
        return {f"the {gcd(width, 8)} channel groups of a width of {width}": gcd(width, 8)}
    if kind == "driver":
        return {f"a width of {options.width}": options.width}
    vocabulary = {f"a vocabulary of {BYTES}": BYTES} if kind == "gpt" else {}
    return {f"the {options.heads} attention heads": options.heads} | vocabulary


class TensorAxis:
    """The axis tp: layers sharded over ranks."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        kind, tp, field = network_kind(experiment), experiment.layout.tp, "layout.tp"
        model = "your own model" if kind == "custom" else unsplittable_model(experiment)
        if model is not None:
            yield Problem(field, f"labkit has no plan for cutting the layers of {model}", 1)
            return
        sizes = _cut_by_tp(experiment)
        for words, size in sizes.items():
            if size % tp:
                yield Problem(field, f"{tp} ranks do not divide {words}", _nearest(tp, *sizes.values()))
        if not experiment.layout.sequence_parallel:
            return
        if kind not in ("gpt", "vit"):
            why = "labkit does not cut the norms of a model of transformers" if kind == "transformers" else NO_SEQUENCE
            yield Problem("layout.sequence_parallel", why, "false")
            return
        length = sequence_length(experiment)
        if length % tp:
            yield Problem("layout.sequence_parallel", f"{tp} ranks do not divide a sequence of {length}", "false")


class ContextAxis:
    """The axis cp: the sequence sharded over ranks."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        kind, cp, field = network_kind(experiment), experiment.layout.cp, "layout.cp"
        model = "your own model" if kind == "custom" else unsplittable_model(experiment)
        if model is not None or kind in ("resnet", "driver"):
            yield Problem(field, f"labkit has no ring for the attention of {model}" if model else NO_SEQUENCE, 1)
            return
        options = _options(experiment)
        if kind == "transformers" and _known_config(options).get("attention_dropout"):
            yield Problem("workload.transformers_config", "the ring has no dropout: set attention_dropout to 0")
        length = sequence_length(experiment)
        chunks = 2 * cp * (experiment.layout.tp if experiment.layout.sequence_parallel else 1)
        if length % chunks:
            yield Problem(
                field,
                f"{chunks} chunks of one size (two per rank, so that causal work is even) do not divide a sequence of "
                f"{length}",
                max(1, _nearest(chunks, length) * cp // chunks),
            )
        if kind == "gpt" and options.experts and options.capacity:
            yield Problem(
                "workload.capacity",
                "an expert's capacity is counted over whole sequences, but cp cuts them into parts",
                0,
            )


class ExpertAxis:
    """The axis ep: experts distributed over ranks."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        options, ep, field = _options(experiment), experiment.layout.ep, "layout.ep"
        experts = options.experts if network_kind(experiment) == "gpt" else 0
        if not experts:
            yield Problem(field, "this network has no experts to distribute (workload.experts of the GPT)", 1)
        elif experts % ep:
            yield Problem(field, f"{ep} ranks do not divide {experts} experts", _nearest(ep, experts))


class PipelineAxis:
    """The axis pp: stages of a chain of blocks."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        layout = experiment.layout
        model = unsplittable_model(experiment)
        if model is not None:
            yield Problem("layout.pp", f"labkit cannot split {model} into blocks", 1)
            return
        blocks = num_blocks(experiment)
        count = layout.pp * layout.stages_per_rank
        by_hand = layout.stage_blocks
        if by_hand is not None and (
            len(by_hand) != count or min(by_hand) < 1 or sum(by_hand) != (blocks or sum(by_hand))
        ):
            yield Problem(
                "layout.stage_blocks",
                f"{list(by_hand)} does not cut {blocks or 'the'} blocks into {count} stages of at least one",
                "null",
            )
        if blocks is not None and blocks < count:
            yield Problem(
                "layout.pp",
                f"{layout.pp} ranks × {layout.stages_per_rank} stages need {count} blocks, the model has {blocks}",
                max(1, blocks // layout.stages_per_rank),
            )
        share = layout.data_parallel * experiment.gradients.accumulation
        pieces = share * layout.microbatches_per_pass
        if experiment.training.global_batch % pieces:
            yield Problem(
                "training.global_batch",
                f"{pieces} microbatches of one size (data-parallel ranks × passes × microbatches) do not divide "
                f"{experiment.training.global_batch} samples",
                -(-experiment.training.global_batch // pieces) * pieces,
            )


class SynchronousSchedule:
    """A pipeline schedule under which all stages finish a step before the next one begins."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield what it requires of stages and micro-batches, if there is a pipeline."""
        return schedule_problems(experiment.layout) if experiment.layout.pp > 1 else iter(())


def schedule_problems(layout: Layout) -> Iterator[Problem]:
    """Yield the problems of the schedule with the number of stages and micro-batches."""
    schedule, stages, order = layout.schedule, layout.stages_per_rank, layout.order
    if order.splits_backward and layout.activation_checkpointing == "selective":
        yield Problem(
            "layout.activation_checkpointing",
            f"{schedule} splits the backward pass of a block in two, but torch keeps what selective recomputation "
            "needs for only one of them",
            "full",
        )
    count = layout.pp * stages
    if order.stages == "two" and stages != 2:
        yield Problem("layout.stages_per_rank", f"{schedule} folds the pipeline and needs exactly 2 stages per rank", 2)
    elif order.stages == "several" and stages < 2:
        yield Problem("layout.stages_per_rank", f"{schedule} needs at least 2 stages per rank", 2)
    elif order.stages == "one" and stages != 1:
        yield Problem("layout.stages_per_rank", f"{schedule} runs one stage per rank", 1)
    least = {"any": 1, "ranks": layout.pp, "stages": count}[order.least_microbatches]
    if layout.microbatches < least:
        yield Problem("layout.microbatches", f"{schedule} needs at least as many microbatches as stages", least)
    elif order.whole_rounds:
        rounds = max(1, layout.microbatches // layout.pp)
        if layout.microbatches % rounds:
            nearest = layout.microbatches // layout.pp * layout.pp
            yield Problem("layout.microbatches", f"{schedule} needs a multiple of {layout.pp} microbatches", nearest)
