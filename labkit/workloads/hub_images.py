"""Labelled images from a folder, a parquet file or the hub, decoded when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from labkit.workloads import hub
from labkit.workloads.base import Batch
from labkit.workloads.digits import stratified_split
from labkit.workloads.images import Images, majority_share

MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], dtype=np.float32)
"""Of ImageNet's pixels: near enough for photographs, and no pass over the data is needed to find them."""

_LABEL_NAMES = ("label", "labels", "class", "target", "fine_label", "coarse_label")


class StoredImages:
    """Rows of a `datasets.Dataset`: `x` [N, 3, side, side] float32 (RGB, normalised), `y` [N] int64."""

    def __init__(self, rows: Any, image_column: str, labels: NDArray[np.int64], side: int) -> None:
        self.rows, self.column, self.labels, self.side = rows, image_column, labels, side

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = list(indices)
        pixels = np.stack([self._pixels(image) for image in self.rows[chosen][self.column]])
        x = torch.from_numpy((pixels - MEAN) / DEVIATION).permute(0, 3, 1, 2).contiguous()
        return {"x": x, "y": torch.from_numpy(self.labels[chosen])}

    def _pixels(self, image: Any) -> NDArray[np.float32]:
        from PIL.Image import Resampling

        small = image.convert("RGB").resize((self.side, self.side), Resampling.BILINEAR)
        return np.asarray(small, dtype=np.float32) / np.float32(255)


def hub_images(data: str, side: int, image_column: str = "", label_column: str = "") -> Images:
    """Load with `datasets`, find the columns, and hold out a stratified fifth if there is no held-out part."""
    train, test = hub.load(data)
    image = hub.column(train, image_column, "images", _image_columns(train), "workload.image_column")
    label = hub.column(train, label_column, "labels", _label_columns(train), "workload.label_column")
    train = _decoded(train, image)
    names, train_labels = _labels(train, label)
    if test is None:
        train_rows, test_rows = stratified_split(train_labels)
        parts = [(train.select(rows), train_labels[rows]) for rows in (train_rows, test_rows)]
    else:
        parts = [(train, train_labels), (_decoded(test, image), _labels(test, label, names)[1])]
    if not all(len(labels) for _, labels in parts):
        raise ValueError(f"{data} has too few images to hold some out")
    (train, train_labels), (test, test_labels) = parts
    return Images(
        StoredImages(train, image, train_labels, side),
        StoredImages(test, image, test_labels, side),
        channels=3,
        classes=names,
        majority_share=majority_share(test_labels),
    )


def _image_columns(rows: Any) -> list[str]:
    """Columns of the type Image; else those named so, whose content can be read as an image."""
    import datasets

    typed = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    return typed or [name for name in ("image", "img", "picture") if name in rows.column_names]


def _label_columns(rows: Any) -> list[str]:
    import datasets

    typed = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    return typed or [name for name in _LABEL_NAMES if name in rows.column_names]


def _decoded(rows: Any, image_column: str) -> Any:
    """Rows whose images come as PIL images, whatever the file said about the column's type."""
    import datasets

    feature = rows.features[image_column]
    if isinstance(feature, datasets.Image):
        return rows
    if getattr(feature, "dtype", "") in ("string", "large_string"):
        # Would be taken as paths or addresses: a foreign data set could have files of this machine opened.
        raise ValueError(f"column {image_column!r} does not hold images, it holds text")
    try:
        return rows.cast_column(image_column, datasets.Image())
    except Exception as error:  # pyarrow and datasets raise many kinds here
        raise ValueError(f"column {image_column!r} does not hold images") from error


def _labels(rows: Any, label_column: str, names: list[str] | None = None) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the classes, and each row's class number. Classes without names are sorted by their value."""
    import datasets

    feature = rows.features.get(label_column)
    values = list(rows[label_column]) if label_column in rows.column_names else []
    if isinstance(feature, datasets.ClassLabel):
        texts = [feature.int2str(value) if value is not None and value >= 0 else None for value in values]
        known = list(feature.names) if names is None else names
    else:
        texts = [None if value is None else str(value) for value in values]
        distinct = {value for value in values if value is not None}
        known = [str(value) for value in sorted(distinct, key=lambda v: (str(type(v)), v))] if names is None else names
    number = {name: index for index, name in enumerate(known)}
    missing = next((text for text in texts if text not in number), ...)
    if missing is not ...:
        raise ValueError(f"column {label_column!r} has rows with the label {missing!r}, which is no class to train on")
    return known, np.array([number[text] for text in texts if text is not None], dtype=np.int64)
