"""Find tensors besides the model's parameters that a loss depends on: no optimizer would train them.

They are found in the autograd graph of a pass, so it does not matter where a parameter is stored: in the closure of a
loss, in a partial, in a plain list of layers, in an object, or in a global variable. Tensors that a loss reads without
gradients, such as those of a frozen teacher, are not in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from labkit.experiment import Experiment
from labkit.workloads.base import Task
from labkit.workloads.held import tensors_held

MOST_NODES = 50_000
"""Maximum number of graph nodes that are visited."""


def leaves(end: Iterable[Tensor], until: Iterable[Tensor] = ()) -> Iterator[Tensor]:
    """Yield the leaf tensors with gradients in the autograd graph of the tensors `end`, up to those in `until`."""
    visited = {tensor.grad_fn for tensor in until}
    stack: list[Any] = [tensor.grad_fn for tensor in end]
    while stack and len(visited) < MOST_NODES:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            yield variable
        stack.extend(inner for inner, _ in node.next_functions)


def untrained_leaf(task: Task, loss: Tensor) -> str | None:
    """Return a sentence if the loss depends on a tensor that no optimizer would train; None if all are parameters."""
    parameters = {id(parameter) for parameter in task.model.parameters()}
    foreign = [leaf for leaf in leaves([loss]) if id(leaf) not in parameters]
    if not foreign:
        return None
    places: dict[int, str] = {}
    for place, tensor in _places(task):
        places.setdefault(id(tensor), place)
    # A tensor that is neither a parameter nor stored anywhere was created in this pass.
    culprit = next((leaf for leaf in foreign if isinstance(leaf, nn.Parameter) or id(leaf) in places), None)
    if culprit is None:
        return None
    name = places.get(id(culprit)) or f"a tensor of shape {list(culprit.shape)} created in the pass"
    return (
        f"the loss depends on {name}, which no optimizer would train: it is not a parameter of the model, so register "
        "it there (nn.Parameter, nn.ModuleList), or freeze it with requires_grad_(False)"
    )


def _places(task: Task) -> Iterator[tuple[str, Tensor]]:
    yield from tensors_held(getattr(task, "loss_fn", None) or task.loss, "the loss")
    yield from tensors_held(task.model, "the model")
    yield from tensors_held(task, "the task")


def parameter_in_loss(experiment: Experiment, task: Task, output: Any, loss: Tensor) -> str | None:
    """Return why the loss cannot read the model's parameters directly in this layout; None if it does not, or can."""
    layout = experiment.layout
    setting = next(
        (
            name
            for name, moves_parameters in (
                ("ZeRO 3", layout.dp_shard > 1 and layout.zero_stage == 3),
                ("a pipeline", layout.pp > 1),
                ("tensor parallelism", layout.tp > 1),
                ("expert parallelism", layout.ep > 1),
                ("a parameter server", experiment.gradients.update.method == "parameter_server"),
            )
            if moves_parameters
        ),
        None,
    )
    if setting is None:
        return None
    outputs = [tensor for _, tensor in tensors_held(output, "")]
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    parameter_name = next((names[id(leaf)] for leaf in leaves([loss], outputs) if id(leaf) in names), None)
    return parameter_name and (
        f"the loss reads {parameter_name} of the model in addition to its output, but under {setting} the loss "
        "cannot read it: use layout.dp_replicate or layout.zero_stage 1 or 2, or use optimizer.weight_decay"
    )


def kept_graph(task: Task) -> str:
    """Return the place of a tensor that the model or the loss keeps with its graph after a pass; '' for none."""
    for place, tensor in _places(task):
        if tensor.grad_fn is not None:
            return place
    return ""
