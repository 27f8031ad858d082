"""A private network namespace for this process, by plain system calls: unshare(2), setns(2) and netlink(7).

Nothing has to be installed (no iproute2), and root is not needed where users may make namespaces; root needs no user
namespace. What is made here belongs to the processes inside and disappears with the last of them.

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
"""Data that may pass at once after a pause, in seconds at the full rate; at least two packets."""
QUEUE_BYTES = 64 * 2**20
"""Length of the queue before a bucket. TCP itself queues less than that, so nothing is dropped."""

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
"""Unit of time of the kernel's packet schedulers (ns)."""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int) -> None:
    if getattr(_libc, name)(*arguments):
        number = ctypes.get_errno()
        reason = os.strerror(number) if number != errno.ENOSPC else "the limit of /proc/sys/user is reached"
        raise OSError(number, f"{name}: {reason}")


def unshare(flags: int) -> None:
    """Move this process to new namespaces of the kinds in `flags`; OSError if that is not permitted."""
    _call("unshare", flags)


def join(descriptor: int) -> None:
    """Enter the network namespace of an open /proc/PID/ns/net."""
    _call("setns", descriptor, CLONE_NEWNET)


def open_current() -> int:
    """Open the network namespace of this process; it exists as long as this file is open or a process is inside."""
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def enter() -> None:
    """Move this process, which must have one thread, into a network namespace of its own; its user stays the same.

    Root (CAP_SYS_ADMIN) needs nothing else; other users get the permission in a user namespace of their own.
    """
    try:
        unshare(CLONE_NEWNET)
        return
    except PermissionError:
        pass
    user, group = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER | CLONE_NEWNET)
    # The same ids inside as outside, so that files keep their owner.
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


def _send_request(kind: int, flags: int, body: bytes) -> None:
    """Send one request for the namespace of this process; OSError with the kernel's own message if it is refused."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
        link.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        link.send(struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, 1, 0) + body)
        answer = link.recv(1 << 16)
    number = -struct.unpack_from("=i", answer, 16)[0] if struct.unpack_from("=H", answer, 4)[0] == _ERROR else 0
    if number:
        raise OSError(number, _error_text(answer[36 + len(body) :]) or os.strerror(number))


def _error_text(attributes: bytes) -> str:
    """Return the error message among the attributes that follow the copy of a refused request; "" without one."""
    while len(attributes) > 4:
        length, kind = struct.unpack_from("=HH", attributes)
        if kind & 0x3FFF == _ERROR_TEXT:
            return attributes[4 : length - 1].decode(errors="replace").strip().rstrip(".")
        attributes = attributes[max(4, length + -length % 4) :]
    return ""


def _link(index: int = 0, flags: int = 0) -> bytes:
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, flags)


def bring_up(interface: str, master: str = "") -> None:
    """Bring an interface up; with `master`, as a port of that bridge."""
    port = _word(_MASTER, socket.if_nametoindex(master)) if master else b""
    _send_request(_NEWLINK, 0, _link(socket.if_nametoindex(interface), _IFF_UP) + _word(_IFMTU, MTU) + port)


def add_bridge(interface: str) -> None:
    """Make a bridge (a switch) without ports."""
    _send_request(_NEWLINK, _CREATE | _EXCL, _link() + _name(_IFNAME, interface) + _kind(b"bridge"))


def add_cable(interface: str, peer: str, namespace: int) -> None:
    """Connect this namespace and another one (a file descriptor) by a pair of interfaces (veth)."""
    peer_link = _link() + _name(_IFNAME, peer) + _word(_NET_NS_FD, namespace)
    data = _attribute(_INFO_DATA, _attribute(_VETH_PEER, peer_link))
    _send_request(_NEWLINK, _CREATE | _EXCL, _link() + _name(_IFNAME, interface) + _kind(b"veth", data))


def _kind(name: bytes, data: bytes = b"") -> bytes:
    return _attribute(_LINKINFO, _attribute(_INFO_KIND, name) + data)


def set_address(interface: str, ip: str, prefix: int) -> None:
    """Give an interface an IPv4 address in a network of `prefix` bits."""
    header = struct.pack("=BBBBI", socket.AF_INET, prefix, 0, 0, socket.if_nametoindex(interface))
    number = socket.inet_aton(ip)
    _send_request(_NEWADDR, _CREATE | _EXCL, header + _attribute(_IFA_LOCAL, number) + _attribute(_IFA_ADDRESS, number))


def limit_rate(interface: str, rate_mbit: float, delay_ms: float = 0.0) -> None:
    """Delay what leaves an interface by `delay_ms`, then limit it by a token bucket of `rate_mbit` (tc-netem, tc-tbf).

    A packet's headers take tokens too. The bucket is small, because the tokens saved up in a pause make short messages
    faster than the link.
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
    header = struct.pack("=BxxxiIII", socket.AF_UNSPEC, socket.if_nametoindex(interface), handle, parent, 0)
    _send_request(_NEWQDISC, _CREATE | _EXCL, header + _name(_TCA_KIND, kind) + _attribute(_TCA_OPTIONS, settings))


# -- what is possible here --------------------------------------------------------------------------------------------


def probe() -> dict[str, str]:
    """Return why `bucket`, `delay` and `hosts` are impossible here, "" if possible; moves this process in trying."""

    def failure(action: Any, prefix: str = "") -> str:
        try:
            action()
        except (OSError, AttributeError) as error:
            return f"{prefix}{getattr(error, 'strerror', None) or error}"
        return ""

    def two_hosts() -> None:
        switch = open_current()
        add_bridge("switch")
        unshare(CLONE_NEWNET)
        add_cable("eth0", "port0", switch)

    refused = failure(enter, "this system does not allow a private network namespace (")
    if refused:
        refused += ")"
    else:
        bring_up("lo")
        refused = failure(lambda: limit_rate("lo", 100.0), "the kernel cannot make a token bucket: ")
    if refused:
        return dict.fromkeys(("bucket", "delay", "hosts"), refused)
    hosts = failure(two_hosts, "the kernel cannot make a virtual cable: ")
    enter()
    bring_up("lo")
    delay = failure(lambda: limit_rate("lo", 100.0, 1.0), "the kernel cannot make a delay (sch_netem): ")
    return {"bucket": "", "delay": delay, "hosts": hosts}


if __name__ == "__main__":
    print(json.dumps(probe()))  # noqa: T201  (the answer)
