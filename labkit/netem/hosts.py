"""The network of one run, slower than the machine's own: its supervisor makes it before it forks the ranks.

One host: the ranks share a private loopback on which every packet passes a token bucket. So all ranks and both
directions share one link, like a cable of the first Ethernet.

    rank 0 ─┐
    rank 1 ─┼─ lo ─ bucket ─ lo
    rank 2 ─┘

Several hosts: each is a network namespace with a loopback at full speed, through which the ranks of one host reach each
other, and a cable to a switch. Each end of a cable has its own bucket: a link has its full rate in each direction.

    rank 0 ─┐ lo                                     lo ┌─ rank 2
    rank 1 ─┴─── eth0 ─ bucket ─ switch ─ bucket ─ eth0 ┴─ rank 3

Everything disappears with the processes inside. Nothing leads out: neither the internet nor another run can be reached.
"""

from __future__ import annotations

import os

from labkit.experiment import Network
from labkit.netem import namespace

SWITCH = "switch"


class Hosts:
    """The emulated hosts. The constructor moves this process, which must have one thread, into the private network."""

    def __init__(self, network: Network, ranks: int) -> None:
        self._network, self._ranks = network, ranks
        self._namespaces: list[int] = []
        """One per host, as file descriptors; empty if the supervisor's own namespace is the only host."""
        namespace.enter()
        namespace.bring_up("lo")
        if network.hosts == 1:
            namespace.limit_rate("lo", network.rate_mbit, network.delay_ms)
            return
        switch = namespace.open_current()
        namespace.add_bridge(SWITCH)
        namespace.bring_up(SWITCH)
        for number in range(network.hosts):
            self._namespaces.append(self._host(number, switch))
        os.close(switch)

    def _host(self, number: int, switch: int) -> int:
        """Make a host, connect it to the switch and return its namespace; this process moves there and back."""
        namespace.unshare(namespace.CLONE_NEWNET)
        host, rate = namespace.open_current(), self._network.rate_mbit
        interface, port = self._network.interface, f"port{number}"
        namespace.bring_up("lo")
        namespace.add_cable(interface, port, switch)
        namespace.set_address(interface, f"10.0.{(number + 1) // 256}.{(number + 1) % 256}", 16)
        namespace.limit_rate(interface, rate, self._network.delay_ms)
        namespace.bring_up(interface)
        namespace.join(switch)
        namespace.limit_rate(port, rate)
        namespace.bring_up(port, SWITCH)
        return host

    def join(self, rank: int) -> None:
        """Move this process, which is the forked `rank`, to its host."""
        if self._namespaces:
            namespace.join(self._namespaces[self._network.host(rank, self._ranks)])
        self.close()

    def close(self) -> None:
        """Close the namespaces here: from now on the hosts exist as long as their ranks."""
        for descriptor in self._namespaces:
            os.close(descriptor)
        self._namespaces = []
