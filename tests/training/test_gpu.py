"""What can only be shown on a GPU; each test skips where there is none."""

from __future__ import annotations

import os
import signal
import time

import pytest

from labkit.experiment import Experiment, Machine
from labkit.experiment.recipes import vision_ddp
from labkit.launch import launch
from labkit.proofs.parity import check
from tests.launch.helpers import Watched

pytestmark = pytest.mark.gpu


def short(*assignments: str) -> Experiment:
    base = vision_ddp().replace("training.steps=12", "training.evaluate_every=0", "training.checkpoint_every=0")
    return base.replace("launch.device=cuda", *assignments)


def test_one_gpu_computes_what_a_cpu_computes() -> None:
    figures = {}
    for device in ("cpu", "cuda"):
        run = launch(short("layout.dp_replicate=1", "quantization.training=fp64", f"launch.device={device}"))
        run.result(300)
        figures[device] = run.data().loss
    assert abs(figures["cpu"] - figures["cuda"]).max() < 1e-9


def test_ranks_that_share_a_gpu_run_over_gloo_and_are_flagged() -> None:
    ranks = len(Machine.here().gpus) + 1
    experiment = short(f"layout.dp_replicate={ranks}")
    assert any("share" in str(warning) for warning in experiment.warnings())
    run = launch(experiment)
    run.result(300)
    assert run.summary()["effective"]["backend"] == "gloo"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_parity_on_gpus(accumulation: int) -> None:
    result = check(short("layout.dp_replicate=2", f"gradients.accumulation={accumulation}", "training.global_batch=67"))
    assert result["parity"], result["text"]


def test_nccl_where_every_rank_has_a_gpu() -> None:
    if len(Machine.here().gpus) < 2:
        pytest.skip("needs two GPUs")
    run = launch(short("layout.dp_replicate=2"))
    run.result(300)
    assert run.summary()["effective"]["backend"] == "nccl"


@pytest.mark.parametrize(
    ("sent", "kind", "message"),
    [
        (signal.SIGKILL, "signal", "rank 1 was killed by SIGKILL"),
        (signal.SIGSTOP, "silent", "rank 1 has been silent"),
    ],
    ids=["killed", "hangs"],
)
def test_a_lost_peer_under_nccl_is_named(sent: signal.Signals, kind: str, message: str) -> None:
    """NCCL raises nothing where a peer is lost: the others wait in its kernels until somebody ends them."""
    if len(Machine.here().gpus) < 2:
        pytest.skip("needs two GPUs")
    wanted = short("layout.dp_replicate=2", "training.steps=1000000", "launch.timeout_s=10")
    with Watched(launch(wanted, baseline=None)) as watch:
        os.kill(watch.begun()["rank 1"]["pid"], sent)
        cause = watch.ends("failed", within=30, kind=kind)
    assert cause["rank"] == 1
    assert message in cause["message"]


def test_this_process_made_no_cuda_context() -> None:
    import torch

    assert not torch.cuda.is_initialized()


def used_bytes() -> int:
    """Memory in use on all visible GPUs, as the driver tells it."""
    from labkit.experiment import machine

    return sum(gpu.used_bytes for gpu in machine._gpus()[0])


@pytest.mark.parametrize("how", ["stop", "kill the supervisor"])
def test_nothing_stays_on_the_card(how: str) -> None:
    before = used_bytes()
    run = launch(short("layout.dp_replicate=1", "training.steps=1000000"), baseline=None)
    deadline = time.monotonic() + 60
    while not len(run.data().loss) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert used_bytes() > before + 2**27, "a context and a model"
    if how == "stop":
        assert run.stop(30).state == "stopped"
    else:
        os.kill(run.status["supervisor"]["pid"], signal.SIGKILL)
    while used_bytes() > before + 2**26 and time.monotonic() < deadline + 30:
        time.sleep(0.2)
    assert used_bytes() <= before + 2**26
