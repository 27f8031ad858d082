"""Snapshots of a task's state: a rehearsal leaves no trace, and everything it changes is restored to the last bit.

Copying the task is not an option: models with the old weight normalisation cannot be copied, and large ones would not
fit twice. So the state is recorded before and restored afterwards: parameters and buffers from a copy, gradients, the
attributes of every module, data set and loss, the contents of their lists, dicts and closures, and random generators.
Module-level variables of a file are not covered.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from labkit.workloads.mapped import LARGE_TENSOR, is_mapped, mapped_like
from labkit.workloads.seed import unchanged_generators

MAX_WEIGHT_BYTES = 2**29
"""Size of the parameters up to which they are copied (bytes); beyond it only small ones are copied and restored."""
MAX_COPY_BYTES = 2**29
"""Maximum memory for copies of other tensors and arrays (bytes); the rest is restored by reference only."""
MAX_OBJECTS, MAX_ITEMS, MAX_DEPTH = 20_000, 10_000, 6
"""Maximum number of objects, of entries of a list or dict, and of steps from the task that are recorded."""
MAX_OUTSIDE_BYTES = 2**20
"""Maximum size of tensors and arrays outside of modules that are copied (bytes): data sets are read, not written."""
_ATOMS = (int, float, complex, bool, str, bytes, type(None), type, BuiltinFunctionType, ModuleType)
_LIBRARIES = ("datasets", "pyarrow", "transformers", "tokenizers", "PIL", "pandas")
"""Libraries whose objects hold files and tables, but nothing that a training step could depend on."""
_PLAIN = frozenset(
    getattr(nn, name)
    for name in (
        *("Linear", "Conv1d", "Conv2d", "Embedding", "LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm1d", "BatchNorm2d"),
        *("ReLU", "GELU", "SiLU", "Tanh", "Flatten", "Dropout", "Identity", "MaxPool2d", "AdaptiveAvgPool2d"),
    )
)
_OWN = frozenset(vars(nn.Module())) | {"_reversed_padding_repeated_twice"}
"""Attributes that torch's layers have in addition to their settings."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def restored(*roots: Any, device: torch.device, weights: bool = True) -> Iterator[Snapshot]:
    """Restore what the `roots` (a task, a module, a data set) contain, and all random generators, at the end.

    Yields the snapshot, which says whether a plain attribute of a module has changed and can restore everything
    earlier. Without `weights`, parameters are not copied: for passes that cannot change them. The large ones of a
    model beyond `MAX_WEIGHT_BYTES` never are; those in mapped files are copied into such files.
    """
    snapshot = Snapshot(weights, weights and _weights_fit(roots))
    for root in roots:
        snapshot.record(root, 0)
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    with unchanged_generators():
        try:
            yield snapshot
        finally:
            snapshot.undo()
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, device)


@contextmanager
def undisturbed(*parts: Any, weights: bool = True) -> Iterator[Snapshot]:
    """Do the same as `restored` for `parts` on the device of the first model among them."""
    tensors = (tensor for part in parts if isinstance(part, nn.Module) for tensor in part.parameters())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    with restored(*parts, device=device, weights=weights) as snapshot:
        yield snapshot


class Snapshot:
    """The recorded state of the roots, as functions that restore it."""

    def __init__(self, weights: bool = True, large_weights: bool = True) -> None:
        self._weights = weights
        self.has_weights = large_weights
        """Whether all parameters were copied, so that a pass may change them."""
        self._undo: list[Callable[[], Any]] = []
        self._generators: list[Callable[[], Any]] = []
        self._counts: list[tuple[Tensor, Tensor]] = []
        """Buffers with a single element, and copies of them."""
        self._not_copied: list[tuple[Tensor, int]] = []
        """Tensors that cannot be restored, with their version counters."""
        self._seen: dict[int, Any] = {}
        self._bytes = 0
        self._inside = False
        """Whether the object being recorded is part of a module."""
        self._attributes: list[tuple[nn.Module, dict[str, Any]]] = []

    def undo(self, generators: bool = True) -> None:
        """Restore everything, any number of times; without `generators` the random generators are left as they are."""
        for action in (*self._undo, *(self._generators if generators else ())):
            action()

    def changed(self) -> bool:
        """Return True if a number, a text or a reference among the attributes of a module has changed."""
        for module, before in self._attributes:
            now = vars(module)
            if now.keys() != before.keys():
                return True
            for name, value in before.items():
                if name != "training" and now[name] is not value and not _same(now[name], value):
                    return True
        return False

    def lost(self) -> list[Tensor]:
        """Return the tensors that were changed and cannot be restored."""
        return [tensor for tensor, version in self._not_copied if tensor._version != version]

    def counters(self) -> list[Callable[[int], None]]:
        """Return functions that advance the modules' counters: integer attributes and one-element buffers that changed.

        They count from the recorded value.
        """
        advances: list[Callable[[int], None]] = [
            partial(_set_forward, module, name, value) for module, name, value in self._counted()
        ]
        for buffer, copy in self._counts:
            if not torch.equal(buffer, copy):
                advances.append(partial(_add, buffer))
        return advances

    def counter(self) -> str:
        """Return the name of an integer attribute of a module that has changed, e.g. `Net.calls`; empty if none has."""
        return next((f"{type(module).__name__}.{name}" for module, name, _ in self._counted()), "")

    def _counted(self) -> Iterator[tuple[nn.Module, str, int]]:
        """Yield module, name and recorded value of every integer attribute that has changed."""
        for module, before in self._attributes:
            for name, value in before.items():
                if type(value) is int and vars(module).get(name) != value:
                    yield module, name, value

    def record(self, value: Any, depth: int) -> None:
        """Record a value and what it contains."""
        if isinstance(value, _ATOMS) or id(value) in self._seen:
            return
        if len(self._seen) >= MAX_OBJECTS or (depth > MAX_DEPTH and not isinstance(value, nn.Module | Tensor)):
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._record_tensor(value)
        elif isinstance(value, nn.Module):
            if _is_plain(value):
                return self._record_plain(value)
            self._attributes.append((value, dict(vars(value))))
            inside, self._inside = self._inside, True
            self._record_attributes(value, 0)  # however deep it is in the model
            self._inside = inside
        elif isinstance(value, FunctionType):
            for cell in value.__closure__ or ():
                self._record_cell(cell, depth)
        elif isinstance(value, partial):
            self.record([value.func, *value.args, *value.keywords.values()], depth)
        elif isinstance(value, np.ndarray):
            self._record_array(value)
        elif self._record_generator(value):
            pass
        elif isinstance(value, list | tuple | deque | dict | set):
            self._record_items(value, depth)
        elif isinstance(value, MethodType):
            self.record(value.__self__, depth)
        elif _has_attributes(value):
            self._record_attributes(value, depth)

    def _record_attributes(self, value: Any, depth: int) -> None:
        attributes = vars(value)
        before = dict(attributes)
        self._undo.append(lambda: _put_back(attributes, before))
        for inner in before.values():
            self.record(inner, depth + 1)

    def _record_plain(self, module: nn.Module) -> None:
        """Record a torch layer without hooks in a tenth of the time: only its tensors can change."""
        before = dict(vars(module))
        held = dict(module._parameters), dict(module._buffers)
        self._undo.append(lambda: _put_back_plain(module, before, *held))
        for value in (*held[0].values(), *held[1].values()):
            if value is not None and id(value) not in self._seen:
                self._seen[id(value)] = value
                inside, self._inside = self._inside, True
                self._record_tensor(value)
                self._inside = inside

    def _record_cell(self, cell: Any, depth: int) -> None:
        try:
            before = cell.cell_contents
        except ValueError:  # nothing in it yet
            return
        self._undo.append(lambda: setattr(cell, "cell_contents", before))
        self.record(before, depth + 1)

    def _record_items(self, value: Any, depth: int) -> None:
        if len(value) > MAX_ITEMS:
            return
        if isinstance(value, dict):
            pairs = dict(value)
            self._undo.append(lambda: _put_back(value, pairs))
        elif isinstance(value, set):
            members = set(value)
            self._undo.append(lambda: _replace(value, members))
        elif isinstance(value, list | deque):
            entries = list(value)
            self._undo.append(lambda: _refill(value, entries))
        for inner in list(value.values()) if isinstance(value, dict) else list(value):
            self.record(inner, depth + 1)

    def _record_tensor(self, value: Tensor) -> None:
        if value.is_leaf:
            gradient = value.grad
            self._undo.append(lambda: setattr(value, "grad", gradient))
        for hook in _hooks_of(value):
            self.record(hook, 0)
        if is_lazy(value):  # no shape and no values yet
            return
        size = value.numel() * value.element_size()
        plain = type(value) in (Tensor, nn.Parameter, nn.Buffer) and value.layout is torch.strided
        is_weight = isinstance(value, nn.Parameter)
        if not plain or value.is_inference() or _overlaps(value):
            return
        version = value._version
        is_large_weight = is_weight and size >= LARGE_TENSOR
        if is_weight and not self._weights:
            return
        if not (self.has_weights if is_large_weight else is_weight or self._room_for(size)):
            self._not_copied.append((value, version))
            return
        try:
            copy = mapped_like(value.detach(), value)
        except OSError:  # the disk has no room for copies of mapped weights
            self.has_weights = False
            self._not_copied.append((value, version))
            return
        if value.numel() == 1 and not is_weight:
            self._counts.append((value, copy))

        def put_back() -> None:
            # Batch normalisation updates its running statistics without increasing the version counter.
            if value._version != version or not is_weight:
                with torch.no_grad():
                    value.detach().copy_(copy)

        self._undo.append(put_back)

    def _record_array(self, value: np.ndarray[Any, Any]) -> None:
        if value.dtype.hasobject or not value.flags.writeable or not self._room_for(value.nbytes):
            return
        copy = value.copy()
        self._undo.append(lambda: np.copyto(value, copy))

    def _record_generator(self, value: Any) -> bool:
        """Record the state of a random generator; return False for any other value."""
        if isinstance(value, np.random.Generator):
            value = value.bit_generator
        if isinstance(value, np.random.BitGenerator):
            state: Any = value.state
            self._generators.append(lambda: setattr(value, "state", state))
        elif isinstance(value, np.random.RandomState):
            state = value.get_state()
            self._generators.append(lambda: value.set_state(state))
        elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            state = value.getstate()
            self._generators.append(lambda: value.setstate(state))
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._generators.append(lambda: value.set_state(state))
        else:
            return False
        return True

    def _room_for(self, size: int) -> bool:
        """Reserve `size` bytes for a copy; return False if that would exceed the limits."""
        if self._bytes + size > MAX_COPY_BYTES or (size > MAX_OUTSIDE_BYTES and not self._inside):
            return False
        self._bytes += size
        return True


def _weights_fit(roots: Iterable[Any]) -> bool:
    """Return whether the parameters of the modules among the roots that are in memory are few enough to be copied."""
    modules = (root for root in roots if isinstance(root, nn.Module))
    parameters = {id(p): p for module in modules for p in module.parameters() if not is_lazy(p)}.values()
    return sum(value.nbytes for value in parameters if not is_mapped(value)) <= MAX_WEIGHT_BYTES


def _hooks_of(tensor: Tensor) -> list[Any]:
    """Return the hooks that are registered on a tensor."""
    tables = (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None))
    return [hook for table in tables if table for hook in table.values()]


def _set_forward(module: nn.Module, name: str, value: int, steps: int) -> None:
    setattr(module, name, value + steps)


def _add(counter: Tensor, steps: int) -> None:
    counter.add_(steps)


def _overlaps(tensor: Tensor) -> bool:
    """Return True if several elements share one place in memory (expand), so that in-place writes are impossible."""
    return any(size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _is_plain(module: nn.Module) -> bool:
    """Return True for a layer of torch's own, without hooks and without attributes that somebody has attached to it."""
    attributes = vars(module)
    if type(module) not in _PLAIN or any(attributes[name] for name in _HOOKS):
        return False
    return all(isinstance(attributes[name], (*_ATOMS, tuple)) for name in attributes.keys() - _OWN)


def _put_back_plain(module: nn.Module, before: dict[str, Any], parameters: Any, buffers: Any) -> None:
    _put_back(vars(module), before)
    _put_back(module._parameters, parameters)
    _put_back(module._buffers, buffers)


def _put_back(target: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Restore the entries of a dict, unless they are unchanged."""
    if target.keys() != before.keys() or any(target[key] is not value for key, value in before.items()):
        target.clear()
        target.update(before)


def _replace(target: set[Any], members: set[Any]) -> None:
    """Restore the members of a set, unless they are unchanged."""
    if target != members:
        target.clear()
        target.update(members)


def _refill(target: Any, entries: list[Any]) -> None:
    """Restore the entries of a list or deque, unless they are unchanged."""
    if len(target) != len(entries) or any(a is not b for a, b in zip(target, entries, strict=True)):
        target.clear()
        target.extend(entries)


def _same(first: Any, second: Any) -> bool:
    """Return True if two attributes are equal as far as a branch could depend on them."""
    if isinstance(first, _ATOMS) and isinstance(second, _ATOMS):
        return bool(first == second)
    return type(first) is type(second)


def _has_attributes(value: Any) -> bool:
    """Return True if the value has attributes to record and does not belong to one of the excluded libraries."""
    library = type(value).__module__.partition(".")[0]
    return isinstance(getattr(value, "__dict__", None), dict) and library not in _LIBRARIES
