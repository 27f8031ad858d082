"""Safe reading and writing of files that somebody else may have made; all of labkit goes through this module.

A run directory is shared, copied, unpacked from archives: any file in it may be a link, a pipe that never ends, a
device, a terabyte of zeros, or not what its name says. So only regular files are opened, without following a link in
the last part of the path and without blocking, and nothing is read beyond a limit. Output goes to a new file next to
its target, which then replaces it; a link at the target is replaced, not followed.

JSON is written in ASCII, so that no name, message or lone surrogate can break a writer, a reader or a terminal. JSON
that is read has bounded depth, numbers of bounded length, and no lone surrogates in its strings.
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
"""Maximum nesting of lists and objects; nothing that labkit writes is nested this deeply."""
MAX_DIGITS = 30
"""Maximum digits of an integer in JSON; labkit writes nothing longer, and longer ones are slow to work with."""
_CHUNK_BYTES = 2**20
_SURROGATE = re.compile("[\ud800-\udfff]")
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class NotRegularError(OSError):
    """Raised if the path exists, but is a link, a folder, a pipe or a device."""


class TooLargeError(OSError):
    """Raised if the file is larger than anything that labkit writes under that name."""


def _require_possible_name(path: Path) -> None:
    """Raise OSError for a name that no file can have; Python itself raises one of two kinds of ValueError."""
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise OSError(errno.EINVAL, "no file can have this name", str(path))


def _about(path: Path) -> os.stat_result:
    """Return the status of `path` itself, without following a link; OSError if nothing is there."""
    _require_possible_name(path)
    return os.lstat(path)


def is_regular(path: Path) -> bool:
    """Return True if `path` itself is a regular file (a link to one does not count)."""
    try:
        return stat.S_ISREG(_about(path).st_mode)
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Return True if `path` itself is a folder (a link to one does not count)."""
    try:
        return stat.S_ISDIR(_about(path).st_mode)
    except OSError:
        return False


def _checked_regular(descriptor: int, path: Path) -> int:
    """Return the descriptor if it belongs to a regular file; otherwise close it and raise OSError."""
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(mode: int, path: Path) -> None:
    """Raise NotRegularError unless `mode` is that of a regular file."""
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise NotRegularError(errno.EINVAL, f"this is {kind}, not a regular file", str(path))


def open_to_read(path: Path) -> int:
    """Return a descriptor of the regular file at `path`; OSError (one sentence) if it is missing or anything else.

    Opening never blocks (a pipe without a writer) and never follows a link at `path` itself.
    """
    _require_regular(_about(path).st_mode, path)  # merely opening a device may have an effect
    try:
        descriptor = os.open(path, _READ)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotRegularError(errno.EINVAL, "this is a link, not a regular file", str(path)) from None
        raise
    return _checked_regular(descriptor, path)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[int]:
    """Yield the descriptor of `open_to_read` and close it at the end."""
    descriptor = open_to_read(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the whole file; TooLargeError if it contains more than `limit` bytes, OSError as in `open_to_read`."""
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
    """Return at most `length` bytes from `offset`; fewer at the end of the file, none beyond it."""
    with reading(path) as descriptor:
        return os.pread(descriptor, length, offset)


def read_tail(path: Path, length: int) -> bytes:
    """Return the last `length` bytes, or all of a shorter file."""
    with reading(path) as descriptor:
        return os.pread(descriptor, length, max(0, os.fstat(descriptor).st_size - length))


def size(path: Path) -> int:
    """Return the size in bytes of the regular file at `path`; OSError if there is none."""
    about = _about(path)
    _require_regular(about.st_mode, path)
    return about.st_size


def modified_ns(path: Path) -> int:
    """Return when the file itself was last modified (ns); 0 if it does not exist."""
    try:
        return _about(path).st_mtime_ns
    except OSError:
        return 0


# -- writing ----------------------------------------------------------------------------------------------------------


def open_to_append(path: Path) -> int:
    """Return a descriptor that appends to the regular file at `path`, created if it is missing (mode 0600).

    Raises OSError for a link, a pipe or a device.
    """
    with contextlib.suppress(FileNotFoundError):
        _require_regular(_about(path).st_mode, path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    return _checked_regular(descriptor, path)


def truncate_to_tail(path: Path, length: int, head: bytes = b"") -> None:
    """Cut the file at `path` to `head` and its last `length` bytes; a process that appends continues after them."""
    end = read_tail(path, length)
    descriptor = open_to_append(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, head + end)
    finally:
        os.close(descriptor)


def open_to_lock(path: Path) -> int:
    """Return a descriptor of an (empty) file to lock, created if it is missing; OSError if it is not a regular file.

    The file is opened for reading: that needs no free block, so a lock can be taken on a full disk.
    """
    with contextlib.suppress(FileNotFoundError):
        return open_to_read(path)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    return open_to_read(path)


def replace(path: Path, data: bytes, durable: bool = False, mode: int = 0o600) -> None:
    """Write `data` to a new file next to `path` and move it to `path`.

    A reader sees the old content or the new, never a mixture; a link at `path` is replaced, not followed, and anything
    other than a file is refused (NotRegularError). With `durable`, the data is on the disk when this returns; a caller
    that renames or lists the file later still has to sync the folder.
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
    """Make names and renames in a folder durable after a power failure, if the file system can sync folders."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Make the regular file `source` available at `target` too, by a hard link or else a copy.

    Raises FileExistsError if `target` exists.
    """
    _require_regular(_about(source).st_mode, source)
    _require_possible_name(target)
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or the file system or the owner does not permit links
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with reading(source) as come_from, os.fdopen(os.open(target, flags, 0o600), "wb") as file:
            while piece := os.read(come_from, _CHUNK_BYTES):
                file.write(piece)


def remove_folder(path: Path) -> None:
    """Remove a folder with its contents, as far as possible; a link at `path` is left alone.

    Raises ValueError, and removes nothing, if the home directory, the current folder or the folder of temporary files
    is at `path` or below it: no run directory contains any of these, so the path must be wrong.
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
    """Return JSON in ASCII, with control, direction-changing and lone surrogate characters escaped.

    JSON has no NaN and no infinity; they become null.
    """
    try:
        return json.dumps(data, ensure_ascii=True, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(finite(data), ensure_ascii=True, indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """Return a copy with NaN and infinity replaced by null, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def from_json(data: bytes, bounded_numbers: bool = True) -> Any:
    """Parse JSON; ValueError if it is invalid, nested too deeply, or contains a number that is too long.

    Lone surrogates in strings, which no file and no terminal accepts, become their six-character escapes. Without
    `bounded_numbers` only Python's own limit on integers applies (4300 digits), which is faster.
    """
    try:
        parsed = json.loads(data.decode("utf-8"), parse_int=_whole_number if bounded_numbers else None)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    # A cheap check first: most files have fewer brackets than the maximum depth.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _require_depth(parsed)
    return _without_surrogates(parsed) if b"\\u" in data else parsed


def _whole_number(text: str) -> int:
    """Parse an integer of at most MAX_DIGITS digits."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _require_depth(parsed: Any) -> None:
    """Raise ValueError if lists and objects are nested deeper than MAX_DEPTH."""
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
    """Return a copy with lone surrogates in strings replaced by their escapes."""
    if isinstance(parsed, str):
        return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", parsed)
    if isinstance(parsed, list):
        return [_without_surrogates(item) for item in parsed]
    if isinstance(parsed, dict):
        return {_without_surrogates(key): _without_surrogates(value) for key, value in parsed.items()}
    return parsed


def write_json(path: Path, data: Any, durable: bool = False) -> None:
    """Write `data` as JSON to `path`, as `replace` does."""
    replace(path, (to_json(data, indent=1) + "\n").encode("ascii"), durable)


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Return the JSON in a file; None if it is missing, not a regular file, larger than `limit` bytes, or invalid."""
    try:
        return from_json(read_bytes(path, limit))
    except (OSError, ValueError):
        return None


# -- text for a terminal ----------------------------------------------------------------------------------------------


def printable(text: Any) -> str:
    """Return text from a file, a name or an argument with control characters and line breaks escaped."""
    return "".join(sign if sign.isprintable() else _escape(sign) for sign in str(text))


def _escape(sign: str) -> str:
    """Return the backslash escape of a character."""
    return sign.encode("unicode_escape").decode("ascii")
