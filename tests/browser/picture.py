"""Make the picture of the README: a real comparison in the real JupyterLab.

    python tests/browser/picture.py [--out notebooks/images/lab.png] [--recipe vision-ddp]

Trains on one rank, then independent copies on two (the ceiling), then on two ranks, and photographs the lab. Run it on
a machine that does nothing else: the speed-up on the picture is measured while it is taken.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.browser.jupyter import ROOT, Jupyter, browser, eventually, open_notebook, state

MAX_BYTES = 300_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "notebooks" / "images" / "lab.png")
    parser.add_argument("--recipe", default="vision-ddp")
    given = parser.parse_args()
    server = Jupyter(Path(tempfile.mkdtemp(prefix="labkit-picture-")))
    try:
        cell = f'from labkit.ui import Lab\n\nlab = Lab("{given.recipe}")\nlab'
        with browser(width=1560, height=1500) as page:
            open_notebook(page, server.notebook("lab.ipynb", cell))
            page.wait_for_selector(".labkit-lab .js-plotly-plot .main-svg")
            for done, words in enumerate(("Run baseline", "Measure ceiling", "Run"), start=1):
                page.get_by_role("button", name=words, exact=True).click()

                def rows(wanted: int = done) -> bool:
                    finished = page.locator(".labkit-lab td", has_text="finished").count() >= wanted
                    return finished and state(page).startswith("Finished")

                eventually(rows, seconds=300, what=words)
            time.sleep(2)
            page.mouse.move(0, 0)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            lab = page.locator(".jp-Notebook .jp-CodeCell").first
            lab.screenshot(path=given.out)
    finally:
        server.close()
    size = given.out.stat().st_size
    print(f"{given.out}: {size / 1000:.0f} kB")
    return 0 if size < MAX_BYTES else 1


if __name__ == "__main__":
    raise SystemExit(main())
