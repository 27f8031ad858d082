"""What a run shows to the network, to other users of the machine and to whoever reads its directory."""

from __future__ import annotations

import ast
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import labkit
from labkit.cli import main
from labkit.launch import client, standby_pid
from labkit.runs import Run
from tests.launch.helpers import ENDLESS, Watched, start, tcp, tiny, wait_until

PACKAGE = Path(labkit.__file__).parent
MARKUP = "<img src=x onerror=alert(1)>"
TOKEN = "hf_thisIsASecretToken0123456789"
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
PICKLE_HEADS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"\x93NUMPY")
PICKLE_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".npz", ".npy", ".joblib", ".ckpt", ".distcp"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run with a name full of markup, checkpoints, and a token in the environment; it has ended."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LABKIT_HOME", str(tmp_path_factory.mktemp("secure") / "home"))
        for name in ("HF_TOKEN", "WANDB_API_KEY", "LABKIT_SECRET", "AWS_SECRET_ACCESS_KEY"):
            patched.setenv(name, TOKEN)
        old = os.umask(0)  # the careless umask of some shared servers
        try:
            run = start(tiny(steps=12, name=MARKUP, training__checkpoint_every=5, training__evaluate_every=5)).wait(60)
        finally:
            os.umask(old)
        assert run.state == "finished", run.cause
        yield run


def test_no_process_listens_beyond_loopback() -> None:
    with Watched(start(tiny(ranks=3, steps=ENDLESS))) as watch:
        known = watch.begun()
        standby = standby_pid()
        assert standby is not None
        for name, process in {**known, "standby": {"pid": standby}}.items():
            sockets = tcp(process["pid"])
            assert bool(sockets) == name.startswith("rank"), f"{name} has {len(sockets)} TCP sockets"
            beyond = [address for address, _ in sockets if address not in LOOPBACK]
            assert not beyond, f"{name} has a TCP socket on {beyond}"
        watch.run.stop()


def test_tcp_sees_a_listener_beyond_loopback() -> None:
    """The check above can fail."""
    import socket

    with socket.create_server(("0.0.0.0", 0)), socket.create_server(("127.0.0.1", 0)):
        assert ("00000000", True) in tcp(os.getpid())
        assert ("0100007F", True) in tcp(os.getpid())


def test_nobody_else_can_read_a_run(run: Run) -> None:
    for path in (run.directory.path, run.directory.path.parent, run.directory.path.parent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path


def test_a_run_directory_holds_json_safetensors_and_text_only(run: Run) -> None:
    files = [path for path in run.directory.path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "optimizer.safetensors", "checkpoint.json"}
    for path in files:
        head = path.read_bytes()[:16]
        assert path.suffix not in PICKLE_SUFFIXES, path
        assert not head.startswith(PICKLE_HEADS), path
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        elif path.suffix == ".safetensors":
            length = int.from_bytes(head[:8], "little")
            assert isinstance(json.loads(path.read_bytes()[8 : 8 + length]), dict)
        elif path.suffix == ".log" or path.name == ".lock":
            path.read_text(encoding="utf-8")
        else:
            raise AssertionError(f"what is {path.name}?")


def test_no_token_of_the_environment_is_written_down(run: Run) -> None:
    home = run.directory.path.parent.parent
    for path in home.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    variables = json.loads(run.directory.environment.read_text())["variables"]
    assert variables, "what is allowed is written down"


def test_a_name_full_of_markup_stays_text(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.title == MARKUP
    assert run.id.replace("-", "").isalnum(), "the id is made from the workload and the layout, not from the name"
    assert main(["runs"]) == 0
    assert MARKUP in capsys.readouterr().out
    for command in (["runs", "--json"], ["show", run.id, "--json"], ["compare", run.id, "--json"]):
        assert main(command) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert MARKUP in _texts(found)


def test_a_name_cannot_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path))
    path = tmp_path / "runs" / "20200101-0000-vision-1"
    path.mkdir(parents=True)
    evil = "\x1b[2J\x1b]0;owned\x07line\r\nbreak"
    (path / "experiment.json").write_text(tiny(ranks=1).to_json())
    cause = {"kind": "exception", "message": evil, "log": [evil]}
    (path / "status.json").write_text(json.dumps({"state": "failed", "title": evil, "cause": cause, "layout": evil}))
    for command in (["runs"], ["show", path.name]):
        assert main(command) == 0
        assert not set(capsys.readouterr().out) & {"\x1b", "\x07", "\r"}


def test_the_standby_and_the_ranks_hold_nothing_of_the_notebook() -> None:
    """No file of whoever launches is open in a run: not its sockets, not its pipes."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)  # a careless library
    client.close()
    try:
        mine = os.fstat(writer).st_ino
        with Watched(start(tiny(steps=ENDLESS))) as watch:
            known = watch.begun()
            for name, process in known.items():
                links = [_inode(link) for link in Path(f"/proc/{process['pid']}/fd").iterdir()]
                assert links, name
                assert mine not in links, f"{name} holds a pipe of the process that launched it"
            watch.run.stop()
        wait_until(lambda: watch.run.done, 1, "the end")
    finally:
        os.close(reader)
        os.close(writer)


# -- the source -------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    *("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "load_state", "save_state"),
    *("torch.load", "torch.save", "torch.jit.load", "numpy.load", "np.load", "yaml.load"),
    *("pandas.read_pickle", "pd.read_pickle", "os.system"),
}


def forbidden(source: str) -> list[str]:
    """Uses of a function that runs code from a file, or a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called.endswith("np.load") and keywords.get("allow_pickle") == "False":
                continue
            if keywords.get("shell") == "True":
                names = ["os.system"]
            names += [called, called.rpartition(".")[2]] if called.count(".") else [called]
        found += [f"line {node.lineno}: {name}" for name in names if name in FORBIDDEN]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_unpickled(path: Path) -> None:
    assert not forbidden(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('x')",
        "np.load('x', allow_pickle=True)",
        "accelerator.save_state('x')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
    ],
)
def test_what_is_forbidden_is_found(source: str) -> None:
    assert forbidden(source)


def _inode(link: Path) -> int:
    try:
        return link.stat().st_ino
    except OSError:
        return 0


def _texts(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set().union(*(_texts(item) for item in value.values())) if value else set()
    if isinstance(value, list):
        return set().union(*(_texts(item) for item in value)) if value else set()
    return {value} if isinstance(value, str) else set()
