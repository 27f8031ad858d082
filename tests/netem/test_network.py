"""The emulated network is slow where it should be, counts what leaves, and is gone with the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from labkit.experiment import Experiment, ExperimentError
from labkit.launch import doctor, launch
from labkit.netem import namespace
from labkit.netem import rules as slow_link
from labkit.netem.rules import Links, possible
from labkit.runs import Run
from tests.launch.helpers import ENDLESS, GONE_S, Watched, events, start, tiny, wait_until

needs_namespaces = pytest.mark.skipif(bool(possible().bucket), reason=possible().bucket)
needs_hosts = pytest.mark.skipif(bool(possible().hosts), reason=possible().hosts)
RATE = 100.0
STEPS = 8


def slow(ranks: int, hosts: int = 1, **changes: Any) -> Experiment:
    """About 3 MB of gradient, with an evaluation and checkpoints between the updates."""
    network = {"rate_mbit": RATE, "hosts": hosts}
    between = {"training__evaluate_every": 3, "training__checkpoint_every": 4}
    settings = {"steps": STEPS, "workload__width": 48, "launch__network": network} | between
    return tiny(ranks=ranks, **(settings | changes))


def seconds_of_a_step(run: Run) -> float:
    """The fastest of all: whoever else uses this machine makes steps longer, never shorter."""
    return min(second for event in events(run, 0) if event["event"] == "steps" for second in event["seconds"])


def where(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def inside(namespaces: set[str]) -> list[str]:
    """Processes that live in one of these network namespaces."""
    found = []
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            if os.readlink(link) in namespaces:
                found.append(str(link))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def shared_link() -> Run:
    run = start(slow(2)).wait(120)
    assert run.state == "finished", run.cause
    return run


@pytest.fixture(scope="module")
def two_hosts() -> Run:
    run = start(slow(4, hosts=2)).wait(120)
    assert run.state == "finished", run.cause
    return run


@needs_namespaces
def test_the_counters_show_what_an_all_reduce_sends(shared_link: Run) -> None:
    summary = shared_link.summary()
    network = summary["network"]
    assert (network["rate_mbit"], network["hosts"], network["updates"]) == (RATE, 1, STEPS)
    formula = 2 * summary["communication"]["bytes_per_step"]
    assert formula > 5e6
    assert formula <= network["bytes_per_step"] <= 1.05 * formula
    assert network["loopback_bytes"] == 0


@needs_namespaces
@pytest.mark.parametrize(
    "gradients",
    [
        {"compression": {"method": "fp16"}},
        {"compression": {"method": "sign", "start_step": 0}},
        {"compression": {"method": "topk", "start_step": 0}},
        {"compression": {"method": "powersgd", "start_step": 0}},
        {"update": {"method": "local_sgd", "every": 2}},
        {"update": {"method": "streaming_diloco", "every": 4}},
        {"update": {"method": "parameter_server"}},
        {"update": {"method": "gossip"}},
    ],
    ids=lambda one: next(iter(one.values()))["method"],
)
def test_the_counters_show_what_methods_send(gradients: dict[str, Any]) -> None:
    run = start(slow(4, gradients=gradients)).wait(120)
    assert run.state == "finished", run.cause
    summary = run.summary()
    counted = summary["communication"]["counted_bytes_of_all_ranks"]
    assert counted <= summary["network"]["bytes_per_step"] <= 1.05 * counted


@needs_namespaces
def test_a_step_takes_as_long_as_its_bytes_need(shared_link: Run) -> None:
    theory = 2 * shared_link.summary()["communication"]["bytes_per_step"] * 8 / (RATE * 1e6)
    assert 0.7 * theory < seconds_of_a_step(shared_link) < 3 * theory


@needs_namespaces
def test_the_run_is_written_as_ever(shared_link: Run) -> None:
    """The user inside the namespace is the user outside."""
    assert shared_link.checkpoints()
    for path in (shared_link.directory.path, *shared_link.directory.path.rglob("*")):
        assert (path.stat().st_uid, path.stat().st_gid) == (os.getuid(), os.getgid()), path
    assert any("emulated on this machine" in warning for warning in shared_link.summary()["warnings"])


@needs_namespaces
@needs_hosts
def test_between_hosts_it_is_slow_and_within_them_fast(two_hosts: Run) -> None:
    """In the ring of four, one rank of each host sends to the other host and one to its neighbour."""
    summary = two_hosts.summary()
    network, sent = summary["network"], summary["communication"]["bytes_per_step"]
    assert [event["event"] for rank in (1, 3) for event in events(two_hosts, rank)].count("link") == 0
    for host in network["per_host"]:
        assert sent <= host["bytes"] / STEPS <= 1.05 * sent
        assert sent <= host["loopback_bytes"] / STEPS <= 1.05 * sent
    assert network["bytes"] == sum(host["bytes"] for host in network["per_host"])
    theory = sent * 8 / (RATE * 1e6)
    assert 0.7 * theory < seconds_of_a_step(two_hosts) < 3 * theory


@needs_namespaces
@needs_hosts
def test_ranks_live_on_their_hosts_and_nothing_stays() -> None:
    mine = where(os.getpid())
    with Watched(start(tiny(ranks=4, steps=ENDLESS, launch__network={"rate_mbit": 1000, "hosts": 2}))) as watch:
        pids = {name: process["pid"] for name, process in watch.begun().items()}
        homes = {name: where(pid) for name, pid in pids.items()}
        assert homes["rank 0"] == homes["rank 1"]
        assert homes["rank 2"] == homes["rank 3"]
        private = {homes["supervisor"], homes["rank 0"], homes["rank 2"]}
        assert len(private) == 3
        assert mine not in private
        assert len(inside(private)) == 5
        watch.run.stop()
        watch.ends("stopped", 60)
    wait_until(lambda: not inside(private), GONE_S, "nobody is in the private network any more")
    assert where(os.getpid()) == mine


@needs_namespaces
def test_a_killed_supervisor_leaves_no_network() -> None:
    network = {"rate_mbit": 1000, "hosts": 1 if possible().hosts else 2}
    with Watched(start(tiny(ranks=2, steps=ENDLESS, launch__network=network))) as watch:
        pids = {name: process["pid"] for name, process in watch.begun().items()}
        private = {where(pid) for pid in pids.values()}
        assert where(os.getpid()) not in private
        os.kill(pids["supervisor"], 9)
        wait_until(lambda: not inside(private), GONE_S, "the ranks are gone")
        watch.ends("failed", 10)


def test_where_namespaces_are_forbidden_nothing_is_launched(monkeypatch: pytest.MonkeyPatch, labkit_home: Path) -> None:
    reason = "containers forbid it"
    monkeypatch.setattr(slow_link, "possible", lambda: Links(reason, reason, reason))
    with pytest.raises(ExperimentError, match=rf"launch\.network: .*{reason}"):
        launch(slow(2))
    assert not list(labkit_home.glob("runs/*"))


@pytest.mark.parametrize(
    ("links", "said"),
    [
        (Links(), "allowed: links can be slowed down (launch.network)"),
        (Links(delay="no netem"), "allowed: links can be slowed down (launch.network); no delay_ms: no netem"),
        (Links("forbidden", "", ""), "links cannot be slowed down (launch.network): forbidden"),
    ],
)
def test_the_doctor_tells(links: Links, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_link, "possible", lambda: links)
    assert doctor._emulated_network().text == said


# Two hosts without any training: host 0 sends 1.25 MB to host 1 and to itself, at 50 Mbit/s; and nothing leads out.
# The process that makes them stays at the switch, as a supervisor does.
BY_HAND = """
import json, os, socket, time
from labkit.experiment import Network
from labkit.netem.hosts import Hosts

hosts = Hosts(Network(rate_mbit=50, hosts=2), 2)
ready, says = os.pipe()

def receive(address):
    with socket.create_server((address, 5000)) as server:
        os.write(says, b"+")
        connection, _ = server.accept()
        while connection.recv(1 << 20):
            pass
        connection.sendall(b"+")

def send():
    found = {}
    os.read(ready, 1), os.read(ready, 1)
    for name, address in (("within", "10.0.0.1"), ("between", "10.0.0.2")):
        with socket.create_connection((address, 5000), timeout=20) as connection:
            begun = time.monotonic()
            connection.sendall(bytes(1_250_000))
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
            found[name] = time.monotonic() - begun
    try:
        socket.create_connection(("192.0.2.1", 80), timeout=5)
    except OSError as error:
        found["out"] = error.strerror
    print(json.dumps(found), flush=True)

def on_host(host, work, *arguments):
    if os.fork() == 0:
        try:
            hosts.join(host)
            work(*arguments)
        finally:
            os._exit(0)

on_host(0, receive, "10.0.0.1")
on_host(1, receive, "10.0.0.2")
on_host(0, send)
for _ in range(3):
    os.wait()
"""


@needs_namespaces
@needs_hosts
def test_a_host_by_hand() -> None:
    answer = subprocess.run([sys.executable, "-c", BY_HAND], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert 0.7 * 0.2 < found["between"] < 3 * 0.2
    assert found["within"] < 0.7 * found["between"]
    assert found["out"] == "Network is unreachable"


def test_a_delay_is_asked_for_as_iproute2_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many kernels lack the module, so the message itself is compared: `tc qdisc add dev lo root handle 1: netem
    delay 10ms limit 1000000`, as strace shows it.
    """
    asked: list[bytes] = []
    monkeypatch.setattr(namespace, "_send_request", lambda kind, flags, body: asked.append(body))
    monkeypatch.setattr(namespace.socket, "if_nametoindex", lambda name: 1)
    namespace.limit_rate("lo", 100.0, 10.0)
    delay, bucket = asked
    assert delay.hex() == (
        "00000000" "01000000" "00000100" "ffffffff" "00000000" "0a000100" "6e6574656d000000"
        "1c000200" "5a620200" "40420f00" "00000000000000000000000000000000"
    )  # fmt: skip
    assert bucket[8:16] == bytes.fromhex("0000020001000100")  # handle 2:, below 1:1
