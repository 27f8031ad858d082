"""Weights in files that are mapped into memory, so that no rank holds a whole model that its layout shards.

Every rank builds the whole model: only then does every layout begin with the weights of one process, bit for bit,
whatever the code of the model does. The parameters of a large model are moved into files without a name as soon as a
module registers them, and are initialised there. Pages that were read or written are dropped from memory every few
milliseconds; the file keeps their contents. Once a layout has decided what this rank keeps, `into_memory` copies that,
and a file is gone with the last tensor that uses it. A checkpoint gathers full tensors into such files, too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

LARGE = 2**28
"""Size of the parameters of a model from which further ones are mapped (bytes)."""
LEAST = 2**20
"""Size of a tensor from which it is mapped (bytes)."""
RESIDENT = 2**26
"""How much a process may grow before pages are dropped (bytes)."""
PERIOD_S = 0.01
"""Seconds between two checks of its size."""
_MMAP_THRESHOLD, _OWN_MAPPING = -3, 2**22
"""Option of glibc's mallopt(3), and the size from which a block is returned to the system when it is freed (bytes)."""


class _Mapping(mmap.mmap):
    """A file without a name, mapped into memory."""

    folder: Path
    """Folder on whose disk the file is."""


_MAPPINGS: WeakValueDictionary[int, _Mapping] = WeakValueDictionary()
"""Mapped files by the address of the tensor's storage."""


def mapped_copy(tensor: Tensor, folder: Path) -> Tensor:
    """Return a contiguous copy of a tensor in a new file without a name in `folder`, which should be on a disk.

    Raises OSError if there is no room for it.
    """
    size = tensor.numel() * tensor.element_size()
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # otherwise a full disk would end the process (SIGBUS)
        mapping = _Mapping(file.fileno(), size)
    mapping.folder = folder
    copy = torch.frombuffer(mapping, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
    _MAPPINGS[copy.data_ptr()] = mapping
    with torch.no_grad():
        return copy.copy_(tensor)


def is_mapped(tensor: Tensor) -> bool:
    """Return whether the storage of the tensor is a mapped file."""
    return _mapping_of(tensor) is not None


def converted(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `tensor.to(device, dtype)`; what is mapped stays mapped on the CPU, also in another dtype."""
    result, mapping = tensor.to(device, dtype), _mapping_of(tensor)
    if mapping is None or result is tensor or device.type != "cpu":
        return result
    return mapped_copy(result, mapping.folder)


def into_memory(module: nn.Module) -> None:
    """Copy the mapped parameters of a module into ordinary memory, one after the other."""
    for parameter in module.parameters():
        if type(parameter) is nn.Parameter and is_mapped(parameter):
            parameter.data = parameter.data.clone()


@contextmanager
def mapped_parameters(folder: Path) -> Iterator[None]:
    """Map the parameters that modules register inside the context, once those of a model are `LARGE`.

    Those for which the disk has no room stay in memory.
    """
    total = 0

    def move(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal total
        if not _is_ordinary(parameter):
            return
        size = parameter.numel() * parameter.element_size()
        total += size
        if total > LARGE and size >= LEAST:
            try:
                parameter.data = mapped_copy(parameter.data, folder)
            except OSError:
                return
            _return_freed_blocks()

    handle = register_module_parameter_registration_hook(move)
    try:
        with pages_dropped():
            yield
    finally:
        handle.remove()


@contextmanager
def pages_dropped() -> Iterator[None]:
    """Return memory whenever this process has grown, inside the context: pages of mapped tensors and freed blocks."""
    ended = threading.Event()

    def watch() -> None:
        before = resident_bytes()
        while not ended.wait(PERIOD_S):
            if _MAPPINGS and resident_bytes() - before > RESIDENT:
                _drop_pages()
                before = resident_bytes()

    thread = threading.Thread(target=watch, name="drop mapped pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _MAPPINGS:
            _drop_pages()


def scratch_folder(run: Path) -> Path:
    """Return the folder for large files of a process: the temporary folder, or, if that is in memory, the run's."""
    return _folder_on_disk(Path(tempfile.gettempdir()), run)


def _folder_on_disk(*folders: Path) -> Path:
    """Return the first of the folders whose files are not kept in memory (tmpfs); the last one if all of them are."""
    with open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
        mounts = [line.split()[1:3] for line in file]
    for folder in folders:
        above = [(place, kind) for place, kind in mounts if folder.resolve().is_relative_to(_unescaped(place))]
        if above and max(above, key=lambda mount: len(mount[0]))[1] not in ("tmpfs", "ramfs"):
            return folder
    return folders[-1]


def _unescaped(place: str) -> str:
    """Return a mount point as it is: spaces and the like are written as octal numbers (proc(5))."""
    return place.encode().decode("unicode_escape")


def _drop_pages() -> None:
    for mapping in list(_MAPPINGS.values()):
        mapping.madvise(mmap.MADV_DONTNEED)
    _call_libc("malloc_trim", 0)


def _return_freed_blocks() -> None:
    """Let this process return large blocks when they are freed: glibc keeps them otherwise, and reuses few of them."""
    _call_libc("mallopt", _MMAP_THRESHOLD, _OWN_MAPPING)


def _call_libc(name: str, *arguments: int) -> None:
    """Call a function of glibc; do nothing with a C library that does not have it."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)


def resident_bytes() -> int:
    """Return the memory of this process that is resident (bytes)."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def _mapping_of(tensor: Tensor) -> _Mapping | None:
    if not _MAPPINGS or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return None
    return _MAPPINGS.get(tensor.untyped_storage().data_ptr())


def _is_ordinary(parameter: Any) -> bool:
    """Return whether a registered object is a parameter in memory that can be moved."""
    return (
        type(parameter) is nn.Parameter
        and not is_lazy(parameter)
        and parameter.device.type == "cpu"
        and parameter.layout is torch.strided
        and not parameter.is_quantized
        and parameter.is_contiguous()
        and not is_mapped(parameter)
    )
