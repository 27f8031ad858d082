"""The labels of the pretended GPUs while several threads make tensors, as the autograd engine and the loader do."""

import sys
import threading

import torch

from tests.pretended.labels import CUDA, Labels


def test_labels_are_counted_while_other_threads_make_some() -> None:
    labels, ended = Labels(), threading.Event()

    def make() -> None:
        kept: list[torch.Tensor] = []
        while not ended.is_set():
            kept = [*kept[-100:], torch.empty(3)]
            labels.put(kept[-1], CUDA)

    threads = [threading.Thread(target=make) for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(2000):
            labels.on_gpu()
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert len(labels.on_gpu()) <= 3 * 101
    kept = torch.empty(3)
    labels.put(kept, CUDA)
    assert labels.of(kept) == CUDA
