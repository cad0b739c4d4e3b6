"""The native directory: what a run has that its base has not, exactly.

rankshift.json        the run's plain values, the base's fingerprint, and size and SHA-256 of every other file
adapter.safetensors   adapters, whole copies, running statistics
base-00001.safetensors, …   only weights of the base that no longer are what they came as

The directory appears by one rename (see :mod:`.atomic`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.errors import CheckpointError, CorruptFile, MissingFile, NotWritable
from rankshift.core.site import returned
from rankshift.io import fingerprint, peft, peft_vera
from rankshift.io.atomic import COMPRESSED, MODEL, NATIVE, replacing, settle

MANIFEST = "rankshift.json"
TRAINER = "rankshift"  # the run's directory inside a checkpoint of rs.Trainer
FORMAT = 1
SHARD = 4 << 30  # bytes of base weights in one file


class Source(Protocol):
    """What is asked of a run."""

    model: nn.Module

    @property
    def changed(self) -> set[str]:
        """Parameters of the base that no longer are what they came as."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain values, as JSON knows them."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor), one gathered at a time; ``base/…`` last."""
        ...


def save(run: Source, directory: str | Path) -> Path:
    """Write a run's directory. Every rank must call this; rank 0 writes.

    Raises:
        NotWritable: nothing was written, and what was there before is untouched.
    """
    prints = fingerprint.take(run.model, run.changed)
    tensors = run.tensors()
    write_on_first_rank(run.model, directory, lambda: _write(run, tensors, prints, directory), tensors)
    return Path(directory)


def write_on_first_rank(model: nn.Module, directory: str | Path, write: Any, tensors: Iterator[Any]) -> None:
    """Call ``write()`` on rank 0, take part in gathering on the others, and raise everywhere if it failed."""
    failure: BaseException | None = None
    if shard.rank() == 0:
        try:
            write()
        except Exception as error:
            failure = error
    for _ in tensors:  # each gather needs every rank, also after a failure of the one that writes
        pass
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    failed = shard.any_rank(failure is not None, device)
    if failure is not None:
        raise failure
    if failed:
        raise NotWritable(f"{directory} was not written.\nThe first process could not; its own error says why.")


def read(
    model: nn.Module,
    directory: str | Path,
    seed: int = 0,
    check_base: bool = True,
    tied: Literal["refuse", "untie"] = "refuse",
) -> dict[str, Any]:
    """What ``Run.state_dict`` gave when the directory was written; for a PEFT directory, what it would have given.

    Args: see :func:`rankshift.load`.

    Raises:
        MissingFile, CorruptFile: the directory is not complete.
        WrongBase: ``model`` is not what it was trained on.
    """
    folder = settle(directory)
    if not (folder / MANIFEST).exists() and (folder / TRAINER).is_dir():
        folder = settle(folder / TRAINER)
    if not folder.is_dir():
        raise MissingFile(f"There is no directory {directory}.\nCheck the path; hub names are not looked up.")
    if not (folder / MANIFEST).exists():
        if (folder / peft.CONFIG).exists():
            if str(peft.load_config(folder)["peft_type"]).upper() == "VERA":
                return peft_vera.read(model, folder, seed, tied)
            return peft.read(model, folder, seed, tied)
        if COMPRESSED.at(folder):
            raise MissingFile(
                f"{folder} holds a compressed model, which stands without its base, and no run.\n"
                f'Load it by itself: rs.load_compressed("{directory}").'
            )
        if MODEL.at(folder):
            raise MissingFile(
                f"{folder} holds a plain model, with nothing of a run in it.\nLoad it as any model, with "
                "from_pretrained or load_state_dict, or name a directory that run.save() or PEFT wrote."
            )
        raise MissingFile(
            f"{folder} holds neither {MANIFEST} nor {peft.CONFIG}.\nName a directory that run.save() or PEFT wrote."
        )
    manifest = inspect(folder)
    prints = manifest["base"]["prints"] if check_base else {}
    later = {name: entry for name, entry in prints.items() if "storage" in entry}  # known once it is a base again
    with returned(model):  # a run's own model, when it goes back to a state of its own
        fingerprint.compare(model, {n: p for n, p in prints.items() if n not in later}, folder)
    tensors: dict[str, Tensor] = {}
    for name in manifest["files"]:
        try:
            tensors |= load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise CorruptFile(f"{folder / name} cannot be read: {error}.\nSave or copy it again.") from error
    return {**manifest["run"], "tensors": tensors, "prints": later}


def inspect(directory: str | Path) -> dict[str, Any]:
    """The manifest of a native directory, after checking that every file is what it says.

    Raises:
        MissingFile, CorruptFile: a file is not there, or of another size or checksum.
    """
    folder = Path(directory)
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version, files = manifest["format"], dict(manifest["files"])
        if version > FORMAT:
            raise CheckpointError(
                f"{path} is of format {version}, written by rankshift {manifest.get('rankshift')}; formats up to "
                f"{FORMAT} are read here.\nUpdate: pip install -U rankshift"
            )
        _ = manifest["run"]["adapters"], manifest["base"]["prints"]
        wanted = [(str(name), int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()]
    except FileNotFoundError as error:
        raise MissingFile(f"{path} is not there.\nName a directory that run.save() wrote.") from error
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise CorruptFile(f"{path} is not a manifest: {error!r}.\nSave or copy it again.") from error
    check_files(folder, path, wanted)
    return dict(manifest)


def check_files(folder: Path, path: Path, wanted: Iterable[tuple[str, int, str]]) -> None:
    """Raise MissingFile or CorruptFile unless every file has the bytes and SHA-256 that the manifest says."""
    for name, size, digest in wanted:
        file = folder / name
        if file.parent != folder or not file.is_file():
            raise MissingFile(f"{file} is not there, but {path} names it.\nCopy the whole directory.")
        if file.stat().st_size != size:
            raise CorruptFile(f"{file} has {file.stat().st_size:,} bytes instead of {size:,}.\nSave or copy it again.")
        if sha256(file) != digest:
            raise CorruptFile(f"{file} is damaged: its SHA-256 is not the one in {path}.\nSave or copy it again.")


def sha256(file: Path) -> str:
    """The checksum of a file, as hexadecimal text."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them: contiguous, on the CPU, no two in one storage."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if place in seen or tensor.is_neg() or tensor.is_conj() else tensor
        seen.add(place)
    return out


def _write(run: Source, tensors: Iterator[tuple[str, Tensor]], prints: dict[str, Any], directory: str | Path) -> None:
    with replacing(directory, NATIVE) as folder:
        part: dict[str, Tensor] = {}
        held = count = 0
        for name, tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if name.startswith("base/"):
                if count == 0 or held + size > SHARD:
                    save_file(packed(part), folder / _file(count))
                    part, held, count = {}, 0, count + 1
                held += size
            part[name] = tensor.cpu()
        save_file(packed(part), folder / _file(count))
        config = getattr(run.model, "config", None)
        manifest = {
            "format": FORMAT,
            "rankshift": version(),
            "run": run.describe(),
            "base": {"class": type(run.model).__name__, "name": getattr(config, "name_or_path", ""), "prints": prints},
            "files": {f.name: {"size": f.stat().st_size, "sha256": sha256(f)} for f in sorted(folder.iterdir())},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def _file(count: int) -> str:
    return f"base-{count:05d}.safetensors" if count else "adapter.safetensors"


def version() -> str:
    """Ours."""
    from rankshift import __version__

    return __version__
