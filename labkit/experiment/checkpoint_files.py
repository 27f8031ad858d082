"""What a checkpoint consists of on disk: its list of files with sizes and checksums, and how it becomes visible.

    step-00000100/
        model.safetensors        weights by name, loadable anywhere
        optimizer.safetensors    e.g. `state.blocks.head.weight.exp_avg`
        model-1.safetensors …    the same of the other ranks of a pipeline, each with its own stages
        update.safetensors       what the update rule and the sparsity keep, if they keep anything
        rank-0.safetensors …     what each rank keeps for itself, e.g. what its compressor has not sent yet
        checkpoint.json          step, experiment, and every file with its size and SHA-256; written last

A checkpoint is complete or absent, also after a power cut: it is written under another name, all files and the folder
are synced, then it is renamed. It is believed only if its list is whole, every file in the folder is in the list, every
file in the list is in the folder, and size and checksum of what is read agree. Links are not followed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.experiment import safe_files

FORMAT = 2
MANIFEST = "checkpoint.json"
_NAME = re.compile(r"((model|optimizer)(-[1-9][0-9]{0,4})?|update|rank-[0-9]{1,5})\.safetensors")
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class FileChecksum:
    """Size and checksum of a file."""

    size: int
    """In bytes."""
    sha256: str
    """In hexadecimal digits."""


@dataclass(frozen=True)
class Manifest:
    """What the list of a checkpoint says."""

    step: int
    """Updates done."""
    experiment: dict[str, Any]
    files: dict[str, FileChecksum]
    unscheduled: bool
    """Was it written because the run was stopped, at a step at which an uninterrupted run would not have paused?"""
    code: str
    """SHA-256 of the file with the user's own task when it was written; empty if there is none."""

    def parts(self, kind: str) -> list[str]:
        """Names of all files of a kind (`model`, `optimizer`), the first part first."""
        parts = [name for name in self.files if re.fullmatch(rf"{kind}(-[0-9]+)?\.safetensors", name)]
        return sorted(parts, key=lambda name: (len(name), name))

    @property
    def ranks(self) -> int:
        """How many ranks have kept something for themselves."""
        return sum(name.startswith("rank-") for name in self.files)


class DamagedError(ValueError):
    """A checkpoint cannot be believed; the message is one sentence that names it and its file."""


def rank_file(rank: int) -> str:
    """Name of the file with what a rank keeps for itself."""
    return f"rank-{rank}.safetensors"


# -- writing ----------------------------------------------------------------------------------------------------------


def seal(path: Path) -> FileChecksum:
    """Bring a file that was just written to the disk and return its size and checksum.

    The checksum is computed while the disk works, from the pages that are still in memory.
    """
    with safe_files.reading(path) as descriptor:
        digest = hashlib.sha256()
        worker = threading.Thread(target=_feed, args=(digest, descriptor))
        worker.start()
        try:
            os.fsync(descriptor)
        finally:
            worker.join()
        return FileChecksum(os.fstat(descriptor).st_size, digest.hexdigest())


def _feed(digest: Any, descriptor: int) -> None:
    offset = 0
    while piece := os.pread(descriptor, _CHUNK_BYTES, offset):
        digest.update(piece)
        offset += len(piece)


def write_checksums(folder: Path, writer: int, sums: dict[str, FileChecksum]) -> None:
    """Leave the sums of what one rank has written in the unfinished folder, for the rank that completes it."""
    content = {name: [checksum.size, checksum.sha256] for name, checksum in sums.items()}
    safe_files.write_json(folder / f"sums-{writer}.json", content)


def collect_checksums(folder: Path) -> dict[str, FileChecksum]:
    """The sums that all ranks have left; their notes are removed."""
    sums: dict[str, FileChecksum] = {}
    for path in sorted(folder.glob("sums-*.json")):
        sums |= {name: FileChecksum(*entry) for name, entry in (safe_files.read_json(path) or {}).items()}
        path.unlink()
    return sums


def manifest_content(
    step: int, experiment: dict[str, Any], files: dict[str, FileChecksum], unscheduled: bool = False, code: str = ""
) -> dict[str, Any]:
    """The content of checkpoint.json, with a checksum of its own."""
    content = {
        "format": FORMAT,
        "step": step,
        "experiment": experiment,
        "unscheduled": unscheduled,
        "code": code,
        "files": {name: {"size": checksum.size, "sha256": checksum.sha256} for name, checksum in sorted(files.items())},
    }
    return content | {"sha256": _manifest_checksum(content)}


def _manifest_checksum(content: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in content.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def publish(partial: Path, final: Path) -> None:
    """Make a completed folder visible under its name; what stood there is replaced. It outlasts a power cut."""
    safe_files.sync_folder(partial)
    replaced = final.with_name(f".{final.name}.replaced.partial")
    safe_files.remove_folder(replaced)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    safe_files.sync_folder(final.parent)
    safe_files.remove_folder(replaced)


# -- reading ----------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """What a checkpoint says of itself; DamagedError unless its list is whole and the folder holds just what it lists.

    Sizes are compared; checksums are not: see `verify`.
    """
    content = safe_files.read_json(folder / MANIFEST) if safe_files.is_folder(folder) else None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("step"), int):
        raise DamagedError(f"{folder} is not a checkpoint of this version of labkit")
    files, experiment = content.get("files"), content.get("experiment")
    if (
        content.get("sha256") != _manifest_checksum(content)
        or not isinstance(experiment, dict)
        or not isinstance(files, dict)
    ):
        raise DamagedError(f"the checkpoint {folder.name} is damaged: {MANIFEST} is not as it was written")
    sums: dict[str, FileChecksum] = {}
    for name, entry in files.items():
        well_formed = (
            isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        )
        if not well_formed or not _NAME.fullmatch(name):
            raise DamagedError(f"the checkpoint {folder.name} is damaged: {MANIFEST} lists {name!r}, no part of ours")
        sums[name] = FileChecksum(entry["size"], entry["sha256"])
    if missing := {"model.safetensors", "optimizer.safetensors"} - set(sums):
        raise DamagedError(f"the checkpoint {folder.name} is damaged: {MANIFEST} does not list {min(missing)}")
    if extra := set(os.listdir(folder)) - set(sums) - {MANIFEST}:
        raise DamagedError(f"the checkpoint {folder.name} is damaged: {min(extra)!r} does not belong to it")
    for name, expected in sums.items():
        _require_size(folder, name, expected)
    return Manifest(
        content["step"], experiment, sums, content.get("unscheduled") is True, str(content.get("code") or "")
    )


def _require_size(folder: Path, name: str, expected: FileChecksum) -> None:
    try:
        size = safe_files.size(folder / name)
    except OSError as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise DamagedError(f"the checkpoint {folder.name} is damaged: {name} {why}") from None
    if size != expected.size:
        raise DamagedError(
            f"the checkpoint {folder.name} is damaged: {name} has {size:,} bytes, {expected.size:,} were written"
        )


def verify(folder: Path, contents: Manifest, names: Iterable[str]) -> None:
    """Compare the checksums of these files with the list; DamagedError with the name of one that has changed."""
    for name in names:
        digest = hashlib.sha256()
        try:
            with safe_files.reading(folder / name) as descriptor:
                _feed(digest, descriptor)
        except OSError as error:
            why = f"cannot be read ({error.strerror})"
            raise DamagedError(f"the checkpoint {folder.name} is damaged: {name} {why}") from None
        if digest.hexdigest() != contents.files[name].sha256:
            raise DamagedError(f"the checkpoint {folder.name} is damaged: {name} is not as it was written (SHA-256)")


def link_checkpoint(folder: Path, contents: Manifest, target: Path) -> None:
    """Let a checkpoint also be at `target`, which must not exist, by hard links where possible.

    So it stays whole when its own run removes it. OSError, FileNotFoundError if it was removed meanwhile.
    """
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True, mode=0o700)
    for name in (*contents.files, MANIFEST):
        safe_files.link_or_copy(folder / name, partial / name)
    publish(partial, target)
