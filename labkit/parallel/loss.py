"""The next-token loss where a rank has only some logits of a token, or only some tokens.

Vocabulary parallelism (Megatron-LM, arXiv:1909.08053, section 3): with the output layer sharded along the vocabulary,
each rank computes some of the logits. The ranks exchange three numbers per token (the maximum, the sum of exponentials
and the logit of the target) instead of a whole row of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from labkit.parallel import collectives
from labkit.parallel.context import zigzag
from labkit.parallel.mesh import Mesh
from labkit.workloads.base import Task
from labkit.workloads.language_task import LanguageTask
from labkit.workloads.text import mean_nats


def shard_loss(task: Task, mesh: Mesh) -> None:
    """Make the loss of a language task accept outputs sharded along the vocabulary (tp) and the sequence (cp)."""
    if not isinstance(task, LanguageTask):
        return
    vocabulary, index, ranks = mesh.group("tp"), mesh.index("cp"), mesh.size("cp")

    def nats(output: Tensor, target: Tensor) -> Tensor:
        local_target = zigzag(target, 1, index, ranks) if ranks > 1 else target
        return mean_nats(output, local_target) if vocabulary is None else sharded_nats(output, local_target, vocabulary)

    task.nats = nats


def sharded_nats(logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the mean cross-entropy (scalar, equal on all ranks of `group`).

    `logits`: this rank's columns, [N, T, V/ranks]; `target`: [N, T].
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    highest = logits.detach().amax(-1)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    columns = logits.shape[-1]
    local = target - group.rank() * columns
    is_local = (local >= 0) & (local < columns)
    local_logit = logits.gather(-1, local.where(is_local, 0).unsqueeze(-1)).squeeze(-1) - highest
    sums = torch.stack([(logits - highest.unsqueeze(-1)).exp().sum(-1), local_logit.where(is_local, 0)])
    denominator, target_logit = collectives.reduce_from_region(sums, group)
    return (denominator.log() - target_logit).mean()
