"""Every wrong request: exit code 2, one sentence per reason on standard error, nothing launched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from labkit.cli import main
from labkit.experiment.machine import Machine
from labkit.experiment.recipes import vision_ddp
from labkit.experiment.run_directory import write_json
from labkit.launch import standby_pid

# What the sentences are made of: a prefix, a reason, and a full stop or a hint in brackets.
SENTENCE = re.compile(r"labkit: \S.*(\.|\(see labkit[^)]*--help\))")
GPU = bool(Machine.here().gpus)


@dataclass(frozen=True)
class Case:
    """A request, and the words that the refusal must hold, one string a reason."""

    name: str
    arguments: list[str]
    says: list[str]


def sets(name: str, assignment: str | list[str], *says: str) -> Case:
    """`labkit run vision-ddp --set …`"""
    assignments = [assignment] if isinstance(assignment, str) else assignment
    return Case(name, ["run", "vision-ddp", *(part for text in assignments for part in ("--set", text))], list(says))


def file(name: str, content: str, *says: str) -> Case:
    """`labkit run wrong.json`"""
    return Case(name, ["run", f"@{content}"], list(says))


DEEP = "[" * 100_000
CASES = [
    # fields
    sets("unknown field", "training.stepz=3", "unknown field 'stepz'", "steps"),
    sets("misspelt section", "trainning.steps=3", "unknown section 'trainning'"),
    sets("no such top-level field", "stepps=3", "unknown field 'stepps'"),
    sets("section below a field", "training.steps.more=1", "training"),
    sets("empty name", "=5", "write section.field=value"),
    sets("no value", "training.steps", "write section.field=value"),
    sets("field of a word", ["layout=nonsense", "layout.tp=2"], "cannot read 'nonsense'"),
    sets("field of a number", ["training=5", "training.steps=3"], "training: was set to 5"),
    sets("field of a workload's name", ["workload=vision", "workload.width=8"], "workload: was set to 'vision'"),
    sets("section as text", "training=fast", "training: must be a JSON object"),
    sets("layout as a number", "layout=5", "layout: must be a JSON object with named fields or a short form"),
    # numbers
    sets("zero steps", "training.steps=0", "must be at least 1, got 0"),
    sets("negative steps", "training.steps=-5", "must be at least 1, got -5"),
    sets("steps in words", "training.steps=many", "must be a whole number, got 'many'"),
    sets("half a step", "training.steps=1.5", "must be a whole number, got 1.5"),
    sets("far too many steps", "training.steps=" + "9" * 5000, "training.steps: must be a whole number"),
    sets("neither steps nor epochs", "training.steps=null", "give either steps or epochs"),
    sets("both steps and epochs", 'training={"steps": 3, "epochs": 1}', "give either steps or epochs"),
    sets("NaN learning rate", "optimizer.lr=NaN", "optimizer.lr: must be a finite number, got nan"),
    sets("infinite learning rate", "optimizer.lr=inf", "optimizer.lr: must be a finite number"),
    sets("learning rate of zero", "optimizer.lr=0", "must be greater than 0"),
    sets("learning rate in words", "optimizer.lr=fast", "must be a number, got 'fast'"),
    sets("yes for true", "training.gradient_norm=perhaps", "must be true or false, got 'perhaps'"),
    sets("negative grace", "launch.grace_s=-1", "must be at least 0"),
    sets("timeout of zero", "launch.timeout_s=0", "must be at least 1"),
    sets("no duration", "launch.max_duration_s=0", "must be greater than 0"),
    sets("negative seed", "training.seed=-1", "must be at least 0"),
    sets("beta1 of one", "optimizer.beta1=1", "must be less than 1"),
    sets("unknown optimizer", "optimizer.name=adam", "must be one of 'adamw' or 'sgd'"),
    sets("nested too deeply", f"optimizer.lr={DEEP}", "optimizer.lr: must be a number"),
    sets("a name too long", "name=" + "x" * 201, "name: must have at most 200 characters"),
    sets("half a character", 'name="\\ud800"', "name: must be text"),
    sets("several at once", ["training.steps=0", "optimizer.lr=-1", "launch.grace_s=x"], "steps", "lr", "grace_s"),
    # layout and machine
    sets("unknown axis", "layout=dq2", "cannot read 'dq2'"),
    sets("axis twice", "layout=dp2·dp4", "dp_replicate appears twice"),
    sets("axis of zero ranks", "layout.dp_replicate=0", "must be at least 1, or -1"),
    sets("two open axes", "layout=dp-1·tp-1", "only one axis can be -1"),
    Case("ranks that do not fit", ["run", "--ranks", "3"], ["dp_replicate 2 × tp 1 × pp 1 = 2, but world_size is 3"]),
    Case(
        "ranks that an open axis cannot fill",
        ["run", "--set", "layout=dp-1·tp2", "--ranks", "3"],
        ["does not divide world_size 3"],
    ),
    Case("sweep without a list", ["sweep", "--name", "a", "--over", "training.seed=1"], ["--over takes a list"]),
    Case("sweep of nothing", ["sweep", "--name", "a", "--over", "training.seed=[]"], ["--over takes a list"]),
    Case("sweep over no field", ["sweep", "--name", "a", "--over", "training.sed=[1]"], ["unknown field 'sed'"]),
    Case("a name that is a path", ["sweep", "--name", "../a", "--over", "training.seed=[1]"], ["a sweep's name"]),
    Case("no ranks", ["run", "--ranks", "0"], ["at least 1, got '0'"]),
    sets("more ranks than the machine bears", "layout.dp_replicate=99999", "more than 16 times", "samples per"),
    sets("global batch below the ranks", "training.global_batch=1", "need at least 2 samples per update, got 1"),
    sets("batch beyond the data", ["workload.shift=0", "training.global_batch=5000"], "has 1438 samples"),
    sets("more passes than samples", "gradients.accumulation=100", "need at least 200 samples"),
    sets("unknown device", "launch.device=tpu", "must be one of 'auto', 'cpu' or 'cuda'"),
    sets("isolated tensor parallelism", ["layout=dp2·tp2", "launch.isolated=true"], "plain data"),
    # methods
    sets("unknown workload", "workload.name=visoin", "unknown workload 'visoin'", "vision"),
    sets("unknown method", "gradients.compression.method=zip", "unknown compression method 'zip'"),
    sets(
        "sparse without a target",
        "sparsity.method=rigl",
        "rigl needs to know which fraction of the weights should become zero",
    ),
    sets("option of another method", ['gradients.compression={"method": "sign", "ratio": 0.1}'], "ratio"),
    sets("stages as text", "layout.stage_blocks=1,5", "layout.stage_blocks: must be a list such as [1, 5]"),
    sets("axis without a sequence", "layout=cp2", "layout.cp: this network has no sequence to cut"),
    sets("axis without experts", "layout=ep2", "layout.ep: this network has no experts to distribute"),
    sets("slow link without packets", ["launch.network.rate_mbit=100", "launch.transport=shared_memory"], "launch."),
    sets(
        "masks of ranks apart",
        ["sparsity.method=rigl", "sparsity.target=0.9", "gradients.update.method=gossip"],
        "different masks",
    ),
    sets("update rule that cannot", ["layout=shard2", "gradients.update.method=gossip"], "gradients.update.method: "),
    sets("asynchronous schedule without a pipeline", "layout.schedule=pipedream", "layout.schedule: "),
    sets(
        "two update rules",
        ["layout=pp2", "layout.schedule=pipedream", "gradients.update.method=diloco"],
        "cannot be combined with diloco; nearest legal value: synchronous",
    ),
    sets("shares without replicas", ["layout=tp2", "training.shares=speed"], "training.shares: "),
    sets("network without a rate", "launch.network.delay_ms=1", "launch.network.rate_mbit: is required"),
    sets("layers that are not there", "quantization.training=int8", "a residual network has convolutions"),
    sets("unknown number format", "quantization.training=fp7", "unknown number format 'fp7'"),
    sets("unknown schedule", "layout.schedule=2f2b", "unknown schedule '2f2b'"),
    sets("unknown option of the workload", "workload.wdth=8", "unknown field 'wdth'"),
    sets("option out of range", "workload.width=1", "workload.width: must be at least 4"),
    sets("sizes that do not fit", ["workload.model=vit", "workload.heads=5"], "5 heads do not divide a width of 64"),
    sets("own workload without a path", "workload.name=custom", "needs either a path"),
    sets(
        "own workload from nowhere",
        ["workload.name=custom", "workload.path=nowhere.py:make_task"],
        "there is no file nowhere.py",
    ),
    sets(
        "own workload that does not travel",
        ['workload={"name": "custom", "source": "def make_task():\\n    return secret + 1\\n"}'],
        "secret",
    ),
    sets("no such data", "workload.data=./nowhere", "there is no file or folder ./nowhere"),
    # recipes and files
    Case("unknown recipe", ["run", "vision-dpp"], ["unknown recipe 'vision-dpp'"]),
    Case("missing file", ["run", "nowhere.json"], ["cannot read the experiment from nowhere.json: No such file"]),
    Case("a folder", ["run", "/tmp/"], ["cannot read the experiment from /tmp/: Is a directory"]),
    file("not JSON", "{steps: 3}", "this is not JSON"),
    file("an empty file", "", "this is not JSON"),
    file("a list", "[1, 2]", "the experiment must be a JSON object with named fields, got [1, 2]"),
    file("nothing but null", "null", "the experiment must be a JSON object"),
    file("nonsense a mile deep", DEEP, "this is not JSON"),
    file("another schema version", '{"schema_version": 99}', "this labkit reads schema version 1, the file has 99"),
    file("unknown section in a file", '{"trainig": {}}', "unknown field 'trainig'"),
    file("unknown field of a link", '{"launch": {"network": {"rate": 1, "rate_mbit": 5}}}', "rate_mbit, delay_ms"),
    file("wrong type in a file", '{"training": {"steps": [3]}}', "training.steps: must be a whole number, got [3]"),
    file("text as an experiment", '"vision"', "the experiment must be a JSON object"),
    Case("not text at all", ["run", "@\udcff\udcfe"], ["not UTF-8 text"]),
    # runs
    Case("no run yet", ["show"], ["there is no run in"]),
    Case("unknown run", ["show", "20200101-0000-nothing"], ["there is no run '20200101-0000-nothing'"]),
    Case("run id that climbs", ["show", "../../etc"], ["there is no run at /"]),
    Case("run id with an odd sign", ["show", "a b"], ["'a b' is not a run id"]),
    Case("run id of dots", ["show", ".."], ["'..' is not a run id"]),
    Case("empty run id", ["show", ""], ["'' is not a run id"]),
    Case("run id with a line break", ["show", "a\nb"], ["is not a run id"]),
    Case("path of no run", ["show", "/tmp"], ["there is no run at /tmp"]),
    Case("resume of an unknown run", ["run", "--resume", "nothing"], ["there is no run 'nothing'"]),
    Case("resume without checkpoint", ["run", "--resume", "@run"], ["has no checkpoint"]),
    Case(
        "resume without checkpoint, measuring first",
        ["run", "--resume", "@run", "--baseline", "measure"],
        ["has no checkpoint"],
    ),
    Case("unknown baseline", ["run", "--baseline", "nothing"], ["there is no run 'nothing'"]),
    Case("compare nothing", ["compare"], ["name the runs to compare, or pass --all"]),
    Case("compare all of nothing", ["compare", "--all"], ["there is no run to compare yet"]),
    Case("compare both", ["compare", "--all", "last"], ["name the runs to compare, or pass --all"]),
    Case("compare unknown", ["compare", "nothing"], ["there is no run 'nothing'"]),
    Case("compare with an unknown baseline", ["compare", "@run", "--baseline", "x"], ["there is no run 'x'"]),
    Case("report of an unknown run", ["report", "nothing"], ["there is no run 'nothing'"]),
    Case("report to nowhere", ["report", "@run", "-o", "/proc/nowhere/report.html"], ["/proc/nowhere"]),
    Case("stop nothing", ["stop"], ["name one run, or pass --all"]),
    Case("stop an unknown run", ["stop", "nothing"], ["there is no run 'nothing'"]),
    Case("stop with NaN grace", ["stop", "last", "--grace", "nan"], ["must be seconds between 0 and 86400, got 'nan'"]),
    # the command line itself
    Case("no command", [], ["required: COMMAND"]),
    Case("unknown command", ["train"], ["invalid choice: 'train'"]),
    Case("unknown option", ["run", "--fast"], ["unrecognized arguments: --fast"]),
    Case("two recipes", ["run", "vision-ddp", "language-ddp"], ["unrecognized arguments: language-ddp"]),
    Case("steps of zero", ["check", "--steps", "0"], ["must be a whole number of at least 1, got '0'"]),
    Case("steps in words", ["check", "--steps", "many"], ["must be a whole number of at least 1, got 'many'"]),
    Case("unknown precision", ["check", "--precision", "fp8"], ["invalid choice: 'fp8'"]),
    Case("check what cannot run", ["check", "--set", "training.global_batch=1"], ["need at least 2 samples"]),
    Case("validate what cannot run", ["validate", "--set", "layout=pp2"], ["1f1b needs at least as many microbatches"]),
    Case(
        "validate, as JSON", ["validate", "--json", "--set", "layout=pp2"], ["1f1b needs at least as many microbatches"]
    ),
]
if not GPU:
    CASES.append(sets("no GPU", "launch.device=cuda", "no GPU can be used"))


@pytest.fixture
def home(labkit_home: Path) -> Iterator[Path]:
    before = standby_pid()
    yield labkit_home
    assert standby_pid() == before, "a refused request started a process"
    left = sorted(path.name for path in (labkit_home / "runs").glob("*"))
    assert left in ([], ["20200101-0000-vision-dp2"]), f"a refused request made {left}"


def prepare(arguments: list[str], home: Path) -> list[str]:
    """Make the files and runs that the arguments name by @."""
    ready = []
    for argument in arguments:
        if argument == "@run":
            path = home / "runs" / "20200101-0000-vision-dp2"
            path.mkdir(parents=True)
            write_json(path / "experiment.json", vision_ddp().to_dict())
            write_json(path / "status.json", {"state": "finished", "title": "vision dp2"})
            ready.append(path.name)
        elif argument.startswith("@"):
            home.mkdir(exist_ok=True)
            wrong = home / "wrong.json"
            wrong.write_bytes(argument[1:].encode("utf-8", "surrogateescape"))
            ready.append(str(wrong))
        else:
            ready.append(argument)
    return ready


def assert_refused(code: int, out: str, err: str, says: list[str]) -> None:
    assert code == 2, err
    for line in out.splitlines():
        json.loads(line)
    lines = err.splitlines()
    assert 1 <= len(lines) <= max(1, len(says)), err
    for line in lines:
        assert SENTENCE.fullmatch(line), line
        assert len(line) < 600, line
    assert "Traceback" not in err
    for words in says:
        assert words in err


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_request_is_refused_in_a_sentence(
    case: Case, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main(prepare(case.arguments, home))
    out, err = capsys.readouterr()
    assert_refused(code, out, err, case.says)


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 45
    assert len({case.name for case in CASES}) >= len(CASES) - 1


# -- a home that cannot be used ---------------------------------------------------------------------------------------


def _a_file(tmp_path: Path) -> Path:
    (tmp_path / "home").write_text("this is no folder")
    return tmp_path / "home"


def _in_proc(tmp_path: Path) -> Path:
    return Path("/proc/labkit-home")


def _below_a_file(tmp_path: Path) -> Path:
    return _a_file(tmp_path) / "deeper"


def _a_name_too_long(tmp_path: Path) -> Path:
    return tmp_path / ("x" * 300)


@pytest.mark.parametrize("make", [_a_file, _in_proc, _below_a_file, _a_name_too_long], ids=lambda make: make.__name__)
def test_an_unwritable_home_is_refused(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LABKIT_HOME", str(make(tmp_path)))
    before = standby_pid()
    code = main(["run", "vision-ddp"])
    out, err = capsys.readouterr()
    assert_refused(code, out, err, ["LABKIT_HOME: cannot write a run to"])
    assert standby_pid() == before


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare(1) to mount a small disk")
def test_a_home_on_a_full_disk_is_refused(tmp_path: Path) -> None:
    mapped = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    script = f"mount -t tmpfs -o size=1m none {tmp_path} || exit 77; LABKIT_HOME={tmp_path}/home labkit run vision-ddp"
    done = _run(["unshare", "--mount", *mapped, "sh", "-c", script])
    if done.returncode in (1, 77):
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    assert_refused(done.returncode, done.stdout, done.stderr, ["LABKIT_HOME: only 1.0 MB are free"])


def test_a_deleted_working_directory_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    code = main(["run", "vision-ddp"])
    out, err = capsys.readouterr()
    assert_refused(code, out, err, ["the current directory has been deleted"])


# -- through the installed command ------------------------------------------------------------------------------------


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    everything: dict[str, Any] = os.environ | {"PATH": path} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=everything)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "vision-ddp", "--set", "optimizer.lr=NaN"], ["must be a finite number"]),
        (["run", "vision-ddp", "--set", "layout.dp_replicate=2", "--ranks", "4", "--json"], ["world_size is 4"]),
        (["validate", "--set", "training.steps=0", "--set", "optimizer.lr=-1"], ["steps", "lr"]),
        (["stop", "20200101-0000-nothing"], ["there is no run"]),
        (["frobnicate"], ["invalid choice"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_the_installed_command_refuses_too(arguments: list[str], says: list[str], tmp_path: Path) -> None:
    done = _run(["labkit", *arguments], LABKIT_HOME=str(tmp_path / "home"))
    assert_refused(done.returncode, done.stdout, done.stderr, says)
    assert not (tmp_path / "home").exists()


def test_python_m_labkit_is_the_same_command(tmp_path: Path) -> None:
    done = _run([sys.executable, "-m", "labkit", "show"], LABKIT_HOME=str(tmp_path / "home"))
    assert_refused(done.returncode, done.stdout, done.stderr, ["there is no run in"])
