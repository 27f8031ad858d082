"""Whether ranks that sent these messages would have waited for each other on GPUs.

Collectives of a group come in one order on all its ranks. Messages from rank to rank are taken by NCCL as they are
issued, pair by pair: a send ends when its receive has begun, so two ranks that both send first wait forever, unless
both messages belong to one batch (`batch_isend_irecv`). gloo buffers them, so on the CPU nobody notices.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, Any]


def read(file: Path) -> list[Message]:
    """Return the messages of one rank; a line that was being written when the rank ended is left out."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def faults(by_rank: dict[int, list[Message]]) -> list[str]:
    """Return in sentences what would have hung."""
    return [*_collectives(by_rank), *_pairs(by_rank)]


def _collectives(by_rank: dict[int, list[Message]]) -> list[str]:
    sequences: dict[tuple[str, tuple[int, ...]], dict[int, list[Message]]] = defaultdict(dict)
    for rank, messages in by_rank.items():
        for message in messages:
            if not message["kind"].startswith(("send", "recv")):
                group = (message["group"], tuple(message["ranks"]))
                sequences[group].setdefault(rank, []).append(message)
    found = []
    for (_, ranks), sequence in sequences.items():
        first = sequence.get(ranks[0], [])
        for rank in ranks[1:]:
            found += _difference(ranks[0], first, rank, sequence.get(rank, []))
    return found


def _difference(one: int, messages: list[Message], other: int, others: list[Message]) -> list[str]:
    """Return a sentence if two ranks do not send the same collectives in the same order."""
    for index in range(max(len(messages), len(others))):
        left = messages[index] if index < len(messages) else None
        right = others[index] if index < len(others) else None
        if left is None or right is None or _shape(left) != _shape(right):
            return [f"rank {one} sends {_words(left)}, rank {other} {_words(right)}"]
    return []


def _shape(message: Message) -> Any:
    """Return what all ranks must agree on. Sizes differ where each rank sends a part of its own."""
    uneven = message["kind"].startswith(("alltoall", "allgather_", "gather", "scatter", "reduce_scatter_"))
    return message["kind"], [dtype if uneven else (dtype, count) for dtype, count in message["sizes"]]


def _words(message: Message | None) -> str:
    if message is None:
        return "nothing more"
    sizes = ", ".join(f"{count} {dtype}" for dtype, count in message["sizes"])
    return f"{message['kind'].rstrip('_')} of {sizes or 'nothing'} at {message['place']}"


@dataclass
class Batch:
    """Messages of one rank for one peer that NCCL takes together."""

    place: str
    number: int | None
    sends: int = 0
    receives: int = 0


def _pairs(by_rank: dict[int, list[Message]]) -> list[str]:
    found = []
    queues: dict[tuple[str, int, int], list[Batch]] = defaultdict(list)
    for rank, messages in by_rank.items():
        for message in messages:
            if message["peer"] is not None and message["nccl"]:
                _append(queues[message["group"], rank, message["peer"]], message)
    for group, rank, peer in sorted(queues):
        if rank < peer:
            found += _stuck(rank, queues[group, rank, peer], peer, queues[group, peer, rank])
    return found


def _append(queue: list[Batch], message: Message) -> None:
    if not queue or message["batch"] is None or queue[-1].number != message["batch"]:
        queue.append(Batch(message["place"], message["batch"]))
    if message["kind"] == "send":
        queue[-1].sends += 1
    else:
        queue[-1].receives += 1


def _stuck(rank: int, queue: list[Batch], peer: int, other: list[Batch]) -> list[str]:
    """Return a sentence if two ranks come to a point where neither's next message can end."""
    queue, other = list(queue), list(other)
    while queue and other:
        mine, theirs = queue[0], other[0]
        there, back = min(mine.sends, theirs.receives), min(mine.receives, theirs.sends)
        if not there and not back:
            return [
                f"rank {rank} at {mine.place} and rank {peer} at {theirs.place} wait for each other: "
                "NCCL takes unbatched messages of a pair one by one"
            ]
        mine.sends, theirs.receives = mine.sends - there, theirs.receives - there
        mine.receives, theirs.sends = mine.receives - back, theirs.sends - back
        queue = queue[1:] if not mine.sends and not mine.receives else queue
        other = other[1:] if not theirs.sends and not theirs.receives else other
    left = [(rank, peer, queue)] if queue else [(peer, rank, other)] if other else []
    return [
        f"rank {a} at {rest[0].place} waits for a message that rank {b} never sends or takes" for a, b, rest in left
    ]
