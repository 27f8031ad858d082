"""Import each module of labkit as the first one of a process, and print those that cannot be.

A program that `tests/test_layers.py` runs. Whatever is not labkit's is loaded once; then each module is imported in a
fork in which no module of labkit has been imported yet.
"""

from __future__ import annotations

import gc
import importlib
import importlib.machinery
import os
import pkgutil
import subprocess
import sys

EXTERNAL = """
import importlib, pkgutil, sys
import labkit
for module in pkgutil.walk_packages(labkit.__path__, "labkit."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(*(name for name in sys.modules if name.split(".")[0] != "labkit"), sep="\\n")
"""


def load_the_others() -> None:
    """Import every module that labkit's modules import and that is not labkit's own."""
    output = subprocess.run([sys.executable, "-c", EXTERNAL], check=True, capture_output=True, text=True).stdout
    for name in output.split():
        try:
            importlib.import_module(name)
        except ImportError:
            pass  # made by its package while that is imported


def fault_of_importing(name: str) -> str:
    """Import `name` in a fork and return what it raised there, or nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 0
        try:
            importlib.import_module(name)
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode()[:1000])
            status = 1
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        words = pipe.read().decode()
    return words if os.waitpid(child, 0)[1] else ""


def modules() -> list[str]:
    """Return the names of labkit's modules without importing any of them."""
    root = importlib.machinery.PathFinder.find_spec("labkit")
    assert root is not None
    assert root.submodule_search_locations
    folders, names = [("labkit", folder) for folder in root.submodule_search_locations], ["labkit"]
    while folders:
        package, folder = folders.pop()
        for module in pkgutil.iter_modules([folder]):
            names.append(f"{package}.{module.name}")
            if module.ispkg:
                folders.append((names[-1], os.path.join(folder, module.name)))
    return sorted(name for name in names if not name.endswith("__main__"))


if __name__ == "__main__":
    load_the_others()
    gc.disable()  # a collection in a fork would copy all memory of its parent
    assert not any(name.split(".")[0] == "labkit" for name in sys.modules)
    for name in modules():
        if words := fault_of_importing(name):
            print(f"{name}: {words}")
