"""Labelled images from a folder, a parquet file or the hub, decoded on access."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from labkit.workloads import hub
from labkit.workloads.base import Batch
from labkit.workloads.digits import stratified_split
from labkit.workloads.image_folder import ImageFolder, read_folder
from labkit.workloads.images import Images, majority_share
from labkit.workloads.pixels import GROUND, rgb
from labkit.workloads.rules import is_path

Source = Callable[[int], tuple[Path | bytes, str]]
"""Function from an index to (the path or the bytes of a file, its name in messages)."""
Part = tuple[Source, NDArray[np.int64]]
DARK = 0.125
"""Images whose brightest pixel (0 to 1) is darker than this are noted."""
TRIED_S = 1.0
"""Seconds for which the images of a part are tried before training."""

MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], dtype=np.float32)
"""Standard deviation of ImageNet's pixels, as MEAN: close enough for photographs, without a pass over the data."""

_LABEL_NAMES = ("label", "labels", "class", "target", "fine_label", "coarse_label")


class StoredImages:
    """Encoded images: `x` [N, 3, side, side] float32 (RGB, normalised), `y` [N] int64.

    `source` returns the path or the bytes of the file at an index, and its name in messages.
    """

    def __init__(self, source: Source, labels: NDArray[np.int64], side: int) -> None:
        self.source, self.labels, self.side = source, labels, side

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = list(indices)
        pixels = np.stack([self.pixels(index) for index in chosen])
        x = torch.from_numpy((pixels - MEAN) / DEVIATION).permute(0, 3, 1, 2).contiguous()
        return {"x": x, "y": torch.from_numpy(self.labels[chosen])}

    def pixels(self, index: int) -> NDArray[np.float32]:
        """Return the image as [side, side, 3]; ValueError names an image that cannot be read."""
        from PIL import Image, UnidentifiedImageError

        stored, name = self.source(index)
        try:
            with Image.open(stored if isinstance(stored, Path) else io.BytesIO(stored)) as image:
                return rgb(image, self.side)
        except UnidentifiedImageError:
            raise ValueError(f"the image {name} cannot be read: it is not an image of a known format") from None
        except ValueError as error:
            raise ValueError(f"the image {name} {error}") from None
        except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error, …
            raise ValueError(f"the image {name} cannot be read: {hub.first_line(error)}") from error

    def try_all(self, seconds: float = TRIED_S) -> float:
        """Decode every image, as far as time permits, to find bad ones before training.

        Returns the largest value, from 0 to 1.
        """
        until, largest = time.monotonic() + seconds, 0.0
        for index in range(len(self)):
            largest = max(largest, float(self.pixels(index).max()))
            if time.monotonic() > until:
                break
        return largest


def hub_images(data: str, side: int, image_column: str = "", label_column: str = "") -> Images:
    """Return labelled images of a folder, a file or the hub; without a held-out part a stratified fifth is held out."""
    path = Path(data).expanduser()
    folder = read_folder(path) if is_path(data) and path.is_dir() and not _has_metadata(path) else None
    if folder is not None:
        for option, column in (("image_column", image_column), ("label_column", label_column)):
            if column:
                raise ValueError(f"there is no column {column!r} (workload.{option}): {data} is a folder of images")
        parts = _of_folder(folder, path)
        about: dict[str, Any] = {
            "held_out": f"files named {folder.split}" if folder.split else "a fifth of each class",
            "skipped_files": folder.skipped,
        }
        names = sorted({name for _, name in folder.train})
    else:
        names, parts, about = _of_table(data, image_column, label_column)
    (train_source, train_labels), test = parts
    if test is None:
        train_rows, test_rows = stratified_split(train_labels)
        test = (_selected(train_source, test_rows), train_labels[test_rows])
        train_source, train_labels = _selected(train_source, train_rows), train_labels[train_rows]
    test_source, test_labels = test
    if not len(train_labels) or not len(test_labels):
        raise ValueError(f"{data} has too few images to hold some out")
    if len(names) < 2:
        raise ValueError(f"{data} has one class only ({names[0]}): there is nothing to classify")
    notes: list[str] = []
    absent = [name for number, name in enumerate(names) if number not in set(test_labels.tolist())]
    if absent:
        about["classes_not_held_out"] = absent
        notes.append(f"the held-out part has no image of {', '.join(absent[:5])}: accuracy ignores them")
    stored = StoredImages(train_source, train_labels, side), StoredImages(test_source, test_labels, side)
    largest = max(part.try_all() for part in stored)
    if largest < DARK:
        notes.append(
            f"no pixel is brighter than {255 * largest:.0f} of 255: if the files store 10 or 12 bits in 16, scale them"
        )
    counts = {name: int((train_labels == number).sum()) for number, name in enumerate(names)}
    return Images(
        *stored,
        channels=3,
        classes=names,
        majority_share=majority_share(test_labels),
        about=about | {"images_per_class": counts, "ground": GROUND} | ({"notes": notes} if notes else {}),
    )


def _has_metadata(path: Path) -> bool:
    """Return True if a metadata file describes the images in the format of `datasets`."""
    return any(path.rglob("metadata.csv")) or any(path.rglob("metadata.jsonl"))


def _of_folder(folder: ImageFolder, root: Path) -> tuple[Part, Part | None]:
    """Return the training and the held-out part (None for none) of a folder with one subfolder per class."""
    names = sorted({name for _, name in folder.train})
    unknown = sorted({name for _, name in folder.held_out} - set(names))
    if unknown:
        raise ValueError(f"{root} has held-out classes that are not trained on: {', '.join(unknown)}")
    number = {name: index for index, name in enumerate(names)}

    def part(files: list[tuple[Path, str]]) -> Part:
        paths = [path for path, _ in files]
        labels = np.array([number[name] for _, name in files], dtype=np.int64)
        return (lambda index: (paths[index], str(paths[index]))), labels

    return part(folder.train), part(folder.held_out) if folder.held_out else None


def _of_table(
    data: str, image_column: str, label_column: str
) -> tuple[list[str], tuple[Part, Part | None], dict[str, Any]]:
    """Return class names, the training and the held-out part (None for none), and facts of a data set with columns."""
    train, test, about = hub.load(data)
    image = hub.column(train, image_column, "images", _image_columns(train), "workload.image_column")
    label = hub.column(train, label_column, "labels", _label_columns(train), "workload.label_column")
    names, train_labels = _labels(train, label)
    parts = (_source(_encoded(train, image), image, "training"), train_labels), None
    about |= {"image_column": image, "label_column": label}
    if test is None:
        return names, parts, about
    for column in (image, label):
        if column not in test.column_names:
            raise ValueError(f"the held-out part has no column {column!r}; columns: {', '.join(test.column_names)}")
    held_out = _source(_encoded(test, image), image, "held-out"), _labels(test, label, names)[1]
    return names, (parts[0], held_out), about


def _source(rows: Any, column: str, part: str) -> Source:
    """Return a function that reads the image at an index of `rows`."""

    def read(index: int) -> tuple[Path | bytes, str]:
        stored = rows[index][column]
        name = f"in row {index} of the {part} part"
        if stored is None or (stored["bytes"] is None and not stored["path"]):
            raise ValueError(f"the image {name} is missing")
        if stored["bytes"] is not None:
            return stored["bytes"], f"{name} ({stored['path']})" if stored["path"] else name
        return Path(stored["path"]), stored["path"]

    return read


def _selected(source: Source, rows: NDArray[np.int64]) -> Source:
    """Return the source of a subset of rows."""
    return lambda index: source(int(rows[index]))


def _image_columns(rows: Any) -> list[str]:
    """Return the columns of the type Image, or else those with a usual name."""
    import datasets

    typed = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    return typed or [name for name in ("image", "img", "picture") if name in rows.column_names]


def _label_columns(rows: Any) -> list[str]:
    """Return the columns of the type ClassLabel, or else those with a usual name."""
    import datasets

    typed = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    return typed or [name for name in _LABEL_NAMES if name in rows.column_names]


def _encoded(rows: Any, image_column: str) -> Any:
    """Return the rows with images as bytes or paths, whatever type the file declares for the column."""
    import datasets

    feature = rows.features[image_column]
    if isinstance(feature, datasets.Image):
        return rows.cast_column(image_column, datasets.Image(decode=False))
    if getattr(feature, "dtype", "") in ("string", "large_string"):
        # These would be used as paths or addresses: a foreign data set could make this machine open its files.
        raise ValueError(f"column {image_column!r} contains text, not images")
    try:
        return rows.cast_column(image_column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow and datasets raise many types here
        raise ValueError(f"column {image_column!r} does not contain images") from error


def _labels(rows: Any, label_column: str, names: list[str] | None = None) -> tuple[list[str], NDArray[np.int64]]:
    """Return the names of the classes and each row's class number. Classes without names are sorted by their value."""
    import datasets

    feature = rows.features.get(label_column)
    values = list(rows[label_column]) if label_column in rows.column_names else []
    if isinstance(feature, datasets.ClassLabel):
        texts = [feature.int2str(value) if value is not None and value >= 0 else None for value in values]
        class_names = list(feature.names) if names is None else names
    else:
        texts = [None if value is None else str(value) for value in values]
        distinct = {value for value in values if value is not None}
        class_names = (
            [str(value) for value in sorted(distinct, key=lambda v: (str(type(v)), v))] if names is None else names
        )
    number = {name: index for index, name in enumerate(class_names)}
    missing = next((text for text in texts if text not in number), ...)
    if missing is not ...:
        raise ValueError(f"column {label_column!r} has rows with the label {missing!r}, which is not a trained class")
    return class_names, np.array([number[text] for text in texts if text is not None], dtype=np.int64)
