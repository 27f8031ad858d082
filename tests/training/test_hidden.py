"""What no single sample shows is named before step 1: hidden parameters, lost hooks, kept graphs, ids, odd numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labkit.cli import main
from labkit.experiment import Experiment
from labkit.experiment.fault import TaskFault
from labkit.training.rehearsal.ids import Ids, first_beyond
from labkit.workloads.text import Windows
from tests.training import hidden_tasks, test_rehearsal
from tests.training.test_rehearsal import run, sentence

TASKS = Path(hidden_tasks.__file__)
UNTRAINED = ", which no optimizer would train: it is not a parameter of the model, so register it there"
KEPT = " is kept from one pass to the next together with its graph, which the first backward pass has freed: "


def custom(function: str, layout: str = "dp1", **changes: Any) -> Experiment:
    experiment = test_rehearsal.custom("plain", layout, **changes)
    return experiment.set({"workload": {"name": "custom", "path": f"{TASKS}:{function}"}})


WRONG: list[tuple[str, str, str]] = [
    ("in_a_closure", "dp2", "the loss depends on scale of the loss" + UNTRAINED),
    ("in_a_partial", "dp1", "the loss depends on projection.weight of the loss" + UNTRAINED),
    ("in_an_object", "dp1", "the loss depends on parts['temperature'] of the loss" + UNTRAINED),
    ("in_a_method", "dp1", "the loss depends on parts['temperature'] of the loss" + UNTRAINED),
    ("in_the_file", "dp1", "the loss depends on GLOBAL_SCALE of the loss" + UNTRAINED),
    ("in_a_list", "dp1", "the loss depends on layers[0].weight of the model" + UNTRAINED),
    ("made_in_the_pass", "dp1", "a tensor of shape [3] created in the pass" + UNTRAINED),
    (
        "penalized",
        "shard2",
        "the loss reads body.weight of the model in addition to its output, but under ZeRO 3",
    ),
    ("inputs_with_gradients", "dp1", "x of train requires a gradient, which no optimizer would use: detach it"),
    ("hidden_state_kept", "dp1", "memory['state'] of the model" + KEPT),
    ("loss_of_before_kept", "dp1", "before[0] of the loss" + KEPT),
    ("id_too_large", "dp1", "of train has the id 20, but 0 has 20 rows (ids 0 to 19): give it more rows"),
    ("one_id_too_large", "dp2", "sample 77 of train has the id 1000, but 0 has 20 rows (ids 0 to 19)"),
    ("one_id_below_zero", "dp1", "sample 31 of train has the id -"),
    ("sparse_inputs", "dp1", "x is a sparse tensor, which cannot be batched: give it dense (x.to_dense())"),
    ("sparse_rows_of_inputs", "dp1", "sample 0 of train from sparse_rows_of_inputs: x is a sparse tensor"),
    ("target_of_70_bits", "dp1", "sample 31 of train from target_of_70_bits: its y is 1180591620717411303424, which"),
    ("loss_as_class", "dp1", "loss_fn from loss_as_class is the class CrossEntropyLoss: give an instance of it, Cross"),
    ("model_as_class", "dp1", "model from model_as_class is the class Net: give an instance of it, Net()"),
    (
        "hook",
        "shard2",
        "body.weight has a hook (register_hook), which is lost under ZeRO 3: set layout.zero_stage",
    ),
    ("hook_afterwards", "shard2", "body.weight has a hook (register_post_accumulate_grad_hook), which is lost under Z"),
]


@pytest.mark.parametrize(("function", "layout", "words"), WRONG, ids=[case[0] for case in WRONG])
def test_what_is_hidden_is_named_before_the_first_step(function: str, layout: str, words: str) -> None:
    message = sentence(custom(function, layout))
    assert words in message, message


@pytest.mark.parametrize("function", ["teacher", "gradient_penalty", "penalized"])
def test_what_is_only_read_or_made_in_the_pass_is_trained_with(function: str) -> None:
    ended = run(custom(function, "dp2"))
    assert ended.state == "finished", ended.cause


def test_validate_exits_2_for_what_is_hidden(labkit_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload = json.dumps({"name": "custom", "path": f"{TASKS}:in_a_closure"})
    assert main(["validate", "--rehearse", "--json", "--set", f"workload={workload}"]) == 2
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["problems"][0]["reason"].startswith("the loss depends on scale of the loss, which no optimizer")


def test_a_hook_that_is_lost_in_any_other_way_is_named() -> None:
    """The net below the rules: whatever stands where the parameter was."""
    from torch import nn

    from labkit.training.rehearsal import hooks

    model = hidden_tasks.hook()["model"]
    before = hooks.hooked(model)
    assert list(before) == ["body.weight"]
    assert hooks.lost_in(before, [model]) is None
    model.body.weight = nn.Parameter(model.body.weight.detach().clone())
    assert str(hooks.lost_in(before, [model])).startswith("body.weight has a hook (register_hook), but this experiment")


LOSSES_DIFFER = "although weights, buffers and samples are equal: something else in the model or the loss differs; draw"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("attribute_differs", LOSSES_DIFFER),
        ("loss_differs", LOSSES_DIFFER),
        ("weights_of_the_loss_differ", "weight of the loss differs between rank 0 and rank 1: draw"),
        ("trained_on_one_rank", "whether body.bias is trained differs between rank 0 and rank 1: draw"),
    ],
)
@pytest.mark.parametrize("layout", ["dp2", "shard2"])
def test_whatever_makes_ranks_train_different_models_is_named(function: str, words: str, layout: str) -> None:
    message = sentence(custom(function, layout))
    assert words in message, message


@pytest.mark.parametrize("function", ["moving_teacher", "moving_statistics", "counting"])
def test_state_that_moves_once_per_pass_is_noted_where_a_step_has_several(function: str) -> None:
    ended = run(custom(function, "dp1", **{"gradients.accumulation": 2}))
    assert ended.state == "finished", ended.cause
    assert any("changes in every training pass, and a step has 2 passes" in note for note in ended.summary()["notes"])
    alone = run(custom(function, "dp1"))
    assert not any("changes in every training pass" in note for note in alone.summary()["notes"])


def test_a_teacher_that_zero_3_would_not_move_is_refused() -> None:
    """The change was written to a gathered copy and freed: held-out loss 1.468 instead of 1.466, without a word."""
    message = sentence(custom("moving_teacher", "shard2"))
    assert "teacher.weight is changed in the forward pass although it is not trained, and ZeRO 3 would lose" in message
    ended = run(custom("moving_teacher", "shard2", **{"layout.zero_stage": 2}))
    assert ended.state == "finished", ended.cause


@pytest.mark.parametrize("layout", ["dp1", "dp2"])
def test_a_model_and_a_loss_may_write_to_what_they_are_given(layout: str) -> None:
    ended = run(custom("writes_to_its_inputs", layout))
    assert ended.state == "finished", ended.cause


def test_an_embedding_with_a_pass_of_its_own_is_not_asked_for_ids() -> None:
    """The positions of BART are an embedding that is given the ids for their shape alone."""

    class Positions(torch.nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.arange(ids.shape[1]).expand(ids.shape))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = torch.nn.Embedding(50, 4), Positions(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tokens(x) + self.positions(x)

    model, x = Model(), torch.full((2, 6), 49)
    with Ids(model).checked(x, [0, 1], "train"):
        model(x)


# -- all samples are compared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("one_label_differs", "the whole of y of train differs between rank 0 and rank 1: draw"),
        ("one_label_differs_in_a_subset", "the whole of tensor 1 of train differs between rank 0 and rank 1: draw"),
        ("other_order_of_a_subset", "the whole of the indices of test differs between rank 0 and rank 1: draw"),
        ("one_row_differs", "sample 22 of train differs between rank 0 and rank 1: draw"),
    ],
)
def test_a_single_sample_that_differs_between_ranks_is_noticed(function: str, words: str) -> None:
    message = sentence(custom(function, "dp2"))
    assert words in message, message


def test_a_long_tensor_is_looked_at_whole() -> None:
    import torch

    from labkit.training.rehearsal.fingerprint import digest

    long = torch.zeros(300_001, dtype=torch.uint8)
    one, other = long.clone(), long.clone()
    one[12_345], other[12_346] = 1, 1
    assert len({digest(tensor) for tensor in (long, one, other)}) == 3
    hot = torch.eye(1024, dtype=torch.float64)
    assert digest(hot) != digest(hot.flip(0))
    assert digest(hot) == digest(hot.clone()) == digest(hot.T.contiguous())
    assert digest(hot[:, ::2]) == digest(hot[:, ::2].clone())


def test_comparing_built_in_data_costs_little() -> None:
    """A few milliseconds; the bound leaves room for a machine that does other things."""
    import time

    from labkit.experiment.registry import registry
    from labkit.training.rehearsal import fingerprint

    for name in ("vision", "language", "driving"):
        workload = registry("workload")[name].load()
        task = workload.build(workload.Options(), 0)
        seconds = []
        for _ in range(5):
            begun = time.perf_counter()
            assert fingerprint.in_memory(task.train)
            list(fingerprint.hash_in_memory(task.train, "train"))
            list(fingerprint.hash_in_memory(task.test, "test"))
            seconds.append(time.perf_counter() - begun)
        assert min(seconds) < 0.05, name


@pytest.mark.parametrize(("rows", "first"), [(256, None), (255, 1), (100, 0)])
def test_ids_of_eight_bits_are_compared_as_numbers(rows: int, first: int | None) -> None:
    assert first_beyond(torch.tensor([[0, 254], [255, 0]], dtype=torch.uint8), rows) == first


def test_ids_of_a_text_are_checked_whole() -> None:
    tokens = np.arange(8 * 100 + 1) % 20
    tokens[8 * 77 + 3] = 1000
    windows = Windows(tokens, context=8)
    model = torch.nn.Sequential(torch.nn.Embedding(20, 4))
    ids, first = Ids(model), windows.__getitems__([0, 1])["x"]
    with ids.checked(first, [0, 1], "train"):
        model(first)
    with pytest.raises(TaskFault, match=r"^sample 77 of train has the id 1000, but 0 has 20 rows"):
        ids.check_all(windows, "train")
