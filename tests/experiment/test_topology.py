"""How GPUs are linked: the matrix of the driver, what follows for a layout, and that anything else is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.experiment import machine, topology
from labkit.experiment.layout import Layout
from labkit.experiment.machine import Machine
from labkit.experiment.placement import Placement, axis_links, link_warnings, neighbours, placement_of
from labkit.experiment.topology import Topology, TopologyError, in_words, parse
from labkit.launch import doctor
from labkit.plots import plot_grid
from labkit.plots.grid import grid_html
from labkit.runs.environment import describe

LEGEND = """
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NV#  = Connection traversing a bonded set of # NVLinks
"""
TWO = """\
\x1b[4m\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tPHB\t0-63\t0\t\tN/A
GPU1\tPHB\t X \t0-63\t0\t\tN/A
"""
PAIRS = """\
        GPU0    GPU1    GPU2    GPU3    NIC0    CPU Affinity    NUMA Affinity
GPU0     X      NV4     SYS     SYS     PIX     0-23    0
GPU1    NV4      X      SYS     SYS     PIX     0-23    0
GPU2    SYS     SYS      X      NV4     SYS     24-47   1
GPU3    SYS     SYS     NV4      X      SYS     24-47   1
NIC0    PIX     PIX     SYS     SYS      X
"""


def matrix(count: int, link: str) -> str:
    """All pairs of GPUs with the same link, with eight network cards, as on an HGX board."""
    cards = "".join(f"\tNIC{card}" for card in range(8))
    head = "".join(f"\tGPU{gpu}" for gpu in range(count)) + cards + "\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    rows = [
        f"GPU{row}" + "".join("\t X " if row == column else f"\t{link}" for column in range(count)) + "\tNODE" * 8
        for row in range(count)
    ]
    return head + "".join(row + "\t0-55\t0\t\tN/A\n" for row in rows)


def test_the_links_of_a_pair_of_pairs() -> None:
    links = parse(PAIRS + LEGEND)
    assert links.gpus == (0, 1, 2, 3)
    assert links.link(1, 0) == links.link(2, 3) == "NV4"
    assert links.link(0, 3) == "SYS"
    assert links.link(0, 9) == ""
    assert links.islands == [[0, 1], [2, 3]]
    assert links.within([2, 0]).to_dict() == {"gpus": [0, 2], "links": [[0, 2, "SYS"]]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TWO, "PCIe through the CPU (PHB): 0–1. There is no NVLink: data parallelism and pipelines suit"),
        (matrix(8, "NV18"), "NVLink (18 links): every pair. NVLink connects all GPUs: any axis of a layout"),
        (
            PAIRS,
            "NVLink (4 links): 0–1, 2–3; PCIe and the link between CPUs (SYS): 0–2, 0–3, 1–2, 1–3. "
            "Keep tensor, context and expert parallelism within GPUs 0, 1 and within GPUs 2, 3; the other pairs",
        ),
        (PAIRS.replace("NV4", "PIX"), "pairs under a common PCIe switch (0–1, 2–3) suit tensor parallelism best."),
        (matrix(8, "SYS"), "PCIe and the link between CPUs (SYS): every pair"),
    ],
)
def test_the_links_in_words(text: str, words: str) -> None:
    assert words in in_words(parse(text + LEGEND))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("No devices were found", "does not name each GPU once"),
        (PAIRS.replace("GPU1    NV4", "GPU1    NV6"), "not symmetric"),
        (PAIRS.replace("SYS", "XYZ"), "'XYZ'"),
        (PAIRS.replace("NV4", "NV0"), "'NV0'"),
        (PAIRS.replace("GPU3    SYS     SYS     NV4      X      SYS     24-47   1\n", ""), "one row for each GPU"),
        (PAIRS + "GPU3  SYS SYS NV4 X\n", "one row for each GPU"),
        (PAIRS.replace("        GPU0    GPU1", "        GPU0    GPU0"), "does not name each GPU once"),
        (PAIRS.replace("GPU0     X ", "GPU0    SYS"), "'SYS' where a link"),
        (matrix(65, "SYS"), "does not name each GPU once"),
        ("x" * 2**21, "longer"),
        ("GPU0 GPU1\nGPU0 X\nGPU1 SYS X", "''"),
    ],
)
def test_anything_else_is_refused_in_a_sentence(text: str, reason: str) -> None:
    with pytest.raises(TopologyError, match=reason):
        parse(text)


WORDS = st.sampled_from(["GPU0", "GPU1", "GPU2", "X", "NV4", "SYS", "PIX", "NIC0", "CPU", "\n", "\t", "\x1b[4m", "N/A"])


@given(st.text() | st.lists(WORDS | st.text(max_size=4), max_size=60).map(" ".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        links = parse(text)
    except TopologyError:
        return
    assert set(links.links) == {(a, b) for a in links.gpus for b in links.gpus if a < b}
    assert in_words(links).endswith(".")


# -- layouts ----------------------------------------------------------------------------------------------------------


def placed(*gpus: int, text: str = PAIRS) -> Placement:
    placement = placement_of(gpus, parse(text))
    assert placement is not None
    return placement


def test_neighbours_along_an_axis() -> None:
    layout = Layout(dp_replicate=2, tp=2)
    assert neighbours(layout, "tp") == [(0, 1), (2, 3)]
    assert neighbours(layout, "dp_replicate") == [(0, 2), (1, 3)]
    assert neighbours(Layout(cp=4), "cp") == [(0, 1), (1, 2), (2, 3), (3, 0)]


def test_the_slowest_link_of_each_axis() -> None:
    layout = Layout(dp_replicate=2, tp=2)
    links = {link.axis: link.link for link in axis_links(layout, placed(0, 1, 2, 3))}
    assert links == {"tp": "NV4", "dp_replicate": "SYS"}
    assert link_warnings(layout, placed(0, 1, 2, 3)) == []
    crossed = placed(0, 2, 1, 3)
    assert {link.axis: link.link for link in axis_links(layout, crossed)} == {"tp": "SYS", "dp_replicate": "NV4"}
    (warning,) = link_warnings(layout, crossed)
    assert warning.startswith("tp crosses SYS between GPUs 0 and 2, while NVLink connects 0, 1 and 2, 3: use a smaller")
    assert link_warnings(Layout(tp=4), placed(0, 1, 2, 3)), "a ring of four leaves its pair"
    assert link_warnings(Layout(tp=2), placed(0, 1, text=TWO)) == [], "nothing here is faster"
    assert link_warnings(Layout(dp_replicate=4), placed(0, 1, 2, 3)) == [], "the gradients cross once a step only"


def test_ranks_that_share_a_gpu() -> None:
    links = axis_links(Layout(tp=4), placed(0, 1))
    assert [link.link for link in links] == ["NV4"]
    assert str(axis_links(Layout(dp_replicate=2, tp=2), placed(0, 1))[0]) == "dp: neighbours share a GPU"
    assert placement_of((0,), parse(PAIRS)) is None
    assert placement_of((0, 1), None) is None
    assert axis_links(Layout(tp=2), placed(0, 9)) == [], "a GPU that is not in the matrix"


def test_the_grid_shows_gpus_links_and_warnings() -> None:
    layout = Layout(dp_replicate=2, tp=2)
    figure = plot_grid(layout, 128, placement=placed(0, 2, 1, 3))
    assert [row["GPU"] for row in figure.rows] == [0, 2, 1, 3]
    assert "Links: dp: NV4, NVLink at the slowest (GPUs 0 and 1); tp: SYS" in figure.summary
    assert "Warning: tp crosses SYS" in figure.summary
    texts = [note.text for note in figure.layout.annotations]
    assert "<b>rank 1 · GPU 2</b>" in texts[1]
    assert any(text.startswith("Warning: tp crosses SYS") for text in texts)
    html = grid_html(layout, 128, placement=placed(0, 2, 1, 3))
    assert "rank 1 · GPU 2" in html
    assert "Warning: tp crosses SYS" in html
    assert "GPU" not in grid_html(layout, 128)


# -- the driver -------------------------------------------------------------------------------------------------------


SMI = """#!/bin/sh
case "$*" in
"topo -m") {topology} ;;
*compute_cap*) echo "GPU-a, 9.0"; echo "GPU-b, 9.0" ;;
*) echo "0, GPU-a, NVIDIA H100, 81559, 4"; echo "1, GPU-b, NVIDIA H100, [N/A], [N/A]" ;;
esac
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on PATH for a program `nvidia-smi`; what was known of this machine is forgotten, then and afterwards."""

    def forget() -> None:
        machine._probe.cache_clear()
        topology.here.cache_clear()
        topology._Background.thread = None

    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(machine, "_torch_cuda", lambda: "13.0")
    forget()
    yield tmp_path
    forget()


def install(folder: Path, answer: str) -> None:
    (folder / "topology.txt").write_text(TWO.replace("PHB", "NV12"))
    program = folder / "nvidia-smi"
    program.write_text(SMI.format(topology=answer.format(folder=folder)))
    program.chmod(0o755)


def test_the_doctor_and_the_record_of_the_machine_have_the_links(driver: Path) -> None:
    install(driver, "cat {folder}/topology.txt")
    assert len(Machine.here().gpus) == 2
    (links,) = [finding.text for finding in doctor._hardware() if finding.topic == "links"]
    assert links.startswith("NVLink (12 links): 0–1. NVLink connects all GPUs")
    assert doctor.as_dict([])["machine"]["links"] == {"gpus": [0, 1], "links": [[0, 1, "NV12"]]}
    assert json.loads(json.dumps(describe(str(driver))))["gpu_links"]["links"] == [[0, 1, "NV12"]]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("exit 3", "nvidia-smi topo fails (CalledProcessError)"),
        ("exec sleep 30", "nvidia-smi topo does not answer within 0.3 s"),
        ("echo nonsense", "the first line of the topology does not name each GPU once"),
        ("printf '\\377\\376'", "the first line of the topology does not name each GPU once"),
    ],
)
def test_a_driver_that_does_not_answer_is_said(
    answer: str, reason: str, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(driver, answer)
    monkeypatch.setattr(topology, "TIMEOUT_S", 0.3)
    assert doctor._links(Machine.here()) == f"unknown ({reason})"
    assert doctor.as_dict([])["machine"]["links"] is None


def test_a_form_does_not_wait_for_the_driver(driver: Path) -> None:
    install(driver, "sleep 0.5; cat {folder}/topology.txt")
    answers: list[Topology | None] = []
    begun = time.monotonic()
    assert topology.when_known(lambda: answers.append(topology.when_known(lambda: None))) is None
    assert topology.when_known(lambda: None) is None, "asked once"
    assert time.monotonic() - begun < 0.3
    thread = topology._Background.thread
    assert thread is not None
    thread.join(10)
    assert answers[0] is not None
    assert answers[0].link(0, 1) == "NV12"
