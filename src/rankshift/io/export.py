"""What other programs load: a PEFT adapter directory, or a plain model with the adapters folded in.

PEFT, exact. Every LoRA variant that PEFT has, as itself. An anchored start (PiSSA, OLoRA) becomes a LoRA of twice the
rank, A = [A; A₀], B = [B, −B₀], on the untouched base. MELoRA's n blocks become one LoRA of rank n·r, zeros and all.

VeRA on layers for which PEFT has it becomes a VERA directory; on others, and with profile="portable", a LoRA of rank r.

PEFT, portable. One plain LoRA as servers accept it: one rank everywhere (zero rows fill up), the scale folded into A so
that lora_alpha = r, no patterns, no options.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import blocks
from rankshift.core.errors import ConfigError, ExportError, NotWritable, nearest
from rankshift.core.form import ConvForm, EmbeddingForm, Form, TransposedForm
from rankshift.core.method import Method, from_dict
from rankshift.core.site import Replica, Site, bare, base_parameters, embeddings_untied, walk
from rankshift.io import peft, peft_vera
from rankshift.io.atomic import MODEL, PEFT, SIGN, replacing
from rankshift.io.checkpoint import packed as contiguous
from rankshift.io.checkpoint import version, write_on_first_rank
from rankshift.methods.lora import DoRALayer, LoRA, LoRALayer
from rankshift.methods.melora import MELoRALayer
from rankshift.methods.vera import VeRA
from rankshift.storage.quantised import Held, held_in, marks

FORMATS = ("peft", "merged", "compressed")
_TASKS = {  # the end of a transformers class name → PEFT's task_type, and the heads that PEFT then wants in the file
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


class Source(Protocol):
    """What is asked of a run."""

    model: nn.Module

    @property
    def changed(self) -> set[str]:
        """Parameters of the base that no longer are what they came as."""
        ...

    @property
    def active(self) -> tuple[str, ...]:
        """Adapters that act."""
        ...

    @property
    def sites(self) -> dict[str, Site]:
        """Sites by name."""
        ...

    def adapter(self, name: str = ...) -> dict[str, Adapter]:
        """An adapter's part at each of its sites."""
        ...

    @property
    def step(self) -> int:
        """Updates taken."""
        ...

    @property
    def total_steps(self) -> int | None:
        """Updates of the whole run."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        ...


def export(
    run: Source,
    directory: str | Path,
    *,
    format: str,
    profile: str,
    adapter: str | None,
    packed: bool = False,
    original: Callable[[str], Tensor] | None = None,
) -> Path:
    """Write the directory; see :meth:`Run.export`. Every rank must call this; rank 0 writes.

    Args:
        packed: what is held in few bits is written so, as it is.
        original: what is added to there instead, by the names of the weights.
    """
    for what, value, known in (("format", format, FORMATS), ("profile", profile, ("exact", "portable"))):
        if value not in known:
            raise ConfigError(f"export has no {what} {value!r}. {nearest(str(value), known)}")
    if format == "compressed":
        from rankshift.io import compressed

        write = compressed.write(run, directory)
    else:
        portable = profile == "portable"
        plain = format == "merged"
        write = _merged(run, directory, packed, original) if plain else _peft(run, directory, portable, adapter)
    write_on_first_rank(run.model, directory, write, iter(()))
    return Path(directory)


# ---- PEFT ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """One site as PEFT has it: ΔW = scale · B A."""

    form: Form
    A: Tensor  # (…, r, in)
    B: Tensor  # (…, out, r)
    scale: float
    magnitude: Tensor | None = None  # (out,), DoRA
    b: Tensor | None = None  # (out,), bias of B

    @property
    def rank(self) -> int:
        return self.A.shape[-2]


def _peft(run: Source, directory: str | Path, portable: bool, adapter: str | None) -> Callable[[], None]:
    """Gather one adapter (on every rank) and return what writes it."""
    name = _one(run, adapter)
    method = from_dict(run.describe()["adapters"][name]["method"])
    replicas = {at: m for at, m, _ in walk(run.model) if isinstance(m, Replica) and name in m.copies}
    biases = _biases(run, method, tuple(replicas))
    layers = run.adapter(name)
    as_vera = isinstance(method, VeRA) and not portable and bool(layers) and peft_vera.holds(layers.values())
    parts = {} if as_vera else _parts(method, layers, name)
    if portable:
        _check_portable(method, parts, replicas, biases)
        rank = max(part.rank for part in parts.values())
        parts = {site: _padded(part, rank) for site, part in parts.items()}
    modules = {at: dict(replica.copies[name].state_dict()) for at, replica in replicas.items()}
    for at in _also_matched(run.model, modules):  # PEFT compares ends of names without regard to dots
        if any(site == at or site.startswith(f"{at}.") for site in parts or layers):
            raise ExportError(
                f"PEFT would take {at}, which has an adapter, for one of modules_to_save = {list(modules)}."
            )
        modules[at] = dict(run.model.get_submodule(at).state_dict())
    tensors = peft_vera.vectors(layers) if as_vera else _tensors(run.model, parts)
    tensors |= {f"{at}.{leaf}": shard.whole(t) for at, state in modules.items() for leaf, t in state.items()}
    for bias, (parameter, adapted) in biases.items():
        key = f"{bias.removesuffix('bias')}base_layer.bias" if adapted else bias
        tensors[key] = shard.whole(parameter)
    if isinstance(method, VeRA) and as_vera:
        config = _labels(run.model, list(modules)) | peft_vera.fields(method, layers)
        config["target_modules"] = _target_modules(run.model, config, list(layers))
    else:
        config = _config(run.model, method, parts, list(modules), bool(biases))
    pair = peft_vera.projections(layers) if config.get("save_projection") else {}

    def write() -> None:
        with replacing(directory, PEFT) as folder:
            named = {peft.PREFIX + key: tensor for key, tensor in tensors.items()} | pair
            save_file(contiguous(named), folder / peft.WEIGHTS, metadata={"format": "pt"})
            (folder / peft.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    return write


def _parts(method: Method, layers: Mapping[str, Adapter], name: str) -> dict[str, _Part]:
    """The layers that the adapter changes, as PEFT's LoRA has them."""
    parts = {site: _part(site, layer, name) for site, layer in layers.items()}
    if not parts:
        raise ExportError(f'{type(method).__name__} makes no low-rank change. Use format="merged" for a plain model.')
    parts = {site: part for site, part in parts.items() if part.rank}
    if not parts:
        raise ExportError(
            f"Adapter {name!r} has no rank left at any layer, so it changes none of them: the base is what it "
            "computes. Use the base, or train with less sparsity."
        )
    for site, part in parts.items():
        why = peft.unlike(part.form)
        if why:
            raise ExportError(
                f"{site} is a convolution with {why}, which PEFT leaves out of its branch: it would compute something "
                'else, or fail. Use format="merged" for a plain model, or exclude the layer.'
            )
    return parts


def _one(run: Source, adapter: str | None) -> str:
    known = run.describe()["adapters"]
    if adapter is None and len(run.active) != 1:
        raise ExportError(
            f"{len(run.active)} adapters are active; a PEFT directory holds one. Pass adapter=…, one of "
            f"{', '.join(known)}, or join them first with run.combine()."
        )
    return run.active[0] if adapter is None else adapter


def _biases(run: Source, method: Method, copied: tuple[str, ...]) -> dict[str, tuple[Tensor, bool]]:
    """Biases that train in place. Any other changed weight of the base cannot travel in an adapter."""
    inside = tuple(f"{name}." for name in copied)
    found: dict[str, tuple[Tensor, bool]] = {}
    for name, parameter, adapted in base_parameters(run.model):
        if name not in run.changed or name.startswith(inside):
            continue
        if not method.in_place(name, adapted) or not name.endswith("bias"):
            raise ExportError(
                f"{name} of the base was changed by training, and an adapter holds no base weights. "
                'Use format="merged" for a plain model, or run.save().'
            )
        found[name] = (parameter, adapted)
    return found


def _part(site: str, layer: Adapter, name: str) -> _Part:
    if isinstance(layer, LoRALayer):
        A, B = layer.whole_factors()
        magnitude = shard.whole(layer.magnitude) if isinstance(layer, DoRALayer) else None
        return _Part(layer.form, A, B, layer.scale, magnitude, None if layer.b is None else shard.whole(layer.b))
    if isinstance(layer, MELoRALayer):
        return _Part(layer.form, *layer.whole_factors(), layer.scale)
    low, shift = layer.low_rank(), layer.delta_bias()
    if layer.leaves:
        raise ExportError(
            f"Adapter {name!r} at {site} takes the place of its base, to which a LoRA would add it again. Use "
            'format="compressed" for the small model that remains once the base has faded away.'
        )
    if low is None:
        raise ExportError(
            f"Adapter {name!r} at {site} is no product of two factors, so no LoRA holds it. "
            'Use format="merged" for a plain model.'
        )
    return _Part(layer.form, *low, 1.0, None, None if shift is None else shard.whole(shift))


def _check_portable(
    method: Method, parts: Mapping[str, _Part], replicas: Mapping[str, Any], biases: Mapping[str, Any]
) -> None:
    reasons = []
    if any(part.magnitude is not None for part in parts.values()):
        reasons.append("DoRA rescales whole rows, which no plain LoRA does")
    if any(part.b is not None for part in parts.values()):
        reasons.append("lora_bias adds a bias")
    if biases:
        reasons.append("biases were trained")
    if replicas:
        reasons.append(f"modules_to_save holds {', '.join(replicas)} whole")
    odd = next((s for s, p in parts.items() if isinstance(p.form, (ConvForm, EmbeddingForm))), None)
    if odd is not None:
        reasons.append(f"{odd} is no linear layer, and servers adapt only those")
    if reasons:
        raise ExportError(
            f"A portable LoRA cannot hold this {type(method).__name__} adapter: {'; '.join(reasons)}. "
            'Use profile="exact" for PEFT, or format="merged" for a plain model.'
        )


def _padded(part: _Part, rank: int) -> _Part:
    """Scale folded into A, zero rows of A and zero columns of B up to ``rank``."""
    more = rank - part.rank
    A = torch.nn.functional.pad(part.scale * part.A, (0, 0, 0, more))
    return _Part(part.form, A, torch.nn.functional.pad(part.B, (0, more)), 1.0)


def _tensors(model: nn.Module, parts: Mapping[str, _Part]) -> dict[str, Tensor]:
    """PEFT's names (without the common prefix) and shapes."""
    owners = peft.nesting(model, [site for site, part in parts.items() if part.form.stacked])
    out: dict[str, Tensor] = {}
    for site, part in parts.items():
        A, B, form, at = part.A, part.B, part.form, owners.get(site, site)
        if isinstance(form, EmbeddingForm):
            out |= {f"{at}.lora_embedding_A": A, f"{at}.lora_embedding_B": B}
            continue
        if form.stacked:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)  # (experts·r, in) and (out, r·experts)
        if isinstance(form, ConvForm):
            A, B = form.stored(A), B.reshape(*B.shape, *(1,) * len(form.kernel))
        out |= {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B}
        if part.b is not None:
            out[f"{at}.lora_B.bias"] = part.b
        if part.magnitude is not None:
            ones = (1,) * len(form.kernel) if isinstance(form, ConvForm) else ()
            # PEFT writes no ".weight" here and reads both; transformers' load_adapter reads only this
            out[f"{at}.lora_magnitude_vector.weight"] = part.magnitude.reshape((1, -1, *ones) if ones else (-1,))
    return out


def _config(
    model: nn.Module, method: Method, parts: Mapping[str, _Part], modules: Sequence[str], biased: bool
) -> dict[str, Any]:
    rslora = isinstance(method, LoRA) and method.scaling == "rslora" and any(p.scale != 1 for p in parts.values())
    ranks = {site: part.rank for site, part in parts.items()}
    alphas = {site: _tidy(part.scale * (math.sqrt(part.rank) if rslora else part.rank)) for site, part in parts.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    stacked = [site for site, part in parts.items() if part.form.stacked]
    config: dict[str, Any] = {
        **_labels(model, modules),
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(s)}": v for s, v in ranks.items() if v != rank},
        "alpha_pattern": {f"^{re.escape(s)}": v for s, v in alphas.items() if v != alpha},
        "lora_dropout": getattr(method, "dropout", 0.0),
        "bias": _bias(method) if biased else "none",
        "use_rslora": rslora,
        "use_dora": any(part.magnitude is not None for part in parts.values()),
        "init_lora_weights": True,
        "fan_in_fan_out": any(isinstance(part.form, TransposedForm) for part in parts.values()),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    if any(part.b is not None for part in parts.values()):
        config["lora_bias"] = True
    if stacked:
        config["target_parameters"] = stacked
    config["target_modules"] = _target_modules(model, config, [site for site in parts if site not in stacked])
    return config


def _labels(model: nn.Module, modules: Sequence[str]) -> dict[str, Any]:
    """What adapter_config.json says of the model, whatever the method."""
    return {
        "task_type": _task(model, modules),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "inference_mode": True,
        "modules_to_save": list(modules) or None,
    }


def _bias(method: Method) -> str:
    """PEFT's word for the biases that a method trains in place."""
    if isinstance(method, VeRA):
        return "lora_only" if method.bias == "vera_only" else method.bias
    return method.bias if isinstance(method, LoRA) else "none"


def _tidy(alpha: float) -> float | int:
    """16 rather than 15.999999999999998: the rounding of s = alpha / r, undone."""
    near = round(alpha, 6)
    alpha = near if math.isclose(near, alpha, rel_tol=1e-14) else alpha
    return int(alpha) if alpha == int(alpha) else alpha


def _target_modules(model: nn.Module, config: Mapping[str, Any], sites: Sequence[str]) -> list[str] | str:
    """The last parts of the names if PEFT then adapts these layers and no others; else names; else an expression."""
    leaves = sorted({site.rpartition(".")[2] for site in sites})
    for targets in (leaves, list(sites)):
        if set(peft.targeted_modules(model, {**config, "target_modules": targets})) == set(sites):
            return targets
    return "|".join(re.escape(site) for site in sites)


def _task(model: nn.Module, modules: Sequence[str]) -> str | None:
    """PEFT's task_type, where the class says it and the file holds the heads that PEFT then asks it for."""
    for end, (task, heads) in _TASKS.items():
        if type(model).__name__.endswith(end):
            wanted = [name for name, _, p in walk(model) if p is None and heads and name.endswith(heads)]
            return task if all(any(w == m or w.startswith(f"{m}.") for m in modules) for w in wanted) else None
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if encoder_decoder and type(model).__name__.endswith("ForConditionalGeneration") else None


def _also_matched(model: nn.Module, modules: Mapping[str, Any]) -> list[str]:
    """Modules that PEFT would take for modules_to_save too: ``pre_classifier`` ends in ``classifier``."""
    wanted = tuple(modules)
    inside = tuple(f"{name}." for name in modules)
    hits = [name for name, _, p in walk(model) if p is None and wanted and name.endswith(wanted)]
    return [name for name in hits if name not in modules and not name.startswith(inside)]


# ---- a plain model ---------------------------------------------------------------------------------------------------


def folded(site: Site, original: Tensor | None = None) -> dict[str, Tensor]:
    """The layer's own tensors by name with its acting adapters in them, whole; the site is not touched.

    W + Σ ΔW is taken in fp32 (float64 on a float64 base) and rounded once, as in ``Run.merge``. ``original`` is another
    W, which is written to.
    """
    acting, form = site.acting(), site.spec.form
    weight = site.base.rows() if original is None else original  # (…, out, in)
    delta = site.change()
    with torch.no_grad():
        every = slice(0, weight.shape[-2])
        for rows in blocks(every, weight.shape[-1]) if type(form) is Form else [every]:
            change = delta(rows)
            here = weight[..., rows, :]
            here.copy_(here.to(torch.promote_types(here.dtype, change.dtype)) + change)
        out = {"weight": form.stored(weight).contiguous()}
        bias = None if site.base.bias is None else shard.whole(site.base.bias)
        for shift in (shard.whole(b) for b in (a.delta_bias() for a in acting) if b is not None):
            if bias is None:
                raise ExportError(
                    f"{site.spec.name} has no bias to merge the adapter's bias into. Export to another format, or "
                    'train without it: LoRA(lora_bias=False), PCLoRA(bias="match").'
                )
            bias = (bias.to(shift.dtype) + shift).to(bias.dtype)
        if bias is not None:
            out["bias"] = bias
    return out


def _merged(
    run: Source, directory: str | Path, packed: bool, original: Callable[[str], Tensor] | None
) -> Callable[[], None]:
    """Gather the plain state (on every rank) and return what writes it."""
    model, first = run.model, shard.rank() == 0
    with bare(model):
        state: dict[str, Any] = dict(model.state_dict())
    odd = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ExportError(f"{odd} in the model's state is no tensor; safetensors cannot hold it.")
    held = {name: base for name, module, _ in walk(model) if (base := held_in(module)) is not None}

    def unrounded(name: str) -> Tensor | None:
        """A copy of the original of a weight that is held in few bits."""
        if original is None or name not in held:
            return None
        return original(f"{name}.weight").detach().to(held[name].weight.device, held[name].dtype, copy=True)

    said = _quantisation(model, held) if packed else {}
    for name, base in held.items():  # written as it acts, in the layer's dtype
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        if packed:
            parts: dict[str, Tensor | None] = {**base.plain().state_dict()}
        else:
            weight = unrounded(name)
            parts = {"weight": base.rows() if weight is None else weight, "bias": base.bias}
        state |= {f"{name}.{leaf}": tensor for leaf, tensor in parts.items() if tensor is not None}
    for name, site in run.sites.items():
        if site.active:
            for leaf, value in folded(site, unrounded(name)).items():
                state[name if site.spec.form.stacked else f"{name}.{leaf}"] = value.cpu() if first else None
    for name, value in state.items():
        if value is not None:
            whole = shard.whole(value)
            state[name] = whole if first else None  # whole on the rank that writes, and nowhere else

    def write() -> None:
        _check_not_base(model, Path(directory))
        with replacing(directory, MODEL) as folder:
            (folder / SIGN).write_text(json.dumps({"rankshift": version()}) + "\n")
            own = getattr(model, "save_pretrained", None)
            if own is None:
                save_file(contiguous(state), folder / "model.safetensors")
                return
            with bare(model), ties_as_they_are(model), dense(model, said):
                own(folder, state_dict=state)

    return write


def _check_not_base(model: nn.Module, directory: Path) -> None:
    """Raise NotWritable if the model itself was read from there: every adapter on it needs it as it was."""
    base = getattr(getattr(model, "config", None), "name_or_path", None)
    if base and directory.exists() and Path(base).exists() and directory.samefile(base):
        raise NotWritable(f"{directory} is the base model itself, which its adapters need.\nName another directory.")


def _quantisation(model: nn.Module, held: Mapping[str, Held]) -> dict[str, Any]:
    """What config.json says of a model whose linear layers, but for some, are held by bitsandbytes.

    Raises:
        ExportError: nobody else reads them.
    """
    kinds = {(base.kind, base.dtype, *base.options.items()) for base in held.values()}
    if len(kinds) > 1 or any(base.kind == "fp8" for base in held.values()):
        odd = "fp8, which is our own format" if len(kinds) == 1 else "formats that differ from layer to layer"
        raise ExportError(f'The base is held in {odd}: no other program reads it. Export onto="dequantised".')
    if any(map(shard.is_sharded, model.parameters())):
        raise ExportError(
            'onto="requantised" is written by one process, and this model is sharded. Save the run, load it in one '
            "process, and export there."
        )
    base = next(iter(held.values()))
    if base.kind == "int8":
        said = {"load_in_8bit": True, "llm_int8_threshold": base.options["threshold"]}
    else:
        said = {"load_in_4bit": True, "bnb_4bit_quant_type": base.kind}
        said["bnb_4bit_use_double_quant"] = base.options["nested"]
        said["bnb_4bit_compute_dtype"] = str(base.dtype).removeprefix("torch.")
    dense = [name for name, m, parameter in walk(model) if parameter is None and type(m) is nn.Linear]
    return {"quant_method": "bitsandbytes", **said, "llm_int8_skip_modules": dense}


@contextlib.contextmanager
def dense(model: nn.Module, instead: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
    """A transformers model that does not say that it is quantised, or only ``instead``, for a ``with`` block."""
    said = [(place, key, place.pop(key)) for place, key in marks(model)]
    config: Any = getattr(model, "config", None)
    if instead:
        config.quantization_config = dict(instead)
    try:
        yield
    finally:
        if instead:
            del config.quantization_config
        for place, key, value in said:
            place[key] = value


@contextlib.contextmanager
def ties_as_they_are(model: nn.Module) -> Iterator[None]:
    """Say tie_word_embeddings=False while a tied embedding has a copy of its own: else loading ties it again."""
    config: Any = getattr(model, "config", None)
    if embeddings_untied(model):
        config.tie_word_embeddings = False
        try:
            yield
        finally:
            config.tie_word_embeddings = True
    else:
        yield
