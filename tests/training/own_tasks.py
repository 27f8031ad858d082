"""Workloads of somebody's own: complex weights, branches, losses that are not a mean over samples, buffers."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from labkit.workloads.base import Blocks
from labkit.workloads.custom_task import as_task

SAMPLES, WIDTH = 48, 6


def data(classes: int = 3) -> tuple[Tensor, Tensor]:
    """Inputs [48, 6] and classes [48]."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(SAMPLES, WIDTH, generator=generator)
    return x, torch.randint(classes, (SAMPLES,), generator=generator)


def classifies(model: nn.Module) -> dict[str, Any]:
    """The task of a model that gives three scores."""
    return {"model": model, "train": data(), "test": data(), "loss_fn": nn.CrossEntropyLoss()}


class Spectral(nn.Module):
    """A layer with complex weights and a complex buffer, as of Fourier layers and of rotary factors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH // 2 + 1, WIDTH // 2 + 1, dtype=torch.complex64))
        self.register_buffer("factors", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.factors: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft((torch.fft.rfft(x) * self.factors) @ self.weight, n=WIDTH)


def chain(*blocks: nn.Module) -> nn.Module:
    return Blocks({f"block_{number}": block for number, block in enumerate(blocks)})


def complex_weights() -> Any:
    x, y = data()
    model = chain(nn.Linear(WIDTH, WIDTH), Spectral(), nn.Tanh(), nn.Linear(WIDTH, 3))
    return {"model": model, "train": (x, y), "test": (x, y), "loss_fn": nn.CrossEntropyLoss()}


class Branch(nn.Module):
    """A branch for every second pass in training, and weights that nothing uses."""

    def __init__(self, every: int = 2) -> None:
        super().__init__()
        self.trunk, self.branch = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.head, self.never = nn.Linear(8, 3), nn.Linear(5, 5)
        self.every, self.passes = every, 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x)
        if self.training:
            self.passes += 1
            if self.passes % self.every == 0:
                hidden = hidden + self.branch(x)
        out: Tensor = self.head(hidden.tanh())
        return out


def branch() -> Any:
    x, y = data()
    return {"model": Branch(), "train": (x, y), "test": (x, y), "loss_fn": nn.CrossEntropyLoss()}


class ByBatch(nn.Module):
    """A branch that depends on the samples: some ranks take it and some do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        high = x[:, 0] > 1.5
        if high.any():
            hidden = torch.where(high.unsqueeze(1), hidden + self.branch(hidden), hidden)
        out: Tensor = self.head(hidden)
        return out


def branch_by_batch() -> Any:
    x, y = data()
    return {"model": ByBatch(), "train": (x, y), "test": (x, y), "loss_fn": nn.CrossEntropyLoss()}


class NeverUsed(nn.Module):
    """Passes its input on; has weights that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x


def never_used() -> Any:
    x, y = data()
    model = chain(nn.Linear(WIDTH, 8), nn.Sequential(nn.Tanh(), NeverUsed()), nn.Linear(8, 8), nn.Linear(8, 3))
    return {"model": model, "train": (x, y), "test": (x, y), "loss_fn": nn.CrossEntropyLoss()}


class Centred(nn.Module):
    """A running mean of its inputs, and counts, in buffers: changed in place or assigned anew."""

    def __init__(self, anew: bool) -> None:
        super().__init__()
        self.anew = anew
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.mean: Tensor
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self.mean
        if self.training:
            now = 0.7 * self.mean + 0.3 * x.detach().mean(0)
            if self.anew:
                self.mean = now
                self.seen = self.seen + 1
            else:
                self.mean.copy_(now)
                self.seen.add_(1)
        return centred


def running_mean(anew: bool = False) -> Any:
    x, y = data()
    x = x + torch.arange(float(SAMPLES))[:, None] / SAMPLES  # shares of a batch have other means
    model = chain(Centred(anew), nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 3))
    return {"model": model, "train": (x, y), "test": (x[:20], y[:20]), "loss_fn": nn.CrossEntropyLoss()}


def running_mean_anew() -> Any:
    return running_mean(anew=True)


def batch_norm() -> Any:
    x, y = data()
    model = chain(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    return {"model": model, "train": (x, y), "test": (x[:20], y[:20]), "loss_fn": nn.CrossEntropyLoss()}


def classifier() -> nn.Module:
    return chain(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))


def class_weights() -> Any:
    x, y = data()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 5.0]))
    return {"model": classifier(), "train": (x, y), "test": (x, y), "loss_fn": loss}


def ignored_targets() -> Any:
    x, y = data()
    y = torch.where(torch.arange(SAMPLES) % 3 == 0, -100, y)
    return {"model": classifier(), "train": (x, y), "test": (x, y), "loss_fn": nn.CrossEntropyLoss()}


class Masked:
    """A task with a loss of its own: the mean over what a mask leaves."""

    def __init__(self) -> None:
        x, y = data()
        mask = (torch.arange(SAMPLES) % 4 != 0).float()
        from labkit.workloads.base import TensorData

        task = as_task((classifier(), (x, y), (x, y), nn.CrossEntropyLoss()), "masked")
        self.model, self.metric = task.model, task.metric
        self.train = self.test = TensorData(x=x, y=y, mask=mask)
        self.closed_loop, self.facts = task.closed_loop, task.facts

    def batch_weight(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["mask"].sum()

    def loss(self, output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        each = nn.functional.cross_entropy(output, batch["y"], reduction="none")
        return (each * batch["mask"]).sum() / batch["mask"].sum()

    def evaluate(self, output: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        each = nn.functional.cross_entropy(output, batch["y"], reduction="none")
        right = (output.argmax(-1) == batch["y"]) * batch["mask"]
        return {"count": batch["mask"].sum(), "loss": (each * batch["mask"]).sum(), "correct": right.sum()}

    def metrics(self, sums: Any) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["count"], "accuracy": sums["correct"] / sums["count"]}


def masked() -> Any:
    return Masked()


def probabilities() -> Any:
    x, y = data(2)
    model = chain(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 1), nn.Sigmoid(), nn.Flatten(0)))
    target = y.float()
    return {"model": model, "train": (x, target), "test": (x, target), "loss_fn": nn.BCELoss(), "metric": "loss"}


def years() -> Any:
    """Targets that bfloat16 cannot tell apart, and a model that learns nothing."""
    x, _ = data()
    y = 1993 + torch.arange(SAMPLES) % 15
    head = nn.Linear(WIDTH, 1)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, 2000.0)  # a number of bfloat16
    head.requires_grad_(False)

    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.nothing = head, nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = (self.head(x) + 0 * self.nothing).squeeze(1)
            return out

    return {"model": Plus(), "train": (x, y.float()), "test": (x, y.float()), "loss_fn": nn.MSELoss()}


class CountsSamples(nn.Module):
    """Counts the samples that it has seen, in floating point: no mean of ranks is what one process counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("samples", torch.zeros(()))
        self.samples: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.samples += len(x)
        return x


def only_counts_samples() -> Any:
    x, y = data()
    model = chain(CountsSamples(), nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 3))
    return {"model": model, "train": (x, y), "test": (x, y), "loss_fn": nn.CrossEntropyLoss()}


def hidden_mask() -> Any:
    """A mean over a part of the samples, of which nobody is told."""
    x, y = data()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        kept = target != 0
        return nn.functional.cross_entropy(output[kept], target[kept])

    return {"model": classifier(), "train": (x, y), "test": (x, y), "loss_fn": loss}


def complex_layer() -> Any:
    """A linear layer of complex numbers."""

    class Phases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.layer = nn.Linear(WIDTH, 8), nn.Linear(8, 8, dtype=torch.complex64)
            self.between, self.after = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.before(x)
            out: Tensor = self.after(self.between(self.layer(hidden.to(self.layer.weight.dtype)).abs()))
            return out

    x, y = data()
    return {"model": Phases(), "train": (x, y), "test": (x, y), "loss_fn": nn.CrossEntropyLoss()}


def _with_hook(add: Any) -> Any:
    task = batch_free()
    add(task["model"].blocks["block_1"].weight)
    return task


def batch_free() -> Any:
    """Three layers that look at one sample each."""
    model = chain(nn.Linear(WIDTH, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return {"model": model, "train": data(), "test": data(), "loss_fn": nn.CrossEntropyLoss()}


def hooked() -> Any:
    """Half of the rows are not trained, by a hook of the weight."""

    def half(gradient: Tensor) -> Tensor:
        return gradient * (torch.arange(8) < 4).to(gradient.dtype).unsqueeze(1)

    return _with_hook(lambda weight: weight.register_hook(half))


def hooked_afterwards() -> Any:
    """The same, by a hook that runs after the gradient has been accumulated."""

    def half(weight: Tensor) -> None:
        assert weight.grad is not None
        weight.grad[4:] = 0

    return _with_hook(lambda weight: weight.register_post_accumulate_grad_hook(half))


def clipping_hook() -> Any:
    """A hook that is not linear: clipping a mean is not the mean of what has been clipped."""
    return _with_hook(lambda weight: weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01)))


def overflows_in_float64() -> Any:
    """The lowest number of the format of the weights is put into a float32 tensor, as XGLM's mask does."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.layer(x)
            lowest = torch.zeros(3, dtype=torch.float32)
            lowest.fill_(torch.finfo(scores.dtype).min)
            return torch.max(scores, lowest.to(scores.dtype))

    return classifies(Masked())


def evaluates_by_ranks() -> Any:
    """A model that trains alike everywhere, and whose scores in evaluation depend on the number of ranks."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.layer(x)
            return scores if self.training else scores * float(os.environ.get("WORLD_SIZE", "1"))

    return classifies(Scaled())
