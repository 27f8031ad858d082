"""Which device each storage pretends to be on."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

CPU, CUDA = "cpu", "cuda"


@dataclass(frozen=True)
class Label:
    """What is known of a storage on the GPU."""

    storage: StorageWeakRef
    """As long as it exists, no other storage has the same address."""
    place: str
    """The line of labkit that allocated it."""

    @property
    def n_bytes(self) -> int:
        """Size of the storage now (bytes): `fully_shard` frees the memory of storages that it keeps."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return 0 if storage is None else storage.nbytes()


class Labels:
    """The storages on the GPU; all others are on the host."""

    def __init__(self) -> None:
        self._by_address: dict[int, Label] = {}
        self._next_sweep = 10_000
        self._lock = threading.RLock()

    def of(self, tensor: Tensor) -> str:
        """Return the device of a tensor, `cpu` or `cuda`."""
        storage = _storage(tensor)
        return CUDA if storage is not None and storage._cdata in self._by_address else CPU

    def put(self, tensor: Tensor, device: str, place: str = "") -> None:
        """Label the storage of a tensor, whatever its label was."""
        storage = _storage(tensor)
        if storage is None:
            return
        with self._lock:
            if device == CPU:
                self._by_address.pop(storage._cdata, None)
            elif storage._cdata not in self._by_address:
                self._by_address[storage._cdata] = Label(StorageWeakRef(storage), place)
                if len(self._by_address) > self._next_sweep:
                    self._next_sweep = 2 * len(self.on_gpu()) + 10_000

    def on_gpu(self) -> list[Label]:
        """Return the storages on the GPU that are still in use; other threads may label some meanwhile."""
        with self._lock:
            self._by_address = {key: label for key, label in self._by_address.items() if not label.storage.expired()}
            return list(self._by_address.values())


def _storage(tensor: Any) -> torch.UntypedStorage | None:
    """Return the storage that holds a tensor's numbers; None if it has none (meta tensors, wrappers)."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    if tensor.layout is torch.sparse_csr:
        tensor = tensor.values()
    elif tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    try:
        storage: torch.UntypedStorage = tensor.untyped_storage()
    except RuntimeError:  # it has none
        return None
    return storage


LABELS = Labels()
"""The labels of this process."""
