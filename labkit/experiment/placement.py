"""Which GPU each rank computes on, and over which links the neighbours along an axis of a layout exchange data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from labkit.experiment.layout import SHORT, Layout
from labkit.experiment.topology import PATHS, Topology, kind, rank_of

BUSY_AXES = ("tp", "cp", "ep")
"""Axes whose ranks exchange data in every layer, so that a slow link between them slows down the whole step."""
SHARED = "shared"
"""Stands for a link between ranks on the same GPU."""


@dataclass(frozen=True)
class Placement:
    """The GPUs of a run by their numbers in nvidia-smi, in the order of CUDA, and the links between them."""

    gpus: tuple[int, ...]
    topology: Topology

    def gpu(self, rank: int) -> int:
        """Return the number of the GPU of a rank: ranks beyond the number of GPUs share them in turn."""
        return self.gpus[rank % len(self.gpus)]

    def link(self, first: int, second: int) -> str:
        """Return the link between two ranks; SHARED on the same GPU, an empty text if it is unknown."""
        gpus = self.gpu(first), self.gpu(second)
        return SHARED if gpus[0] == gpus[1] else self.topology.link(*gpus)


@dataclass(frozen=True)
class AxisLink:
    """The slowest link between neighbours along one axis, and the two GPUs that it connects."""

    axis: str
    link: str
    gpus: tuple[int, int]

    def __str__(self) -> str:
        if self.link == SHARED:
            return f"{SHORT[self.axis]}: neighbours share a GPU"
        path = f"{self.link}, {PATHS[kind(self.link)]}"
        return f"{SHORT[self.axis]}: {path} at the slowest (GPUs {self.gpus[0]} and {self.gpus[1]})"


def neighbours(layout: Layout, axis: str) -> list[tuple[int, int]]:
    """Return the pairs of ranks that are neighbours along an axis, including the last and the first of a ring."""
    rings: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        rings.setdefault(tuple(place[other] for other in place if other != axis), []).append(rank)
    pairs = [pair for ring in rings.values() for pair in pairwise(ring)]
    return pairs + [(ring[-1], ring[0]) for ring in rings.values() if len(ring) > 2]


def axis_links(layout: Layout, placement: Placement) -> list[AxisLink]:
    """Return the slowest link along each axis that has several ranks; axes with an unknown link are left out."""
    slowest = []
    for axis, size in layout.sizes.items():
        pairs = neighbours(layout, axis) if size > 1 else []
        links = {pair: placement.link(*pair) for pair in pairs}
        if links and all(links.values()):
            pair = max(links, key=lambda pair: -1 if links[pair] == SHARED else rank_of(links[pair]))
            slowest.append(AxisLink(axis, links[pair], (placement.gpu(pair[0]), placement.gpu(pair[1]))))
    return slowest


def link_warnings(layout: Layout, placement: Placement) -> list[str]:
    """Return a sentence for each busy axis that leaves NVLink although some GPUs here are connected by it."""
    islands = [island for island in placement.topology.within(placement.gpus).islands if len(island) > 1]
    if not islands:
        return []
    groups = " and ".join(", ".join(map(str, island)) for island in islands)
    return [
        f"{SHORT[axis.axis]} crosses {axis.link} between GPUs {axis.gpus[0]} and {axis.gpus[1]}, while NVLink connects "
        f"{groups}: use a smaller {SHORT[axis.axis]}, or order the GPUs with CUDA_VISIBLE_DEVICES"
        for axis in axis_links(layout, placement)
        if axis.axis in BUSY_AXES and axis.link != SHARED and kind(axis.link) != "NV"
    ]


def placement_of(gpus: tuple[int, ...], topology: Topology | None) -> Placement | None:
    """Return the placement on these GPUs; None for fewer than two, or if their links are unknown."""
    return None if topology is None or len(gpus) < 2 else Placement(gpus, topology)
