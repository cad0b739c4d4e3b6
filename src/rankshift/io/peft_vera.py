"""PEFT's VeRA directories, both ways.

    base_model.model.<layer>.vera_lambda_b (out,)   base_model.model.<layer>.vera_lambda_d (r,)
    base_model.vera_A (r, in_max)   base_model.vera_B (out_max, r)      with save_projection only

PEFT stores neither in_max nor out_max: it takes them from the layers that target_modules names, and so does
:func:`read`, which gives the adapter a pair of its own. A file that holds its pair is believed, whatever its width.
Written is a directory in which PEFT finds the same pair again, with the pair in it where it would draw another one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.errors import ConfigError, CorruptFile, WrongBase
from rankshift.core.form import Form, TransposedForm
from rankshift.core.site import Spec, spec_of
from rankshift.io import peft
from rankshift.methods.vera import GENERATOR, Numbers, VeRA, VeRALayer, digest

_DEFAULTS: dict[str, Any] = {  # of the fields that mean something here, as PEFT has them
    "r": 256,
    "d_initial": 0.1,
    "projection_prng_key": 0,
    "save_projection": True,
    "vera_dropout": 0.0,
    "bias": "none",
    "modules_to_save": None,
    "target_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
}
_NO_EFFECT = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "fan_in_fan_out", "init_weights",
}  # fmt: skip
_LEAF = re.compile(r"(?P<owner>.+)\.vera_(?P<leaf>lambda_[bd])$")
_PAIR = {"base_model.vera_A": "A", "base_model.vera_B": "B"}


def read(
    model: nn.Module, directory: str | Path, seed: int = 0, tied: Literal["refuse", "untie"] = "refuse"
) -> dict[str, Any]:
    """What ``Run.state_dict`` would give for this adapter on ``model``.

    Raises:
        MissingFile, CorruptFile: a file, or a tensor that the config promises.
        ConfigError: an option without an equal here.
        WrongBase: a tensor fits no layer of ``model``.
    """
    folder = Path(directory)
    path = folder / peft.CONFIG
    config = peft.known_fields(peft.load_config(folder), _DEFAULTS, _NO_EFFECT, path)
    found = peft.load_tensors(folder)
    pair = {leaf: found.pop(key) for key, leaf in _PAIR.items() if key in found}
    groups, rest = _grouped(found, folder)
    sites = peft.adapted_sites(model, groups, config, folder)
    copies = peft.copied_modules(model, config)
    if lacking := [name for name in peft.targeted_modules(model, config) if name not in sites]:
        raise CorruptFile(
            f"{folder} adapts {lacking[0]} by its {peft.CONFIG}, but holds no tensors for it.\nExport or copy it again."
        )
    specs = [spec_of(model, name) for name in sites]
    for spec in specs:
        _check(spec, sites[spec.name], config["r"], folder)
    numbers = Numbers(
        config["r"],
        max(spec.into for spec in specs),
        max(spec.out for spec in specs),
        config["projection_prng_key"],
    )
    method = VeRA(
        rank=numbers.rank,
        d_initial=config["d_initial"],
        projection_seed=numbers.seed,
        save_projection=config["save_projection"],
        dropout=config["vera_dropout"],
        bias=config["bias"],
        modules_to_save=tuple(copies),
        targets=peft.target_names(model, list(sites)),
        tied=tied,
    )
    tensors = {f"default/{name}.{leaf}": tensor for name, group in sites.items() for leaf, tensor in group.items()}
    numbers, sign = _own(numbers, pair, method.save_projection, folder)
    if method.save_projection:  # the first layer holds what all share
        tensors |= {f"default/{specs[0].name}.projection.{leaf}": matrix for leaf, matrix in pair.items()}
    ranks = dict.fromkeys(sites, numbers.rank)
    tensors |= peft.remaining(model, rest, copies, method, ranks, folder)
    shared = {"generator": GENERATOR, **dataclasses.asdict(numbers), "digest": sign}
    return peft.state(method, ranks, tensors, seed, shared)


def _grouped(found: Mapping[str, Tensor], folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The vectors by their layer; and the other tensors, by their name."""
    groups: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in found.items():
        if not key.startswith(peft.PREFIX):
            raise CorruptFile(f"{folder}: tensor {key!r} is not named as PEFT names them ({peft.PREFIX}…).")
        name = key.removeprefix(peft.PREFIX)
        hit = _LEAF.match(name)
        if hit:
            groups.setdefault(hit["owner"], {})[hit["leaf"]] = tensor
        else:
            rest[name] = tensor
    if not groups:
        raise CorruptFile(f"{folder} holds no VeRA tensors.\nExport or copy it again.")
    return groups, rest


def _check(spec: Spec, group: Mapping[str, Tensor], rank: int, folder: Path) -> None:
    if type(spec.form) not in (Form, TransposedForm):
        kind = type(spec.form).__name__.removesuffix("Form")
        raise ConfigError(f"{folder} adapts {spec.name}, of kind {kind}, for which PEFT defines no VeRA.")
    for leaf, size, of in (("lambda_d", rank, f"the r of its {peft.CONFIG}"), ("lambda_b", spec.out, "the layer's")):
        if leaf not in group:
            raise CorruptFile(f"{folder}: {spec.name} has no tensor vera_{leaf}.\nExport or copy it again.")
        if tuple(group[leaf].shape) != (size,):
            kind_of = CorruptFile if leaf == "lambda_d" else WrongBase
            raise kind_of(
                f"{folder}: vera_{leaf} at {spec.name} is {tuple(group[leaf].shape)}; {of} wants ({size},).\n"
                "Load the model that it was trained on, or export it again."
            )


def _own(numbers: Numbers, pair: Mapping[str, Tensor], saved: bool, folder: Path) -> tuple[Numbers, str]:
    """The numbers and the digest of the adapter's own pair: the one in the file, or the one that its seed draws.

    Whether it is large enough for the model's layers is seen when it is shared out.
    """
    if not saved:
        drawn = digest(*numbers.draw())
        if len(pair) == 2 and digest(pair["A"], pair["B"]) != drawn:
            raise CorruptFile(
                f"{folder} holds projections that are not those of its seed, although its {peft.CONFIG} says "
                "save_projection = false.\nSet it to true if they are those that it was trained with."
            )
        return numbers, drawn
    if len(pair) < 2:
        raise CorruptFile(
            f"{folder} lacks vera_A or vera_B, although its {peft.CONFIG} says save_projection = true.\n"
            "Export or copy it again."
        )
    A, B = pair["A"], pair["B"]
    if (A.shape[0], B.shape[-1]) != (numbers.rank, numbers.rank) or A.dim() != 2 or B.dim() != 2:
        raise CorruptFile(
            f"{folder}: vera_A is {tuple(A.shape)} and vera_B {tuple(B.shape)}, against r = {numbers.rank}.\n"
            "Export or copy it again."
        )
    return Numbers(numbers.rank, A.shape[1], B.shape[0], numbers.seed), digest(A, B)


# ---- written ---------------------------------------------------------------------------------------------------------


def holds(layers: Iterable[Adapter]) -> bool:
    """Whether PEFT has VeRA for layers of these kinds: Linear and transformers' Conv1D."""
    return all(isinstance(layer, VeRALayer) and type(layer.form) in (Form, TransposedForm) for layer in layers)


def fields(method: VeRA, layers: Mapping[str, Adapter]) -> dict[str, Any]:
    """The part of adapter_config.json that is VeRA's."""
    return {
        "peft_type": "VERA",
        "r": method.rank,
        "d_initial": method.d_initial,
        "projection_prng_key": method.projection_seed,
        "save_projection": method.save_projection or not _drawn_alike(layers),
        "vera_dropout": method.dropout,
        "bias": method.bias,
        "init_weights": True,
        "fan_in_fan_out": any(isinstance(layer.form, TransposedForm) for layer in layers.values()),
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def vectors(layers: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """PEFT's names, without the common prefix. Under sharding every rank must call this."""
    return {
        f"{site}.vera_{leaf}": shard.whole(p) for site, layer in layers.items() for leaf, p in layer.named_parameters()
    }


def projections(layers: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The pair under PEFT's names, as wide as PEFT's own would be."""
    into, out = _widths(layers)
    pair = next(layer.projection for layer in layers.values() if isinstance(layer, VeRALayer))
    return {"base_model.vera_A": pair.A[:, :into], "base_model.vera_B": pair.B[:out]}


def _widths(layers: Mapping[str, Adapter]) -> tuple[int, int]:
    """(in_max, out_max) as PEFT finds them."""
    return max(layer.in_features for layer in layers.values()), max(layer.out_features for layer in layers.values())


def _drawn_alike(layers: Mapping[str, Adapter]) -> bool:
    """Whether PEFT draws a pair of this adapter's size: one that came from a file may be wider."""
    pair = next(layer.projection for layer in layers.values() if isinstance(layer, VeRALayer))
    return (pair.A.shape[1], pair.B.shape[0]) == _widths(layers)
