"""A model whose adapted layers became two thin ones each: made, written, and read without the base that it came from.

rankshift-compressed.json   which layers are thin, their ranks, and size and SHA-256 of every other file
compressed.safetensors      every parameter and buffer of the model by its name, each once
config.json, …              of a transformers model, so that its architecture can be built again

Linear(in → out) is Sequential(Linear(in → r), Linear(r → out, bias C)); a convolution keeps its geometry in the first
and has 1×1 places in the second. Buffers are written even where torch would not save them: a model built without
values (on torch's meta device) then lacks nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.errors import CheckpointError, CorruptFile, ExportError, MissingFile, WrongBase, nearest
from rankshift.core.form import ConvForm
from rankshift.core.site import Site, bare, form_of
from rankshift.io.atomic import COMPRESSED, replacing, settle
from rankshift.io.checkpoint import check_files, packed, sha256, version
from rankshift.io.export import ties_as_they_are

MANIFEST, WEIGHTS = "rankshift-compressed.json", "compressed.safetensors"
FORMAT = 1


class Source(Protocol):
    """What is asked of a run."""

    model: nn.Module

    @property
    def sites(self) -> dict[str, Site]:
        """Sites by name."""
        ...

    @property
    def step(self) -> int:
        """Updates taken."""
        ...

    @property
    def total_steps(self) -> int | None:
        """Updates of the whole run."""
        ...


# ---- made ------------------------------------------------------------------------------------------------------------


def factors(run: Source) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """(A, B, C) of each adapted layer, whole, in the layer's dtype. Under sharding every rank must call this.

    Raises:
        ExportError: a layer still needs its base.
    """
    found: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
    for name, site in run.sites.items():
        acting = site.acting()
        if not acting:
            continue
        parts = acting[0].alone()
        if isinstance(parts, str):
            raise ExportError(
                f"{name} still needs its weight at step {run.step} of {run.total_steps}: {parts}. Train to the end, or "
                'use run.merge() or format="merged" for a plain model of the original size.'
                if acting[0].leaves
                else f"{name} cannot do without its weight: {parts}. Only PC-LoRA leaves a compressed model behind. "
                'Use run.merge() or format="merged" for a plain model.'
            )
        A, B, C = parts
        dtype = site.base.dtype
        found[name] = A.to(dtype), B.to(dtype), None if C is None else C.to(dtype)
    if not found:
        raise ExportError("No adapter acts, so there is no compressed model. Make one act: run.use(name).")
    return found


def thin(layer: nn.Module, rank: int, bias: bool, device: torch.device | str = "meta") -> nn.Sequential:
    """The two layers of this rank that can stand where ``layer`` does, without values."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    kind: dict[str, Any] = {"device": device, "dtype": weight.dtype}
    form = form_of(layer)
    if isinstance(form, ConvForm):
        conv: Any = type(layer)
        first = conv(
            form.channels, rank, form.kernel, form.stride, form.padding, form.dilation,
            bias=False, padding_mode=form.padding_mode, **kind,
        )  # fmt: skip
        return nn.Sequential(first, conv(rank, weight.shape[0], 1, bias=bias, **kind))
    assert form is not None
    out, into = form.matrix(weight).shape
    return nn.Sequential(nn.Linear(into, rank, bias=False, **kind), nn.Linear(rank, out, bias=bias, **kind))


def replace(model: nn.Module, found: Mapping[str, tuple[Tensor, Tensor, Tensor | None]]) -> None:
    """Put thin layers with these values where the model's own layers stand."""
    for name, (A, B, C) in found.items():
        layer = model.get_submodule(name)
        pair = thin(layer, A.shape[0], C is not None)
        places = dict(pair.named_parameters())
        fill(pair, {leaf: value.reshape(places[leaf].shape) for leaf, value in named(A, B, C)})
        pair.train(layer.training)
        put(model, name, pair)


def named(A: Tensor, B: Tensor, C: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """The factors under the names that they have in a pair of thin layers."""
    yield "0.weight", A
    yield "1.weight", B
    if C is not None:
        yield "1.bias", C


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let ``module`` stand at this place of the model."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


# ---- written ---------------------------------------------------------------------------------------------------------


def write(run: Source, directory: str | Path) -> Any:
    """Gather the compressed model (on every rank) and return what writes it; the run goes on unchanged."""
    found = factors(run)
    model, first = run.model, shard.rank() == 0
    with bare(model):
        own = {name: tensor for name, tensor in tensors(model) if not name.startswith(tuple(f"{n}." for n in found))}
    state: dict[str, Tensor] = {}
    for name, tensor in own.items():
        whole = shard.whole(tensor)
        if first:  # whole on the rank that writes, and nowhere else
            state[name] = whole.cpu()
    layers: dict[str, Any] = {}
    for name, (A, B, C) in found.items():
        layers[name] = {"rank": A.shape[0], "bias": C is not None}
        form = run.sites[name].spec.form
        if isinstance(form, ConvForm):
            A, B = form.stored(A), B.reshape(*B.shape, *(1,) * len(form.kernel))
        state |= {f"{name}.{leaf}": value for leaf, value in named(A, B, C)}

    def put_down() -> None:
        with replacing(directory, COMPRESSED) as folder:
            save_file(packed(state), folder / WEIGHTS, metadata={"format": "pt"})
            with bare(model), ties_as_they_are(model):
                for part in ("config", "generation_config"):
                    save = getattr(getattr(model, part, None), "save_pretrained", None)
                    if save is not None:
                        save(folder)
            manifest = {
                "format": FORMAT,
                "rankshift": version(),
                "class": type(model).__name__,
                "layers": layers,
                "files": {f.name: {"size": f.stat().st_size, "sha256": sha256(f)} for f in sorted(folder.iterdir())},
            }
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")

    return put_down


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of a model, tied ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


# ---- read ------------------------------------------------------------------------------------------------------------


def inspect(directory: str | Path) -> dict[str, Any]:
    """The manifest of a compressed model, after checking that every file is what it says.

    Raises:
        MissingFile, CorruptFile: a file is not there, or of another size or checksum.
    """
    folder = settle(directory)
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] > FORMAT:
            raise CheckpointError(
                f"{path} is of format {manifest['format']}, written by rankshift {manifest.get('rankshift')}; formats "
                f"up to {FORMAT} are read here.\nUpdate: pip install -U rankshift"
            )
        wanted = [(str(name), int(e["size"]), str(e["sha256"])) for name, e in manifest["files"].items()]
        _ = str(manifest["class"]), [(int(e["rank"]), bool(e["bias"])) for e in manifest["layers"].values()]
    except FileNotFoundError as error:
        raise MissingFile(
            f'{path} is not there.\nName a directory that run.export(…, format="compressed") wrote.'
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise CorruptFile(f"{path} is not a manifest: {error!r}.\nExport or copy it again.") from error
    check_files(folder, path, wanted)
    return dict(manifest)


def read(model: nn.Module, directory: str | Path) -> nn.Module:
    """Turn a model of the right architecture into the compressed one, in place; its own values do not matter.

    Raises:
        MissingFile, CorruptFile: the directory is not complete.
        WrongBase: the model has not the layers and tensors that the directory names; then nothing was changed.
    """
    folder, manifest = settle(directory), inspect(directory)
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{folder / WEIGHTS} cannot be read: {error}.\nExport or copy it again.") from error
    pairs: dict[str, nn.Sequential] = {}
    for name, entry in manifest["layers"].items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            known = [n for n, m in model.named_modules() if form_of(m) is not None]
            raise WrongBase(
                f"{folder} holds a {manifest['class']} with a layer {name}; this {type(model).__name__} has none. "
                f"{nearest(name, known)}\nGive a model of that class and size."
            ) from None
        form = form_of(layer)
        pair = None if form is None or form.stacked else thin(layer, entry["rank"], entry["bias"])
        for leaf, p in () if pair is None else pair.named_parameters():
            saved = state.get(f"{name}.{leaf}")
            if saved is None or saved.shape != p.shape:
                pair = None
                break
        if pair is None:
            raise WrongBase(
                f"{name} of this {type(model).__name__} has not the shape of the layer that {folder} holds in two "
                "parts.\nGive a model of the same class and size."
            )
        pairs[name] = pair
    rest = {n: t for n, t in state.items() if not n.startswith(tuple(f"{name}." for name in pairs))}
    inside = tuple(f"{name}." for name in pairs)
    here = {name: t for name, t in tensors(model) if not name.startswith(inside)}
    if odd := sorted(rest.keys() ^ here.keys()):
        raise WrongBase(
            f"{odd[0]} is only in {'the file' if odd[0] in rest else f'this {type(model).__name__}'}: {folder} holds a "
            f"{manifest['class']}.\nGive a model of that class and size."
        )
    for name, tensor in here.items():
        if tensor.shape != rest[name].shape:
            raise WrongBase(
                f"{name} is {tuple(rest[name].shape)} in {folder} and {tuple(tensor.shape)} here.\nGive a model of the "
                "same size."
            )
    for name, pair in pairs.items():
        pair.train(model.get_submodule(name).training)
        put(model, name, pair)
    fill(model, state)
    return model


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put these tensors where a model's parameters and buffers stand, in their own dtype and on the device of what they
    replace, if that is anywhere (meta is not). What is tied stays tied."""
    new: dict[int, Tensor] = {}
    for name, old in tensors(model):
        value = state[name] if old.device.type == "meta" else state[name].to(old.device)
        new[id(old)] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for leaf, tensor in kept.items():
                if tensor is not None:
                    kept[leaf] = new[id(tensor)]  # type: ignore[assignment]
