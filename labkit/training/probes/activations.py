"""Peak number of bytes that autograd saves for the backward pass.

Every tensor that an operation saves passes through a pair of hooks, which do not change it. A storage counts once,
however many views of it are saved; storages of parameters and buffers do not count, because they exist anyway. Under
activation checkpointing, recomputed tensors count while they exist, and so do the results that selective checkpointing
keeps. torch passes neither of them to hooks from outside, so two of its classes are replaced while counting.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint

from labkit.parallel.shard import to_local


class _Saved:
    """Wrapper of a saved tensor; when autograd frees it, the count falls."""

    __slots__ = ("_count", "_key", "tensor")

    def __init__(self, tensor: Tensor, count: Activations, key: int) -> None:
        self.tensor, self._count, self._key = tensor, count, key

    def __del__(self) -> None:
        self._count.release(self._key)


class Activations:
    """Context manager that counts saved activations; `peak` is in bytes."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._saved_storages: dict[int, list[int]] = {}  # address of a storage: [number of times saved, bytes]
        self._current = self.peak = 0
        self._lock = threading.RLock()  # on a GPU the backward pass runs in a separate thread
        self._parameter_addresses: set[int] = set()
        self._hook_handles: list[Any] = []

    def __enter__(self) -> Activations:
        self.update_addresses()
        for module in self._modules:
            # `fully_shard` gathers parameters into new memory each time, just before a part of the model runs.
            for part in (module, *(child for child in module.modules() if hasattr(child, "unshard"))):
                self._hook_handles.append(part.register_forward_pre_hook(self.update_addresses))
        self._saved_tensors_hooks = saved_tensors_hooks(self._pack, _unpack)
        self._saved_tensors_hooks.__enter__()
        self._originals = {name: getattr(checkpoint, name) for name in _COUNTING}
        for name, counting in _COUNTING.items():
            setattr(checkpoint, name, counting(self, self._originals[name]))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name, original in self._originals.items():
            setattr(checkpoint, name, original)
        self._saved_tensors_hooks.__exit__(kind, error, at)
        for hook in self._hook_handles:
            hook.remove()

    def update_addresses(self, *hook_arguments: Any) -> None:
        """Store the current addresses of parameters and buffers, which do not count."""
        self._parameter_addresses = {
            to_local(tensor).untyped_storage().data_ptr()
            for module in self._modules
            for tensor in (*module.parameters(), *module.buffers())
        }

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        key = self.save(tensor)
        return tensor if key is None else _Saved(tensor, self, key)

    def save(self, tensor: Tensor) -> int | None:
        """Count a saved tensor; return the key to `release` later, or None if the tensor does not count."""
        storage = to_local(tensor).untyped_storage()
        key = storage.data_ptr()
        if not key or key in self._parameter_addresses:
            return None
        with self._lock:
            entry = self._saved_storages.setdefault(key, [0, storage.nbytes()])
            entry[0] += 1
            if entry[0] == 1:
                self._current += entry[1]
                self.peak = max(self.peak, self._current)
        return key

    def save_while_alive(self, tensor: Any, holder: Any) -> None:
        """Count a tensor as saved for as long as `holder` exists."""
        key = self.save(tensor) if isinstance(tensor, Tensor) else None
        if key is not None:
            weakref.finalize(holder, self.release, key)

    def release(self, key: int) -> None:
        """Stop counting one saved tensor of the storage `key`."""
        with self._lock:
            entry = self._saved_storages[key]
            entry[0] -= 1
            if not entry[0]:
                self._current -= entry[1]
                del self._saved_storages[key]


def _unpack(saved: Tensor | _Saved) -> Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved


def _counting_recomputation(count: Activations, original: Any) -> type:
    """Return a counting subclass of torch's hooks for recomputation in a checkpointed part."""

    class Recomputation(original):  # type: ignore[misc]
        pack_hook: Any

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            count.update_addresses()  # recomputation of a part begins; `fully_shard` has just gathered its parameters
            pack_original: Any = self.pack_hook

            def pack(tensor: Tensor) -> Any:
                copy = tensor.detach()  # a new object, which exists exactly as long as the checkpoint keeps it
                count.save_while_alive(copy, copy)
                return pack_original(copy)

            self.pack_hook = pack

    return Recomputation


def _counting_kept(count: Activations, original: Any) -> type:
    """Return a counting subclass of torch's holder of a result that selective checkpointing keeps."""

    class Kept(original):  # type: ignore[misc]
        def __init__(self, value: Any) -> None:
            super().__init__(value)
            count.save_while_alive(value, self)

    return Kept


_COUNTING = {"_recomputation_hook": _counting_recomputation, "_VersionWrapper": _counting_kept}
"""Private classes of torch.utils.checkpoint, and the functions that derive counting subclasses from them."""
