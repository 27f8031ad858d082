"""Everything that a machine with an NVIDIA GPU can show, in one go: `python -m tests.gpu [FOLDER] [--only PART …]`.

It needs torch, the packages of labkit's engine and pytest, no set-up and no registry: on a bare machine put the
repository and the folder of further packages on PYTHONPATH. Each part appends to a file of its own in FOLDER and leaves
out what is there already, so a session that was cut off goes on where it was. At the end everything stands in FOLDER:

    facts.jsonl  functional.jsonl  by_hand.jsonl  speed.jsonl  beside.jsonl  pytest.log
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from labkit.experiment.machine import Machine
from tests.gpu.beside import FILE

PARTS = {
    "facts": (["tests.gpu.facts", "facts.jsonl"], 120),
    "functional": (["tests.gpu.functional", "functional.jsonl", "--side-by-side", "8"], 300),
    "by_hand": (["tests.gpu.by_hand", "by_hand.jsonl"], 240),
    "speed": (["tests.gpu.speed", "speed.jsonl", "1.2 B", "bf16", "bf16, not compiled", "pure_bf16", "fp8"], 300),
    "formats": (["tests.gpu.speed", "speed.jsonl", "0.4 B"], 400),
    "pytest": (["pytest", "-q", "-m", "gpu", "tests"], 600),
}
"""Name to module with its arguments, and the longest time it may take (s)."""


def run(name: str, folder: Path) -> int:
    """Run one part; its output goes to the screen and to a log. Returns its exit code, 124 if it took too long."""
    (module, *arguments), limit = PARTS[name]
    given = [str(folder / argument) if argument.endswith(".jsonl") else argument for argument in arguments]
    environment = os.environ | {FILE: str(folder / "beside.jsonl"), "PYTHONUNBUFFERED": "1"}
    begun = time.monotonic()
    with (folder / f"{name}.log").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *given], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        try:
            output, _ = child.communicate(timeout=limit)
            code = child.returncode
        except subprocess.TimeoutExpired:
            child.terminate()
            output, _ = child.communicate()
            code = 124
        log.write(output)
    sys.stdout.write(output.decode(errors="replace"))
    print(f"== {name}: exit {code} after {time.monotonic() - begun:.0f} s", flush=True)
    return code


def main() -> int:
    """Run the parts in order; exit 1 if one of them failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("test-output/gpu"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    machine = Machine.here()
    if not machine.gpus:
        print(f"No GPU can be used: {machine.gpu_reason}", file=sys.stderr)
        return 2
    given.folder.mkdir(parents=True, exist_ok=True)
    codes = [run(name, given.folder) for name in given.only]
    return 1 if any(codes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
