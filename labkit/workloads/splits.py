"""Training and held-out parts by their names, the same for every format (`train.txt`, `val/`, `x.test.tokens`, …).

A part that is named as held out is never trained on. (Issue 11, B19a: three files were joined and the test file was
trained on.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Split = Literal["train", "test", "validation"]

_TRAIN = ("train", "training")
_VALIDATION = ("validation", "valid", "val", "dev", "development", "eval", "evaluation")
_TEST = ("test", "testing", "holdout", "heldout")
_ENDINGS = ("set", "data", "split", "part", "file", "files", "images", "texts")
HELD_OUT: tuple[Split, ...] = ("test", "validation")
"""Held-out splits in the order of preference; those that are not used are ignored."""


def split_of(name: str) -> Split | None:
    """Return the split that a name states (of a file without its folder, a folder, a part of a data set), or None.

    Words are separated by anything but letters and by capitals: `X_train`, `train-00000-of-00002`, `wiki.valid.txt`,
    `testData`. A name that states both train and held out (`train_test`) counts as held out.
    """
    splits = {_split_of_word(word.lower()) for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
    if re.search(r"held[-_ ]?out|hold[-_ ]?out", name.lower()):
        splits.add("test")
    choices: tuple[Split, ...] = (*HELD_OUT, "train")
    return next((split for split in choices if split in splits), None)


def _split_of_word(word: str) -> Split | None:
    """Return the split that a word in lower case stands for, or None."""
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) > len(ending):
            word = word.removesuffix(ending)
            break
    return "train" if word in _TRAIN else "validation" if word in _VALIDATION else "test" if word in _TEST else None


def choose(names: Iterable[str], what: str) -> tuple[list[str], list[str], list[str]]:
    """Return the names to train on, to hold out and to ignore, from the names of the parts of a data set.

    Training parts are those named so; without any, those that name no split. Of the held-out ones, `test` is preferred
    to `validation`. `what` begins the message of the ValueError raised if all parts are held out.
    """
    by_split: dict[Split | None, list[str]] = {"train": [], "test": [], "validation": [], None: []}
    for name in names:
        by_split[split_of(name)].append(name)
    train = by_split["train"] or by_split[None]
    if not train:
        raise ValueError(f"{what} has held-out parts only ({', '.join(by_split['test'] + by_split['validation'])})")
    held_out = by_split["test"] or by_split["validation"]
    left_out = [*(by_split["validation"] if by_split["test"] else []), *(by_split[None] if by_split["train"] else [])]
    return train, held_out, left_out
