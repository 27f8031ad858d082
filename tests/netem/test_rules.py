"""The slow link and slowed ranks as data: what is refused, what is said about them, and where they do not belong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from labkit.experiment import Experiment, ExperimentError, Machine, Network
from labkit.experiment.fields import fields
from labkit.experiment.machine import Gpu
from labkit.experiment.one_process import is_one_process, one_process
from labkit.netem import rules as slow_link
from labkit.netem.rules import PROGRAM, Links, possible

CPU = Machine(cores=8, cores_total=8, memory_bytes=2**33, gpu_reason="no driver")
SERVER = Machine(32, 64, 2**38, gpus=tuple(Gpu(at, f"GPU-{at}", "H100", 2**36, 0) for at in range(4)))
REASON = "containers forbid it"

# As user without CAP_SYS_ADMIN, whoever runs the tests: prctl(PR_CAPBSET_DROP, CAP_SYS_ADMIN), then the program.
UNPRIVILEGED = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 21, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-I", "-S", sys.argv[1]])
"""


def allow(monkeypatch: pytest.MonkeyPatch, links: Links) -> None:
    monkeypatch.setattr(slow_link, "possible", lambda: links)


def problems(changes: str, machine: Machine = CPU) -> list[tuple[str, object]]:
    found = Experiment().replace(*changes.split()).problems(machine)
    return [(problem.field, problem.nearest) for problem in found]


@pytest.mark.parametrize(
    ("changes", "machine", "links", "expected"),
    [
        ("layout=dp2", CPU, Links(REASON, REASON, REASON), []),
        ("layout=dp2 launch.network.rate_mbit=10", CPU, Links(), []),
        ("layout=dp2 launch.network.rate_mbit=10", CPU, Links(REASON, REASON, REASON), [("launch.network", "null")]),
        ("layout=dp4 launch.device=cuda launch.network.rate_mbit=10", SERVER, Links(), [("launch.network", "null")]),
        # More ranks than GPUs talk over gloo.
        ("layout=dp8 launch.device=cuda launch.network.rate_mbit=10", SERVER, Links(), []),
        (
            "layout=dp2 launch.network.rate_mbit=10 launch.transport=shared_memory",
            CPU,
            Links(),
            [("launch.transport", "auto")],
        ),
        ("layout=dp2 launch.network.rate_mbit=10 launch.transport=network", CPU, Links(), []),
        ('layout=dp6 launch.network={"rate_mbit":10,"hosts":3}', CPU, Links(), []),
        ('layout=dp6 launch.network={"rate_mbit":10,"hosts":4}', CPU, Links(), [("launch.network.hosts", 3)]),
        ('layout=dp2 launch.network={"rate_mbit":10,"hosts":3}', CPU, Links(), [("launch.network.hosts", 2)]),
        (
            'layout=dp6 launch.network={"rate_mbit":10,"hosts":4}',
            CPU,
            Links(hosts="no veth"),
            [("launch.network.hosts", 1)],
        ),
        ('layout=dp2 launch.network={"rate_mbit":10,"delay_ms":5}', CPU, Links(), []),
        (
            'layout=dp2 launch.network={"rate_mbit":10,"delay_ms":5}',
            CPU,
            Links(delay="no netem"),
            [("launch.network.delay_ms", 0)],
        ),
        ('layout=dp2 launch.slowdown={"1":4}', CPU, Links(), []),
        ('layout=dp2 launch.slowdown={"2":4,"1":2}', CPU, Links(), [("launch.slowdown", None)]),
    ],
)
def test_rules(
    changes: str,
    machine: Machine,
    links: Links,
    expected: list[tuple[str, object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allow(monkeypatch, links)
    assert problems(changes, machine) == expected


def test_the_reason_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, Links(REASON, REASON, REASON))
    [problem] = Experiment().replace("layout=dp2", "launch.network.rate_mbit=10").problems(CPU)
    assert REASON in problem.reason


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("layout=dp2 launch.network.rate_mbit=10", "one link of 10 Mbit/s, shared by all ranks and both directions"),
        ('layout=dp4 launch.network={"rate_mbit":10,"hosts":2}', "2 hosts, each joined to a switch by a link of 10"),
        ('layout=dp2 launch.network={"rate_mbit":10,"delay_ms":2}', "10 Mbit/s with 2 ms of delay"),
        ("launch.network.rate_mbit=10", "no effect: a single rank does not communicate"),
        (
            "layout=dp2 launch.isolated=true launch.network.rate_mbit=10",
            "no effect: independent copies do not communicate",
        ),
        ('layout=dp2 launch.slowdown={"1":4,"0":1}', "rank 1 is slowed down on purpose, by a factor of 4"),
    ],
)
def test_it_is_said_what_is_emulated(changes: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, Links())
    [warning] = Experiment().replace(*changes.split()).warnings(CPU)
    assert said in warning.reason


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('{"1": 0.5}', "launch.slowdown: rank 1 can be made 1 to 1000 times slower, got 0.5"),
        ('{"1": 1001}', "1 to 1000 times slower"),
        ('{"-1": 2}', "there is no rank -1"),
        ('{"one": 2}', "launch.slowdown.one: must be a whole number"),
        ('{"1": "much"}', "launch.slowdown.1: must be a number"),
        ("4", "launch.slowdown: must be a JSON object"),
    ],
)
def test_what_is_no_slowdown(value: str, said: str) -> None:
    with pytest.raises(ExperimentError) as refused:
        Experiment().replace(f"launch.slowdown={value}")
    assert said in str(refused.value)


def test_slowed_ranks_survive_json() -> None:
    experiment = Experiment().replace('launch.slowdown={"3": 4, "0": 1.5}')
    assert experiment.launch.slowdown == {3: 4.0, 0: 1.5}
    assert Experiment.from_json(experiment.to_json()) == experiment
    [field] = [field for field in fields() if field.name == "launch.slowdown"]
    assert field.kind == "{int: float}"


def test_ranks_are_dealt_out_to_hosts_in_order() -> None:
    network = Network(rate_mbit=1, hosts=3)
    assert [network.host(rank, 6) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert (Network(rate_mbit=1).interface, network.interface) == ("lo", "eth0")


def test_a_baseline_runs_at_its_own_speed() -> None:
    experiment = Experiment().replace("layout=dp4", "launch.network.rate_mbit=10", 'launch.slowdown={"3": 4}')
    base = one_process(experiment)
    assert base.launch.network is None
    assert base.launch.slowdown == {}
    assert is_one_process(base)
    assert not is_one_process(base.replace('launch.slowdown={"0": 4}'))


def test_what_is_possible_is_the_same_without_root() -> None:
    if possible().bucket:
        pytest.skip(possible().bucket)
    command = [sys.executable, "-I", "-S", "-c", UNPRIVILEGED, str(PROGRAM)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "unshare: " in answer.stdout:
        pytest.skip(f"only root may have namespaces here: {answer.stdout}")
    assert '"bucket": ""' in answer.stdout, answer.stderr


def test_a_probe_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    possible.cache_clear()
    try:
        monkeypatch.setattr(slow_link, "PROGRAM", tmp_path / "gone.py")
        assert "trying it failed" in possible().bucket
    finally:
        possible.cache_clear()
