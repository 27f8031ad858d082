from __future__ import annotations

import functools
import linecache
import tempfile
import textwrap
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from labkit.experiment import Experiment
from labkit.workloads.base import ClassificationTask, TensorData
from labkit.workloads.custom import Custom, NotSelfContainedError, from_notebook, self_contained_source
from labkit.workloads.custom_task import as_task
from tests.workloads.helpers import evaluate, reasons, train

TASK = """
def make_task(seed=0):
    import torch
    from torch import nn
    x = torch.randn(200, 4)
    y = (x.sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    return model, (x[:150], y[:150]), (x[150:], y[150:]), nn.CrossEntropyLoss()
"""


class Cells:
    """Runs text the way a notebook runs a cell: compiled under a name of its own that linecache knows."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.count = 0

    def run(self, text: str) -> dict[str, Any]:
        self.count += 1
        text = textwrap.dedent(text)
        name = f"{tempfile.gettempdir()}/ipykernel_1/{id(self)}{self.count}.py"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        exec(compile(text, name, "exec"), self.names)
        return self.names


@pytest.fixture
def cells() -> Cells:
    return Cells()


def test_a_function_of_a_cell_travels_as_text_and_trains(cells: Cells) -> None:
    section = from_notebook(cells.run(TASK)["make_task"])
    assert section["name"] == "custom"
    experiment = Experiment.from_json(Experiment().replace(workload=section).to_json())
    assert experiment.workload.options["source"].strip() == TASK.strip()
    assert reasons(section) == []
    task = Custom.build(experiment.workload, 0)
    train(task, 60, 32, 1e-2)
    assert evaluate(task)["accuracy"] > 0.85


def test_the_seed_reaches_the_function(cells: Cells) -> None:
    section = from_notebook(cells.run(TASK)["make_task"])
    first, again, other = (build(section, seed) for seed in (1, 1, 2))
    assert torch.equal(first.model[0].weight, again.model[0].weight)
    assert not torch.equal(first.model[0].weight, other.model[0].weight)


def build(section: dict[str, str], seed: int = 0) -> Any:
    return Custom.build({key: value for key, value in section.items() if key != "name"}, seed)


@pytest.mark.parametrize(
    ("before", "body", "sentence"),
    [
        (
            "train_set = [1]",
            "return train_set",
            "train_set is defined elsewhere in the notebook; define it inside make_task",
        ),
        (
            "import numpy as np",
            "return np.zeros(3)",
            "np is imported elsewhere in the notebook; write `import numpy as np`",
        ),
        ("import math", "return math.pi", "math is imported elsewhere in the notebook; write `import math` inside"),
        ("", "return nowhere", "nowhere is not defined in the source"),
        ("def helper(): ...", "return [helper() for _ in range(2)]", "helper is defined elsewhere in the notebook"),
        ("class Net: ...", "def inner():\n        return Net\n    return inner()", "Net is defined elsewhere"),
        ("width = 3", "class Net:\n        size = width\n    return Net", "width is defined elsewhere"),
        ("a = b = 1", "return a, b", "a is defined elsewhere.*; b is defined elsewhere"),
        ("total = 0", "global total\n    return total", "total is defined elsewhere"),
        ("width = 3", "return lambda x: x + width", "width is defined elsewhere"),
    ],
)
def test_what_a_cell_leans_on_is_named(cells: Cells, before: str, body: str, sentence: str) -> None:
    cells.run(before)
    function = cells.run(f"def make_task():\n    {body}\n")["make_task"]
    with pytest.raises(NotSelfContainedError, match=sentence):
        self_contained_source(function)


@pytest.mark.parametrize(
    "body",
    [
        "import math\n    return math.pi",
        "from math import pi as p\n    return p",
        "x = 1\n    def inner():\n        return x\n    return inner()",
        "class Net:\n        def size(self):\n            return len([n for n in range(3)])\n    return Net().size()",
        "global made\n    made = 1\n    return made",
        "try:\n        return int('x')\n    except ValueError as error:\n        return str(error)",
        "return [y for x in [[1]] for y in x if (z := y)], {k: v for k, v in {}.items()}",
        "n: int = 3\n    return n",
    ],
)
def test_what_stands_on_its_own_travels(cells: Cells, body: str) -> None:
    self_contained_source(cells.run(f"def make_task():\n    {body}\n")["make_task"])


def test_annotations_need_not_be_known_on_the_other_side(cells: Cells) -> None:
    cells.run("class Task: ...")
    cells.run(TASK.replace("def make_task(seed=0)", "def make_task(seed: Task = 0) -> Task"))
    assert build(from_notebook(cells.names["make_task"])).metric.key == "accuracy"


def test_default_values_and_decorators_are_looked_at_too(cells: Cells) -> None:
    cells.run("size = 3\ndef twice(f): return f")
    for text in ("def make_task(n=size):\n    return n\n", "@twice\ndef make_task():\n    return 1\n"):
        with pytest.raises(NotSelfContainedError, match="elsewhere in the notebook"):
            self_contained_source(cells.run(text)["make_task"])


class _Thing:
    def make_task(self) -> None: ...

    def __call__(self) -> None: ...


def _outer(x: int) -> Any:
    def make_task() -> int:
        return x

    return make_task


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda: None, "a lambda cannot be sent to ranks"),
        (_outer(3), "make_task uses x of the enclosing function"),
        (_Thing().make_task, "can be sent to ranks, not a method"),
        (_Thing(), "not a _Thing"),
        (functools.partial(print), "not a partial"),
        (len, "not a builtin_function_or_method"),
        (_Thing, "not a type"),
        (None, "not a NoneType"),
    ],
)
def test_what_is_no_plain_function_is_refused(function: Any, sentence: str) -> None:
    with pytest.raises(NotSelfContainedError, match=sentence):
        self_contained_source(function)


def test_a_function_without_source_is_refused() -> None:
    names: dict[str, Any] = {}
    exec("def make_task(): ...", names)
    with pytest.raises(NotSelfContainedError, match="the source of make_task cannot be found"):
        self_contained_source(names["make_task"])


def test_nothing_is_run_while_checking(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    source = f"open({str(mark)!r}, 'w').close()\ndef make_task(): return 1\n"
    package = tmp_path / "package"
    package.mkdir()
    for file in (tmp_path / "task.py", package / "__init__.py", package / "inner.py"):
        file.write_text(source)
    assert reasons({"name": "custom", "source": source}) == []
    assert reasons({"name": "custom", "path": f"{tmp_path}/task.py:make_task"}) == []
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        assert reasons({"name": "custom", "path": "package.inner:make_task"}) == []
        assert len(reasons({"name": "custom", "path": "package.none:make_task"})) == 1
    finally:
        sys.path.remove(str(tmp_path))
    assert not mark.exists()


def test_a_traceback_shows_the_lines_of_the_cell(cells: Cells) -> None:
    section = from_notebook(cells.run("def make_task():\n    wrong = 1 / 0  # here\n    return wrong\n")["make_task"])
    with pytest.raises(ZeroDivisionError) as caught:
        build(section)
    shown = "".join(traceback.format_exception(caught.value))
    assert 'File "<notebook cell make_task>", line 2, in make_task' in shown
    assert "wrong = 1 / 0  # here" in shown


def test_a_function_in_a_file_and_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_neighbour.py").write_text("WIDTH = 16\n")
    (tmp_path / "my_task.py").write_text("from my_neighbour import WIDTH\n" + TASK.replace("16", "WIDTH"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for path in ("my_task.py:make_task", f"{tmp_path}/my_task.py:make_task", "my_task:make_task"):
        assert reasons({"name": "custom", "path": path}) == []
        assert len(Custom.build({"path": path}, 0).train) == 150


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "workload.path: your own workload needs either"),
        ({"path": "a:b", "source": "x"}, "workload.path: your own workload needs either"),
        ({"path": "make_task"}, "workload.path: 'make_task' is not of the form module:function or file.py:function"),
        ({"path": "no_such_module_here:make_task"}, "workload.path: there is no module no_such_module_here"),
        ({"path": "json.nothing:make_task"}, "workload.path: there is no module json.nothing"),
        ({"path": "nothing.py:make_task"}, "workload.path: there is no file nothing.py"),
        ({"path": "json:make_task"}, "workload.path: json does not define make_task"),
        ({"path": "a-b:make_task"}, "workload.path: 'a-b' is not a module name"),
        ({"source": "def other(): ..."}, "workload.source: the source does not define make_task"),
        ({"source": "def make_task(:"}, "workload.source: the source is not Python"),
        ({"source": "def make_task():\n  return data"}, "workload.source: data is not defined in the source"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(options: dict, sentence: str) -> None:
    found = reasons({"name": "custom"} | options)
    assert len(found) == 1
    assert found[0].startswith(sentence)


class Pairs(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3,), float(index)), index % 2


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter([])


MODEL = nn.Linear(3, 2)
X, Y = torch.randn(8, 3), torch.zeros(8, dtype=torch.int64)


def test_a_dict_a_tuple_a_data_set_and_a_task_are_understood() -> None:
    whole = as_task((MODEL, Pairs(), Pairs(), nn.CrossEntropyLoss()), "f")
    batch = whole.train.__getitems__([4, 1])
    assert batch["x"][:, 0].tolist() == [4.0, 1.0]
    assert batch["y"].tolist() == [0, 1]
    assert whole.metric.key == "accuracy"
    regression = {"model": nn.Linear(3, 3), "train": (X, X), "test": (X, X), "loss_fn": nn.MSELoss()}
    task = as_task(regression, "f")
    assert task.metric.key == "loss"
    assert evaluate(task)["loss"] == pytest.approx(nn.functional.mse_loss(task.model(X), X).item())
    own = ClassificationTask(MODEL, TensorData(x=X, y=Y), TensorData(x=X, y=Y))
    assert as_task(own, "f") is own


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (None, "f must return a Task, a dict .*, but it returned None"),
        (MODEL, "it returned Linear"),
        ((MODEL, 1, 2), "it returned tuple"),
        ({"model": MODEL}, "lacks train, test, loss_fn"),
        ({"model": MODEL, "train": (X, Y), "test": (X, Y), "loss_fn": len, "x": 1}, "has unknown keys x"),
        ((X, (X, Y), (X, Y), len), "model from f must be a torch.nn.Module, but it is Tensor"),
        ((MODEL, (X, Y[:3]), (X, Y), len), "train from f has 8 inputs and 3 targets"),
        ((MODEL, 3, (X, Y), len), "train from f must be .*, but it is int"),
        ((MODEL, Stream(), (X, Y), len), "train from f is an iterable data set"),
        ((MODEL, (X, Y), (X[:0], Y[:0]), len), "test from f is empty"),
        ((MODEL, (X, Y), (X, Y), "mse"), "loss_fn from f must be a function"),
        ((MODEL, (X, Y), (X, Y), nn.MSELoss(reduction="sum")), "must be the mean over the samples"),
    ],
)
def test_a_misfit_is_named(made: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        as_task(made, "f")
