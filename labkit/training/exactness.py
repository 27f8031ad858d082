"""Parts of a model that make data parallelism compute something else than one process does."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd


def inexact_parts(model: nn.Module, ranks: int) -> list[str]:
    """One sentence for each reason why `ranks` ranks differ from one process with this model; [] if none is known."""
    if ranks == 1:
        return []
    reasons = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            reasons.append(f"{name}: batch normalisation sees one rank's samples, so ranks differ from one process")
            break
    for name, module in model.named_modules():
        if (isinstance(module, _DropoutNd) and module.p > 0) or _drops_attention(module):
            reasons.append(f"{name}: dropout draws other numbers on every rank, so ranks differ from one process")
            break
    return reasons


def _drops_attention(module: nn.Module) -> bool:
    """An attention of transformers keeps its probability as a number."""
    chance = getattr(module, "attention_dropout", 0.0)
    return isinstance(chance, float) and chance > 0
