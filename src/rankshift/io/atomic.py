"""Directories that appear at once: written beside the target, synced, then swapped in by one rename.

At every instant the target is the old directory or the new one, complete; a crash leaves the old one. What is replaced
are the files of one kind of directory; anything else that a user keeps beside them stays. A directory of no known kind
is never written to, and a plain model only replaces one that bears the sign of this library.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from rankshift.core.errors import NotWritable

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # file systems (NFS, …) without it


@dataclass(frozen=True)
class Kind:
    """What makes a directory one of ours to replace."""

    name: str
    markers: tuple[str, ...]  # one of these is there
    files: tuple[str, ...]  # what a new one replaces
    sign: str | None = None  # the file without which these files are someone else's

    def at(self, directory: Path) -> bool:
        """Whether the directory is of this kind, perhaps among others."""
        return any(_matches(entry.name, self.markers) for entry in directory.iterdir())


NATIVE = Kind(
    "rankshift checkpoint", ("rankshift.json",), ("rankshift.json", "adapter.safetensors", "base-*.safetensors")
)
PEFT = Kind(
    "PEFT adapter", ("adapter_config.json",), ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
)
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*")
SIGN = "rankshift-merged.json"
MODEL = Kind("plain model", _WEIGHTS, (*_WEIGHTS, "config.json", "generation_config.json", SIGN), SIGN)
COMPRESSED = Kind(
    "compressed model",
    ("rankshift-compressed.json",),
    ("rankshift-compressed.json", "compressed.safetensors", "config.json", "generation_config.json"),
)
_KINDS = (NATIVE, PEFT, MODEL, COMPRESSED)
# in one directory, transformers loads the model and then the adapter on it; and two models would share a config.json
_APART = frozenset({PEFT.name, MODEL.name, COMPRESSED.name})


def check(directory: str | Path, kind: Kind) -> None:
    """Raise NotWritable if a directory of this kind could not be written here. Writes nothing: ask before training."""
    target = Path(os.path.realpath(directory))
    if target.exists():
        if not target.is_dir():
            raise NotWritable(f"{target} is a file, so no {kind.name} can be written there.\nName a directory.")
        try:
            entries = sorted(entry.name for entry in target.iterdir())
            kinds = {other.name for other in _KINDS if other.at(target)}
        except OSError as error:
            raise explain(error, target) from error
        if entries and not kinds:
            raise NotWritable(
                f"{target} holds {entries[0]!r} and is no checkpoint, adapter or model: it is left alone.\n"
                "Name a new or an empty directory."
            )
        if kind.sign is not None and kind.sign not in entries:
            theirs = next((name for name in entries if _matches(name, kind.files)), None)
            if theirs is not None:
                raise NotWritable(
                    f"{target} holds a {kind.name} that rankshift did not write ({theirs}): it is left alone.\n"
                    "Name a new or an empty directory."
                )
        rival = (kinds | {kind.name}) & _APART
        if kind.name in _APART and len(rival) > 1:
            raise NotWritable(
                f"{target} holds a {next(iter(rival - {kind.name}))}; with a {kind.name} beside it, programs would "
                "load both.\nName another directory."
            )
        if os.path.ismount(target):
            raise NotWritable(f"{target} is a mount point and cannot be replaced by a rename.\nName a directory in it.")
    above = next(p for p in target.parents if p.exists())
    if not above.is_dir():
        raise NotWritable(f"{above} is a file, so {target} cannot be made under it.\nName another directory.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise explain(PermissionError(errno.EACCES, "Permission denied"), target)


@contextlib.contextmanager
def replacing(directory: str | Path, kind: Kind) -> Iterator[Path]:
    """A folder to fill; it becomes ``directory`` in one rename when the block ends well, and vanishes when not.

    Raises:
        NotWritable: for every OSError here or in the block; what was at ``directory`` is untouched.
    """
    check(directory, kind)
    target = Path(os.path.realpath(directory))
    fresh = target.with_name(f".{target.name}.rankshift-partial")
    missing = [folder for folder in target.parents if not folder.exists()]
    done = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        settle(target)
        _discard(fresh)  # what a killed writer left
        fresh.mkdir()
        yield fresh
        _open_up(fresh)
        _sync(fresh)
        if target.exists():
            _carry(target, fresh, kind)
            _sync_one(fresh)
        _swap(fresh, target)
        _sync_one(target.parent)
        done = True
    except (OSError, SafetensorError) as error:
        raise explain(error, target) from error
    finally:
        _discard(fresh)  # the previous directory after a swap, the unfinished one after a failure
        for folder in () if done else missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def settle(directory: str | Path) -> Path:
    """The directory, after undoing a swap that was interrupted on a file system which cannot exchange two names."""
    target = Path(os.path.realpath(directory))
    previous = _previous(target)
    if not target.exists() and previous.exists():
        os.rename(previous, target)
    return target


def explain(error: Exception, target: Path) -> NotWritable:
    """An OSError (or safetensors' wrapping of one) as two lines: what happened, what to do."""
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (found := re.search(r"os error (\d+)", str(error))):
        code = int(found.group(1))
    if code in (errno.ENOSPC, errno.EDQUOT):
        return NotWritable(
            f"The disk is full: {target} was not written.\n"
            "Free some space or name a directory on another disk. What was there before is untouched."
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return NotWritable(f"No permission to write {target}.\nName another directory or change its permissions.")
    if code in (errno.ENOTDIR, errno.EEXIST):
        return NotWritable(f"{target} cannot be made: a file is in the way.\nName another directory.")
    if code == errno.EFBIG:
        return NotWritable(f"{target} was not written: a file exceeds the size limit here.\nRaise it (ulimit -f).")
    if code == errno.ENOENT:
        return NotWritable(f"{target} cannot be made: no files can be made there.\nName another directory.")
    why = error.strerror if isinstance(error, OSError) and error.strerror else error
    return NotWritable(f"{target} was not written: {why}.\nWhat was there before is untouched.")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.rankshift-previous")


def _discard(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def _carry(old: Path, fresh: Path, kind: Kind) -> None:
    """Everything in ``old`` that is not of this kind, into ``fresh``, by hard links where the disk can."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)
            if not os.path.islink(target):
                _sync_one(Path(target))

    for entry in sorted(old.iterdir()):
        if _matches(entry.name, kind.files) or (fresh / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, fresh / entry.name, symlinks=True, copy_function=link)
        else:
            link(str(entry), str(fresh / entry.name))


def _open_up(folder: Path) -> None:
    """Every file as readable as the umask, seen in the new folder, says; safetensors writes for the owner alone."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def _sync(folder: Path) -> None:
    """Flush every file and directory below ``folder`` to the disk."""
    for path, _, files in os.walk(folder):
        for name in files:
            file = Path(path, name)
            if not file.is_symlink():
                _sync_one(file)
        _sync_one(Path(path))


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(fresh: Path, target: Path) -> None:
    """``fresh`` becomes ``target``; what was at ``target`` is then at ``fresh``, or gone."""
    if not target.exists():
        os.rename(fresh, target)
        return
    if _exchange(fresh, target):
        return
    previous = _previous(target)  # settle() undoes a crash between the next two lines
    _discard(previous)
    os.rename(target, previous)
    try:
        os.rename(fresh, target)
    except OSError:
        os.rename(previous, target)
        raise
    _discard(previous)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(b))
