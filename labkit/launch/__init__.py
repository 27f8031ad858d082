"""Starting and stopping ranks. Imports no torch: the kernel is a client, never the launcher."""

from labkit.launch.client import launch, standby_pid, warm

__all__ = ["launch", "standby_pid", "warm"]
