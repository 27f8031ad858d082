"""Text as windows of tokens, and the baseline that a model has to beat on it.

Tokens are the bytes of UTF-8: 256 of them, any text in any language, nothing to train and nothing to download. One
character is one byte in English and up to four elsewhere, so results are given in bits per character, which can be
compared between tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from labkit.workloads.base import Batch

BYTES = 256
TEST_SHARE = 0.1

Encode = Callable[[str], NDArray[np.integer]]


def python_documentation() -> str:
    """Return about 465,000 characters of English that ship with every CPython: the texts behind `help("topics")`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def encode_bytes(text: str) -> NDArray[np.uint8]:
    """Return the UTF-8 bytes of the text, [length] uint8."""
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)


class Windows:
    """A text split into non-overlapping windows of `context` tokens; sample i is always the same window.

    Batches have `x` [N, context] and `y` [N, context] int64, where y is x shifted by one token. A remainder shorter
    than a window is dropped.
    """

    def __init__(self, tokens: NDArray[np.integer], context: int) -> None:
        self.tokens = torch.from_numpy(tokens.astype(np.uint8 if tokens.max(initial=0) < BYTES else np.int32))
        self.context = context
        self.within = torch.arange(context + 1)

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.context)

    def inputs(self) -> Tensor:
        """Return a view of the x of all windows, [number of windows, context], in the tokens' own integer type."""
        return self.tokens[: len(self) * self.context].view(-1, self.context)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        start = torch.as_tensor(indices).unsqueeze(1) * self.context
        window = self.tokens[start + self.within].long()
        return {"x": window[:, :-1], "y": window[:, 1:]}


@dataclass(frozen=True)
class Corpus:
    """A tokenized text: its beginning to train on, its end held out."""

    train: NDArray[np.integer]
    test: NDArray[np.integer]
    tokens_per_character: float
    """Tokens per character of the held-out part; converts nats per token to bits per character."""
    vocabulary: int

    @classmethod
    def from_text(cls, train: str, test: str | None, encode: Encode, vocabulary: int) -> Corpus:
        """Tokenize the texts; without a held-out text, the last tenth of the training text is held out."""
        if test is None:
            cut = round(len(train) * (1 - TEST_SHARE))
            train, test = train[:cut], train[cut:]
        if not train or not test:
            if not (train or test):
                raise ValueError("the text is empty")
            part = "held-out" if train else "training"
            raise ValueError(f"the {part} part of the text is empty: the text, or the file of this split, is too short")
        held_out = encode(test)
        return cls(encode(train), held_out, len(held_out) / len(test), vocabulary)

    def bits_per_character(self, nats_per_token: float) -> float:
        """Return loss / ln 2 · tokens / characters."""
        return nats_per_token / math.log(2) * self.tokens_per_character

    def unigram_entropy(self) -> float:
        """Return the nats per held-out token of a model that knows only how often each token occurs.

        This is the cross-entropy of the held-out text under the training frequencies, each count raised by one for
        tokens that never occurred: the loss of a network that ignores its context.
        """
        counts = np.bincount(self.train, minlength=self.vocabulary) + 1.0
        log_share = np.log(counts / counts.sum())
        return float(-log_share[self.test].mean())


def mean_nats(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy over all positions: logits [N, T, vocabulary] and target [N, T] to a scalar."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
