"""Tensors to and from safetensors files: the only module that reads or writes them.

It imports torch only when it is used, because forms import this package too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.experiment import safe_files

if TYPE_CHECKING:
    from torch import Tensor


def save_file(tensors: Mapping[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """Write named tensors of any device and memory layout to a new file, replacing a file or link at `path`.

    `about` is stored as the metadata of the file.
    """
    from safetensors.torch import save_file as write

    path.unlink(missing_ok=True)
    prepared: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        prepared[name] = _with_own_storage(tensor, storages)
    write(prepared, path, about)


def _with_own_storage(tensor: Tensor, storages: set[int]) -> Tensor:
    """Return the tensor on the CPU, contiguous and sharing its storage with no other tensor, as the format requires.

    `storages` holds the storage addresses of the tensors before it; that of the result is added.
    """
    import torch

    tensor = tensor.detach().cpu()
    storage = tensor.untyped_storage()
    owns_storage = storage.nbytes() == tensor.numel() * tensor.element_size() and storage.data_ptr() not in storages
    if not (owns_storage and tensor.is_contiguous()):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    storages.add(tensor.untyped_storage().data_ptr())
    return tensor


def load_arrays(path: Path) -> dict[str, Any]:
    """Return the tensors of a file as numpy arrays, without importing torch."""
    from safetensors.numpy import load_file as read

    safe_files.size(path)
    arrays: dict[str, Any] = read(path)
    return arrays


def load_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a regular file on the CPU; raises OSError for a link, SafetensorError if it is damaged."""
    from safetensors.torch import load_file as read

    safe_files.size(path)
    tensors: dict[str, Tensor] = read(path)
    return tensors
