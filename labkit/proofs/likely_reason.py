"""Why a layout differs from one process: the likeliest reason, in one sentence, from where the difference begins."""

from __future__ import annotations

from collections.abc import Sequence

from labkit.experiment import Experiment


def likely_reason(experiment: Experiment, first_step: int | None, buffer: str | None, notes: Sequence[str]) -> str:
    """The reason to look for first.

    `first_step`: the first update that differs (None: none does); `buffer`: the name of a buffer that differs; `notes`:
    what the ranks themselves have said of the model.
    """
    if notes:
        return f"likely reason: {notes[0]}"
    parts = experiment.resolve().layout.data_parallel > 1 or experiment.gradients.accumulation > 1
    if first_step is not None and parts and experiment.workload.name == "custom":
        return (
            "likely reason: the loss is a mean over something other than samples, which the task has to say "
            "(batch_weight), or the model looks at a batch as a whole or keeps something of it between passes"
        )
    if first_step == 1:
        return "likely reason: something random in the model or its data, or a part that looks at the batch as a whole"
    if first_step is not None:
        return (
            f"likely reason: what update {first_step - 1} left behind differs: gradients that do not reach all ranks, "
            "or state that the model keeps between passes"
        )
    if buffer is not None:
        return f"likely reason: {buffer} changes in training with the samples of a pass, which ranks see in parts"
    return "likely reason: the evaluation depends on how the held-out data is cut into batches, or draws random numbers"
