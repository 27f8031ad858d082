"""A checkpoint brings back every number, is whole or absent, and holds tensors and JSON only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from labkit.experiment import Experiment, Layout, Optimizer
from labkit.experiment.run_directory import RunDirectory
from labkit.parallel import state
from labkit.parallel.decay import by_shape
from labkit.parallel.mesh import Mesh
from labkit.training import checkpoint
from labkit.training.optimizers import make_optimizer


class Tied(nn.Module):
    """An embedding that is also the output layer, as in a GPT, and a part that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.frozen(self.norm(self.embedding(x))))
        return out


def made(seed: int, name: Any = "adamw", momentum: float = 0.9, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    model = Tied().to(dtype)
    return model, make_optimizer(Optimizer(name=name, lr=0.05, momentum=momentum), by_shape(model.parameters()))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        x = torch.randint(0, 7, (16,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(x), (x + 1) % 7)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Alone:
    """A model on one rank, held as a whole."""

    sharded = ()

    def __init__(self, model: nn.Module) -> None:
        self.holdings: dict[str, Any] = {}
        self.stages, self.mesh = {0: model}, Mesh(Layout(), 0, "cpu", connect=False)


def save(
    directory: RunDirectory, step: int, model: nn.Module, optimizer: Any, experiment: Experiment, writes: bool = True
) -> Path:
    saved = checkpoint.Saved(*state.gather(Alone(model), optimizer), part=0 if writes else None)
    return checkpoint.save(directory, step, experiment, saved, rank=0 if writes else 1)


def load(folder: Path, model: nn.Module, optimizer: Any) -> int:
    stored = checkpoint.read(folder)
    with checkpoint.fitting(folder):
        state.restore(Alone(model), optimizer, stored.weights, stored.moments)
    return stored.step


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "momentum"), [("adamw", 0.9), ("sgd", 0.9), ("sgd", 0.0)])
def test_training_goes_on_exactly(directory: RunDirectory, name: str, momentum: float, dtype: torch.dtype) -> None:
    model, optimizer = made(0, name, momentum, dtype)
    train(model, optimizer, 0, 5)
    folder = save(directory, 5, model, optimizer, Experiment(), writes=True)
    expected = train(model, optimizer, 5, 12)
    other, other_optimizer = made(1, name, momentum, dtype)
    assert load(folder, other, other_optimizer) == 5
    assert other.head.weight is other.embedding.weight, "tied weights stay tied"
    assert train(other, other_optimizer, 5, 12) == expected
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_saving_changes_nothing(directory: RunDirectory) -> None:
    one, two = made(0), made(0)
    train(*one, 0, 3)
    train(*two, 0, 3)
    save(directory, 3, *one, Experiment(), writes=True)
    assert train(*one, 3, 6) == train(*two, 3, 6)


def test_weights_can_be_read_by_anyone(directory: RunDirectory) -> None:
    from safetensors.torch import load_file

    model, optimizer = made(0)
    train(model, optimizer, 0, 2)
    folder = save(directory, 2, model, optimizer, Experiment(), writes=True)
    weights = load_file(folder / "model.safetensors")
    assert "embedding.weight" in weights
    assert "head.weight" not in weights, "tied weights are stored once"
    torch.testing.assert_close(weights["embedding.weight"], model.embedding.weight.detach())
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]
    content = json.loads((folder / "checkpoint.json").read_text())
    assert content["step"] == 2
    assert Experiment.from_dict(content["experiment"]) == Experiment()


def test_only_the_rank_that_writes_writes(directory: RunDirectory) -> None:
    model, optimizer = made(0)
    folder = save(directory, 1, model, optimizer, Experiment(), writes=False)
    assert not folder.exists()


def test_the_latest_are_kept_and_a_step_can_be_written_again(directory: RunDirectory) -> None:
    model, optimizer = made(0)
    experiment = Experiment().replace("training.keep_checkpoints=2")
    for step in (1, 2, 3, 3, 10):
        save(directory, step, model, optimizer, experiment, writes=True)
    assert sorted(path.name for path in directory.checkpoints.iterdir()) == ["step-00000003", "step-00000010"]


def test_a_checkpoint_cut_short_counts_as_absent(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    from labkit.runs import Run

    model, optimizer = made(0)
    save(directory, 1, model, optimizer, Experiment(), writes=True)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            save(directory, 2, model, optimizer, Experiment(), writes=True)
    assert Run(directory).checkpoints() == [1]


def _no_json(folder: Path) -> None:
    (folder / "checkpoint.json").unlink()


def _other_format(folder: Path) -> None:
    (folder / "checkpoint.json").write_text('{"format": 99, "step": 1}')


def _no_numbers(folder: Path) -> None:
    (folder / "checkpoint.json").write_text('{"format": 2, "step": 1, "optimizer": [1]}')


def _cut_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:50])


def _pickled_weights(folder: Path) -> None:
    torch.save({"embedding.weight": torch.ones(7, 4)}, folder / "model.safetensors")


def _no_optimizer(folder: Path) -> None:
    (folder / "optimizer.safetensors").unlink()


@pytest.mark.parametrize(
    "damage",
    [_no_json, _other_format, _no_numbers, _cut_weights, _pickled_weights, _no_optimizer],
    ids=lambda function: function.__name__,
)
def test_a_damaged_checkpoint_is_refused_in_words(directory: RunDirectory, damage: Any) -> None:
    model, optimizer = made(0)
    train(model, optimizer, 0, 1)
    folder = save(directory, 1, model, optimizer, Experiment(), writes=True)
    damage(folder)
    with pytest.raises(ValueError, match="step-00000001"):
        load(folder, *made(1))


def test_a_checkpoint_of_another_model_is_refused(directory: RunDirectory) -> None:
    model, optimizer = made(0)
    folder = save(directory, 1, model, optimizer, Experiment(), writes=True)
    other = nn.Linear(4, 7)
    with pytest.raises(ValueError, match="does not fit this model"):
        load(folder, other, make_optimizer(Optimizer(), by_shape(other.parameters())))
