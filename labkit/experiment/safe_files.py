"""The one door through which labkit reads and writes files that somebody else may have made.

A run directory is shared, copied, unpacked from archives: any file in it may be a link, a pipe that never ends, a
device, a terabyte of zeros, or not what it says. So nothing is opened but a regular file, without following a link in
its last part and without waiting, and nothing is read beyond a bound. What is written goes to a new file beside its
target, which then takes its place; a link that stands there is replaced, not followed.

JSON is written in ASCII, so that no name, message or half of a character pair can stop a writer, a reader or a
terminal. What is read has a bounded depth, numbers of bounded length, and no lone surrogates in its texts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 8 * 2**20
MAX_DEPTH = 64
"""Lists and objects within each other; nothing that labkit writes is nested so deep."""
MAX_DIGITS = 30
"""Digits of a whole number in JSON; anything longer is no number of ours, and slow to work with."""
_CHUNK_BYTES = 2**20
_SURROGATE = re.compile("[\ud800-\udfff]")
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class NotRegularError(OSError):
    """The path is there, but a link, a folder, a pipe or a device stands at it."""


class TooLargeError(OSError):
    """The file is larger than anything that labkit writes under that name."""


def _require_possible_name(path: Path) -> None:
    """Raise OSError for a name that no file can have, where Python raises one of two kinds of ValueError."""
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise OSError(errno.EINVAL, "no file can have this name", str(path))


def _about(path: Path) -> os.stat_result:
    """What stands at `path` itself; OSError if there is nothing."""
    _require_possible_name(path)
    return os.lstat(path)


def is_regular(path: Path) -> bool:
    """Does a regular file stand at `path` itself (a link to one does not count)?"""
    try:
        return stat.S_ISREG(_about(path).st_mode)
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Does a folder stand at `path` itself (a link to one does not count)?"""
    try:
        return stat.S_ISDIR(_about(path).st_mode)
    except OSError:
        return False


def _checked_regular(descriptor: int, path: Path) -> int:
    """Return the descriptor if it is that of a regular file; else close it and raise OSError."""
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise NotRegularError(errno.EINVAL, f"this is {kind}, not a regular file", str(path))


def open_to_read(path: Path) -> int:
    """A descriptor of the regular file at `path`; OSError (one sentence) if it is missing or anything else.

    Opening never waits (a pipe without a writer) and never follows a link at `path` itself.
    """
    _require_regular(_about(path).st_mode, path)  # opening a device may already do something
    try:
        descriptor = os.open(path, _READ)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotRegularError(errno.EINVAL, "this is a link, not a regular file", str(path)) from None
        raise
    return _checked_regular(descriptor, path)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[int]:
    """The descriptor of `open_to_read`, closed at the end."""
    descriptor = open_to_read(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole file; TooLargeError if it holds more than `limit` bytes, OSError as in `open_to_read`."""
    with reading(path) as descriptor:
        if os.fstat(descriptor).st_size > limit:
            raise _too_large(path, limit)
        pieces, total = [], 0
        while piece := os.read(descriptor, min(_CHUNK_BYTES, limit + 1 - total)):
            pieces.append(piece)
            total += len(piece)
            if total > limit:  # it grows while it is read
                raise _too_large(path, limit)
        return b"".join(pieces)


def _too_large(path: Path, limit: int) -> TooLargeError:
    reason = f"this is larger than {limit / 2**20:g} MiB" if limit >= 2**20 else f"this is larger than {limit} bytes"
    return TooLargeError(errno.EFBIG, reason, str(path))


def read_piece(path: Path, offset: int, length: int) -> bytes:
    """At most `length` bytes from `offset` on; fewer at the end of the file, none beyond it."""
    with reading(path) as descriptor:
        return os.pread(descriptor, length, offset)


def read_tail(path: Path, length: int) -> bytes:
    """The last `length` bytes, or all of a shorter file."""
    with reading(path) as descriptor:
        return os.pread(descriptor, length, max(0, os.fstat(descriptor).st_size - length))


def size(path: Path) -> int:
    """Bytes of the regular file at `path`; OSError if there is none."""
    about = _about(path)
    _require_regular(about.st_mode, path)
    return about.st_size


def changed(path: Path) -> int:
    """When the file itself was last changed (ns); 0 if there is none."""
    try:
        return _about(path).st_mtime_ns
    except OSError:
        return 0


# -- writing ----------------------------------------------------------------------------------------------------------


def open_to_append(path: Path) -> int:
    """A descriptor that appends to the regular file at `path`, made if it is missing (mode 0600).

    OSError if a link, a pipe or a device stands there.
    """
    with contextlib.suppress(FileNotFoundError):
        _require_regular(_about(path).st_mode, path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    return _checked_regular(descriptor, path)


def keep_end(path: Path, length: int, head: bytes = b"") -> None:
    """Cut the regular file at `path` to `head` and its last `length` bytes; who appends to it goes on behind them."""
    end = read_tail(path, length)
    descriptor = open_to_append(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, head + end)
    finally:
        os.close(descriptor)


def open_to_lock(path: Path) -> int:
    """A descriptor of an (empty) file to hold a lock on, made if it is missing; OSError if something else is there.

    Opened for reading: that needs no free block, so a lock can be had on a full disk.
    """
    with contextlib.suppress(FileNotFoundError):
        return open_to_read(path)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    return open_to_read(path)


def replace(path: Path, data: bytes, durable: bool = False, mode: int = 0o600) -> None:
    """Write `data` to a new file beside `path` and let it take that place.

    A reader sees the old content or the new one, never half of it; a link at `path` is replaced, not followed, and
    anything else than a file is refused (NotRegularError). `durable`: it is on the disk when this returns; who renames
    or lists it later still has to sync the folder.
    """
    with contextlib.suppress(FileNotFoundError):
        present = _about(path).st_mode
        if not stat.S_ISLNK(present):
            _require_regular(present, path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if mode != 0o600:
                os.fchmod(file.fileno(), mode)
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def sync_folder(path: Path) -> None:
    """Make names and renames in a folder outlast a power cut; file systems that cannot are left alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Let the regular file `source` also be at `target`, which must not exist: by a hard link, else by a copy."""
    _require_regular(_about(source).st_mode, source)
    _require_possible_name(target)
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or a file system or an owner that does not permit it
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with reading(source) as come_from, os.fdopen(os.open(target, flags, 0o600), "wb") as file:
            while piece := os.read(come_from, _CHUNK_BYTES):
                file.write(piece)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it, as far as possible; a link at `path` is left alone.

    Raises ValueError, and removes nothing, if the home directory, the current folder or the folder of temporary files
    is at `path` or below it: no run directory holds any of these, so that the path was put together wrongly.
    """
    if not is_folder(path):
        return
    place = os.path.realpath(path)
    for kept in map(os.path.realpath, (os.path.expanduser("~"), ".", tempfile.gettempdir())):
        if os.path.commonpath((place, kept)) == place:
            raise ValueError(f"{place} is never removed: {kept} is in it")
    shutil.rmtree(path, ignore_errors=True)


# -- JSON -------------------------------------------------------------------------------------------------------------


def to_json(data: Any, indent: int | None = None) -> str:
    """JSON in ASCII: control, direction-changing and lone surrogate characters are escaped in it.

    JSON has no NaN and no infinity; they become null.
    """
    try:
        return json.dumps(data, ensure_ascii=True, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(finite(data), ensure_ascii=True, indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """The same with null in place of NaN and infinity, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def from_json(data: bytes, bounded_numbers: bool = True) -> Any:
    """What stands in `data`; ValueError if that is no JSON, is nested too deep, or has endless numbers.

    Lone surrogates in texts, which no file and no terminal takes, become their escapes, in six characters. Without
    `bounded_numbers` only Python's own bound on whole numbers holds (4300 digits), which is faster.
    """
    try:
        parsed = json.loads(data.decode("utf-8"), parse_int=_whole_number if bounded_numbers else None)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    # A cheap bound first: most files have fewer brackets than the depth that is permitted.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _require_depth(parsed)
    return _without_surrogates(parsed) if b"\\u" in data else parsed


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _require_depth(parsed: Any) -> None:
    level, depth = [parsed], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deep")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [value for value in item.values() if isinstance(value, dict | list)]
            elif isinstance(item, list):
                below += [value for value in item if isinstance(value, dict | list)]
        level = below


def _without_surrogates(parsed: Any) -> Any:
    if isinstance(parsed, str):
        return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", parsed)
    if isinstance(parsed, list):
        return [_without_surrogates(item) for item in parsed]
    if isinstance(parsed, dict):
        return {_without_surrogates(key): _without_surrogates(value) for key, value in parsed.items()}
    return parsed


def write_json(path: Path, data: Any, durable: bool = False) -> None:
    """Replace `path` by this JSON, as `replace` does."""
    replace(path, (to_json(data, indent=1) + "\n").encode("ascii"), durable)


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The JSON in a file; None if it is missing, no regular file, larger than `limit` bytes, or no JSON of ours."""
    try:
        return from_json(read_bytes(path, limit))
    except (OSError, ValueError):
        return None


# -- text for a terminal ----------------------------------------------------------------------------------------------


def printable(text: Any) -> str:
    """Text that came from a file, a name or an argument, with what would steer a terminal or break the line escaped."""
    return "".join(sign if sign.isprintable() else _escape(sign) for sign in str(text))


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")
