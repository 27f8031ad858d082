"""Find Chromium for the browser tests; as a script, print its path, and with --install try to get it first.

Installing needs root and apt-get. Without them, and without a browser, the browser tests skip with the reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MISSING = f"no browser: none of {', '.join(NAMES)} is on PATH, and LABKIT_BROWSER names none"


def find_browser() -> str | None:
    """Path of the browser that the tests drive: LABKIT_BROWSER if set, else the first of NAMES on PATH."""
    return next(
        (path for name in (os.environ.get("LABKIT_BROWSER"), *NAMES) if name and (path := shutil.which(name))), None
    )


def install_browser() -> None:
    """Install the distribution's Chromium, where this user may; raises CalledProcessError where it fails."""
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    packages = ["chromium", "fonts-dejavu"]
    for command in ([apt, "-q", "update"], [apt, "-qy", "install", "--no-install-recommends", *packages]):
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env=environment, timeout=900)


def main() -> int:
    if "--install" in sys.argv[1:] and find_browser() is None:
        try:
            install_browser()
        except (OSError, subprocess.SubprocessError) as error:
            print(f"Chromium could not be installed: {error}", file=sys.stderr)
    browser = find_browser()
    print(browser or MISSING, file=sys.stdout if browser else sys.stderr)
    return 0 if browser else 1


if __name__ == "__main__":
    raise SystemExit(main())
