"""Weights in memory-mapped files, so that no rank holds the whole of a model that its layout shards.

Every rank builds the whole model: only then does every layout start from the weights of one process, bit for bit,
whatever the code of the model does. The parameters of a large model are moved into unnamed temporary files as soon as a
module registers them, and are initialised there. Pages that were read or written are dropped from memory every few
milliseconds; the file keeps their contents. Once the layout has determined what this rank keeps, `into_memory` copies
it, and a file is deleted with the last tensor that uses it. A checkpoint also gathers full tensors into such files.
Each rank needs as much disk space as the model has bytes, and twice that during the rehearsal; what does not fit stays
in memory.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import errno
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from labkit.experiment.layout import Layout
from labkit.experiment.periodically import periodically
from labkit.experiment.process_memory import resident_bytes

LARGE_MODEL = 2**28
"""Size of the parameters of a model from which further ones are mapped (bytes)."""
LARGE_TENSOR = 2**20
"""Size of a tensor from which it is mapped (bytes)."""
CHUNK = 2**28
"""Size of a file (bytes): it holds several tensors, because a process may have a thousand open files only."""
RESERVE = 2**28
"""Room that stays free on the disk (bytes)."""
GROWTH = 2**26
"""How much a process may grow before pages are dropped (bytes)."""
PERIOD_S = 0.01
"""Seconds between two checks of its size."""
_MMAP_THRESHOLD, _OWN_MAPPING = -3, 2**22
"""Option of glibc's mallopt(3), and the size from which a block is returned to the system when it is freed (bytes)."""


class _Chunk(mmap.mmap):
    """A temporary file without a name, mapped into memory."""

    files: MappedFiles
    """The files that it is one of."""


_CHUNKS: list[weakref.ref[_Chunk]] = []
"""All files that some tensor still uses, and some that none does any more."""
_CHUNK_OF: WeakValueDictionary[int, _Chunk] = WeakValueDictionary()
"""Mapped file by the address of the tensor's storage."""


class MappedFiles:
    """Temporary files in a folder, in which tensors are stored one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._chunk: _Chunk | None = None
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of a tensor in a file; raises OSError if the disk has no room for it."""
        chunk, offset = self._allocate(tensor.nbytes)
        copy = torch.frombuffer(chunk, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
        _CHUNK_OF[copy.data_ptr()] = chunk
        with torch.no_grad():
            return copy.copy_(tensor)

    def copy_if_possible(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of a tensor, in memory if the disk has no room for it."""
        try:
            return self.copy(tensor)
        except OSError:
            return tensor.clone(memory_format=torch.contiguous_format)

    def _allocate(self, size: int) -> tuple[_Chunk, int]:
        """Return a file and the offset of `size` unused bytes in it, which the disk has."""
        if shutil.disk_usage(self.folder).free < max(size, CHUNK) + RESERVE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
        if self._chunk is None or self._used + size > len(self._chunk):
            length = max(size, CHUNK)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # Without blocks of its own on a full disk, the first write to a page would end the process (SIGBUS).
                os.posix_fallocate(file.fileno(), 0, length)
                self._chunk, self._used = _Chunk(file.fileno(), length), 0
            self._chunk.files = self
            _return_freed_blocks()
            _CHUNKS[:] = [reference for reference in _CHUNKS if reference() is not None]
            _CHUNKS.append(weakref.ref(self._chunk))
        offset = self._used
        self._used += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        return self._chunk, offset


def is_mapped(tensor: Tensor) -> bool:
    """Return whether the storage of the tensor is in a mapped file."""
    return _chunk_of(tensor) is not None


def mapped_like(tensor: Tensor, original: Tensor) -> Tensor:
    """Return a copy of `tensor`: in a file if `original` is mapped, else in memory. OSError if the disk has no room."""
    chunk = _chunk_of(original)
    return tensor.clone() if chunk is None or tensor.device.type != "cpu" else chunk.files.copy(tensor)


def converted(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `tensor.to(device, dtype)`; what is mapped stays mapped on the CPU, also in another dtype."""
    result = tensor.to(device, dtype)
    if result is tensor or device.type != "cpu" or not is_mapped(tensor):
        return result
    with contextlib.suppress(OSError):  # the disk has no room
        return mapped_like(result, tensor)
    return result


def into_memory(module: nn.Module) -> None:
    """Copy the mapped parameters of a module into ordinary memory, one after the other; views of them follow."""
    tensors: dict[int, list[Tensor]] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if is_mapped(tensor):
            tensors.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    for same_storage in tensors.values():
        storage = same_storage[0].untyped_storage().clone()
        for tensor in same_storage:
            where = tensor.storage_offset(), tensor.shape, tensor.stride()
            tensor.data = torch.empty(0, dtype=tensor.dtype).set_(storage, *where)


@contextmanager
def mapped_parameters(files: MappedFiles | None) -> Iterator[None]:
    """Map the parameters that modules register inside the context, once those of a model are large.

    Does nothing without files. Parameters of modules that are copied (`copy.deepcopy`) are not registered and stay in
    memory.
    """
    if files is None:
        yield
        return
    total = 0

    def move(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal total
        if not _is_ordinary(parameter):
            return
        total += parameter.nbytes
        if total > LARGE_MODEL and parameter.nbytes >= LARGE_TENSOR and not _is_shared(parameter):
            with contextlib.suppress(OSError):  # the disk has no room
                parameter.data = files.copy(parameter.data)

    handle = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def pages_dropped(files: MappedFiles | None) -> Iterator[None]:
    """Return memory whenever this process has grown, inside the context: pages of mapped tensors and freed blocks.

    Does nothing without files.
    """
    if files is None:
        yield
        return
    before = resident_bytes()

    def check() -> None:
        nonlocal before
        now = resident_bytes()
        if _CHUNKS and now - before > GROWTH:
            _drop_pages()
            before = resident_bytes()
        before = min(before, now)

    try:
        with periodically(check, PERIOD_S, "labkit-mapped-pages"):
            yield
    finally:
        if _CHUNKS:
            _drop_pages()


def mapped_files(layout: Layout, run: Path) -> MappedFiles | None:
    """Return the files for the tensors of a large model, if the layout shards its weights; else None.

    They are in the temporary folder or in that of the run, whichever has more room, but rather on a disk than in
    memory.
    """
    return MappedFiles(_scratch_folder(run)) if layout.shards_weights else None


def _scratch_folder(run: Path) -> Path:
    folders = (Path(tempfile.gettempdir()), run)
    on_disk = [folder for folder in folders if not _is_in_memory(folder)]
    return max(on_disk or [run], key=lambda folder: shutil.disk_usage(folder).free)


def _is_in_memory(folder: Path) -> bool:
    """Return whether the files of a folder are kept in memory (tmpfs)."""
    folder, kind, depth = folder.resolve(), "", -1
    with open("/proc/self/mounts", "rb") as file:
        mounts = [line.split()[1:3] for line in file]
    for escaped, kind_of_mount in mounts:
        place = Path(os.fsdecode(codecs.escape_decode(escaped)[0]))  # spaces are octal numbers (proc(5))
        if folder.is_relative_to(place) and len(place.parts) >= depth:  # of two at one place the later is in force
            kind, depth = kind_of_mount.decode(), len(place.parts)
    return kind in ("tmpfs", "ramfs")


def _drop_pages() -> None:
    for chunk in [reference() for reference in tuple(_CHUNKS)]:
        if chunk is not None:
            chunk.madvise(mmap.MADV_DONTNEED)
    _call_libc("malloc_trim", 0)


def _return_freed_blocks() -> None:
    """Let this process return large blocks when they are freed: glibc keeps them otherwise, and reuses few of them."""
    _call_libc("mallopt", _MMAP_THRESHOLD, _OWN_MAPPING)


def _call_libc(name: str, *arguments: int) -> None:
    """Call a function of glibc; do nothing with a C library that does not have it."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)


def _chunk_of(tensor: Tensor) -> _Chunk | None:
    if not _CHUNKS or tensor.device.type != "cpu" or tensor.layout is not torch.strided or is_lazy(tensor):
        return None
    return _CHUNK_OF.get(tensor.untyped_storage().data_ptr())


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


def _is_shared(parameter: Tensor) -> bool:
    """Return whether another tensor uses the storage of a parameter: it would not follow into the file."""
    count: Any = getattr(torch._C, "_storage_Use_Count", None)
    storage = parameter.untyped_storage()
    own = 2  # the parameter, and `storage` itself
    return count is None or count(storage._cdata) > own
