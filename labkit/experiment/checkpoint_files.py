"""The files of a checkpoint: their names, the manifest with sizes and checksums, and atomic publication.

    step-00000100/
        model.safetensors        weights by name, loadable anywhere
        optimizer.safetensors    e.g. `state.blocks.head.weight.exp_avg`
        model-1.safetensors …    the same of the other ranks of a pipeline, each with its own stages
        update.safetensors       the state of the update rule and of the sparsity method, if they have any
        rank-0.safetensors …     the local state of each rank, e.g. what its compressor has not sent yet
        checkpoint.json          the manifest: step, experiment, and every file with size and SHA-256; written last

A checkpoint is complete or absent, even after a power failure: it is written under another name, all files and the
folder are synced, then it is renamed. It is trusted only if its manifest is intact, the folder contains exactly the
files that the manifest lists, and the size and checksum of what is read agree. Links are not followed.
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
    """Size in bytes."""
    sha256: str
    """SHA-256 in hexadecimal digits."""


@dataclass(frozen=True)
class Manifest:
    """Contents of the manifest of a checkpoint."""

    step: int
    """Number of optimizer steps done."""
    experiment: dict[str, Any]
    files: dict[str, FileChecksum]
    unscheduled: bool
    """Whether it was written because the run was stopped, at a step without a scheduled checkpoint or evaluation."""
    code: str
    """SHA-256 of the file with the user's own task when the checkpoint was written; empty if there is none."""

    def parts(self, kind: str) -> list[str]:
        """Return the names of all files of a kind (`model`, `optimizer`), the first part first."""
        parts = [name for name in self.files if re.fullmatch(rf"{kind}(-[0-9]+)?\.safetensors", name)]
        return sorted(parts, key=lambda name: (len(name), name))

    @property
    def ranks(self) -> int:
        """Number of ranks that stored local state."""
        return sum(name.startswith("rank-") for name in self.files)


class DamagedError(ValueError):
    """Raised for a checkpoint that cannot be trusted; the message names it and its damaged file in one sentence."""


def rank_file(rank: int) -> str:
    """Return the name of the file with a rank's local state."""
    return f"rank-{rank}.safetensors"


# -- writing ----------------------------------------------------------------------------------------------------------


def sync_and_hash(path: Path) -> FileChecksum:
    """Flush a file that was just written to the disk and return its size and checksum.

    The checksum is computed during the fsync, from the pages that are still in memory.
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
    """Add the content of the file behind `descriptor` to the digest."""
    offset = 0
    while piece := os.pread(descriptor, _CHUNK_BYTES, offset):
        digest.update(piece)
        offset += len(piece)


def write_checksums(folder: Path, writer: int, sums: dict[str, FileChecksum]) -> None:
    """Write the checksums of a rank's files into the unfinished folder, for the rank that completes the checkpoint."""
    content = {name: [checksum.size, checksum.sha256] for name, checksum in sums.items()}
    safe_files.write_json(folder / f"sums-{writer}.json", content)


def collect_checksums(folder: Path) -> dict[str, FileChecksum]:
    """Return the checksums that all ranks have written, and remove their files."""
    sums: dict[str, FileChecksum] = {}
    for path in sorted(folder.glob("sums-*.json")):
        sums |= {name: FileChecksum(*entry) for name, entry in (safe_files.read_json(path) or {}).items()}
        path.unlink()
    return sums


def manifest_content(
    step: int, experiment: dict[str, Any], files: dict[str, FileChecksum], unscheduled: bool = False, code: str = ""
) -> dict[str, Any]:
    """Return the content of checkpoint.json, with a checksum of itself."""
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
    """Return the SHA-256 of the manifest without its own checksum."""
    text = json.dumps({key: value for key, value in content.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def publish(partial: Path, final: Path) -> None:
    """Make a completed folder visible under its final name and replace what is there; durable after a power failure."""
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
    """Return the manifest of a checkpoint.

    Raises DamagedError unless the manifest is intact and the folder contains exactly what it lists. Sizes are compared;
    checksums are not: see `verify`.
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
        valid = isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        if not valid or not _NAME.fullmatch(name):
            raise DamagedError(
                f"the checkpoint {folder.name} is damaged: {MANIFEST} lists {name!r}, which is not one of its files"
            )
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
    """Raise DamagedError unless the file exists with the expected size."""
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
    """Compare the checksums of these files with the manifest; raise DamagedError for one that has changed."""
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
    """Make a checkpoint also available at `target`, which must not exist, by hard links where possible.

    It then stays complete when the run that wrote it removes it. Raises OSError, FileNotFoundError if it was removed
    meanwhile.
    """
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True, mode=0o700)
    for name in (*contents.files, MANIFEST):
        safe_files.link_or_copy(folder / name, partial / name)
    publish(partial, target)
