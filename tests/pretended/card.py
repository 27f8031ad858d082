"""Stand-ins for what torch asks the driver: how many GPUs there are, their memory, streams, events, random numbers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.pretended.findings import FINDINGS
from tests.pretended.functions import DeviceArguments
from tests.pretended.groups import Groups
from tests.pretended.labels import CPU, CUDA, LABELS
from tests.pretended.operations import LabeledOperations

MEMORY = 80 << 30
NOTHING = (
    *("set_device", "manual_seed", "manual_seed_all", "_lazy_init", "init", "empty_cache", "set_rng_state_all"),
    *("reset_peak_memory_stats", "set_stream"),
)
"""Functions of torch.cuda that do nothing here."""


class Event:
    """An event that has passed as soon as it is recorded."""

    def __init__(self, **options: Any) -> None:
        self._recorded = 0.0

    def record(self, *stream: Any) -> None:
        """Take the time."""
        self._recorded = time.perf_counter()

    def query(self) -> bool:
        """Return whether it has passed."""
        return True

    def elapsed_time(self, later: Event) -> float:
        """Return the milliseconds up to another event."""
        return (later._recorded - self._recorded) * 1000

    def synchronize(self) -> None:
        """Wait for it."""
        FINDINGS.wait("an event is waited for")

    def wait(self, *stream: Any) -> None:
        """Let a stream wait."""


class Stream:
    """A stream without work. `current` is the one that work goes to."""

    current: Stream
    stream_id, device_index, device_type = 0, 0, 1

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def synchronize(self) -> None:
        """Wait for its work."""
        FINDINGS.wait("a stream is waited for")

    def query(self) -> bool:
        """Return whether its work is done."""
        return True

    def is_capturing(self) -> bool:
        """Return whether its work goes into a graph."""
        return False

    def wait_event(self, event: Event) -> None:
        """Wait for an event."""

    def wait_stream(self, stream: Stream) -> None:
        """Wait for another stream."""

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event."""
        event = event or Event()
        event.record()
        return event


Stream.current = Stream()


@contextlib.contextmanager
def _in_stream(stream: Stream | None) -> Iterator[None]:
    before, Stream.current = Stream.current, stream or Stream.current
    try:
        yield
    finally:
        Stream.current = before


class Properties:
    """What torch knows of an H100."""

    name = "NVIDIA H100 80GB HBM3"
    multi_processor_count = 132
    total_memory = MEMORY
    major = 9
    minor = 0


def _allocated(*device: Any) -> int:
    return sum(label.n_bytes for label in LABELS.on_gpu())


def _synchronize(*device: Any) -> None:
    FINDINGS.fault("torch.cuda.synchronize waits for messages that were posted ahead, too,")


def install(index: int, count: int, groups: Groups) -> None:
    """Let this process believe that it computes on the GPU `index` of `count`; there is no way back."""
    groups.install()
    _replace_driver(index, count)
    _replace_accelerator(index, count)
    _replace_autocast()
    torch.compile = lambda function=None, **options: function or (lambda compiled: compiled)  # type: ignore[assignment]
    # Checkpointing compares devices where no mode is active.
    torch.utils.checkpoint._default_meta_extractor = lambda x: {"shape": x.shape, "dtype": x.dtype}
    torch.utils.checkpoint._allowed_determinism_checks_to_fns["default"] = (
        torch.utils.checkpoint._default_meta_extractor
    )
    mode, operations = DeviceArguments(index), LabeledOperations(groups)
    _allocate_in_ddp(operations)
    _group_by_label(index)
    _enter_in_threads(mode, operations)
    operations.__enter__()
    mode.__enter__()


def _replace_driver(index: int, count: int) -> None:
    driver: dict[str, Callable[..., Any]] = {
        "device_count": lambda: count,
        "current_device": lambda: index,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "get_device_name": lambda *device: Properties.name,
        "get_device_properties": lambda *device: Properties(),
        "get_device_capability": lambda *device: (9, 0),
        "is_bf16_supported": lambda *args, **options: True,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda *device: (MEMORY - _allocated(), MEMORY),
        "memory_allocated": _allocated,
        "memory_reserved": _allocated,
        "max_memory_allocated": _allocated,
        "max_memory_reserved": _allocated,
        "get_rng_state": lambda *device: torch.get_rng_state(),
        "set_rng_state": lambda state, *device: torch.set_rng_state(state),
        "get_rng_state_all": list,
        "synchronize": _synchronize,
        "current_stream": lambda *device: Stream.current,
        "default_stream": lambda *device: Stream.current,
        "stream": _in_stream,
        "device": lambda *device: contextlib.nullcontext(),
    }
    for name in NOTHING:
        driver[name] = lambda *args, **options: None
    for name, stand_in in driver.items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.graphs.is_current_stream_capturing = driver["is_current_stream_capturing"]  # type: ignore[assignment]
    torch.cuda.Event, torch.cuda.Stream = Event, Stream  # type: ignore[assignment, misc]
    torch.cuda.nccl.version = lambda: (2, 28, 9)  # type: ignore[assignment]  # torch says it with every error of a group
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    torch.Generator = _generator_of_the_host(torch.Generator)  # type: ignore[misc]
    future_init = torch.futures.Future.__init__
    torch.futures.Future.__init__ = lambda self, *, devices=None: future_init(self)  # type: ignore[method-assign]


def _replace_accelerator(index: int, count: int) -> None:
    """The same for torch.accelerator, by which torch's optimizers and threads that pin memory ask the driver."""
    stand_ins: dict[str, Callable[..., Any]] = {
        "device_count": lambda: count,
        "is_available": lambda: True,
        "current_accelerator": lambda check_available=False: torch.device(CUDA),
        "current_device_index": lambda: index,
        "set_device_index": lambda *device: None,
        "current_stream": lambda *device: Stream.current,
        "set_stream": lambda stream: None,
        "synchronize": _synchronize,
        "memory_allocated": _allocated,
        "max_memory_allocated": _allocated,
        "memory_reserved": _allocated,
        "empty_cache": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.accelerator, name, stand_in)


def _generator_of_the_host(original: Any) -> Any:
    """Return a class that makes generators of the CPU, whatever device is asked for."""

    class Kind(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, original)

    class Generator(metaclass=Kind):
        def __new__(cls, device: Any = CPU) -> Any:
            return original(CPU)

    return Generator


def _replace_autocast() -> None:
    """Autocast computes on the CPU, where the numbers are."""
    original = torch.autocast

    class Autocast(original):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
            super().__init__(CPU if device_type == CUDA else device_type, *args, **options)

    torch.autocast = torch.amp.autocast = torch.amp.autocast_mode.autocast = Autocast  # type: ignore[assignment, misc]
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        asked = getattr(torch, name)
        setattr(torch, name, lambda *device, asked=asked: asked(*[CPU if each == CUDA else each for each in device]))
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False


def _allocate_in_ddp(operations: LabeledOperations) -> None:
    """DDP's buckets are made in C++, on the device of the parameters."""
    for name in ("__init__", "_pre_forward"):
        original = getattr(DistributedDataParallel, name)

        def on_gpu(self: Any, *args: Any, original: Any = original, **options: Any) -> Any:
            operations.allocates_on_gpu += 1
            try:
                return original(self, *args, **options)
            finally:
                operations.allocates_on_gpu -= 1

        setattr(DistributedDataParallel, name, on_gpu)


def _group_by_label(index: int) -> None:
    """C++ groups the tensors of an optimizer by their real device: it is told the label's."""
    original = torch.utils._foreach_utils._group_tensors_by_device_and_dtype

    def grouped(lists: Any, with_indices: bool = False) -> Any:
        by_key = {}
        for (device, dtype), value in original(lists, with_indices).items():
            on_gpu = any(LABELS.of(tensor) == CUDA for tensor in value[0][0][:1] if tensor is not None)
            by_key[torch.device(CUDA, index) if on_gpu else device, dtype] = value
        return by_key

    for name in ("torch.utils._foreach_utils", "torch.nn.utils.clip_grad", "torch.optim.optimizer"):
        import_module(name)._group_tensors_by_device_and_dtype = grouped  # type: ignore[attr-defined]


def _enter_in_threads(mode: DeviceArguments, operations: LabeledOperations) -> None:
    """Modes belong to a thread: every thread that begins later enters them, too."""
    run = threading.Thread.run

    def run_in_modes(self: threading.Thread) -> None:
        with operations, mode:
            run(self)

    threading.Thread.run = run_in_modes  # type: ignore[method-assign]
