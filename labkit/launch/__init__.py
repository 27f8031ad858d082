"""Starting and stopping ranks. Nothing here imports torch in the kernel: it is a client, never the launcher."""

from labkit.launch.client import launch, standby_pid, warm

__all__ = ["launch", "standby_pid", "warm"]
