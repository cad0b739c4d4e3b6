"""Where rows come from: files, globs, directories, the bundled text, or a data set of the Hugging Face hub."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankshift.core.errors import DataError, beside
from rankshift.train import bundled

if TYPE_CHECKING:
    from datasets import Dataset

_READERS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json",
    ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
_PACKED = (".gz", ".xz", ".bz2")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def find(spec: str | tuple[str, ...], where: str) -> list[Path] | None:
    """The files that a ``data.train`` or ``data.validation`` names; None if it is bundled or of the hub.

    Reads nothing, so that a missing file is found before anything is loaded. A single directory of images is returned
    as it is.

    Raises:
        DataError: nothing is there, or files of several kinds.
    """
    names = (spec,) if isinstance(spec, str) else spec
    if len(names) == 1 and not _is_path(names[0]):
        return None
    files = [file for name in names for file in _expand(name, where)]
    if len(files) == 1 and files[0].is_dir():
        return files
    if any(file.is_dir() for file in files):
        raise DataError(f"{where} mixes a directory of images with other files. Give the directory alone.")
    kinds = {_suffix(file) for file in files}
    if len({_READERS[kind] for kind in kinds}) > 1 or {".csv", ".tsv"} <= kinds:
        raise DataError(f"{where} mixes files of several kinds ({', '.join(sorted(kinds))}). Give files of one kind.")
    empty = [file for file in files if file.stat().st_size == 0]
    if empty:
        raise DataError(f"{empty[0]} is empty. Give {where} a file with at least one example.")
    return files


def load(spec: str | tuple[str, ...], where: str, split: str = "train", subset: str | None = None) -> Dataset:
    """The rows. A text file is one row with the column "text".

    Raises:
        DataError: it cannot be found, reached or read, or has no rows.
    """
    import datasets

    name = spec if isinstance(spec, str) else spec[0]
    files = find(spec, where)
    with quiet():
        if files is None and name in bundled.TEXTS:
            rows = datasets.Dataset.from_dict({"text": [bundled.text(name)]})
        elif files is None:
            rows = _from_hub(name, where, split, subset)
        elif files[0].is_dir():
            rows = _read("imagefolder", {"data_dir": str(files[0])}, files[0])
        else:
            kind = _suffix(files[0])
            how: dict[str, Any] = {"data_files": [str(file) for file in files]}
            if _READERS[kind] == "csv":
                how |= {"keep_default_na": False, "sep": "\t" if kind == ".tsv" else ","}  # "NA" is a word
            if _READERS[kind] == "text":
                how |= {"sample_by": "document"}
            rows = _read(_READERS[kind], how, files[0])
    if len(rows) == 0:
        raise DataError(f"{name} has no rows. Give {where} at least one example.")
    return rows


def describe(spec: str | tuple[str, ...]) -> str:
    """A short name of a source for people."""
    names = (spec,) if isinstance(spec, str) else spec
    return Path(names[0]).name + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _is_path(name: str) -> bool:
    """Whether a name is meant as a path: it exists, or it does not look like an id of the hub."""
    if name in bundled.TEXTS and not Path(name).exists():
        return False
    path = Path(name).expanduser()
    looks = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or glob.has_magic(name)
    return looks or path.exists() or _suffix(path) in _READERS


def _suffix(file: Path) -> str:
    """ ".jsonl" of "a.jsonl.gz"."""
    name = file.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def _expand(name: str, where: str) -> Iterator[Path]:
    path = Path(name).expanduser()
    if glob.has_magic(name) and not path.exists():
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if _suffix(Path(p)) in _READERS]
        if not found:
            raise DataError(f"{where} = {name} matches no file that can be read. Known: {', '.join(_READERS)}.")
        yield from found
    elif path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        readable = [p for p in inside if _suffix(p) in _READERS]
        if any(p.suffix.lower() in _IMAGES for p in inside):
            yield path
        elif readable:
            yield from readable
        else:
            raise DataError(
                f"the directory {name} holds no file that can be read. Known: {', '.join(_READERS)}, images."
            )
    elif not path.exists():
        hint = "Name a file that is." if path.parent.is_dir() else f"There is no directory {path.parent} either."
        raise DataError(f"{where} = {name} is not there. {beside(path) or hint}")
    elif _suffix(path) not in _READERS:
        raise DataError(f"{name} is of no kind that can be read. Known: {', '.join(_READERS)}, also with .gz or .xz.")
    else:
        yield path


def _read(reader: str, how: dict[str, Any], file: Path) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(reader, split="train", **how)
    except ImportError as error:
        raise DataError(f"{file} needs a package that is not installed: {error}. Install it with pip.") from error
    except Exception as error:  # readers raise what pandas, pyarrow and the decompressors raise
        cause = error.__cause__ or error
        first = (str(cause) or type(cause).__name__).split("\n")[0].rstrip(".")
        raise DataError(f"{file} cannot be read as {reader}: {first}. Correct or leave out that file.") from error


def _from_hub(name: str, where: str, split: str, subset: str | None) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        first = str(error).split("\n")[0].rstrip(".")
        raise DataError(
            f"{where} = {name!r} is no file or directory here ({Path(name).absolute()}), and as a data set of the "
            f"Hugging Face hub it could not be loaded: {first}. {beside(Path(name))}".rstrip()
            + " Check the path, the id, data.subset and data.split, and the connection."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Loading says nothing of its own: what matters is printed by the recipe, what fails is in the error."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in _chatty()]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _chatty() -> Iterable[str]:
    return [name for name in logging.root.manager.loggerDict if name.split(".")[0] in ("datasets", "huggingface_hub")]
