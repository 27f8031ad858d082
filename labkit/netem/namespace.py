"""A private network namespace for this process, by plain system calls: unshare(2), setns(2) and netlink(7).

Nothing has to be installed (no iproute2) and nobody has to be root where users may make namespaces; root needs no user
namespace. What is made here belongs to the processes inside and vanishes with the last of them.

Run as a program (`python namespace.py`, standard library only) it tries everything in a process of its own and prints,
as JSON, why each of `bucket`, `delay` and `hosts` is impossible here; "" for what is possible.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import struct
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
MTU = 9000
"""Jumbo frames, as in clusters: headers and acknowledgements add about 1 %, with 1500 bytes nearly 7 %."""
BURST_S = 0.0005
"""What may pass at once after a pause, as time at the full rate; at least two packets."""
QUEUE_BYTES = 64 * 2**20
"""Room before a bucket. TCP keeps what it queues below that by itself, so that nothing is dropped."""

# <linux/rtnetlink.h>, <linux/if_link.h>, <linux/if_addr.h>, <linux/pkt_sched.h>, <linux/netlink.h>
_NEWLINK, _NEWADDR, _NEWQDISC = 16, 20, 36
_REQUEST, _ACK, _EXCL, _CREATE = 0x1, 0x4, 0x200, 0x400
_IFNAME, _IFMTU, _MASTER, _LINKINFO, _NET_NS_FD = 3, 4, 10, 18, 28
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_TCA_KIND, _TCA_OPTIONS, _TBF_PARMS, _TBF_RATE64, _TBF_BURST = 1, 2, 1, 4, 6
_ROOT = 0xFFFFFFFF
_IFF_UP, _ETHERNET = 1, 1
_SOL_NETLINK, _EXT_ACK, _ERROR, _ERROR_TEXT = 270, 11, 2, 1
_TICK_NS = 64
"""The unit of time of the kernel's packet schedulers."""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int) -> None:
    if getattr(_libc, name)(*arguments):
        number = ctypes.get_errno()
        why = os.strerror(number) if number != errno.ENOSPC else "the limit of /proc/sys/user is reached"
        raise OSError(number, f"{name}: {why}")


def unshare(flags: int) -> None:
    """Leave the namespaces that `flags` name for new ones; OSError where that is not permitted."""
    _call("unshare", flags)


def join(descriptor: int) -> None:
    """Enter the network namespace of an open /proc/PID/ns/net."""
    _call("setns", descriptor, CLONE_NEWNET)


def own() -> int:
    """The network namespace of this process as an open file; it lives as long as this or a process inside."""
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def enter() -> None:
    """Put this process, which must have one thread, into a network namespace of its own. Its user stays who it is.

    Root (CAP_SYS_ADMIN) needs nothing else; anybody else gets the right to it in a user namespace of their own.
    """
    try:
        unshare(CLONE_NEWNET)
        return
    except PermissionError:
        pass
    user, group = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER | CLONE_NEWNET)
    # The same numbers inside as outside, so that files keep their owner.
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


# -- netlink ----------------------------------------------------------------------------------------------------------


def _attribute(kind: int, content: bytes) -> bytes:
    length = 4 + len(content)
    return struct.pack("=HH", length, kind) + content + bytes(-length % 4)


def _word(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _name(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


def _ask(kind: int, flags: int, body: bytes) -> None:
    """Send one request for the namespace that this process is in; OSError with the kernel's own words."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
        link.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        link.send(struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, 1, 0) + body)
        answer = link.recv(1 << 16)
    number = -struct.unpack_from("=i", answer, 16)[0] if struct.unpack_from("=H", answer, 4)[0] == _ERROR else 0
    if number:
        raise OSError(number, _words(answer[36 + len(body) :]) or os.strerror(number))


def _words(attributes: bytes) -> str:
    """The text among the attributes that follow the copy of a refused request."""
    while len(attributes) > 4:
        length, kind = struct.unpack_from("=HH", attributes)
        if kind & 0x3FFF == _ERROR_TEXT:
            return attributes[4 : length - 1].decode(errors="replace").strip().rstrip(".")
        attributes = attributes[max(4, length + -length % 4) :]
    return ""


def _link(index: int = 0, flags: int = 0) -> bytes:
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, flags)


def up(interface: str, master: str = "") -> None:
    """Raise an interface; with `master`, as a port of that bridge."""
    port = _word(_MASTER, socket.if_nametoindex(master)) if master else b""
    _ask(_NEWLINK, 0, _link(socket.if_nametoindex(interface), _IFF_UP) + _word(_IFMTU, MTU) + port)


def bridge(interface: str) -> None:
    """Make a switch without ports."""
    _ask(_NEWLINK, _CREATE | _EXCL, _link() + _name(_IFNAME, interface) + _kind(b"bridge"))


def cable(interface: str, peer: str, namespace: int) -> None:
    """Join this namespace and another one (an open file) by a pair of interfaces (veth)."""
    other = _link() + _name(_IFNAME, peer) + _word(_NET_NS_FD, namespace)
    data = _attribute(_INFO_DATA, _attribute(_VETH_PEER, other))
    _ask(_NEWLINK, _CREATE | _EXCL, _link() + _name(_IFNAME, interface) + _kind(b"veth", data))


def _kind(name: bytes, data: bytes = b"") -> bytes:
    return _attribute(_LINKINFO, _attribute(_INFO_KIND, name) + data)


def address(interface: str, ip: str, prefix: int) -> None:
    """Give an interface an IPv4 address in a network of `prefix` bits."""
    place = struct.pack("=BBBBI", socket.AF_INET, prefix, 0, 0, socket.if_nametoindex(interface))
    number = socket.inet_aton(ip)
    _ask(_NEWADDR, _CREATE | _EXCL, place + _attribute(_IFA_LOCAL, number) + _attribute(_IFA_ADDRESS, number))


def slow(interface: str, rate_mbit: float, delay_ms: float = 0.0) -> None:
    """Let what leaves an interface wait for a token bucket that fills at `rate_mbit`, after a delay (tc-tbf, tc-netem).

    A packet's headers take tokens too. The bucket is small: what is saved up in a pause is a gift to short messages.
    """
    parent = _ROOT
    if delay_ms:
        ticks, packets = round(delay_ms * 1e6 / _TICK_NS), 10**6
        _queue(interface, 0x10000, parent, "netem", struct.pack("=6I", ticks, packets, 0, 0, 0, 0))
        parent = 0x10001
    rate = max(1, round(rate_mbit * 1e6 / 8))
    burst = max(round(rate * BURST_S), 2 * (MTU + 14))
    # Two struct tc_ratespec (the second, of a peak rate, is empty), limit, and two fields that BURST replaces.
    spec = struct.pack("=BBHhHI", 0, _ETHERNET, 0, 0, 0, min(rate, 2**32 - 1))
    settings = _attribute(_TBF_PARMS, spec + bytes(12) + struct.pack("=III", QUEUE_BYTES, 0, 0))
    settings += _attribute(_TBF_RATE64, struct.pack("=Q", rate)) + _word(_TBF_BURST, min(burst, 2**31))
    _queue(interface, 0x20000, parent, "tbf", settings)


def _queue(interface: str, handle: int, parent: int, kind: str, settings: bytes) -> None:
    place = struct.pack("=BxxxiIII", socket.AF_UNSPEC, socket.if_nametoindex(interface), handle, parent, 0)
    _ask(_NEWQDISC, _CREATE | _EXCL, place + _name(_TCA_KIND, kind) + _attribute(_TCA_OPTIONS, settings))


# -- what is possible here --------------------------------------------------------------------------------------------


def probe() -> dict[str, str]:
    """Why `bucket`, `delay` and `hosts` are impossible here, "" where they are possible; changes this process."""

    def why(action: Any, prefix: str = "") -> str:
        try:
            action()
        except (OSError, AttributeError) as error:
            return f"{prefix}{getattr(error, 'strerror', None) or error}"
        return ""

    def two_hosts() -> None:
        switch = own()
        bridge("switch")
        unshare(CLONE_NEWNET)
        cable("eth0", "port0", switch)

    refused = why(enter, "this system gives no private network namespace (")
    if refused:
        refused += ")"
    else:
        up("lo")
        refused = why(lambda: slow("lo", 100.0), "the kernel makes no token bucket: ")
    if refused:
        return dict.fromkeys(("bucket", "delay", "hosts"), refused)
    hosts = why(two_hosts, "the kernel makes no virtual cable: ")
    enter()
    up("lo")
    delay = why(lambda: slow("lo", 100.0, 1.0), "the kernel makes no delay (sch_netem): ")
    return {"bucket": "", "delay": delay, "hosts": hosts}


if __name__ == "__main__":
    print(json.dumps(probe()))  # noqa: T201  (the answer)
