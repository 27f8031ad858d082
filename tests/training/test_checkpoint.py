"""A checkpoint brings back every number, is whole or absent, and holds tensors and JSON only."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from labkit.experiment import Experiment, Layout, Optimizer, checkpoint_files
from labkit.experiment.run_directory import RunDirectory
from labkit.experiment.tensor_files import load_file, save_file
from labkit.parallel import state
from labkit.parallel.decay import with_decay_flags
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
    return model, make_optimizer(Optimizer(name=name, lr=0.05, momentum=momentum), with_decay_flags(model.parameters()))


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
        self.shard_specs: dict[str, Any] = {}
        self.stages, self.mesh = {0: model}, Mesh(Layout(), 0, "cpu", connect=False)


def save(
    directory: RunDirectory, step: int, model: nn.Module, optimizer: Any, experiment: Experiment, writes: bool = True
) -> Path:
    saved = checkpoint.Saved(*state.gather(Alone(model), optimizer), part=0 if writes else None)
    return checkpoint.save(directory, step, experiment, saved, rank=0 if writes else 1)


def load(folder: Path, model: nn.Module, optimizer: Any) -> int:
    stored = checkpoint.read(folder)
    with checkpoint.as_checkpoint_error(folder):
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
        load(folder, other, make_optimizer(Optimizer(), with_decay_flags(other.parameters())))


# -- damage that a parser does not see --------------------------------------------------------------------------------


def _flip(name: str) -> Any:
    """One bit of the last byte, which belongs to a number."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)

    return damage


def _other_step(folder: Path) -> None:
    content = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(content | {"step": 7}))


def _weight_is_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["embedding.weight"].view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def _remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _extra_part(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-1.safetensors")


def _link_to(name: str) -> Any:
    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return damage


def _listed_pickle(folder: Path) -> None:
    (folder / "evil.pkl").write_bytes(b"x")


DAMAGES: dict[str, tuple[Any, str]] = {
    "a bit of the weights": (_flip("model.safetensors"), "model.safetensors"),
    "a bit of the moments": (_flip("optimizer.safetensors"), "optimizer.safetensors"),
    "a bit of what the rule keeps": (_flip("update.safetensors"), "update.safetensors"),
    "a bit of what a rank keeps": (_flip("rank-0.safetensors"), "rank-0.safetensors"),
    "another step": (_other_step, "checkpoint.json"),
    "a weight that is no number": (_weight_is_nan, "model.safetensors"),
    "the rule's file is gone": (_remove("update.safetensors"), "update.safetensors"),
    "a rank's file is gone": (_remove("rank-1.safetensors"), "rank-1.safetensors"),
    "a further part": (_extra_part, "model-1.safetensors"),
    "a further file": (_listed_pickle, "evil.pkl"),
    "the weights are a link": (_link_to("model.safetensors"), "model.safetensors"),
    "the list is a link": (_link_to("checkpoint.json"), "step-00000001"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_noticed_before_a_number_is_used(directory: RunDirectory, name: str) -> None:
    damage, words = DAMAGES[name]
    model, optimizer = made(0)
    train(model, optimizer, 0, 1)
    own = {"compressor.0.errors.0": torch.arange(5.0)}
    saved = checkpoint.Saved(*state.gather(Alone(model), optimizer), shared={"anchor": torch.ones(3)}, own=own)
    folder = directory.checkpoint(1)
    meetings: list[int] = []

    def meet() -> None:  # the other rank writes between the two meetings
        meetings.append(len(meetings))
        if len(meetings) == 2:
            partial = folder.with_name(f".{folder.name}.partial")
            save_file(own, partial / "rank-1.safetensors")
            known = checkpoint_files.sync_and_hash(partial / "rank-1.safetensors")
            checkpoint_files.write_checksums(partial, 1, {"rank-1.safetensors": known})

    checkpoint.save(directory, 1, Experiment(), saved, barrier=meet)
    stored = checkpoint.read(folder)
    assert stored.own is not None
    assert stored.own["compressor.0.errors.0"].tolist() == [0, 1, 2, 3, 4]
    assert stored.contents.ranks == 2
    damage(folder)
    with pytest.raises(ValueError, match=r"step-00000001") as refusal:
        checkpoint.read(folder)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_any_flipped_bit_of_any_file_is_noticed(directory: RunDirectory) -> None:
    model, optimizer = made(0)
    folder = save(directory, 1, model, optimizer, Experiment(), writes=True)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 40)):
            for bit in (0, 5):
                data = bytearray(whole)
                data[place] ^= 1 << bit
                path.write_bytes(data)
                if path.suffix == ".json" and _same_json(bytes(data), whole):
                    continue  # white space between two values
                with pytest.raises(ValueError, match="step-00000001"):
                    checkpoint.read(folder)
        path.write_bytes(whole)
    assert checkpoint.read(folder).step == 1


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_everything_is_on_the_disk_before_it_is_visible_and_before_older_ones_go(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = made(0)
    experiment = Experiment().replace("training.keep_checkpoints=1")
    save(directory, 1, model, optimizer, experiment, writes=True)
    happened: list[str] = []
    real_fsync, real_rename, real_rmtree = os.fsync, os.rename, shutil.rmtree

    def fsync(descriptor: int) -> None:
        happened.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name.lstrip('.')[:10]}")
        real_fsync(descriptor)

    def rename(source: Any, target: Any) -> None:
        happened.append(f"show {Path(target).name}")
        real_rename(source, target)

    def rmtree(path: Any, *more: Any, **options: Any) -> None:
        if Path(path).exists():
            happened.append(f"remove {Path(path).name}")
        real_rmtree(path, *more, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save(directory, 2, model, optimizer, experiment, writes=True)
    shown, removed = happened.index("show step-00000002"), happened.index("remove step-00000001")
    before = happened[:shown]
    for name in ("model.safe", "optimizer.", "checkpoint", "step-00000"):
        assert f"sync {name}" in before, happened
    assert "sync checkpoint" in happened[shown:removed], "the folder of the checkpoints"
    assert shown < removed


def test_tensors_of_every_kind_of_memory_can_be_saved(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    tied = torch.ones(3)
    tensors = {
        "columns": whole[:, :5],
        "transposed": whole.T,
        "side by side": whole[1],
        "expanded": torch.ones(1).expand(4),
        "tied": tied,
        "tied again": tied,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, requires_grad=True),
    }
    save_file(tensors, tmp_path / "file.safetensors")
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=0)


def test_a_link_is_neither_written_through_nor_read(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"mine")
    (tmp_path / "file.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="link"):
        load_file(tmp_path / "file.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "file.safetensors")
    assert (tmp_path / "outside").read_bytes() == b"mine"
    assert not (tmp_path / "file.safetensors").is_symlink()
