"""How the GPUs of this machine are linked: the matrix of `nvidia-smi topo -m`, read strictly.

The driver describes each pair of GPUs by the slowest part of the way between them. What is not exactly such a matrix is
refused, because a layout that trusts a wrong link is slow without a visible reason.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

TIMEOUT_S = 20.0
"""How long nvidia-smi may take (s)."""
MAX_CHARACTERS = 2**20
MAX_GPUS = 64
PATHS = {
    "NV": "NVLink",
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "PCIe through the CPU",
    "NODE": "PCIe through several host bridges of one CPU",
    "SYS": "PCIe and the link between CPUs",
}
"""What each kind of link means, the fastest first."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_GPU = re.compile(r"GPU(0|[1-9][0-9]{0,3})", re.ASCII)
_LINK = re.compile(r"NV([1-9][0-9]?)|PIX|PXB|PHB|NODE|SYS", re.ASCII)


class TopologyError(ValueError):
    """Raised if a text is no matrix of links; the message says why in one sentence."""


@dataclass(frozen=True)
class Topology:
    """The links between GPUs, which are numbered as in nvidia-smi."""

    gpus: tuple[int, ...]
    links: dict[tuple[int, int], str]
    """Link of each pair, the smaller number first: `NV4` for four NVLinks, or a key of PATHS."""

    def link(self, first: int, second: int) -> str:
        """Return the link between two different GPUs; an empty text if one of them is not in the matrix."""
        return self.links.get((min(first, second), max(first, second)), "")

    def within(self, gpus: Sequence[int]) -> Topology:
        """Return the part of the topology between some of the GPUs."""
        chosen = tuple(gpu for gpu in self.gpus if gpu in gpus)
        return Topology(chosen, {pair: link for pair, link in self.links.items() if set(pair) <= set(chosen)})

    @property
    def islands(self) -> list[list[int]]:
        """The groups of GPUs that NVLink connects, directly or through others, in ascending order."""
        group = {gpu: [gpu] for gpu in self.gpus}
        for (first, second), link in self.links.items():
            if kind(link) == "NV" and group[first] is not group[second]:
                joined = sorted(group[first] + group[second])
                group |= dict.fromkeys(joined, joined)
        return sorted({tuple(island): island for island in group.values()}.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the topology as JSON values: `gpus`, and `links` as [GPU, GPU, link]."""
        return {"gpus": list(self.gpus), "links": [[*pair, link] for pair, link in sorted(self.links.items())]}


def kind(link: str) -> str:
    """Return the key of PATHS for a link: `NV` for any number of NVLinks."""
    return "NV" if link.startswith("NV") else link


def rank_of(link: str) -> int:
    """Return the place of a link in the order of PATHS: 0 for NVLink, higher for slower ones."""
    return list(PATHS).index(kind(link))


def parse(text: str) -> Topology:
    """Read the output of `nvidia-smi topo -m`; raise TopologyError if it is not a complete, symmetric matrix."""
    if len(text) > MAX_CHARACTERS:
        raise TopologyError("the topology is longer than any that nvidia-smi prints")
    lines = [line.split() for line in _COLOURS.sub("", text).splitlines() if line.strip()]
    if not lines:
        raise TopologyError("the topology is empty")
    columns = _columns(lines[0])
    rows = {int(match[1]): line[1:] for line in lines[1:] if (match := _GPU.fullmatch(line[0]))}
    if len(rows) != sum(bool(_GPU.fullmatch(line[0])) for line in lines[1:]) or set(rows) != set(columns):
        raise TopologyError("the topology does not have exactly one row for each GPU")
    cells = {
        (row, column): _cell(rows[row], place, row == column) for row in columns for place, column in enumerate(columns)
    }
    links = {pair: link for pair, link in cells.items() if pair[0] < pair[1]}
    if any(cells[second, first] != link for (first, second), link in links.items()):
        raise TopologyError("the topology is not symmetric")
    return Topology(tuple(sorted(columns)), links)


def _columns(header: list[str]) -> list[int]:
    """Return the numbers of the GPUs in the header; network cards and affinities follow them."""
    columns: list[int] = []
    for word in header:
        match = _GPU.fullmatch(word)
        if match is None:
            break
        columns.append(int(match[1]))
    if not columns or len(columns) > MAX_GPUS or len(set(columns)) < len(columns):
        raise TopologyError("the first line of the topology does not name each GPU once")
    return columns


def _cell(row: list[str], place: int, is_diagonal: bool) -> str:
    """Return one cell of a row; raise TopologyError if it is missing or no link."""
    cell = row[place] if place < len(row) else ""
    if not (cell == "X" if is_diagonal else _LINK.fullmatch(cell)):
        raise TopologyError(f"the topology has {cell[:20]!r} where a link is expected")
    return cell


@lru_cache(maxsize=1)
def here() -> tuple[Topology | None, str]:
    """Return the topology of this machine, asked once per process for at most TIMEOUT_S, or None and why."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None, "nvidia-smi not found"
    try:
        answer = subprocess.run([smi, "topo", "-m"], capture_output=True, timeout=TIMEOUT_S, check=True).stdout
        return parse(answer.decode("utf-8", "replace")), ""
    except subprocess.TimeoutExpired:
        return None, f"nvidia-smi topo does not answer within {TIMEOUT_S:g} s"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"nvidia-smi topo fails ({type(error).__name__})"
    except TopologyError as error:
        return None, str(error)


class _Background:
    """The thread that asks for the topology where nobody may wait for it."""

    thread: threading.Thread | None = None


def when_known(then: Callable[[], None]) -> Topology | None:
    """Return the topology if it is known; if not, ask for it in a thread, which calls `then` at its end."""

    def ask() -> None:
        here()
        then()

    if _Background.thread is None:
        _Background.thread = threading.Thread(target=ask, name="labkit-topology", daemon=True)
        _Background.thread.start()
    return None if _Background.thread.is_alive() and here.cache_info().currsize == 0 else here()[0]


# -- in words ---------------------------------------------------------------------------------------------------------


def in_words(topology: Topology) -> str:
    """Return which pairs have which link, and one sentence of advice."""
    by_kind: dict[str, list[tuple[int, int]]] = {}
    for pair, link in sorted(topology.links.items()):
        by_kind.setdefault(kind(link), []).append(pair)
    parts = [_pairs(topology, name, by_kind[name]) for name in PATHS if name in by_kind]
    return f"{'; '.join(parts)}. {advice(topology)}"


def _pairs(topology: Topology, name: str, pairs: list[tuple[int, int]]) -> str:
    """Return the pairs with one kind of link: `NVLink (4 links): 0–1, 2–3`."""
    widths = sorted({int(topology.link(*pair)[2:]) for pair in pairs}) if name == "NV" else []
    links = f" ({' or '.join(map(str, widths))} links)" if widths else f" ({name})"
    if len(pairs) == len(topology.links) > 1:
        return f"{PATHS[name]}{links}: every pair"
    shown = ", ".join(f"{first}–{second}" for first, second in pairs[:8])
    return f"{PATHS[name]}{links}: {shown}" + (f" and {len(pairs) - 8} more pairs" if len(pairs) > 8 else "")


def advice(topology: Topology) -> str:
    """Return one sentence about which layouts these links suit, with a full stop."""
    islands = [island for island in topology.islands if len(island) > 1]
    if islands and len(islands[0]) == len(topology.gpus):
        return "NVLink connects all GPUs: any axis of a layout may use any of them."
    if islands:
        groups = " and within ".join(f"GPUs {', '.join(map(str, island))}" for island in islands)
        return (
            f"Keep tensor, context and expert parallelism within {groups}; "
            "the other pairs exchange data through PCIe, which suits data parallelism and pipelines."
        )
    best = min(topology.links.values(), key=rank_of, default="")
    near = [pair for pair, link in topology.links.items() if kind(link) == kind(best)]
    if kind(best) in ("PIX", "PXB") and len(near) < len(topology.links):
        pairs = ", ".join(f"{first}–{second}" for first, second in sorted(near)[:8])
        return f"There is no NVLink; pairs under a common PCIe switch ({pairs}) suit tensor parallelism best."
    return "There is no NVLink: data parallelism and pipelines suit these GPUs better than tensor parallelism."
