"""Images in folders: one folder for each class, and folders (or file names) that name the splits.

`cats/1.png`, `train/cats/1.png` and `cats/train/1.png` are recognised, inside and above any other folders. (Issue 11,
B18b: train/ and test/ without classes in them became the labels.)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from labkit.workloads.files import kind, walk
from labkit.workloads.splits import HELD_OUT, Split, split_of

Parts = tuple[str, ...]


@dataclass
class ImageFolder:
    """Paths and class names of the images to train on and to hold out."""

    train: list[tuple[Path, str]]
    held_out: list[tuple[Path, str]]
    split: str
    """Name of the held-out split; empty if there is none."""
    skipped: dict[str, int]


def read_folder(root: Path) -> ImageFolder | None:
    """Return the images below `root`; None if there are none. Raises ValueError if their classes are ambiguous."""
    files, hidden = walk(root)
    images = [path for path in files if kind(path) == "image"]
    if not images:
        return None
    skipped = Counter({"hidden": hidden, "no image": len(files) - len(images)})
    parts = {path: path.relative_to(root).parts for path in images}
    parts = _without_common_folder(parts, root)
    splits, parts = _splits(parts, root)
    classes: dict[Path, str] = {}
    loose = []
    for path, rest in parts.items():
        if len(rest) > 1:
            classes[path] = rest[0]
        else:
            loose.append(path)
    if not classes:
        inside = f" (as {_example(parts, root)})" if any(splits.values()) else ""
        raise ValueError(
            f"{root} has no folders of classes: its {len(images)} images are in one place{inside}; "
            "put those of each class into a folder of its own"
        )
    skipped["in no folder of a class"] = len(loose)
    by_split: dict[Split | None, list[tuple[Path, str]]] = {"train": [], "test": [], "validation": [], None: []}
    for path, name in classes.items():
        by_split[splits[path]].append((path, name))
    train = by_split["train"] or by_split[None]
    if by_split["train"]:
        skipped["names no split, next to one named train"] = len(by_split[None])
    if not train:
        raise ValueError(f"{root} contains held-out images only ({_example(parts, root)})")
    split = next((name for name in HELD_OUT if by_split[name]), None)
    for name in HELD_OUT:
        if name != split:
            skipped[f"{name} split, not used"] = len(by_split[name])
    counts = {reason: count for reason, count in skipped.items() if count}
    return ImageFolder(train, by_split[split] if split else [], split or "", counts)


def _without_common_folder(parts: dict[Path, Parts], root: Path) -> dict[Path, Parts]:
    """Drop the folders that contain all images, as long as there are folders below."""
    while all(len(rest) > 2 for rest in parts.values()) and len({rest[0] for rest in parts.values()}) == 1:
        around = next(iter(parts.values()))[0]
        if split_of(around) in HELD_OUT:
            raise ValueError(f"{root} contains held-out images only (in {around}); give that folder itself to use them")
        parts = {path: rest[1:] for path, rest in parts.items()}
    return parts


def _splits(parts: dict[Path, Parts], root: Path) -> tuple[dict[Path, Split | None], dict[Path, Parts]]:
    """Return the split of each image, and its folders without the one that names the split."""
    for level in (0, 1):
        names = {rest[level] for rest in parts.values() if len(rest) > level + 1}
        meant = {name: split_of(name) for name in names}
        held_out = sorted(name for name, split in meant.items() if split in HELD_OUT)
        if "train" in meant.values() and held_out:
            splits = {path: meant.get(rest[level]) if len(rest) > level + 1 else None for path, rest in parts.items()}
            return splits, {path: rest[:level] + rest[level + 1 :] for path, rest in parts.items()}
        if level == 0 and held_out and len(names) > 1:
            others = ", ".join(sorted(names - set(held_out))[:3])
            if not others:
                raise ValueError(
                    f"{root} contains held-out folders only ({', '.join(held_out)}): there is no train folder"
                )
            raise ValueError(
                f"the folder {held_out[0]} of {root} is next to {others}: is it a class or held out? Put the classes "
                "to train on into a folder named train, or rename it"
            )
    named = {path: split_of(path.name) for path in parts}
    if "train" in named.values() and any(split in HELD_OUT for split in named.values()):
        return named, parts
    return dict.fromkeys(parts), parts


def _example(parts: dict[Path, Parts], root: Path) -> str:
    """Return the path of one image relative to `root`."""
    return str(next(iter(parts)).relative_to(root))
