"""Weights in mapped files are those of a model in memory, and take none while nobody reads them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from labkit.workloads import mapped
from labkit.workloads.mapped import MappedFiles, converted, into_memory, is_mapped, mapped_parameters, pages_dropped
from labkit.workloads.models.gpt import gpt

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mapped, "LARGE_MODEL", 0)
    monkeypatch.setattr(mapped, "LARGE_TENSOR", 1)
    monkeypatch.setattr(mapped, "CHUNK", 2**14)
    monkeypatch.setattr(mapped, "_return_freed_blocks", lambda: None)  # it would last for the whole session
    yield
    gc.collect()
    assert not any(reference() for reference in mapped._CHUNKS), "files remain after the test"


def build() -> nn.Module:
    torch.manual_seed(1)
    return gpt(50, 8, 16, 2, 2, tied=True)


def test_initial_weights_are_those_of_a_model_in_memory(tmp_path: Path) -> None:
    plain = build().state_dict()
    with mapped_parameters(MappedFiles(tmp_path)):
        model = build()
    assert all(map(is_mapped, model.parameters()))
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())
    assert model.blocks["head"].score.weight is model.blocks["embed"].token.weight
    assert list(tmp_path.iterdir()) == [], "the files have no names"
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    into_memory(model)
    assert not any(map(is_mapped, model.parameters()))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())


def test_a_model_trains_in_its_files(tmp_path: Path) -> None:
    with mapped_parameters(MappedFiles(tmp_path)):
        model = build()
    plain, x = build(), torch.randint(50, (2, 8))
    for each in (model, plain):
        torch.optim.SGD(each.parameters(), 0.1).zero_grad()
        each(x).square().mean().backward()
        torch.optim.SGD(each.parameters(), 0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_pages_that_were_written_leave_the_memory(tmp_path: Path) -> None:
    """Six times 32 MB are written; at most 64 MB and what one period allows stay."""
    before, most = mapped.resident_bytes(), 0
    with pages_dropped(MappedFiles(tmp_path)):
        tensors, files = [], MappedFiles(tmp_path)
        for number in range(6):
            tensors.append(files.copy(torch.full((2**23,), float(number))))
            most = max(most, mapped.resident_bytes() - before)
    assert mapped.resident_bytes() - before < 40e6
    assert most < 160e6
    assert [float(tensor[-1]) for tensor in tensors] == [0, 1, 2, 3, 4, 5]


def test_another_dtype_stays_in_a_file(tmp_path: Path) -> None:
    tensor = MappedFiles(tmp_path).copy(torch.randn(40))
    half = converted(tensor, CPU, torch.bfloat16)
    assert is_mapped(half)
    assert torch.equal(half, tensor.to(torch.bfloat16))
    assert converted(tensor, CPU, torch.float32) is tensor
    assert not is_mapped(converted(torch.randn(3), CPU, torch.float64))


def test_a_full_disk_leaves_the_weights_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped.os, "posix_fallocate", full)
    with mapped_parameters(MappedFiles(tmp_path)):
        model = build()
    assert not any(map(is_mapped, model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), build().parameters(), strict=True))


def test_what_cannot_be_moved_is_left_alone(tmp_path: Path) -> None:
    with mapped_parameters(MappedFiles(tmp_path)):
        lazy, meta = nn.LazyLinear(3), nn.Linear(3, 3, device="meta")
        shared = nn.Parameter(torch.zeros(2, 3).t())
        holder = nn.Module()
        holder.transposed = shared
    assert isinstance(lazy.weight, nn.UninitializedParameter)
    assert meta.weight.is_meta
    assert holder.transposed is shared
    assert not is_mapped(shared)


def test_what_shares_its_storage_is_left_alone(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            start = torch.zeros(4)
            self.later = nn.Parameter(start)
            start.fill_(2)  # a model may go on with the tensor from which it made a parameter
            flat = torch.zeros(8)
            self.first, self.second = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])
            flat.fill_(3)

    with mapped_parameters(MappedFiles(tmp_path)):
        model = Tied()
    assert [float(value.detach().sum()) for value in model.parameters()] == [8, 12, 12]


def test_views_of_a_mapped_parameter_follow_it_into_memory(tmp_path: Path) -> None:
    with mapped_parameters(MappedFiles(tmp_path)):
        model = nn.Linear(3, 3)
    model.register_buffer("row", model.weight.data[1])
    into_memory(model)
    assert not is_mapped(model.row)
    with torch.no_grad():
        model.weight.fill_(5)
    assert model.row.tolist() == [5, 5, 5]


def test_many_tensors_need_few_open_files(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with mapped_parameters(MappedFiles(tmp_path)):
        model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(400)))
    assert all(map(is_mapped, model.parameters()))
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 210, "a file of 16 KiB holds four pages"


def test_large_files_are_put_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = Path("/dev/shm")
    if not in_memory.is_dir():
        pytest.skip("there is no file system in memory")
    assert mapped._is_in_memory(in_memory)
    assert not mapped._is_in_memory(tmp_path)
    monkeypatch.setattr(mapped.tempfile, "gettempdir", lambda: str(in_memory))
    assert mapped._scratch_folder(tmp_path) == tmp_path
    monkeypatch.setattr(mapped.tempfile, "gettempdir", lambda: str(tmp_path))
    assert mapped._scratch_folder(in_memory) == tmp_path
