"""The loss of next-token prediction where no rank has all scores of a token, or no rank all tokens.

Vocabulary parallelism (Megatron-LM, arXiv:1909.08053, section 3): with the output layer cut along the vocabulary, each
rank has some of the scores. Maximum, sum of exponentials and the target's own score are three numbers a token; they
travel instead of a whole row of the vocabulary.
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


def spread(task: Task, mesh: Mesh) -> None:
    """Let a language task take outputs that are cut along the vocabulary (tp) and the sequence (cp)."""
    if not isinstance(task, LanguageTask):
        return
    vocabulary, index, parts = mesh.group("tp"), mesh.index("cp"), mesh.size("cp")

    def nats(output: Tensor, target: Tensor) -> Tensor:
        mine = zigzag(target, 1, index, parts) if parts > 1 else target
        return mean_nats(output, mine) if vocabulary is None else sharded_nats(output, mine, vocabulary)

    task.nats = nats


def sharded_nats(scores: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Mean cross-entropy on all ranks: this rank's columns of the scores [N, T, V/ranks], target [N, T] to a scalar."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    highest = scores.detach().amax(-1)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    columns = scores.shape[-1]
    local = target - group.rank() * columns
    mine = (local >= 0) & (local < columns)
    own = scores.gather(-1, local.where(mine, 0).unsqueeze(-1)).squeeze(-1) - highest
    sums = torch.stack([(scores - highest.unsqueeze(-1)).exp().sum(-1), own.where(mine, 0)])
    denominator, target_score = collectives.reduce_from_region(sums, group)
    return (denominator.log() - target_score).mean()
