"""What an axis of the layout requires of the model and of the batch. Imports no torch: forms and commands read it."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any

from labkit.experiment.machine import Machine
from labkit.experiment.problem import Problem
from labkit.experiment.schema import Experiment
from labkit.workloads.network import Network

NO_SEQUENCE = "this network has no sequence to cut"


def network_of(experiment: Experiment) -> Network:
    """Return what the workload of an experiment tells about its network; nothing for one that tells nothing."""
    workload, options = experiment.workload.load()
    describe: Any = getattr(workload, "describe", None)
    return Network(has_plans=False) if describe is None else describe(options)


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


class TensorAxis:
    """The axis tp: layers sharded over ranks."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        network, tp, field = network_of(experiment), experiment.layout.tp, "layout.tp"
        if network.name:
            yield Problem(field, f"labkit has no plan for cutting the layers of {network.name}", 1)
            return
        for words, size in network.tp_sizes.items():
            if size % tp:
                yield Problem(field, f"{tp} ranks do not divide {words}", _nearest(tp, *network.tp_sizes.values()))
        if not experiment.layout.sequence_parallel:
            return
        length = network.sequence
        if length is None or network.keeps_norms_whole:
            yield Problem("layout.sequence_parallel", network.keeps_norms_whole or NO_SEQUENCE, "false")
        elif length % tp:
            yield Problem("layout.sequence_parallel", f"{tp} ranks do not divide a sequence of {length}", "false")


class ContextAxis:
    """The axis cp: the sequence sharded over ranks."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        network, cp, field = network_of(experiment), experiment.layout.cp, "layout.cp"
        length = network.sequence
        if network.name or length is None:
            reason = f"labkit has no ring for the attention of {network.name}" if network.name else NO_SEQUENCE
            yield Problem(field, reason, 1)
            return
        if network.attention_dropout:
            yield Problem("workload.transformers_config", "the ring has no dropout: set attention_dropout to 0")
        chunks = 2 * cp * (experiment.layout.tp if experiment.layout.sequence_parallel else 1)
        if length % chunks:
            yield Problem(
                field,
                f"{chunks} chunks of one size (two per rank, so that causal work is even) do not divide a sequence of "
                f"{length}",
                max(1, _nearest(chunks, length) * cp // chunks),
            )
        if network.experts and network.expert_capacity:
            yield Problem(
                "workload.capacity",
                "an expert's capacity is counted over whole sequences, but cp cuts them into parts",
                0,
            )


class ExpertAxis:
    """The axis ep: experts distributed over ranks."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        experts, ep, field = network_of(experiment).experts, experiment.layout.ep, "layout.ep"
        if not experts:
            yield Problem(field, "this network has no experts to distribute (workload.experts of the GPT)", 1)
        elif experts % ep:
            yield Problem(field, f"{ep} ranks do not divide {experts} experts", _nearest(ep, experts))


class PipelineAxis:
    """The axis pp: stages of a chain of blocks."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        layout = experiment.layout
        network = network_of(experiment)
        if network.unsplittable:
            yield Problem("layout.pp", f"labkit cannot split {network.unsplittable} into blocks", 1)
            return
        blocks = network.blocks
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
