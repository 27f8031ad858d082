"""A real JupyterLab with its own home, root and token, and a headless Chromium that looks at it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from labkit.experiment.run_directory import RunDirectory
from labkit.runs.run import Run
from tests.browser.find_browser import find_browser

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "test-output"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Jupyter:
    """JupyterLab on a free port of the loopback, closed with everything that it started."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.home = directory / "home"
        for path in (self.root, self.home):
            path.mkdir(parents=True)
        self.token = secrets.token_hex(16)
        with socket.socket() as probe:  # the system chooses
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        settings = directory / "config" / "lab" / "user-settings"
        self._quiet(settings)
        environment = {
            **os.environ,
            "JUPYTER_TOKEN": self.token,
            "JUPYTER_CONFIG_DIR": str(directory / "config"),
            "JUPYTER_DATA_DIR": str(directory / "data"),
            "JUPYTER_RUNTIME_DIR": str(directory / "runtime"),
            "JUPYTERLAB_SETTINGS_DIR": str(settings),
            "JUPYTERLAB_WORKSPACES_DIR": str(directory / "workspaces"),
            "IPYTHONDIR": str(directory / "ipython"),
            "LABKIT_HOME": str(self.home),
            "PYTHONPATH": str(ROOT),
        }
        environment.pop("LABKIT_UI", None)
        self.log = open(directory / "jupyter.log", "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1"),
                *(f"--port={self.port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={self.root}"),
                *("--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"),
                *(["--allow-root"] if os.geteuid() == 0 else []),
            ],
            cwd=self.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        self._wait()

    @staticmethod
    def _quiet(settings: Path) -> None:
        """No news, no dialogs: what a person would have clicked away on the first day."""
        place = settings / "@jupyterlab" / "apputils-extension"
        place.mkdir(parents=True)
        quiet = {"fetchNews": "false", "checkForUpdates": False}
        (place / "notification.jupyterlab-settings").write_text(json.dumps(quiet))

    def _wait(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "JupyterLab did not start; see jupyter.log"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/status?token={self.token}", timeout=5).close()
                return
            time.sleep(0.2)
        raise TimeoutError("JupyterLab did not answer")

    def notebook(self, name: str, *cells: str) -> str:
        """Write a notebook of code cells; its address."""
        import nbformat

        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(book, self.root / name)
        # a workspace of its own, else JupyterLab opens the notebooks of the earlier tests beside it
        return f"http://127.0.0.1:{self.port}/lab/workspaces/{Path(name).stem}/tree/{name}?token={self.token}"

    def close(self) -> None:
        """End the runs (they outlive their kernel on purpose), the kernels and the server."""
        for directory in RunDirectory.all(self.home):
            Run(directory).stop(grace=1)
        self._api("kernels", stop=True)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(5)
        self.log.close()

    def _api(self, what: str, stop: bool = False) -> None:
        base = f"http://127.0.0.1:{self.port}/api/{what}"
        headers = {"Authorization": f"token {self.token}"}
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(urllib.request.Request(base, headers=headers), timeout=10) as answer:
                found = json.load(answer)
            for item in found if stop else []:
                request = urllib.request.Request(f"{base}/{item['id']}", headers=headers, method="DELETE")
                urllib.request.urlopen(request, timeout=20).close()


@contextlib.contextmanager
def browser(width: int = 1600, height: int = 1250) -> Iterator[Any]:
    """A page of a fresh headless Chromium (playwright's Page)."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=find_browser(), args=list(FLAGS))
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(60_000)
        try:
            yield page
        finally:
            chromium.close()


def open_notebook(page: Any, address: str, cells: int = 1) -> None:
    """Open a notebook and run its first cells."""
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell .cm-content")
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")
    with contextlib.suppress(Exception):
        page.keyboard.press("Control+b")  # the file browser makes room for the notebook
    for number in range(cells):
        cell = page.locator(".jp-Notebook .jp-CodeCell").nth(number)
        for _ in range(6):  # JupyterLab drops a request that comes before its kernel's first answer
            cell.locator(".cm-content").click()
            page.keyboard.press("Shift+Enter")
            time.sleep(1.5)
            if cell.locator(".jp-InputPrompt").first.inner_text().strip() != "[ ]:":
                break


def save(page: Any, path: Path) -> None:
    """Save the notebook with the lab in it, and wait until it is on disk."""
    page.locator("[data-command='docmanager:save']").first.click()
    eventually(lambda: "widget-view" in path.read_text(), what="the notebook is saved")


def lengths(page: Any) -> list[int]:
    """Number of points of every trace of the lab's figure, as the browser has them."""
    found: list[int] = page.evaluate(
        "() => { const plot = document.querySelector('.labkit-lab .js-plotly-plot');"
        " return plot && plot.data ? plot.data.map(trace => trace.x ? trace.x.length : 0) : []; }"
    )
    return found


def state(page: Any) -> str:
    """The state line in words."""
    return str(page.locator(".labkit-state").first.inner_text())


def eventually(check: Any, seconds: float = 60, what: str = "") -> Any:
    """The first true answer of `check()`; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = check()
        if answer:
            return answer
        time.sleep(0.25)
    raise AssertionError(f"not within {seconds:g} s: {what or check}")


def steps_done(text: str) -> int:
    """`Running, step 1,040 of 2,000` is 1040."""
    found = re.search(r"step ([\d,]+)", text)
    return int(found[1].replace(",", "")) if found else 0
