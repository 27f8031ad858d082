"""What a loss depends on beside the model's parameters: no optimizer would train it.

Read off the graph of a pass, so that it does not matter where a parameter is hidden: in the closure of a loss, in a
partial, in a plain list of layers, in an object, in the module's file. What a loss only reads without gradients, such
as a frozen teacher, is not in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from labkit.experiment import Experiment
from labkit.workloads.base import Task
from labkit.workloads.held import tensors_held

MOST_NODES = 50_000
"""Of a graph that is looked at."""


def leaves(end: Iterable[Tensor], until: Iterable[Tensor] = ()) -> Iterator[Tensor]:
    """The leaves of the graph behind the tensors `end` that get a gradient; not beyond the tensors `until`."""
    seen = {tensor.grad_fn for tensor in until}
    waiting: list[Any] = [tensor.grad_fn for tensor in end]
    while waiting and len(seen) < MOST_NODES:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            yield variable
        waiting.extend(inner for inner, _ in node.next_functions)


def strangers(task: Task, loss: Tensor) -> str | None:
    """Why the loss depends on something that no optimizer would train, in one sentence; None if all are parameters."""
    own = {id(parameter) for parameter in task.model.parameters()}
    others = [leaf for leaf in leaves([loss]) if id(leaf) not in own]
    if not others:
        return None
    places: dict[int, str] = {}
    for place, tensor in _places(task):
        places.setdefault(id(tensor), place)
    # What is neither a parameter nor held anywhere was made in this pass.
    other = next((leaf for leaf in others if isinstance(leaf, nn.Parameter) or id(leaf) in places), None)
    if other is None:
        return None
    name = places.get(id(other)) or f"a tensor of shape {list(other.shape)} that is made in the pass"
    return (
        f"the loss depends on {name}, which no optimizer would train: it is no parameter of the model, so register it "
        "there (nn.Parameter, nn.ModuleList), or freeze it with requires_grad_(False)"
    )


def _places(task: Task) -> Iterator[tuple[str, Tensor]]:
    yield from tensors_held(getattr(task, "loss_fn", None) or task.loss, "the loss")
    yield from tensors_held(task.model, "the model")
    yield from tensors_held(task, "the task")


def read_beside(experiment: Experiment, task: Task, output: Any, loss: Tensor) -> str | None:
    """Why a loss cannot read the model's own parameters in this layout; None where it does not, or where it can."""
    layout = experiment.layout
    setting = next(
        (
            words
            for words, lays_out in (
                ("ZeRO 3", layout.dp_shard > 1 and layout.zero_stage == 3),
                ("a pipeline", layout.pp > 1),
                ("tensor parallelism", layout.tp > 1),
                ("expert parallelism", layout.ep > 1),
                ("pipedream", experiment.gradients.update.method == "pipedream"),
                ("a parameter server", experiment.gradients.update.method == "parameter_server"),
            )
            if lays_out
        ),
        None,
    )
    if setting is None:
        return None
    outputs = [tensor for _, tensor in tensors_held(output, "")]
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    hit = next((names[id(leaf)] for leaf in leaves([loss], outputs) if id(leaf) in names), None)
    return hit and (
        f"the loss reads {hit} of the model beside its output, and {setting} keeps that elsewhere than the loss looks: "
        "use layout.dp_replicate or layout.zero_stage 1 or 2, or leave it to optimizer.weight_decay"
    )


def kept_graph(task: Task) -> str:
    """What the model or the loss keeps of a pass together with its graph, in words; '' if it is not to be seen."""
    for place, tensor in _places(task):
        if tensor.grad_fn is not None:
            return place
    return ""
