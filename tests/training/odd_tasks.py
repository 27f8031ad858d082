"""Tasks as people write them, each with one thing that is odd; read by the workload `custom` on the ranks."""

from __future__ import annotations

import datetime
import itertools
import os
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Pair = tuple[Any, Any]


class Net(nn.Module):
    """Two layers; subclasses change the way through them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.body(x)))


def samples(count: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def task(model: nn.Module, loss: Any = None, train: Any = None, test: Any = None) -> dict[str, Any]:
    return {
        "model": model,
        "train": samples() if train is None else train,
        "test": samples(24, 1) if test is None else test,
        "loss_fn": loss or nn.CrossEntropyLoss(),
    }


class Rows(torch.utils.data.Dataset[Pair]):
    """Samples made by a function of their index."""

    def __init__(self, row: Callable[[int], Any], count: int = 48) -> None:
        self.row, self.count = row, count
        self.x, self.y = samples(count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.row(index)


def rows(change: Callable[[Tensor, int, int], Any]) -> dict[str, Any]:
    x, y = samples(48)
    data = Rows(lambda index: change(x[index], int(y[index]), index))
    return task(Net(), train=data)


# -- nothing wrong --------------------------------------------------------------------------------------------------


def plain() -> dict[str, Any]:
    return task(Net())


def with_state() -> dict[str, Any]:
    """Everything that a pass changes or draws from: running statistics, dropout, counters, generators of its own."""

    class Changing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(10), nn.Dropout(0.3)
            self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(10, 10))
            self.passes, self.history = 0, [0]
            self.chance, self.numbers = random.Random(3), np.random.default_rng(4)
            self.register_buffer("mean", torch.zeros(10))

        def forward(self, x: Tensor) -> Tensor:
            h = self.drop(self.norm(self.spectral(self.body(x))))
            if self.training:
                self.passes += 1
                self.history.append(self.passes)
                self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            scale = 1 + 0.01 * (self.passes + len(self.history) + self.chance.random() + self.numbers.random())
            out: Tensor = self.head((h - self.mean) * (scale + random.random() + np.random.rand()))
            return out

    counter = itertools.count()

    class Noisy(Rows):
        draws = np.random.default_rng(5)

        def __init__(self) -> None:
            super().__init__(lambda index: None)
            self.own = np.random.default_rng(6)

        def __getitem__(self, index: int) -> Any:
            noise = float(np.random.rand() + random.random() + torch.rand(()) + self.own.random())
            return self.x[index] + 0.1 * noise, self.y[index]

    assert next(counter) == 0
    return task(Changing(), train=Noisy())


def drawn_by_numpy_and_random() -> dict[str, Any]:
    model = Net()
    with torch.no_grad():
        model.body.weight.copy_(torch.from_numpy(np.random.normal(size=(10, 6)) * 0.3))
        model.body.bias.fill_(random.random())
    return task(model)


def augmented() -> dict[str, Any]:
    return rows(lambda x, y, index: (x + np.random.rand() + random.random(), y))


def noted_draws() -> dict[str, Any]:
    """Each sample's random number is added to a file of its rank, in the folder LABKIT_TEST_DRAWS."""

    def row(x: Tensor, y: int, index: int) -> Pair:
        number = np.random.rand()
        with open(os.path.join(os.environ["LABKIT_TEST_DRAWS"], os.environ.get("RANK", "0")), "a") as file:
            file.write(f"{number!r}\n")
        return x + number, y

    return rows(row)


def fades_by_the_hour() -> dict[str, Any]:
    class Net2(Net):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = super().forward(x) * (1 + datetime.datetime.now().hour)
            return out

    return task(Net2())


def batch_norm_at_the_end() -> dict[str, Any]:
    return task(nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 3), nn.BatchNorm1d(3)))


def unused() -> dict[str, Any]:
    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.never = nn.Linear(5, 5)

    return task(Model())


def alternating() -> dict[str, Any]:
    """A layer that every second pass uses, on all ranks alike."""

    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra, self.passes = nn.Linear(6, 10), 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += self.training
            h = self.body(x) + (self.extra(x) if self.passes % 2 else 0)
            out: Tensor = self.head(torch.tanh(h))
            return out

    return task(Model())


def sometimes() -> dict[str, Any]:
    """A layer that depends on the samples of the pass."""

    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            if x[:, 2].mean() > 0:
                h = h + self.extra(x)
            out: Tensor = self.head(torch.tanh(h))
            return out

    return task(Model())


def by_chance() -> dict[str, Any]:
    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x) + (self.extra(x) if random.random() < 0.5 else 0)
            out: Tensor = self.head(torch.tanh(h))
            return out

    return task(Model())


# -- not the same on all ranks --------------------------------------------------------------------------------------


def other_weights() -> dict[str, Any]:
    model = Net()
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(np.random.default_rng().normal(size=(3, 10))))
    return task(model)


def other_weights_in_blocks() -> dict[str, Any]:
    """The same in blocks, for a pipeline."""
    from labkit.workloads.base import Blocks

    last = nn.Linear(10, 3)
    with torch.no_grad():
        last.weight.copy_(torch.from_numpy(np.random.default_rng().normal(size=(3, 10))))
    return task(Blocks({"first": nn.Linear(6, 10), "middle": nn.Tanh(), "last": last}))


def other_buffer() -> dict[str, Any]:
    model = Net()
    model.register_buffer("born", torch.tensor(float(time.perf_counter_ns() % 10**6)))
    return task(model)


def other_split() -> dict[str, Any]:
    x, y = samples()
    order = torch.from_numpy(np.random.default_rng().permutation(96))
    return task(Net(), train=(x[order[:70]], y[order[:70]]), test=(x[order[70:]], y[order[70:]]))


def other_length() -> dict[str, Any]:
    x, y = samples()
    count = 80 + int(os.environ.get("RANK", 0))
    return task(Net(), train=(x[:count], y[:count]))


def other_augmentation() -> dict[str, Any]:
    """Fresh numbers of the operating system for every sample: allowed in training, but not to be repeated."""
    return rows(lambda x, y, index: (x + float(np.random.default_rng().random()), y))


# -- wrong ----------------------------------------------------------------------------------------------------------


def everything_frozen() -> dict[str, Any]:
    return task(Net().requires_grad_(False))


def lazy() -> dict[str, Any]:
    return task(nn.Sequential(nn.LazyLinear(10), nn.Tanh(), nn.LazyLinear(3)))


def lazy_convolution() -> dict[str, Any]:
    return task(nn.Sequential(nn.Unflatten(1, (1, 6)), nn.LazyConv1d(2, 3), nn.Flatten(), nn.Linear(8, 3)))


def lazy_norm() -> dict[str, Any]:
    return task(nn.Sequential(nn.Linear(6, 10), nn.LazyBatchNorm1d(affine=False), nn.Linear(10, 3)))


def lazy_buffer() -> dict[str, Any]:
    model = Net()
    model.register_buffer("scale", nn.parameter.UninitializedBuffer())
    return task(model)


def synchronized_norm() -> dict[str, Any]:
    return task(nn.Sequential(nn.Linear(6, 10), nn.SyncBatchNorm(10), nn.Linear(10, 3)))


def one_number() -> dict[str, Any]:
    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * self.temperature

    return task(Model())


def empty_parameter() -> dict[str, Any]:
    model = Net()
    model.nothing = nn.Parameter(torch.zeros(0, 4))
    return task(model)


def integer_parameter() -> dict[str, Any]:
    model = Net()
    model.places = nn.Parameter(torch.arange(4), requires_grad=False)
    return task(model)


def dense_rows() -> dict[str, Any]:
    return sparse_rows(sparse=False)


def sparse_rows(sparse: bool = True) -> dict[str, Any]:
    x = torch.randint(0, 20, (96, 3), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Embedding(20, 8, sparse=sparse), nn.Flatten(), nn.Linear(24, 3))
    return task(model, train=(x, x[:, 0] % 3), test=(x, x[:, 0] % 3))


def old_weight_norm() -> dict[str, Any]:
    return task(nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 10)), nn.Tanh(), nn.Linear(10, 3)))


def new_weight_norm() -> dict[str, Any]:
    norm = nn.utils.parametrizations.weight_norm
    return task(nn.Sequential(norm(nn.Linear(6, 10)), nn.Tanh(), nn.Linear(10, 3)))


def two_outputs() -> dict[str, Any]:
    class Model(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    return task(Model(), lambda out, y: functional.cross_entropy(out[0], y))


def two_outputs_in_training() -> dict[str, Any]:
    class Model(Net):
        def forward(self, x: Tensor) -> Any:
            scores = super().forward(x)
            return (scores, x) if self.training else scores

    return task(Model(), lambda out, y: functional.cross_entropy(out if isinstance(out, Tensor) else out[0], y))


def text_for_output() -> dict[str, Any]:
    class Model(Net):
        def forward(self, x: Tensor) -> Any:
            return "nothing"

    return task(Model())


def loss_for_each_sample() -> dict[str, Any]:
    return task(Net(), lambda out, y: functional.cross_entropy(out, y, reduction="none"))


def loss_as_float() -> dict[str, Any]:
    return task(Net(), lambda out, y: float(functional.cross_entropy(out, y)))


def detached_loss() -> dict[str, Any]:
    return task(Net(), lambda out, y: functional.cross_entropy(out.detach(), y))


def loss_twice() -> dict[str, Any]:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        value = functional.cross_entropy(out, y)
        value.backward()
        return value

    return task(Net(), loss)


def labels_of_int32() -> dict[str, Any]:
    return rows(lambda x, y, index: (x, np.int32(y)))


def input_of_bytes() -> dict[str, Any]:
    return rows(lambda x, y, index: ((x * 10 + 100).to(torch.uint8), y))


def label_missing() -> dict[str, Any]:
    return rows(lambda x, y, index: (x, None if index == 31 else y))


def label_as_text() -> dict[str, Any]:
    return rows(lambda x, y, index: (x, "abc"[y])) | {"metric": "loss"}


def ragged() -> dict[str, Any]:
    return rows(lambda x, y, index: (x if index < 40 else x[:5], y))


def broken_file() -> dict[str, Any]:
    def row(x: Tensor, y: int, index: int) -> Pair:
        if index == 29:
            raise OSError("image file is truncated")
        return x, y

    return rows(row)


def inputs_in_a_dict() -> dict[str, Any]:
    return rows(lambda x, y, index: ({"left": x[:3], "right": x[3:]}, y)) | {"metric": "loss"}


def hangs_while_built() -> dict[str, Any]:
    time.sleep(3600)
    return plain()


def hangs_in_a_sample() -> dict[str, Any]:
    return rows(lambda x, y, index: (x, y) if index < 4 else time.sleep(3600))


class Scales(nn.Module):
    """Multiplies each input by a weight and adds some up: it learns without any matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).view(-1, 3, 2).sum(2)


def without_products() -> dict[str, Any]:
    return task(Scales())
