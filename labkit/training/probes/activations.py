"""How many bytes autograd keeps for the backward pass, at most, at once.

Every tensor that an operation saves passes through a pair of hooks, which leave it as it is. A storage counts once,
however many views of it are saved; storages of parameters and buffers do not count, because they are there anyway.
Under activation checkpointing what is computed again counts too, while it lives, and so do the results that selective
checkpointing keeps: torch hands neither of them to hooks from outside, so two of its classes are exchanged meanwhile.
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
    """A saved tensor; when autograd lets go of it, the count falls."""

    __slots__ = ("_count", "_key", "tensor")

    def __init__(self, tensor: Tensor, count: Activations, key: int) -> None:
        self.tensor, self._count, self._key = tensor, count, key

    def __del__(self) -> None:
        self._count.forget(self._key)


class Activations:
    """Counts while it is open, as a context manager; `peak` is in bytes."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._live: dict[int, list[int]] = {}  # address of a storage: times saved, bytes
        self._now = self.peak = 0
        self._lock = threading.RLock()  # on a GPU the backward pass runs in a thread of its own
        self._known: set[int] = set()
        self._open: list[Any] = []

    def __enter__(self) -> Activations:
        self.look()
        for module in self._modules:
            # `fully_shard` gathers parameters into new memory, each time, just before a part of the model runs.
            for part in (module, *(child for child in module.modules() if hasattr(child, "unshard"))):
                self._open.append(part.register_forward_pre_hook(self.look))
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        self._exchanged = {name: getattr(checkpoint, name) for name in _COUNTING}
        for name, counting in _COUNTING.items():
            setattr(checkpoint, name, counting(self, self._exchanged[name]))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name, original in self._exchanged.items():
            setattr(checkpoint, name, original)
        self._hooks.__exit__(kind, error, at)
        for hook in self._open:
            hook.remove()

    def look(self, *of_a_hook: Any) -> None:
        """Note where the parameters and buffers lie now."""
        self._known = {
            to_local(tensor).untyped_storage().data_ptr()
            for module in self._modules
            for tensor in (*module.parameters(), *module.buffers())
        }

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        key = self.note(tensor)
        return tensor if key is None else _Saved(tensor, self, key)

    def note(self, tensor: Tensor) -> int | None:
        """The tensor is kept from now on; what to `forget` later, None if it does not count."""
        storage = to_local(tensor).untyped_storage()
        key = storage.data_ptr()
        if not key or key in self._known:
            return None
        with self._lock:
            entry = self._live.setdefault(key, [0, storage.nbytes()])
            entry[0] += 1
            if entry[0] == 1:
                self._now += entry[1]
                self.peak = max(self.peak, self._now)
        return key

    def follow(self, tensor: Any, holder: Any) -> None:
        """The tensor is kept as long as `holder` lives."""
        key = self.note(tensor) if isinstance(tensor, Tensor) else None
        if key is not None:
            weakref.finalize(holder, self.forget, key)

    def forget(self, key: int) -> None:
        """It is kept no longer."""
        with self._lock:
            entry = self._live[key]
            entry[0] -= 1
            if not entry[0]:
                self._now -= entry[1]
                del self._live[key]


def _unpack(saved: Tensor | _Saved) -> Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved


def _recomputing(count: Activations, original: Any) -> type:
    """The hooks of torch for what a checkpointed part computes again, with counting."""

    class Recomputation(original):  # type: ignore[misc]
        pack_hook: Any

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            count.look()  # a part begins to be computed again, and `fully_shard` has just gathered it
            keep: Any = self.pack_hook

            def pack(tensor: Tensor) -> Any:
                own = tensor.detach()  # an object of its own: it lives exactly as long as the checkpoint keeps it
                count.follow(own, own)
                return keep(own)

            self.pack_hook = pack

    return Recomputation


def _keeping(count: Activations, original: Any) -> type:
    """What holds a result that selective checkpointing keeps, with counting."""

    class Kept(original):  # type: ignore[misc]
        def __init__(self, value: Any) -> None:
            super().__init__(value)
            count.follow(value, self)

    return Kept


_COUNTING = {"_recomputation_hook": _recomputing, "_VersionWrapper": _keeping}
"""Classes of torch.utils.checkpoint, and what makes counting ones of them."""
