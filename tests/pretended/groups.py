"""What ranks send each other: NCCL takes tensors of the GPU, gloo's send and receive take those of the host.

All groups are gloo's in truth. Each message is also written to a file, one line each, so that `order.py` can compare
the ranks even if they have waited for each other until they were ended.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._pytree import tree_leaves

from tests.pretended.findings import FINDINGS, place
from tests.pretended.labels import CPU, CUDA, LABELS

PREFIX = "c10d::"
POINT_TO_POINT = ("send", "recv_", "recv_any_source_")
WITHOUT_DATA = ("barrier", "monitored_barrier_")
UNKNOWN_TO_NCCL = (torch.int16, torch.bool, torch.complex32)


class Groups:
    """The process groups of a rank: the backend that each would have, and what was sent."""

    def __init__(self, file: Path) -> None:
        self._backends: dict[str, str] = {}
        """Backend of each group, by the group's name."""
        self._default = "gloo"
        self._timeout: timedelta | None = None
        self._file = file.open("w", encoding="utf-8")
        self._lock = threading.Lock()
        """The backward pass sends from a thread of its own; each line is written whole."""
        self._batch: int | None = None
        self._batches = 0

    def install(self) -> None:
        """Make all groups gloo's, and remember what was asked for."""
        make, batched = distributed_c10d._new_process_group_helper, distributed_c10d.batch_isend_irecv

        def make_with_gloo(size: int, rank: int, ranks: Any, backend: Any, store: Any, name: Any, **more: Any) -> Any:
            asked = str(backend).lower()
            if not self._backends:
                self._default = asked
            self._backends[str(name)] = asked
            self._judge_timeout(more["timeout"])
            more.pop("device_id", None)
            group, own_store = make(size, rank, ranks, dist.Backend("gloo"), store, name, **more)
            if isinstance(group, dist.ProcessGroup):  # this rank is in it; groups without a backend take its
                distributed_c10d._world.pg_map[group] = (asked, own_store)
            return group, own_store

        def noted_batch(operations: Any) -> Any:
            with self._one_batch():
                return batched(operations)

        distributed_c10d._new_process_group_helper = make_with_gloo
        dist.batch_isend_irecv = distributed_c10d.batch_isend_irecv = noted_batch
        distributed_c10d._get_object_coll_device = lambda group=None: CUDA if self._is_nccl(group) else CPU

    def _judge_timeout(self, timeout: timedelta) -> None:
        """Note a group that waits for lost ranks longer than the first one."""
        self._timeout = self._timeout or timeout
        if timeout != self._timeout:
            FINDINGS.fault(f"a group waits {timeout} for lost ranks, the first one {self._timeout}")

    @contextmanager
    def _one_batch(self) -> Iterator[None]:
        self._batches += 1
        self._batch = self._batches
        try:
            yield
        finally:
            self._batch = None

    def _is_nccl(self, group: Any = None) -> bool:
        """Return whether a group would send tensors of the GPU by NCCL."""
        group = group or dist.group.WORLD
        return "nccl" in self._backends.get(str(group.group_name), self._default)

    def judge(self, operation: Any, args: Any) -> None:
        """Note what the group would refuse, and write the message down."""
        kind = operation._schema.name.removeprefix(PREFIX)
        group = dist.ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))
        tensors = [] if kind in WITHOUT_DATA else [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        backend = self._backends.get(str(group.group_name), self._default)
        for tensor in tensors:
            self._judge_tensor(kind, tensor, backend)
        ranks = dist.get_process_group_ranks(group)
        peer = ranks[int(args[2])] if kind in POINT_TO_POINT[:2] else None
        sizes = [[str(tensor.dtype).removeprefix("torch."), tensor.numel()] for tensor in tensors]
        by_nccl = "nccl" in backend and (not tensors or LABELS.of(tensors[0]) == CUDA)
        line = {"group": str(group.group_name), "ranks": ranks, "kind": kind, "peer": peer, "batch": self._batch}
        with self._lock:
            self._file.write(json.dumps(line | {"sizes": sizes, "nccl": by_nccl, "place": place()}) + "\n")
            self._file.flush()

    def _judge_tensor(self, kind: str, tensor: Tensor, backend: str) -> None:
        device, name = LABELS.of(tensor), kind.rstrip("_")
        if device == CPU and backend == "nccl":
            FINDINGS.fault(f"{name}: NCCL does not take a tensor of the host ({list(tensor.shape)})")
        if device == CUDA and backend == "gloo" and kind in POINT_TO_POINT:
            FINDINGS.fault(f"{name}: gloo does not send a tensor of the GPU ({list(tensor.shape)})")
        if device == CUDA and "nccl" in backend and tensor.dtype in UNKNOWN_TO_NCCL:
            FINDINGS.fault(f"{name}: NCCL has no {tensor.dtype}")
        if not tensor.is_contiguous():
            FINDINGS.fault(f"{name}: a message is not contiguous")
