"""Sites: which layers of a model a method stands at, and the module that stands there."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import HOOKS, Base, Dense, Slab, storage_of
from rankshift.core.errors import TiedWeights, UnmatchedTarget, UnsupportedLayer, nearest
from rankshift.core.form import ConvForm, EmbeddingForm, ExpertsForm, Form, TransposedForm
from rankshift.core.lowrank import LowRankSum

T = TypeVar("T")

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Spec:
    """A layer that a method will stand at."""

    name: str  # dotted name in the model, e.g. "model.layers.0.self_attn.q_proj"
    out: int
    into: int  # columns of the weight: in, or in·∏kernel for a convolution
    form: Form
    dtype: torch.dtype  # the layer computes in it
    device: torch.device
    storage: str = "dense"  # how its weight is held while it is trained on

    @property
    def master(self) -> torch.dtype:
        """The dtype of trained factors: fp32, or float64 on a float64 base."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def weight(self) -> str:
        """The name of its weight in the model as it came."""
        return self.name if self.form.stacked else f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in); (experts, out, in) of a stack."""
        batch = (self.form.experts,) if isinstance(self.form, ExpertsForm) else ()
        return (*batch, self.out, self.into)

    @property
    def max_rank(self) -> int:
        """min(out, in)."""
        return min(self.out, self.into)


class Site(nn.Module):
    """Stands where a layer stood: the layer's base and the adapters on it, in the order they were added.

    ``forward`` goes straight to the topmost active adapter, whose base is the next one below. Switching relinks that
    chain and nothing else, so with no adapter active the layer is the base, bit for bit.
    """

    def __init__(self, spec: Spec, base: Base):
        super().__init__()
        self.spec = spec
        self.base = base
        self.adapters = nn.ModuleDict()
        self.__dict__.update(base.hooks)  # who hooked the layer hooked this place: its hooks run, and can be removed
        base.__dict__.update({name: getattr(nn.Module(), name) for name in HOOKS})  # here, and not below once more
        self.active: tuple[str, ...] = ()
        self.link(())

    def link(self, active: Iterable[str]) -> None:
        """Make these adapters (those of them that stand here) act, their sum in the order given."""
        self.leave()
        self.active = tuple(name for name in active if name in self.adapters)
        self._chain()
        self.enter()

    def _chain(self) -> None:
        top: Base = self.base
        for name in self.active:
            adapter = self[name]
            adapter.stand_on(top)
            top = adapter
        self.__dict__["top"] = top

    def enter(self) -> None:
        """Let the acting adapters put into the base what they keep there."""
        for adapter in self.acting():
            adapter.enter()

    def leave(self) -> None:
        """Let the acting adapters give back what they keep in the base; the function stays."""
        for adapter in self.acting():
            adapter.leave()

    def rest_on(self, base: Base) -> None:
        """Put another base of the same weight under the adapters that stand here; none enters it yet."""
        self.leave()
        self.base = base
        for name in self.adapters:
            self[name].stand_on(base)
        self._chain()

    top: Base

    def __getitem__(self, name: str) -> Adapter:
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    def acting(self) -> list[Adapter]:
        """The active adapters, innermost first."""
        return [self[name] for name in self.active]

    def change(self) -> Callable[[slice], Tensor]:
        """Σ ΔW of the acting adapters, asked for by rows; under sharding every rank must call this."""
        acting = self.acting()
        whole = [a.whole_delta() if any(map(shard.is_sharded, a.parameters())) else None for a in acting]

        def delta(rows: slice) -> Tensor:
            parts = [a.delta(rows) if w is None else w[..., rows, :] for a, w in zip(acting, whole, strict=True)]
            return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

        return delta

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.top(x)
        return y

    def __getattr__(self, name: str) -> Any:
        """What model code asks of a layer besides calling it (stride, embedding_dim) is answered by the layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if name.startswith("_") or base is None or base.layer is None:
                raise
            return getattr(base.layer, name)

    def effective(self) -> Tensor:
        """W + ΔW as stored, differentiable: the form in which stacked weights are adapted.

        Where every change has a low rank it is kept apart from W: exact in bf16, and no second stack is formed.
        """
        weight, form, acting = self.base.weight, self.spec.form, self.acting()
        branches = [branch for branch in (adapter.branch() for adapter in acting) if branch is not None]
        if len(branches) == len(acting):
            A, B = (torch.cat(parts, axis) for parts, axis in zip(zip(*branches, strict=True), (-2, -1), strict=True))
            return form.stored(LowRankSum(form.matrix(weight), A, B))
        for adapter in acting:
            weight = weight + form.stored(adapter.delta().to(weight.dtype))
        return weight

    @property
    def weight(self) -> Tensor:
        """The base's stored weight: model code may ask for its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.base.out_features


class Stack(nn.Module):
    """Stands where a fused-experts module stood and runs it with the effective weights of its sites."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.sites = nn.ModuleDict()

    def named_sites(self) -> Iterator[tuple[str, Site]]:
        """(parameter, site) of each adapted stack."""
        for name, site in self.sites.items():
            assert isinstance(site, Site)
            yield name, site

    def forward(self, *args: object, **kwargs: object) -> object:
        weights = {name: site.effective() for name, site in self.named_sites() if site.active}
        return torch.func.functional_call(self.module, weights, args, kwargs)


class Replica(nn.Module):
    """Stands where a module stood that is trained whole (``modules_to_save``): the original, and trainable copies."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.base = module
        self.copies = nn.ModuleDict()
        self.link(())

    def link(self, active: Iterable[str]) -> None:
        """The last of these names that has a copy here acts; none means the original."""
        self.active = tuple(name for name in active if name in self.copies)[-1:]
        self.__dict__["top"] = self.copies[self.active[0]] if self.active else self.base

    top: nn.Module

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.top(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What model code asks of the module besides calling it (num_embeddings) is answered by the one that acts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            top = self.__dict__.get("top")
            if name.startswith("_") or top is None:
                raise
            return getattr(top, name)

    @property
    def weight(self) -> Tensor:
        """The acting module's weight."""
        return self.top.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The acting module's bias."""
        return self.top.bias  # type: ignore[return-value]


# ---- which layers ----------------------------------------------------------------------------------------------------


def form_of(module: nn.Module) -> Form | None:
    """The form of a layer, or None if no method can stand there."""
    if isinstance(module, Site):
        return module.spec.form
    if storage_of(module) is not None:
        return Form()
    kind = type(module)
    if not isinstance(module._parameters.get("weight"), nn.Parameter) or "forward" in vars(module):
        return None
    if isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward:
        return Form()
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return TransposedForm()
    if isinstance(module, nn.Embedding) and kind.forward is nn.Embedding.forward and module.max_norm is None:
        if module.sparse:
            return None
        return EmbeddingForm(module.padding_idx, module.scale_grad_by_freq)
    if isinstance(module, _CONVS) and kind in _CONVS and module.groups == 1:
        return ConvForm(
            channels=module.in_channels,
            kernel=module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            padding_mode=module.padding_mode,
            padding_pairs=tuple(module._reversed_padding_repeated_twice),
        )
    return None


def matches(name: str, pattern: str) -> bool:
    """True if the dotted ``name`` is ``pattern`` or ends in it at a dot; ``*`` and ``?`` are wildcards."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, "*." + pattern)


def by_pattern(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the last pattern that matches a name; ``default`` if none does."""
    return next((value for pattern, value in reversed(list(patterns.items())) if matches(name, pattern)), default)


def prefixes(name: str) -> list[str]:
    """ "a.b.weight" → ["a", "a.b", "a.b.weight"]."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def walk(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module, str | None]]:
    """(name, module, parameter): every module, and every 3-D parameter of a fused-experts module.

    Names are those of the model as it came: what stands at a site hides what it is made of.
    """
    if isinstance(model, Stack):
        model = model.module
    if name:
        yield name, model, None
    if isinstance(model, (Site, Replica)):
        return
    prefix = f"{name}." if name else ""
    for parameter, tensor in model.named_parameters(recurse=False):
        if tensor.dim() == 3 and not isinstance(model, (*_CONVS, nn.MultiheadAttention)):
            yield prefix + parameter, model, parameter
    for child_name, child in model.named_children():
        yield from walk(child, prefix + child_name)


def base_parameters(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Parameter, bool]]:
    """(name, parameter, adapted): the parameters of the model as it came, under the names it came with.

    ``adapted`` is true for those of a layer that a site stands at. Tied parameters appear once.
    """
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str, adapted: bool) -> Iterator[tuple[str, nn.Parameter, bool]]:
        if isinstance(module, Stack):
            stacked = set(module.sites)
            for leaf, parameter in module.module.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield prefix + leaf, parameter, leaf in stacked
            for child_name, child in module.module.named_children():
                yield from visit(child, f"{prefix}{child_name}.", False)
            return
        if isinstance(module, (Site, Replica)):
            adapted = isinstance(module, Site)
            module = module.base
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield prefix + leaf, parameter, adapted
        for child_name, child in module.named_children():
            yield from visit(child, f"{prefix}{child_name}.", adapted)

    yield from visit(model, f"{name}." if name else "", False)


def running_statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of the base's batch norms: they move in training although nothing trains them."""

    def visit(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(module, Stack):
            module = module.module
        elif isinstance(module, (Site, Replica)):
            module = module.base
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            for leaf, buffer in module.named_buffers(recurse=False):
                yield prefix + leaf, buffer
        for name, child in module.named_children():
            yield from visit(child, f"{prefix}{name}.")

    yield from visit(model, "")


def embeddings_untied(model: Any) -> bool:
    """Whether a transformers model's config says that input and output embeddings are one tensor, and they are not."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return False
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    return first is not None and last is not None and first.weight is not last.weight


@contextlib.contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """The model's own modules where sites, stacks and replicas stand, for a ``with`` block; its names as it came.

    Values are not folded in: where a site stood is the base, where a replica stood its acting copy.
    """
    here: list[tuple[nn.Module, str, nn.Module]] = []

    def visit(module: nn.Module) -> None:
        for leaf, child in list(module.named_children()):
            plain = child
            if isinstance(child, Stack):
                plain = child.module
            elif isinstance(child, Replica):
                plain = child.top
            elif isinstance(child, Site):  # a quantised layer is not made for a look
                plain = child.base if child.base.layer is None else child.base.restore()
            if plain is not child:
                here.append((module, leaf, child))
                setattr(module, leaf, plain)
            visit(plain)

    try:
        visit(model)
        yield
    finally:
        for parent, leaf, child in reversed(here):
            setattr(parent, leaf, child)


@contextlib.contextmanager
def returned(model: nn.Module) -> Iterator[None]:
    """The base's own bits where acting adapters keep columns in it, for the length of a ``with`` block."""
    lent = [m for m in model.modules() if isinstance(m, Site) and m.base.tenant is not None]  # nested: none any more
    if lent:
        shard.settle(model)  # what is written to gathered copies is lost
    for site in lent:
        site.leave()
    try:
        yield
    finally:
        if lent:
            shard.settle(model)
        for site in lent:
            site.enter()


def linear_layers(model: nn.Module) -> list[str]:
    """Linear layers of the body: not the head (lm_head, classifier), not a router of experts."""
    body = getattr(model, "base_model", model)
    if not isinstance(body, nn.Module):
        body = model
    inside = {id(module) for module in body.modules()}
    output: Any = getattr(model, "get_output_embeddings", lambda: None)
    heads = {id(output())}
    names = []
    for name, module, parameter in walk(model):
        if parameter is not None or id(module) not in inside or id(module) in heads:
            continue
        if type(form_of(module)) not in (Form, TransposedForm):
            continue
        parent, _, leaf = name.rpartition(".")
        if leaf in ("gate", "router", "shared_expert_gate") and hasattr(model.get_submodule(parent), "experts"):
            continue
        names.append(name)
    return names


def _why_not(model: nn.Module, name: str, module: nn.Module) -> str:
    if isinstance(module, _CONVS) and module.groups != 1:
        return f"it has groups={module.groups}; only ungrouped convolutions are supported"
    if isinstance(module, nn.Embedding):
        return "an embedding with max_norm rewrites its table in forward, and one with sparse=True has sparse gradients"
    if isinstance(module, nn.Linear) and "weight" not in module._parameters:
        return "its weight is computed by a parametrization; remove that first"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, as accelerate's offloading does; remove that first"
    return (
        f"{type(module).__name__} is not a layer that rankshift knows (Linear, Conv1d/2d/3d, Embedding, transformers' "
        "Conv1D, fused experts)"
    )


def select(model: nn.Module, targets: str | Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Names of the sites that ``targets`` names, in model order. Every pattern must match something.

    ``targets`` is "all-linear", a pattern or a sequence of patterns (see :func:`matches`).

    Raises:
        UnmatchedTarget: a pattern names nothing.
        UnsupportedLayer: a pattern names only modules that no method can stand at.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    everything = list(walk(model))
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern == "all-linear":
            chosen.update(linear_layers(model))
            if not chosen:
                raise UnmatchedTarget(
                    f'targets="all-linear" finds no Linear layer in {type(model).__name__}. Name the layers to adapt.'
                )
            continue
        hits = [(n, m, p) for n, m, p in everything if matches(n, pattern)]
        usable = [n for n, m, p in hits if p is not None or form_of(m) is not None]
        if not hits:
            known = {n.rpartition(".")[2] for n, m, p in everything if p is not None or form_of(m) is not None}
            raise UnmatchedTarget(
                f"target {pattern!r} matches no layer of {type(model).__name__}. {nearest(pattern, known)}"
            )
        if not usable:
            name, module, _ = hits[0]
            raise UnsupportedLayer(f"target {pattern!r} matches {name}, but {_why_not(model, name, module)}.")
        chosen.update(usable)
    for pattern in exclude:
        if not any(matches(n, pattern) for n, _, _ in everything):
            names = {n.rpartition(".")[2] for n, _, _ in everything}
            raise UnmatchedTarget(f"exclude {pattern!r} matches no module. {nearest(pattern, names)}")
    modules = {"": model} | {name: module for name, module, parameter in everything if parameter is None}
    first: dict[tuple[int, str], str] = {}  # place → name: what is in a block with two names is adapted once
    kept: dict[str, None] = {}
    for name, _, _ in everything:
        parent, _, leaf = name.rpartition(".")
        here = first.setdefault((id(modules[parent]), leaf), name)
        if name in chosen and not any(matches(part, e) for part in prefixes(name) for e in exclude):
            kept[here] = None
    if not kept:
        raise UnmatchedTarget(f"exclude={tuple(exclude)} removes every layer that targets={targets!r} matched.")
    return list(kept)


def _shared_with(model: nn.Module, spec: Spec) -> list[str]:
    """The other places that hold a site's weight: a tensor of another module, or the same module under another name."""
    here = model.get_submodule(spec.name)
    weight = here._parameters.get("weight")
    others = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        held = [leaf for leaf, p in module._parameters.items() if p is weight and p is not None and module is not here]
        others += [prefix + leaf for leaf in held]
        others += [prefix + leaf for leaf, child in module._modules.items() if child is here]
    others.remove(spec.name)
    return others


def spec_of(model: nn.Module, name: str) -> Spec:
    """The spec of one selected name, looked at before anything is replaced."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, Stack):
        if leaf in parent.sites:
            return parent.sites[leaf].spec  # type: ignore[return-value]
        parent = parent.module
    here = parent._modules.get(leaf)
    if isinstance(here, Site):
        return here.spec
    owner = parent._parameters.get(leaf)
    if isinstance(owner, nn.Parameter):  # a stack of experts
        form: Form = ExpertsForm(owner.shape[0], bool(getattr(parent, "is_transposed", False)))
        weight: Tensor = owner
    else:
        module = model.get_submodule(name)
        if (storage := storage_of(module)) is not None:
            out, into, dtype, device = storage.measure(module, _dtype(model))
            return Spec(name, out, into, Form(), dtype, device, storage.name_of(module))
        found = form_of(module)
        assert found is not None
        form, weight = found, module.weight  # type: ignore[assignment]
        if isinstance(parent, nn.MultiheadAttention):
            raise UnsupportedLayer(
                f"{name} belongs to nn.MultiheadAttention, which reads its weight and never calls it: an adapter "
                "there would be ignored. Exclude it in targets."
            )
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise UnsupportedLayer(
                f"{name} belongs to nn.TransformerEncoderLayer, whose inference fast path reads weights and never "
                "calls the layer: an adapter there would be ignored in eval(). Call "
                "torch.backends.mha.set_fastpath_enabled(False) first, or exclude it in targets."
            )
    out, into = form.matrix(weight).shape[-2:]
    return Spec(name, out, into, form, weight.dtype, weight.device)


def known_as(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The name under which :func:`base_parameters` has each of these: of weights that are tied it has one."""
    first = {id(p): name for name, p, _ in base_parameters(model)}
    known = set(first.values())
    return {name: name if name in known else first[id(model.get_parameter(name))] for name in names}


def _dtype(model: nn.Module) -> torch.dtype | None:
    """What a model computes in, by its first parameter that is no code."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def perhaps_tied(model: nn.Module, specs: Iterable[Spec]) -> list[Spec]:
    """Those whose weight or module stands in several places, by one walk over the model: the rest is not tied."""
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    held.update(id(child) for module in model.modules() for child in module._modules.values())

    def several(spec: Spec) -> bool:
        if spec.form.stacked:
            return False
        here = model.get_submodule(spec.name)
        weight = here._parameters.get("weight")
        return held[id(here)] > 1 or (weight is not None and held[id(weight)] > 1)

    return [spec for spec in specs if several(spec)]


def check_tied(model: nn.Module, spec: Spec) -> None:
    """Raise TiedWeights if a site's weight is shared with another module."""
    if not spec.form.stacked and not isinstance(model.get_submodule(spec.name), Site):
        others = _shared_with(model, spec)
        if others:
            leaf = spec.name.rpartition(".")[2]
            raise TiedWeights(
                f"{spec.name}.weight is also {others[0]}: a change merged into one would change the other. "
                f'Exclude "{leaf}" in targets, or set tied="untie" to give it a copy of its own.'
            )


def untie(model: nn.Module, spec: Spec) -> Callable[[], None]:
    """Give a site's layer a weight of its own where it shares one; what ties it again, once it is a plain layer."""
    if spec.form.stacked or isinstance(model.get_submodule(spec.name), Site) or not _shared_with(model, spec):
        return lambda: None
    module, (parent, _, leaf) = model.get_submodule(spec.name), spec.name.rpartition(".")
    own = copy.copy(module)  # the layer may itself stand under two names
    own._parameters = dict(module._parameters)
    assert isinstance(module.weight, nn.Parameter)
    own.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    setattr(model.get_submodule(parent), leaf, own)
    said = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    if said:
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]

    def tie() -> None:
        setattr(model.get_submodule(parent), leaf, module)
        if said:
            model.config.tie_word_embeddings = True  # type: ignore[union-attr]

    return tie


def separate(model: nn.Module, names: Iterable[str]) -> None:
    """Give each of these parameters a tensor of its own where it shares one, as in the run that is to be restored."""
    wanted, own = set(names), {name for name, _, _ in base_parameters(model)}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in wanted and name not in own:
            parent, _, leaf = name.rpartition(".")
            fresh = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(model.get_submodule(parent), leaf, fresh)
            if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
                model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def place(model: nn.Module, spec: Spec) -> Site:
    """Put a site where the layer stands, or return the one that is there already. Copies nothing."""
    parent_name, _, leaf = spec.name.rpartition(".")
    if spec.form.stacked:
        parent = model.get_submodule(parent_name)
        if not isinstance(parent, Stack):
            grand_name, _, parent_leaf = parent_name.rpartition(".")
            stack = Stack(parent)
            setattr(model.get_submodule(grand_name), parent_leaf, stack)
            parent = stack
        if leaf not in parent.sites:
            parent.sites[leaf] = Site(spec, Slab(parent.module, leaf, spec.form))
        site = parent.sites[leaf]
        assert isinstance(site, Site)
        return site
    here = model.get_submodule(spec.name)
    if isinstance(here, Site):
        return here
    storage = storage_of(here)
    site = Site(spec, Dense(here, spec.form) if storage is None else storage.over(here, spec.dtype))
    setattr(model.get_submodule(parent_name), leaf, site)
    return site


def place_replica(model: nn.Module, name: str) -> Replica:
    """Put a replica where a module stands, or return the one that is there already."""
    here = model.get_submodule(name)
    if isinstance(here, Replica):
        return here
    parent, _, leaf = name.rpartition(".")
    replica = Replica(here)
    setattr(model.get_submodule(parent), leaf, replica)
    return replica


def remove(model: nn.Module, site: Site) -> None:
    """Put the plain layer back where a site stands, with the weight as it now is."""
    parent_name, _, leaf = site.spec.name.rpartition(".")
    if site.spec.form.stacked:
        stack = model.get_submodule(parent_name)
        if not isinstance(stack, Stack) or leaf not in stack.sites:
            return  # it was put back already
        del stack.sites[leaf]
        if not stack.sites:
            grand_name, _, parent_leaf = parent_name.rpartition(".")
            setattr(model.get_submodule(grand_name), parent_leaf, stack.module)
        return
    setattr(model.get_submodule(parent_name), leaf, site.base.restore())
