"""The network of one run, slower than the machine's own: made by its supervisor before it forks the ranks.

One host: the ranks share a private loopback whose only way is through a token bucket. So all ranks and both directions
share one link, like a cable of the first Ethernet.

    rank 0 ─┐
    rank 1 ─┼─ lo ─ bucket ─ lo
    rank 2 ─┘

Several hosts: each is a network namespace with a loopback at full speed, which ranks of one host reach each other
through, and a cable to a switch. Each end of a cable has its own bucket: a link is as fast in both directions at once.

    rank 0 ─┐ lo                                     lo ┌─ rank 2
    rank 1 ─┴─── eth0 ─ bucket ─ switch ─ bucket ─ eth0 ┴─ rank 3

Everything vanishes with the processes inside. Nothing leads out: neither the internet nor another run can be reached.
"""

from __future__ import annotations

import os

from labkit.experiment import Network
from labkit.netem import namespace

SWITCH = "switch"


class Hosts:
    """The emulated hosts. Making this moves the process, which must have one thread, into the private network."""

    def __init__(self, network: Network, ranks: int) -> None:
        self._network, self._ranks = network, ranks
        self._namespaces: list[int] = []
        """One a host, as open files; none where the only host is the supervisor's own."""
        namespace.enter()
        namespace.up("lo")
        if network.hosts == 1:
            namespace.slow("lo", network.rate_mbit, network.delay_ms)
            return
        switch = namespace.own()
        namespace.bridge(SWITCH)
        namespace.up(SWITCH)
        for number in range(network.hosts):
            self._namespaces.append(self._host(number, switch))
        os.close(switch)

    def _host(self, number: int, switch: int) -> int:
        """Make a host and plug it in; this process goes there and comes back to the switch."""
        namespace.unshare(namespace.CLONE_NEWNET)
        host, rate = namespace.own(), self._network.rate_mbit
        interface, port = self._network.interface, f"port{number}"
        namespace.up("lo")
        namespace.cable(interface, port, switch)
        namespace.address(interface, f"10.0.{(number + 1) // 256}.{(number + 1) % 256}", 16)
        namespace.slow(interface, rate, self._network.delay_ms)
        namespace.up(interface)
        namespace.join(switch)
        namespace.slow(port, rate)
        namespace.up(port, SWITCH)
        return host

    def join(self, rank: int) -> None:
        """Called by `rank` after the fork: move to its host."""
        if self._namespaces:
            namespace.join(self._namespaces[self._network.host(rank, self._ranks)])
        self.close()

    def close(self) -> None:
        """From here on the hosts live as long as their ranks."""
        for descriptor in self._namespaces:
            os.close(descriptor)
        self._namespaces = []
