"""PEFT's LoRA directories, read: adapter_config.json and adapter_model.safetensors (or .bin), as PEFT 0.21 writes them.

The tensors say which layers are adapted and at which rank; the config says the scale, and which layers ought to be
there. What the config holds and has no equal here is refused by its name, a tensor that finds no place likewise:
nothing is dropped in silence. PEFT itself is not needed.

PiSSA and OLoRA. PEFT recomputes the start from the base and subtracts it from W when it loads; here the same start
becomes the anchor of ΔW = s (B A − B₀A₀). PEFT's OLoRA subtracts s·Q R, so that is the anchor, not Q R.

Fused experts. PEFT's A is (experts·r, in) with the expert slow, its B is (out, r·experts) with the expert fast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.errors import ConfigError, CorruptFile, MissingFile, TargetError, WrongBase, nearest
from rankshift.core.form import ConvForm, Form, TransposedForm
from rankshift.core.method import Method, to_dict
from rankshift.core.site import Spec, base_parameters, by_pattern, form_of, select, spec_of, walk
from rankshift.methods import lora_init
from rankshift.methods.lora import LoRA
from rankshift.methods.vera import VeRA

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

_DEFAULTS: dict[str, Any] = {  # of the fields that mean something here, as PEFT has them
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "target_modules": None,
    "target_parameters": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
_NO_EFFECT = {  # labels, and settings of options that are off or refused
    "peft_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "peft_version",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
}
_INITS: dict[Any, Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]] = {
    True: "kaiming",
    False: "kaiming",
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "eva": "kaiming",  # a start that loaded values replace; ranks and alphas are in the patterns
    "pissa": "pissa",
    "olora": "olora",
}
_LEAF = re.compile(
    r"(?P<owner>.+?)\.(?P<leaf>lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)(?:(?<=vector)\.weight)?$"
)
_NAMES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_B.bias": "b",
    "lora_magnitude_vector": "magnitude",
}


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
    config, found = _config(folder), load_tensors(folder)
    groups, rest = _grouped(found, folder)
    sites = adapted_sites(model, groups, config, folder)
    copies = copied_modules(model, config)
    expected = [n for n in [*targeted_modules(model, config), *targeted_parameters(model, config)] if n not in sites]
    if expected:
        raise CorruptFile(
            f"{folder} adapts {expected[0]} by its {CONFIG}, but holds no tensors for it.\nExport or copy it again."
        )
    rslora, init = bool(config["use_rslora"]), _INITS[config["init_lora_weights"]]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    tensors: dict[str, Tensor] = {}
    for name, group in sites.items():
        spec = spec_of(model, name)
        why = unlike(spec.form)
        if why:
            raise ConfigError(
                f"{folder} adapts {name}, a convolution with {why}, which PEFT's branch of it leaves out: here the "
                "adapter would not compute what it was trained to.\nUse PEFT for it."
            )
        group = _ours(group, spec, folder)
        _complete(name, group, config, folder)
        rank = ranks[name] = group["A"].shape[-2]
        stated = _by_pattern(config["rank_pattern"], name, config["r"])
        if rank != stated:
            raise CorruptFile(
                f"{folder}: {name} has rank {rank}, its {CONFIG} says {stated}.\nExport or copy it again."
            )
        alphas[name] = float(_by_pattern(config["alpha_pattern"], name, config["lora_alpha"]))
        if init in ("pissa", "olora"):
            group |= _anchor(model, spec, init, rank, alphas[name] / (rank**0.5 if rslora else rank))
        tensors |= {f"default/{name}.{leaf}": tensor for leaf, tensor in group.items()}
    method = LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        rank_pattern=_pattern(ranks, config["r"]),
        alpha_pattern=_pattern(alphas, float(config["lora_alpha"])),
        scaling="rslora" if rslora else "standard",
        init=init,
        dora=bool(config["use_dora"]),
        dropout=config["lora_dropout"],
        bias=config["bias"],
        lora_bias=bool(config["lora_bias"]),
        modules_to_save=tuple(copies),
        targets=target_names(model, list(ranks)),
        tied=tied,
    )
    return state(method, ranks, tensors | remaining(model, rest, copies, method, ranks, folder), seed)


def state(
    method: Method,
    ranks: Mapping[str, int],
    tensors: Mapping[str, Tensor],
    seed: int,
    shared: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What ``Run.state_dict`` gives for a run of one adapter before its first step."""
    return {
        "format": 1,
        "adapters": {
            "default": {"method": to_dict(method), "ranks": dict(ranks)} | ({"shared": dict(shared)} if shared else {})
        },
        "active": ["default"],
        "seed": seed,
        "total_steps": None,
        "step": 0,
        "phases": [{"method": to_dict(method), "start": 0, "stop": None}],
        "changed": [name.partition("/")[2] for name in tensors if name.startswith("base/")],
        "tensors": dict(tensors),
    }


# ---- the two files ---------------------------------------------------------------------------------------------------


def load_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as it stands."""
    path = folder / CONFIG
    try:
        given = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}.\nExport or copy it again.") from error
    kind = given.get("peft_type") if isinstance(given, dict) else given
    if str(kind).upper() not in ("LORA", "VERA"):
        raise ConfigError(f"{path} has peft_type = {kind!r}.\nOnly LORA and VERA adapters are read here.")
    return dict(given)


def known_fields(
    given: Mapping[str, Any], defaults: Mapping[str, Any], no_effect: Iterable[str], path: Path
) -> dict[str, Any]:
    """The fields of a config that mean something here; ConfigError at one that is set and has no equal."""
    for key, value in given.items():
        if key not in defaults and key not in no_effect and value not in (None, False, "", [], {}):
            raise ConfigError(
                f"{path} sets {key} = {value!r}, which has no equal here: the adapter would not compute what it was "
                "trained to.\nUse PEFT for it, or merge it there and load the plain model."
            )
    config = {key: _or(given.get(key), default) for key, default in defaults.items()}
    check_expressions(config, path)
    return config


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    config = known_fields(load_config(folder), _DEFAULTS, _NO_EFFECT, path)
    if config["init_lora_weights"] not in _INITS:
        raise ConfigError(
            f"{path} sets init_lora_weights = {config['init_lora_weights']!r}, whose change of the base cannot be "
            "repeated here.\nSave it in PEFT with path_initial_model_for_weight_conversion: that makes a plain LoRA."
        )
    return config


def check_expressions(config: Mapping[str, Any], path: Path) -> None:
    """Raise CorruptFile at a regular expression that is none."""
    lists = config["layers_pattern"] or ()
    expressions = [*config.get("rank_pattern", ()), *config.get("alpha_pattern", ())]
    expressions += [lists] if isinstance(lists, str) else lists
    expressions += [v for v in (config.get("target_modules"), config.get("exclude_modules")) if isinstance(v, str)]
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise CorruptFile(f"{path}: {expression!r} is no regular expression: {error}.\nExport it again.") from error


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the directory, by PEFT's name."""
    safe, pickled = folder / WEIGHTS, folder / "adapter_model.bin"
    try:
        if safe.exists():
            return dict(load_file(safe))
        if pickled.exists():
            return dict(torch.load(pickled, map_location="cpu", weights_only=True))
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, ImportError, KeyError, TypeError) as error:
        file = safe if safe.exists() else pickled
        raise CorruptFile(f"{file} cannot be read: {error}.\nExport or copy it again.") from error
    except Exception as error:  # pickle.UnpicklingError: not plain tensors
        raise CorruptFile(f"{pickled} holds more than tensors: {error}.\nExport it as safetensors.") from error
    raise MissingFile(f"{folder} has {CONFIG}, but neither {WEIGHTS} nor adapter_model.bin.\nCopy the whole directory.")


# ---- which layers ----------------------------------------------------------------------------------------------------


def targeted_modules(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Modules that PEFT adapts by this config's target_modules, exclude_modules and layer numbers."""
    wanted = config["target_modules"]
    if not wanted or wanted == "all-linear":  # PEFT saves the names that "all-linear" stood for
        return []
    return [name for name, _, parameter in walk(model) if parameter is None and _targeted(name, config)]


def _targeted(name: str, config: Mapping[str, Any]) -> bool:
    out, wanted = config.get("exclude_modules") or (), config["target_modules"]
    if re.fullmatch(out, name) if isinstance(out, str) else _ends(name, out):
        return False
    if any(re.match(rf"(^|.*\.){copied}($|\..*)", name) for copied in config.get("modules_to_save") or ()):
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    if name in wanted:
        return True
    numbers = config.get("layers_to_transform")
    if not _ends(name, wanted):
        return False
    if numbers is None or numbers == []:
        return True
    lists = config.get("layers_pattern") or [r"[^.]*"]
    lists = [lists] if isinstance(lists, str) else lists
    hits = (re.match(rf"(?:^|.*?\.){layers}\.(\d+)\.", name) for layers in lists)
    number = next((int(hit.group(1)) for hit in hits if hit), None)
    return number in ([numbers] if isinstance(numbers, int) else numbers)


def _ends(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith("." + ending) for ending in endings)


def targeted_parameters(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Stacks of expert weights that PEFT adapts by this config's target_parameters."""
    wanted = config.get("target_parameters") or ()
    return [name for name, _, parameter in walk(model) if parameter is not None and _ends(name, wanted)]


def nesting(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Parameter → the name under which PEFT keeps its factors.

    PEFT wraps the module once for each targeted parameter, the first innermost; ``.base_layer`` is one further in.
    """
    order = [name for name, _, parameter in walk(model) if parameter is not None]
    by_module: dict[str, list[str]] = {}
    for name in sorted(names, key=order.index):
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: module + ".base_layer" * (len(members) - 1 - i)
        for module, members in by_module.items()
        for i, name in enumerate(members)
    }


def _grouped(found: Mapping[str, Tensor], folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by the module that PEFT keeps them in; and those that are no LoRA tensors, by their name."""
    groups: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in found.items():
        if not key.startswith(PREFIX):
            raise CorruptFile(f"{folder}: tensor {key!r} is not named as PEFT names them ({PREFIX}…).")
        hit = _LEAF.match(key.removeprefix(PREFIX))
        if hit:
            groups.setdefault(hit["owner"], {})[_NAMES[hit["leaf"]]] = tensor
        else:
            rest[key.removeprefix(PREFIX)] = tensor
    if not groups:
        raise CorruptFile(f"{folder} holds no LoRA tensors.\nExport or copy it again.")
    return groups, rest


def adapted_sites(
    model: nn.Module, groups: Mapping[str, dict[str, Tensor]], config: Mapping[str, Any], folder: Path
) -> dict[str, dict[str, Tensor]]:
    """The groups by the name of their site, in model order."""
    inside = {owner: name for name, owner in nesting(model, targeted_parameters(model, config)).items()}
    known = {name: module for name, module, _ in walk(model)}
    named: dict[str, dict[str, Tensor]] = {}
    for owner, group in groups.items():
        name = inside.get(owner, owner)
        if name not in known:
            raise WrongBase(
                f"{folder} adapts {owner}, which this {type(model).__name__} does not have. "
                f"{nearest(owner, known)}\nLoad the model that it was trained on."
            )
        if name == owner and form_of(known[name]) is None:
            raise ConfigError(
                f"{folder} adapts {owner}, a {type(known[name]).__name__}, which is not a layer that rankshift knows.\n"
                "Use PEFT for it."
            )
        named[name] = group
    return {name: named[name] for name in known if name in named}


def copied_modules(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Modules trained whole. PEFT compares the ends of names without regard to dots, and skips what matches nothing."""
    wanted = tuple(config["modules_to_save"] or ())
    hits = [name for name, _, parameter in walk(model) if parameter is None and wanted and name.endswith(wanted)]
    return [name for name in hits if not any(name.startswith(f"{other}.") for other in hits)]


def unlike(form: Form) -> str | None:
    """What of a convolution PEFT does not give to lora_A, which then computes something else; None if nothing."""
    if not isinstance(form, ConvForm):
        return None
    if any(step != 1 for step, size in zip(form.dilation, form.kernel, strict=True) if size > 1):
        return f"dilation={form.dilation}"
    if form.padding_mode != "zeros" and any(form.padding_pairs):
        return f"padding_mode={form.padding_mode!r}"
    return None


# ---- one layer -------------------------------------------------------------------------------------------------------


def _ours(group: Mapping[str, Tensor], spec: Spec, folder: Path) -> dict[str, Tensor]:
    """PEFT's tensors of one site in our shapes: A (…, r, in), B (…, out, r), experts in front."""
    group = dict(group)
    if "A" not in group or "B" not in group:
        raise CorruptFile(
            f"{folder}: {spec.name} has no tensor {'A' if 'A' not in group else 'B'}.\nExport or copy it again."
        )
    if spec.form.stacked:
        experts: int = spec.form.experts  # type: ignore[attr-defined]
        if group["A"].shape[0] % experts == 0 and group["B"].shape[-1] % experts == 0:
            group["A"] = group["A"].reshape(experts, -1, group["A"].shape[-1])
            group["B"] = group["B"].reshape(group["B"].shape[0], -1, experts).permute(2, 0, 1)
    elif isinstance(spec.form, ConvForm):
        group["A"], group["B"] = group["A"].flatten(1), group["B"].flatten(1)
    for leaf in ("magnitude", "b"):
        if leaf in group:
            group[leaf] = group[leaf].flatten()
    rank = group["A"].shape[-2]
    wanted = {"A": (rank, spec.into), "B": (spec.out, rank), "magnitude": (spec.out,), "b": (spec.out,)}
    for leaf, tensor in group.items():
        shape = tuple(tensor.shape[-2:]) if leaf in ("A", "B") else tuple(tensor.shape)
        if shape != wanted[leaf]:
            raise WrongBase(
                f"{folder}: {leaf} at {spec.name} is {shape}; this model's layer, {spec.out} × {spec.into}, wants "
                f"{wanted[leaf]}.\nLoad the model that it was trained on."
            )
    return group


def _complete(name: str, group: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    for leaf, key in (("magnitude", "use_dora"), ("b", "lora_bias")):
        if (leaf in group) != bool(config[key]):
            which = "has a tensor" if leaf in group else "lacks the tensor"
            raise CorruptFile(f"{folder}: {name} {which} for {key}, against its {CONFIG}.\nExport or copy it again.")


def _anchor(model: nn.Module, spec: Spec, init: str, rank: int, scale: float) -> dict[str, Tensor]:
    """What PEFT subtracts from W when it loads, in fp32 like there: s·B0 A0."""
    if type(spec.form) not in (Form, TransposedForm) or (init == "olora" and type(spec.form) is TransposedForm):
        kind = "Conv1D" if isinstance(spec.form, TransposedForm) else type(spec.form).__name__.removesuffix("Form")
        raise ConfigError(f"init_lora_weights = {init!r} at {spec.name}: PEFT does not define it for {kind} layers.")
    module = model.get_submodule(spec.name)
    weight = spec.form.matrix(shard.whole(module.weight)).to(torch.float32)  # type: ignore[arg-type]
    A, B = lora_init.pissa(weight, rank, scale) if init == "pissa" else lora_init.olora(weight, rank)
    return {"A0": A.contiguous(), "B0": B.contiguous()}


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the name as a regular expression."""
    return next((v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """rank_pattern or alpha_pattern, in our rule (the last match of a name's end), that gives each site its value."""
    pattern = {name: value for name, value in values.items() if value != default}
    for name, value in values.items():
        if by_pattern(pattern, name, default) != value:
            return {name: values[name] for name in sorted(values, key=len)}  # a name that ends in another comes later
    return pattern


def target_names(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The last parts of the names where they select these layers and no others, else the names."""
    leaves = tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))
    try:
        return leaves if set(select(model, leaves)) == set(names) else tuple(names)
    except TargetError:
        return tuple(names)


# ---- what is not LoRA ------------------------------------------------------------------------------------------------


def remaining(
    model: nn.Module,
    rest: Mapping[str, Tensor],
    copies: Sequence[str],
    method: LoRA | VeRA,
    ranks: Mapping[str, int],
    folder: Path,
) -> dict[str, Tensor]:
    """Whole copies, trained biases, and embeddings that PEFT saved beside the adapter, under our names."""
    canon = _canonical(model)
    places: dict[str, Tensor] = {}
    for key, tensor in rest.items():
        name = key.replace(".base_layer.", ".").replace(".original_module.", ".")
        copied = next((c for c in copies if name.startswith(f"{c}.")), None)
        if copied is not None and ".original_module." in key:
            continue  # with bias="all" PEFT saves the original's bias too, which does not act
        if copied is not None:
            places[f"default/{name.replace('.modules_to_save.', '.')}"] = tensor
            continue
        if name not in canon:
            raise WrongBase(
                f"{folder} holds {key}, for which this {type(model).__name__} has no place.\n"
                "Load the model that it was trained on."
            )
        parameter = canon[name][1]
        if name.endswith(".bias") and method.bias == "none":
            raise CorruptFile(f'{folder} holds {key}, although its {CONFIG} says bias = "none".\nExport it again.')
        if parameter.shape == tensor.shape and not name.endswith(".bias") and _equal(parameter, tensor):
            continue  # PEFT saves embeddings that it adapts; this is the base's own
        places[f"base/{canon[name][0]}"] = tensor
    for name, _, _ in base_parameters(model):
        adapted = name.rpartition(".")[0] in ranks
        inside = any(name.startswith(f"{c}.") for c in copies)
        if method.in_place(name, adapted) and not inside and f"base/{name}" not in places:
            raise CorruptFile(f"{folder} lacks {name}, although its bias = {method.bias!r}.\nExport or copy it again.")
    return places


def _canonical(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Every name of a base parameter, tied ones too → (the name that it goes by here, the parameter)."""
    first = {id(p): name for name, p, _ in base_parameters(model)}
    return {name: (first[id(p)], p) for name, p in model.named_parameters(remove_duplicate=False)}


def _equal(parameter: Tensor, tensor: Tensor) -> bool:
    here = shard.whole(parameter).cpu()
    return torch.equal(here, tensor.to(here.dtype))
