"""What the form reads stays light, and what the standby loads leaves it fit to fork."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from labkit.experiment.registry import registry

THREADS = "print(open('/proc/self/status').read().split('Threads:')[1].split()[0])"


def output(code: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", registry("workload").names())
def test_checking_a_workload_loads_no_heavy_package(name: str) -> None:
    heavy = ("torch", "datasets", "transformers", "gymnasium", "sklearn", "highway_env", "PIL")
    code = f"""
import sys
import labkit.workloads.{name}
from labkit.experiment import Experiment
Experiment.from_dict({{"workload": {{"name": {name!r}}}, "training": {{"steps": 1}}}}).problems()
print([m for m in {heavy} if m in sys.modules])
"""
    assert output(code) == "[]"


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_preloading_starts_no_thread() -> None:
    assert output(f"from labkit.workloads.preload import preload; preload(); {THREADS}") == "1"


@pytest.mark.parametrize("name", registry("workload").names())
def test_every_option_has_a_line_for_its_tooltip(name: str) -> None:
    for field, info in registry("workload").options(name).model_fields.items():
        assert info.description, field
        assert "\n" not in info.description
        assert info.description.endswith(".")
