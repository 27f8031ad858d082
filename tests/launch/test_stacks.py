"""Who waits and who hangs, by the stacks in a log."""

from __future__ import annotations

from labkit.launch.stacks import main_thread, waits_for_others

NOISE = ["some print of the model", "Thread is a word"]
OTHER = ["Thread 0x00007f01 (most recent call first):", '  File "/lib/threading.py", line 331 in wait', ""]
COLLECTIVE = [
    "Current thread 0x00007f02 (most recent call first):",
    '  File "/x/torch/distributed/distributed_c10d.py", line 3000 in all_reduce',
    '  File "/x/torch/distributed/c10d_logger.py", line 83 in wrapper',
    '  File "/x/labkit/training/evaluation.py", line 54 in evaluate',
]
LOOP = [
    "Current thread 0x00007f02 (most recent call first):",
    '  File "/srv/me/model.py", line 3 in forward',
    *[f'  File "/x/torch/nn/modules/module.py", line {number} in _call_impl' for number in range(10)],
    '  File "/x/torch/distributed/fsdp.py", line 1 in forward',
]


def test_a_rank_in_a_collective_waits() -> None:
    assert waits_for_others(NOISE + OTHER + COLLECTIVE)
    assert not waits_for_others(NOISE + OTHER + LOOP), "the framework around a model is no wait"
    assert not waits_for_others([*COLLECTIVE, "", *OTHER, *LOOP]), "the last dump counts"
    assert not waits_for_others(NOISE)
    assert not waits_for_others([])


def test_a_dump_that_is_not_there_yet_has_no_frames() -> None:
    assert main_thread(NOISE) == []
    assert len(main_thread(OTHER + COLLECTIVE)) == 3
