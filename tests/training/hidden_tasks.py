"""Tasks with something wrong that no single sample shows: hidden parameters, hooks, kept graphs, ids, odd numbers."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.training.odd_tasks import Net, Rows, rows, samples, task
from tests.training.own_tasks import Branch

GLOBAL_SCALE = torch.ones(3, requires_grad=True)

# -- parameters that no optimizer would train -------------------------------------------------------------------------


def in_a_closure() -> dict[str, Any]:
    scale = nn.Parameter(torch.ones(3))
    return task(Net(), lambda out, y: functional.cross_entropy(out * scale, y))


def in_a_partial() -> dict[str, Any]:
    def loss(out: Tensor, y: Tensor, projection: nn.Module) -> Tensor:
        return functional.cross_entropy(projection(out), y)

    return task(Net(), functools.partial(loss, projection=nn.Linear(3, 3)))


class Weighing:
    """No module, and yet it holds a parameter."""

    def __init__(self) -> None:
        self.parts = {"temperature": nn.Parameter(torch.ones(1))}

    def __call__(self, out: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(out / self.parts["temperature"], y)


def in_an_object() -> dict[str, Any]:
    return task(Net(), Weighing())


def in_a_method() -> dict[str, Any]:
    return task(Net(), Weighing().__call__)


def in_the_file() -> dict[str, Any]:
    return task(Net(), lambda out, y: functional.cross_entropy(out * GLOBAL_SCALE, y))


def in_a_list() -> dict[str, Any]:
    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(10, 10)]

        def forward(self, x: Tensor) -> Any:
            return self.head(self.layers[0](self.body(x)))

    return task(Model())


def made_in_the_pass() -> dict[str, Any]:
    class Model(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * nn.Parameter(torch.ones(3))

    return task(Model())


def teacher() -> dict[str, Any]:
    """Read, not trained: nothing is wrong."""
    model, elder = Net(), Net()

    def loss(out: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = elder.head.bias.softmax(0)
        return functional.cross_entropy(out, y) + (out.softmax(1).mean(1, keepdim=True) * target).sum(1).mean()

    return task(model, loss)


def gradient_penalty() -> dict[str, Any]:
    """A leaf that is made in the pass and asked for its gradient: nothing is wrong."""

    class Model(Net):
        def forward(self, x: Tensor) -> Any:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(super().forward(leaf).sum(), leaf, create_graph=self.training)
            return super().forward(x) + 0.01 * slope.square().mean(1, keepdim=True)

    return task(Model())


def penalized() -> dict[str, Any]:
    model = Net()
    return task(model, lambda out, y: functional.cross_entropy(out, y) + 0.1 * model.body.weight.square().sum())


def inputs_with_gradients() -> dict[str, Any]:
    x, y = samples()
    return task(Net(), train=(x.requires_grad_(), y))


# -- what is kept from pass to pass ------------------------------------------------------------------------------------


def hidden_state_kept() -> dict[str, Any]:
    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.memory: dict[str, Any] = {"state": torch.zeros(10)}

        def forward(self, x: Tensor) -> Any:
            h = torch.tanh(self.body(x) + self.memory["state"])
            if self.training:
                self.memory["state"] = h.mean(0)
            return self.head(h)

    return task(Model())


def loss_of_before_kept() -> dict[str, Any]:
    before: list[Tensor] = []

    def loss(out: Tensor, y: Tensor) -> Tensor:
        value = functional.cross_entropy(out, y)
        total = value + (0.1 * before.pop() if before else 0)
        before.append(value)
        return total

    return task(Net(), loss)


# -- inputs and targets ------------------------------------------------------------------------------------------------


def _words(ids: Tensor) -> dict[str, Any]:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(24, 3))
    x = torch.arange(288).reshape(96, 3) % 20
    return task(model, train=(ids, x[:, 0] % 3), test=(x, x[:, 0] % 3))


def id_too_large() -> dict[str, Any]:
    ids = torch.arange(288).reshape(96, 3) % 20
    ids[:, 1] = 20
    return _words(ids)


def one_id_too_large() -> dict[str, Any]:
    """Only one sample, which no early pass sees."""
    ids = torch.arange(288).reshape(96, 3) % 20
    ids[77, 2] = 1000
    return _words(ids)


def one_id_below_zero() -> dict[str, Any]:
    x = torch.arange(144).reshape(48, 3) % 20
    data = Rows(lambda index: (x[index] - (30 if index == 31 else 0), 0))
    return _words(x[:1].expand(96, 3)) | {"train": data}


def sparse_inputs() -> dict[str, Any]:
    x, y = samples()
    return task(Net(), train=(x.to_sparse(), y))


def sparse_rows_of_inputs() -> dict[str, Any]:
    return rows(lambda x, y, index: (x.to_sparse(), y))


def target_of_70_bits() -> dict[str, Any]:
    return rows(lambda x, y, index: (x, 2**70 if index == 31 else y))


def loss_as_class() -> dict[str, Any]:
    return task(Net()) | {"loss_fn": nn.CrossEntropyLoss}


def model_as_class() -> dict[str, Any]:
    return task(Net()) | {"model": Net}


# -- hooks -------------------------------------------------------------------------------------------------------------


def hook() -> dict[str, Any]:
    model = Net()
    model.body.weight.register_hook(lambda gradient: gradient * 2)
    return task(model)


def hook_afterwards() -> dict[str, Any]:
    model = Net()
    model.body.weight.register_post_accumulate_grad_hook(lambda weight: weight.grad.mul_(2))
    return task(model)


# -- ranks that have other samples in a few places --------------------------------------------------------------------


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def one_label_differs() -> dict[str, Any]:
    x, y = samples()
    y[41] = (y[41] + _rank()) % 3
    return task(Net(), train=(x, y))


def one_label_differs_in_a_subset() -> dict[str, Any]:
    x, y = samples()
    y[53] = (y[53] + _rank()) % 3
    whole = torch.utils.data.TensorDataset(x, y)
    return task(Net(), train=torch.utils.data.Subset(whole, list(range(10, 90))))


def other_order_of_a_subset() -> dict[str, Any]:
    whole = torch.utils.data.TensorDataset(*samples())
    order = list(range(96))
    if _rank():
        order[50], order[51] = 51, 50
    return task(Net(), test=torch.utils.data.Subset(whole, order))


def one_row_differs() -> dict[str, Any]:
    return rows(lambda x, y, index: (x + (_rank() if index == 22 else 0), y))


# -- state that moves by itself, and what ranks hold beside weights, buffers and samples -------------------------------


class Teacher(nn.Module):
    """A model with a frozen copy of its first layer that follows it by a moving average in every training pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.teacher, self.head = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 3)
        self.teacher.load_state_dict(self.body.state_dict())
        self.teacher.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            with torch.no_grad():
                for average, weight in zip(self.teacher.parameters(), self.body.parameters(), strict=True):
                    average.data.lerp_(weight, 0.1)
        return self.head((self.body(x) + self.teacher(x)).tanh())


def moving_teacher() -> dict[str, Any]:
    return task(Teacher())


def counting() -> dict[str, Any]:
    return task(Branch(every=3))


def moving_statistics() -> dict[str, Any]:
    model = nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(), nn.Linear(6, 3)
    )
    return task(model)


def attribute_differs() -> dict[str, Any]:
    class Scaled(Net):
        scale = 1.0 + _rank()

        def forward(self, x: Tensor) -> Any:
            return self.scale * super().forward(x)

    return task(Scaled())


def loss_differs() -> dict[str, Any]:
    factor = 1.0 + _rank()
    return task(Net(), loss=lambda out, y: factor * nn.functional.cross_entropy(out, y))


def weights_of_the_loss_differ() -> dict[str, Any]:
    return task(Net(), loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0 + _rank(), 1.0])))


def trained_on_one_rank() -> dict[str, Any]:
    model = Net()
    if _rank():
        model.body.bias.requires_grad_(False)
    return task(model)


def writes_to_its_inputs() -> dict[str, Any]:
    """Both are legal in a training loop: what the model and the loss are given is theirs."""

    class Writing(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.requires_grad_())

    def loss(out: Tensor, y: Tensor) -> Tensor:
        y -= 1
        return nn.functional.cross_entropy(out, y)

    (x, y), (test_x, test_y) = samples(), samples(24, 1)
    return task(Writing(), loss, (x, y + 1), (test_x, test_y + 1))
