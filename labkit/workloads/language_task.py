"""The language task: next-token cross-entropy, and bits per character."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from labkit.workloads.base import Batch, Data, Metric
from labkit.workloads.text import Corpus, Windows, mean_nats

Nats = Callable[[Tensor, Tensor], Tensor]
"""Function from (output of the model, target [N, T]) to the mean negative log-likelihood (nats), a scalar."""


class LanguageTask:
    """A causal model on a corpus: tokens [N, T] to logits [N, T, vocabulary]."""

    metric = Metric("bits_per_character", "Held-out bits per character", False, "bits")

    def __init__(
        self, model: nn.Module, corpus: Corpus, context: int, data: str, about: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self.corpus = model, corpus
        self.train: Data = Windows(corpus.train, context)
        self.test: Data = Windows(corpus.test, context)
        self.loss_module: nn.Module | None = None
        self._data, self._about = data, dict(about or {})
        self.nats: Nats = mean_nats
        """Mean loss over the tokens; layouts that shard the sequence or the vocabulary replace it by their own."""
        for part, name in ((self.train, "training"), (self.test, "held-out")):
            if not len(part):
                raise ValueError(f"the {name} text is shorter than one window of {context} tokens")

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return nats per token. All windows have the same length, so the mean over tokens is the mean over samples."""
        return self.nats(output, batch["y"])

    def batch_weight(self, batch: Batch) -> Tensor | float:
        """Return the number of samples, because every window has the same number of tokens."""
        return float(len(batch["y"]))

    def evaluate(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        samples = len(batch["y"])
        return {"count": output.new_tensor(samples), "loss": self.nats(output, batch["y"]) * samples}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        loss = sums["loss"] / sums["count"]
        return {"loss": loss, "bits_per_character": self.corpus.bits_per_character(loss)}

    def closed_loop(self, model: nn.Module, rank: int, world_size: int, seed: int) -> dict[str, float]:
        return {}

    def facts(self) -> dict[str, Any]:
        unigram = self.corpus.unigram_entropy()
        return {
            "data": self._data,
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",  # the documentation depends on it
            "vocabulary": self.corpus.vocabulary,
            "train_samples": len(self.train),
            "test_samples": len(self.test),
            "tokens_per_character": self.corpus.tokens_per_character,
            "uniform_entropy_nats": math.log(self.corpus.vocabulary),
            "unigram_entropy_nats": unigram,
            "unigram_entropy_bits": self.corpus.bits_per_character(unigram),
        } | self._about
