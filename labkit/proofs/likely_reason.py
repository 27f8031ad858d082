"""Why a layout differs from one process: the most likely reason, in one sentence, from where the difference begins."""

from __future__ import annotations

from collections.abc import Sequence

from labkit.experiment import Experiment


def likely_reason(experiment: Experiment, first_step: int | None, buffer: str | None, notes: Sequence[str]) -> str:
    """Return the reason to check first, as one sentence.

    `first_step`: the first optimizer step that differs (None: none does); `buffer`: the name of a buffer that differs;
    `notes`: the warnings of the ranks about the model.
    """
    if notes:
        return f"likely reason: {notes[0]}"
    split_batch = experiment.resolve().layout.data_parallel > 1 or experiment.gradients.accumulation > 1
    if first_step is not None and split_batch and experiment.workload.name == "custom":
        return (
            "likely reason: the loss is a mean over something other than samples, which the task must declare "
            "(batch_weight), or the model depends on the whole batch or keeps state between passes"
        )
    if first_step == 1:
        return "likely reason: something random in the model or its data, or a part that depends on the whole batch"
    if first_step is not None:
        return (
            f"likely reason: the state after step {first_step - 1} differs: gradients that do not reach all ranks, "
            "or state that the model keeps between passes"
        )
    if buffer is not None:
        return f"likely reason: {buffer} is updated in training from the samples of a pass, which ranks divide up"
    return "likely reason: the evaluation depends on the batches of the held-out data, or draws random numbers"
