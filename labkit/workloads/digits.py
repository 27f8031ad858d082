"""Handwritten digits: 1,797 images of 8×8 pixels in 17 grey levels, 10 classes (Alpaydin & Kaynak, UCI 1998).

They ship with scikit-learn as a text table. The table is read from the installed package: importing `sklearn.datasets`
for it would take about a second, and loading scipy would start threads in the process that forks the ranks.
"""

from __future__ import annotations

import gzip
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CLASSES = 10
COUNT = 1797
SIDE = 8
MAX_LEVEL = 16
TEST_SHARE = 0.2


@lru_cache(maxsize=1)
def raw() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return images [1797, 8, 8] with values in 0 … 1, and labels [1797]; read once per process."""
    spec = find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if path.exists():
        table = np.loadtxt(gzip.decompress(path.read_bytes()).decode().splitlines(), delimiter=",", dtype=np.float32)
    else:  # a later scikit-learn may keep the file elsewhere
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        table = np.concatenate([images, labels[:, None]], axis=1).astype(np.float32)
    return table[:, :-1].reshape(-1, SIDE, SIDE) / np.float32(MAX_LEVEL), table[:, -1].astype(np.int64)


def stratified_split(labels: NDArray[Any], share: float = TEST_SHARE) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the training and of the held-out part, with `share` of every class held out.

    The split is always the same: it depends on the labels only, so that runs with different seeds can be compared.
    """
    order = np.random.default_rng(0)
    held_out = []
    for label in np.unique(labels):
        members = order.permutation(np.flatnonzero(labels == label))
        held_out.append(members[: max(1, round(share * len(members)))] if len(members) > 1 else members[:0])
    test = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), test), test


@lru_cache(maxsize=1)
def split() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the training and held-out indices of the digits."""
    return stratified_split(raw()[1])
