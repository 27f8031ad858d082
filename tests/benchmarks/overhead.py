"""What labkit costs per step: beside a hand-written torch DDP loop, and with a live dashboard beside none.

Same model, data, batch and optimizer, two ranks with one thread each, medians of the steps after the warm-up. The live
dashboard runs in a real Jupyter kernel that shows a Lab.
"""

from __future__ import annotations

import json
import statistics

from _common import arguments, by_hand, finished, interleave, median_and_range, ratios, report
from jupyter_client.manager import start_new_kernel

from labkit.experiment.recipes import vision_ddp
from labkit.launch import warm

STEPS, WARMUP = 100, 20
EXPERIMENT = vision_ddp().replace(
    f"training.steps={STEPS}", "training.evaluate_every=0", "training.checkpoint_every=0", "optimizer.schedule=constant"
)
CELL = """
import json, labkit
from labkit.experiment import Experiment
lab = labkit.Lab(Experiment.from_json({experiment!r}), ui="live")
display(lab)
run = lab.run(wait=True)
print("STEPS", json.dumps([float(s) for s in run.data().seconds[0]]))
"""


def headless() -> float:
    """Median step of labkit without anyone watching (s)."""
    return statistics.median(map(float, finished(EXPERIMENT).data().seconds[0][WARMUP:]))


class Live:
    """A Jupyter kernel with a Lab that draws while the run goes on."""

    def __init__(self) -> None:
        self.manager, self.client = start_new_kernel(kernel_name="python3")
        self.client.execute_interactive(
            "import labkit; labkit.warm(120)", timeout=200, output_hook=lambda message: None
        )

    def __call__(self) -> float:
        output: list[str] = []

        def listen(message: dict) -> None:  # type: ignore[type-arg]
            if message["msg_type"] == "stream":
                output.append(message["content"]["text"])
            elif message["msg_type"] == "error":
                raise RuntimeError("\n".join(message["content"]["traceback"]))

        cell = CELL.format(experiment=EXPERIMENT.to_json())
        self.client.execute_interactive(cell, timeout=300, output_hook=listen)
        line = next(line for line in "".join(output).splitlines() if line.startswith("STEPS"))
        return statistics.median(json.loads(line.removeprefix("STEPS"))[WARMUP:])

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def main() -> int:
    options = arguments(__doc__ or "")
    warm(wait=120)
    live = Live()
    try:
        cases = {
            "torch DDP by hand": lambda: by_hand(STEPS, WARMUP),
            "labkit": headless,
            "labkit, live dashboard": live,
        }
        figures = interleave(cases, options.repeats)
    finally:
        live.close()
    loop = ratios(figures, "labkit", "torch DDP by hand")
    dashboard = ratios(figures, "labkit, live dashboard", "labkit")
    rows = [
        (name, median_and_range([1000 * value for value in values]) + " ms/step") for name, values in figures.items()
    ]
    rows += [("labkit / by hand", median_and_range(loop)), ("live / headless", median_and_range(dashboard))]
    claims = [
        ("labkit step over hand-written step", statistics.median(loop), "<=", 1.02),
        ("live dashboard over headless", statistics.median(dashboard), "<=", 1.02),
    ]
    return report("Overhead per step, 2 ranks, vision recipe", rows, claims, options, figures)


if __name__ == "__main__":
    raise SystemExit(main())
