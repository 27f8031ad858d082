"""`python -m labkit` is the same command as `labkit`."""

from labkit.cli import main

raise SystemExit(main())
