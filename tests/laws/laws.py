"""The laws. Each is a function of a case and an engine that raises AssertionError where it does not hold.

Under DDP and FSDP2 every rank calls it; what ranks must agree on is gathered and compared inside.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

import rankshift as rs
from laws.cases import Case
from laws.pulse import registered
from laws.world import (
    TOTAL,
    Engine,
    Session,
    batch,
    begin,
    evaluate,
    gap,
    objective,
    same,
    scramble,
    tiny,
)
from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.method import Method
from rankshift.core.site import Site, base_parameters, returned

F64 = torch.float64


def length(engine: Engine) -> int:
    """Updates that a law takes: enough for two of pulse's folds, one where steps are dear."""
    return 4 if engine == "one" else 3


# float64 sums of a few hundred terms of order one, in another order: 1e-14, and AdamW divides by √v + 1e-6 of gradients
# around 1e-2, which amplifies a difference of 1e-17 to 1e-11 before it meets lr.
RANKS = 1e-9
# W x + B (A x) against (W + B A) x in float64, numbers of order one, two blocks deep
MERGED = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.15}  # bf16: 2⁻⁹ a weight, through 13 matrices


# ---- 1. resume


def resume(case: Case, engine: Engine, ks: tuple[int, ...] | None = None, accumulate: int = 1) -> None:
    """n steps = k steps, save, load, n − k steps: bit for bit, and saving changes nothing."""
    options = {"accumulate": accumulate, "noisy": case.noisy}
    n = length(engine)
    straight = begin(engine, case.method, **options).steps(n)
    session = begin(engine, case.method, **options)
    saved: list[bytes] = []
    for k in range(n + 1):
        saved.append(session.save() if ks is None or k in ks else b"")
        if k < n:
            session.step()
    same(straight.state(), session.state(), what="saving changed the training")
    for k, state in enumerate(saved):
        if not state:
            continue
        scramble()
        method = case.method if k % 2 else None  # by turns: restored, or attached and loaded
        resumed = Session.load(state, engine, tiny(), method, **options).steps(n - k)
        same(straight.state(), resumed.state(), what=f"resumed at {k} of {n}")
        assert resumed.losses == straight.losses[k:], f"losses after a resume at {k}"


def resume_phases(methods: list[Method], engine: Engine, each: int = 2) -> None:
    """The same across phases: each of ``methods`` trains for some steps, then the run shifts to the next."""
    with registered(*methods):
        total = each * len(methods)

        def advance(session: Session, until: int) -> Session:
            while (step := session.run.step) < until:
                if step % each == 0 and len(session.run.phases) <= step // each:
                    session = Session(engine, session.run.shift(methods[step // each]))
                session.step()
            return session

        straight = advance(begin(engine, methods[0]), total).state()
        for k in range(total + 1):
            saved = advance(begin(engine, methods[0]), k).save()
            scramble()
            resumed = Session.load(saved, engine, tiny())
            same(straight, advance(resumed, total).state(), what=f"resumed at {k} of {total}")


# ---- 2. ranks


def ranks(case: Case, engine: Engine) -> None:
    """Different global random state on every rank, equal training state; and that of one process with all the data."""
    session = begin(engine, case.method, F64, noisy=case.noisy).steps(length(engine))
    state = session.state(whole=True)
    agree(state)
    if case.noisy:
        return
    alone = begin("one", case.method, F64, check=False).steps(length(engine))
    same(state, alone.state(whole=True), RANKS, "ranks against one process")


def agree(state: dict[str, Tensor]) -> None:
    """Raise AssertionError unless all ranks hold the same bits."""
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest(state))
    odd = sorted({name for other in digests for name in other if other[name] != digests[0].get(name)})
    assert not odd, f"ranks hold different bits in {odd[:3]}"


def digest(state: dict[str, Tensor]) -> dict[str, str]:
    """A hash of every tensor's bits."""
    return {
        name: hashlib.sha256(t.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in state.items()
    }


# ---- 3. preserve


def preserve(case: Case, engine: Engine, dtype: torch.dtype = F64) -> None:
    """Folding into the base leaves the function unchanged: merged(), merge(), every event that rewrites the base."""
    session = begin(engine, case.method, dtype)
    with rewriting_preserves(session.run, MERGED[dtype]):
        session.steps(length(engine))
    run, tolerance = session.run, MERGED[dtype]
    trained = evaluate(run.model)
    before = bits(run)
    with run.merged():
        assert gap(evaluate(run.model), trained) <= tolerance, "merged() changes the function"
    assert torch.equal(evaluate(run.model), trained), "after merged() the function is another"
    assert bits(run) == before, "merged() leaves other bits behind"
    model = run.merge()
    assert gap(evaluate(model), trained) <= tolerance, "merge() changes the function"
    kinds = {type(module).__module__.split(".")[0] for module in model.modules()}
    assert "rankshift" not in kinds, "merge() leaves a trace"


def preserve_shift(case: Case, to: Method, dtype: torch.dtype = F64) -> None:
    """shift() leaves the function unchanged."""
    session = begin("one", case.method, dtype).steps(2)
    trained = evaluate(session.run.model)
    shifted = session.run.shift(to)
    assert gap(evaluate(shifted.model), trained) <= MERGED[dtype], "shift() changes the function"


def too_narrow(case: Case, engine: Engine, dtype: torch.dtype) -> None:
    """A model whose weights are too narrow for the method is refused, and stays as it was."""
    model = tiny(dtype)
    before = digest(dict(model.named_parameters()))
    with pytest.raises(rs.errors.UnsupportedLayer, match="fp32"):
        rs.attach(model, case.method, total_steps=TOTAL)
    assert digest(dict(model.named_parameters())) == before


class _Watched:
    """An event that checks itself: if its application rewrites a base, W + ΔW of that site must stay."""

    def __init__(self, event: Event, tolerance: float):
        self.event, self.moment, self.tolerance = event, event.moment, tolerance

    def due(self, tick: Tick) -> bool:
        return self.event.due(tick)

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        if getattr(self.event, "steps", False):  # it takes the step that the optimizer has prepared
            self.event.apply(adapter, tick)
            return
        base, whole = adapter.base.rows(), adapter.rows()  # without columns that the base lends
        self.event.apply(adapter, tick)
        if not torch.equal(base, adapter.base.rows()):
            assert gap(adapter.rows(), whole) <= self.tolerance, f"{self.event} changes W + ΔW at {adapter.site}"
            assert adapter.base.changed, f"{self.event} rewrote {adapter.site} and the base does not know"


@contextmanager
def rewriting_preserves(run: rs.Run, tolerance: float) -> Iterator[None]:
    audience = run._driver.audience
    run._driver.audience = lambda: [(_Watched(event, tolerance), adapters) for event, adapters in audience()]
    yield
    run._driver.audience = audience


# ---- 4. off


def off(case: Case, engine: Engine) -> None:
    """With its dose at zero a method is its parent bit for bit."""
    assert case.off is not None
    mine, parent = (begin(engine, method).steps(length(engine)) for method in (case.method, case.off))
    assert mine.losses == parent.losses, f"losses differ: {mine.losses} {parent.losses}"
    a, b = mine.state(), parent.state()
    assert b.keys() <= a.keys(), f"the parent has {sorted(b.keys() - a.keys())[:3]} more"
    same({name: a[name] for name in b}, b, what="dose zero against the parent")


# ---- 5. quiet


def quiet(case: Case, engine: Engine) -> None:
    """No verb changes the global random state; training changes neither the set of parameters nor the base's bits."""
    scramble()
    model = tiny()
    plain = evaluate(model)
    names = {name for name, _ in model.named_parameters()}
    with same_generators("attach"):
        run = rs.attach(model, case.method, total_steps=TOTAL)
    assert {name for name, _, _ in base_parameters(model)} == names, "attach renamed parameters of the model"
    session = Session(engine, run, noisy=case.noisy)
    look = returned_bits if case.resident else bits
    start, parameters = look(run), census(session.model)
    for _ in range(length(engine)):
        if case.noisy:
            session.step()
        else:
            with same_generators("an update"):
                session.step()
        assert census(session.model) == parameters, "an update changed the set of parameters or what trains"
    moved = {name for name, value in look(run).items() if value != start[name]}
    known = run.changed
    assert moved <= known, f"{sorted(moved - known)[:3]} changed and run.changed does not say so"
    if case.method.reversible:
        trained = {name for name, p, _ in base_parameters(model) if p.requires_grad}
        assert moved <= trained, f"{sorted(moved - trained)[:3]} of the frozen base changed"
        with same_generators("disabled()"), run.disabled():
            assert torch.equal(evaluate(model), plain), "disabled() is not the base bit for bit"
    with same_generators("saving"):
        session.save()
    with same_generators("merged()"), run.merged():
        evaluate(model)
    with same_generators("merge()"):
        run.merge()
    assert {name for name, _ in model.named_parameters()} == names, "merge() leaves other parameters behind"


def bits(run: rs.Run) -> dict[str, str]:
    """Hashes of the parameters of the model as it came."""
    return digest({name: shard.whole(p) for name, p, _ in base_parameters(run.model)})


def returned_bits(run: rs.Run) -> dict[str, str]:
    """The same without columns that acting adapters keep in the base."""
    shard.settle(run.model)
    with run._on.returned():
        return bits(run)


def census(model: nn.Module) -> dict[str, tuple[int, bool]]:
    """Which parameter objects there are and which train."""
    return {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


@contextmanager
def same_generators(what: str) -> Iterator[None]:
    before = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    assert torch.equal(torch.random.get_rng_state(), before[0]), f"{what} drew from torch's global generator"
    assert str(np.random.get_state()) == str(before[1]), f"{what} drew from numpy's global generator"
    assert random.getstate() == before[2], f"{what} drew from Python's global generator"


# ---- 6. in place


def in_place(case: Case, engine: Engine) -> None:
    """Optimizer keys, shapes and dtypes are those of ``init`` at the rank of now, in memory of just that size; every
    tensor stays where it is in memory. Only the state of a subspace whose rank has changed may be somewhere else."""
    session = begin(engine, case.method, noisy=case.noisy)
    session.step()
    first, ranks = _places(session), session.run.subspaces
    for _ in range(length(engine) - 1):
        session.step()
        now = _places(session)
        assert now.keys() == first.keys(), f"new state: {sorted(now.keys() ^ first.keys())[:3]}"
        free = {name for name, rank in session.run.subspaces.items() if rank != ranks[name]}
        moved = [name for name, place in now.items() if place != first[name] and name.rpartition("/")[0] not in free]
        assert not moved, f"{moved[:3]} moved in memory or changed shape"
        first, ranks = now, session.run.subspaces


def _places(session: Session) -> dict[str, tuple[int, torch.Size, torch.dtype]]:
    """Where parameters and optimizer state are; of the latter also that it is what ``init`` makes."""
    optimizer, tensors = (
        session.optimizer,
        dict[str, Tensor]((f"model/{name}", p) for name, p in session.model.named_parameters()),
    )
    for group, transform in zip(optimizer.param_groups, optimizer.transforms, strict=True):
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            state, rank = optimizer.state[parameter], session.run.subspaces.get(name)
            promised = {k: (v.shape, v.dtype) for k, v in transform.init(parameter, rank=rank).items()}
            found = {k: (v.shape, v.dtype) for k, v in state.items()}
            assert found == promised, f"optimizer state {found} is not what init made, {promised}"
            for key, value in state.items():
                part = shard.held(value)
                assert part.untyped_storage().nbytes() == part.nbytes, f"{name}/{key} holds more memory than it fills"
            tensors |= {f"{name}/{key}": value for key, value in state.items()}
    return {name: (shard.local(t)[0].data_ptr(), t.shape, t.dtype) for name, t in tensors.items()}


# ---- 7. shapes


def shapes(case: Case, engine: Engine) -> None:
    """Saved integers determine every shape: what JSON holds, then the tensors, is the whole run."""
    session = begin("one", case.method, noisy=case.noisy).steps(1)
    state = session.run.state_dict()
    plain = json.loads(json.dumps(session.run.describe()))
    assert plain == {key: value for key, value in state.items() if key != "tensors"}, "describe() is not plain JSON"
    for entry in plain["adapters"].values():
        assert all(type(r) is int for r in entry["ranks"].values()), "a rank is not one integer"
    fresh = rs.restore(tiny(), {**plain, "tensors": state["tensors"]})
    assert torch.equal(evaluate(fresh.model), evaluate(session.run.model)), "restored from integers: another function"


# ---- 8. forward = delta, merge, gradients, memory


def identity(case: Case, engine: Engine) -> None:
    """Attaching does not change the function."""
    assert case.identity is not None
    model = tiny(F64)
    plain = evaluate(model)
    rs.attach(model, case.method, total_steps=TOTAL)
    moved = gap(evaluate(model), plain)
    assert moved <= case.identity, f"attaching changes the function by {moved:.3g}"


class Experts(nn.Module):
    """Fused experts: one stack of matrices that the module multiplies by itself, here stored (experts, in, out)."""

    is_transposed = True

    def __init__(self, experts: int, into: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, into, out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


KINDS = {  # of layers, by the name that a table gives them
    "linear": "Linear",
    "transposed": "Conv1D",
    "conv1d": "Conv",
    "conv2d": "Conv",
    "embedding": "Embedding",
    "experts": "experts",
}


def _layers() -> dict[str, tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]]:
    """A layer of each kind, 12 → 8: (layer, input, how an (out, in) matrix is stored in its weight)."""
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    with torch.random.fork_rng():
        torch.manual_seed(6)
        table = nn.Embedding(12, 8)
        return {
            "linear": (nn.Linear(12, 8), noise(3, 5, 12), lambda M: M),
            "transposed": (Conv1D(8, 12), noise(3, 12), lambda M: M.T),
            "conv1d": (nn.Conv1d(4, 8, 3, padding=1), noise(2, 4, 8), lambda M: M.reshape(8, 4, 3)),
            "conv2d": (nn.Conv2d(2, 8, (2, 3), stride=2), noise(2, 2, 6, 7), lambda M: M.reshape(8, 2, 2, 3)),
            "embedding": (table, torch.tensor([[1, 4, 4, 10]]), lambda M: M.T),
            "experts": (Experts(3, 12, 8), noise(3, 4, 12), lambda M: M.mT),
        }


def delta(case: Case, engine: Engine) -> dict[str, str]:
    """forward = the layer with the dense W + ΔW in place of its weight; low_rank() = ΔW; at every kind of layer.

    Kinds that the method refuses come back with its reason.
    """
    from dataclasses import replace

    refused: dict[str, str] = {}
    for kind, (layer, x, stored) in _layers().items():
        where = "layer.weight" if kind == "experts" else "layer"
        # no restriction to layers of the model that the laws train
        method = replace(case.method, targets=(where,), modules_to_save=())
        model = nn.ModuleDict({"layer": layer.to(F64)})
        bias = getattr(layer, "bias", None)
        try:
            run = rs.attach(model, method, total_steps=TOTAL)
        except rs.errors.UnsupportedLayer as error:
            refused.setdefault(KINDS[kind], str(error))
            assert model["layer"] is layer, f"{kind}: refused, and yet replaced"
            continue
        model.eval()
        run._driver.step = case.step
        run._driver.open_window()
        sites = run.adapter()
        if not sites:  # the method adapts no layer: it trains the weight itself
            assert layer.weight.requires_grad, f"{kind}: nothing trains"
            if method.projects(model):
                step_in_subspace(run, layer, x, kind)
            continue
        adapter, weight = sites[where], layer.weight.detach().clone()  # attaching may have rewritten it
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for leaf, parameter in adapter.named_parameters():
                if leaf in adapter.derived:  # it follows from the base
                    continue
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=F64)
            got, change, shift = model["layer"](x), adapter.delta(), adapter.delta_bias()
            oracle = _plain_layer(kind)
            oracle.weight.copy_(weight + stored(change))
            if bias is not None:
                oracle.bias.copy_(bias if shift is None else bias + shift)
            assert gap(got, oracle(x)) < 1e-12, f"{kind}: forward is not W + ΔW, off by {gap(got, oracle(x)):.3g}"
            passing = adapter.trains <= adapter.derived  # what trains is zero again before a forward runs
            assert passing or change.abs().max() > 1e-3, f"{kind}: the test moved nothing"
            part, whole = adapter.delta(slice(2, 5)), change[..., 2:5, :]
            assert torch.equal(part, whole) or gap(part, whole) < 1e-14, f"{kind}: rows of ΔW"
            factors = adapter.low_rank()
            if factors is not None:
                assert gap(factors[1] @ factors[0], change) < 1e-13, f"{kind}: low_rank() is not ΔW"
            run.merge()
            assert gap(model["layer"](x), got) < 1e-12, f"{kind}: merge() is not forward"
    assert "Linear" not in refused, f"the method does not serve a Linear layer: {refused['Linear']}"
    return refused


def step_in_subspace(run: rs.Run, layer: nn.Module, x: Tensor, kind: str) -> None:
    """One update changes every matrix of a weight along as many directions as its subspace has."""
    optimizer, before = run.optimizer(lr=1e-2), layer.weight.detach().clone()
    run.model.train()
    run.model.forward = lambda x: layer(x)
    run.model(x).square().sum().backward()
    optimizer.step()
    (rank,) = run.subspaces.values()
    matrix = (layer.weight.detach() - before).reshape(*before.shape[: before.dim() - 1 if kind == "experts" else 1], -1)
    directions = torch.linalg.matrix_rank(matrix, rtol=1e-9)
    assert 0 < rank < 8, f"{kind}: nothing is projected"
    assert bool((directions > 0).all()), f"{kind}: a matrix did not move"
    if getattr(run.method, "residual", "none") == "none":
        assert bool((directions <= rank).all()), f"{kind}: {directions} directions in a subspace of {rank}"


def _plain_layer(kind: str) -> Any:
    return _layers()[kind][0].to(F64)


def gradients(case: Case, engine: Engine) -> None:
    """After the first update, in which one factor may stand still, every tensor that trains has a gradient."""
    session = begin(engine, case.method, noisy=case.noisy)
    session.step()
    before = {name: shard.whole(p).clone() for name, p in session.run.trainable()}
    bases = bits(session.run)
    objective(session.run, session.wrapped, batch(7)).backward()
    for name, parameter in session.run.trainable():
        assert parameter.grad is not None, f"{name} trains and has no gradient"
        assert bool(shard.whole(parameter.grad).count_nonzero()), f"the gradient of {name} is exactly zero"
    session.optimizer.step()
    passing = {f"{name}.{leaf}" for name, a in session.run.adapter().items() for leaf in a.derived & a.trains}
    still = [n for n, p in session.run.trainable() if n not in passing and torch.equal(shard.whole(p), before[n])]
    weights = bits(session.run)
    still += [name for name in passing if weights[weight := f"{name.rpartition('.')[0]}.weight"] == bases[weight]]
    assert not still, f"{still[:3]} did not move"
    others = [n for n, p in session.model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not others, f"frozen {others[:3]} has a gradient"


def memory(case: Case, engine: Engine) -> None:
    """Bytes kept for backward at a linear layer stay under the method's claim."""
    from dataclasses import replace

    assert case.kept is not None
    tokens, into, out = 400, 24, 20
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, x = nn.ModuleDict({"layer": nn.Linear(into, out)}), torch.randn(tokens, into)
    run = rs.attach(model, replace(case.method, targets=("layer",)), total_steps=TOTAL)
    r = sum(a.rank for a in run.adapter().values())
    x.requires_grad_(True)  # as in a network: the layer below wants its gradient
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model["layer"](x)  # noqa: F841  held, so that no storage is freed and counted twice
    a, b, c = case.kept
    ceiling = 4 * tokens * (a * into + b * out + c * r)
    small = 4 * 4 * (r + 1) * (into + out)  # a concatenated or scaled factor, a norm: nothing that grows with tokens
    assert sum(kept.values()) <= ceiling + small, f"{sum(kept.values())} bytes kept, {ceiling + small} claimed"


def roundtrip(case: Case, engine: Engine) -> None:
    """run.save() → rs.load() on a fresh base is the same function, bit for bit."""
    session = begin("one", case.method, noisy=case.noisy).steps(2)
    with tempfile.TemporaryDirectory() as folder:
        session.run.save(f"{folder}/saved")
        again = rs.load(tiny(), f"{folder}/saved")
    assert torch.equal(evaluate(again.model), evaluate(session.run.model)), "rs.load gives another function"
    same(session.run.state_dict()["tensors"], again.state_dict()["tensors"], what="rs.load")


def exported(case: Case, engine: Engine) -> None:
    """run.export() → rs.load() on a fresh base is the same function, or an ExportError says that it cannot be."""
    session = begin("one", case.method, F64, noisy=case.noisy).steps(2)
    with tempfile.TemporaryDirectory() as folder:
        try:
            session.run.export(f"{folder}/peft", format="peft")
        except rs.errors.ExportError:
            plain = type(case.method).events is Method.events and all(
                adapter.low_rank() is not None for adapter in session.run.adapter().values()
            )
            assert not (plain and session.run.adapter()), "a plain low-rank change is refused"
            return
        again = rs.load(tiny(F64), f"{folder}/peft")
    # the files hold fp32: factors of float64 lose 2⁻²⁴ of their size
    assert gap(evaluate(again.model), evaluate(session.run.model)) < 1e-5, "the exported adapter is another function"


def portable(case: Case, engine: Engine) -> str:
    """export(profile="portable") is a plain LoRA and the same function; or an ExportError says why it cannot be."""
    session = begin("one", case.method, F64, noisy=case.noisy).steps(2)
    with tempfile.TemporaryDirectory() as folder:
        try:
            session.run.export(f"{folder}/peft", profile="portable")
        except rs.errors.ExportError as error:
            return str(error)
        config = json.loads(Path(f"{folder}/peft/adapter_config.json").read_text())
        weights = load_file(f"{folder}/peft/adapter_model.safetensors")
    assert config["peft_type"] == "LORA", "not a LoRA"
    assert not any(config[key] for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")), config
    # an oracle that knows only what LoRA's two factors mean
    model, scale = tiny(F64), config["lora_alpha"] / config["r"]
    with torch.no_grad():
        for name, B in weights.items():
            layer, _, leaf = name.removeprefix("base_model.model.").partition(".lora_")
            if leaf == "B.weight":
                A = weights[name.replace("lora_B", "lora_A")]
                assert A.shape[0] == B.shape[1] == config["r"], f"{name} has another rank than {config['r']}"
                model.get_submodule(layer).weight += scale * B.double() @ A.double()
            else:
                assert leaf == "A.weight", f"{name} is no part of a plain LoRA"
    # the files hold fp32: factors of float64 lose 2⁻²⁴ of their size
    assert gap(evaluate(model), evaluate(session.run.model)) < 1e-5, "the plain LoRA is another function"
    return ""


# ---- 9. several adapters


def several(case: Case, engine: Engine) -> str:
    """A second adapter of the same method: each alone is what it is alone, to the bit; both are W + ΔW₁ + ΔW₂.

    The reason comes back where the method refuses a second.
    """
    session = begin("one", case.method, F64, noisy=case.noisy).steps(2)
    run, model = session.run, session.model
    first, base = evaluate(model), returned_bits(run)
    try:
        run.add("second", case.method)
    except rs.errors.AttachError as error:
        assert run.adapters == ("default",)
        assert torch.equal(evaluate(model), first), "a refusal changes the function"
        assert returned_bits(run) == base, "a refusal changes the base"
        return str(error)
    assert torch.equal(evaluate(model), first), "adding changes the function"
    assert returned_bits(run) == base, "adding changes the base"
    run.use("second")
    Session("one", run, noisy=case.noisy).steps(2)
    second = evaluate(model)
    assert not torch.equal(first, second), "the second adapter is the first"
    run.use("default")
    still = returned_bits(run) == base and not any(event.moment is Moment.WINDOW for event in case.method.events())
    assert not still or torch.equal(evaluate(model), first), "the first adapter is not what it was"
    first = evaluate(model)
    run.use("second")
    assert torch.equal(evaluate(model), second), "the second adapter is not what it was"
    if not run._on.replicas():  # of whole modules only one can act
        alone = {name: _changes(run, name) for name in run.adapters} if case.sums else {}
        run.use("default", "second")
        both = evaluate(model)
        parts = alone or {name: _changes(run, name) for name in run.adapters}
        assert gap(both, evaluate(_summed(run, parts))) < 1e-11, "both are not W + ΔW₁ + ΔW₂"
        again = rs.restore(tiny(F64), run.state_dict())
        assert torch.equal(evaluate(again.model), both), "two adapters restored are another function"
        with run.merged():
            assert gap(evaluate(model), both) < 1e-11, "two adapters merged are another function"
        assert torch.equal(evaluate(model), both), "after merged() two adapters are another function"
    if case.method.reversible:
        with run.disabled():
            assert torch.equal(evaluate(model), evaluate(tiny(F64))), "disabled() is not the base"
    run.use("default")
    assert torch.equal(evaluate(model), first), "the first adapter is not what it was before both acted"
    run.use("second")
    run.delete("default")
    assert torch.equal(evaluate(model), second), "deleting one adapter changes the other"
    assert not any(name.startswith("default/") for name in run.state_dict()["tensors"]), "a deleted adapter is saved"
    return ""


def _changes(run: rs.Run, name: str) -> dict[str, Tensor]:
    """ΔW of an adapter at each of its sites, where it now stands."""
    return {site: adapter.whole_delta().clone() for site, adapter in run.adapter(name).items()}


def _summed(run: rs.Run, parts: dict[str, dict[str, Tensor]]) -> nn.Module:
    """A plain model with W + Σ ΔW in every weight."""
    model = tiny(F64)
    with torch.no_grad():
        for name, p, _ in base_parameters(run.model):
            model.get_parameter(name).copy_(p)
        for site, held in run.sites.items():
            layer: Any = model.get_submodule(site)
            change = sum(part[site] for part in parts.values())
            layer.weight.copy_(held.spec.form.stored(held.base.rows() + change))
            for shift in (b for b in (adapter.delta_bias() for adapter in held.acting()) if b is not None):
                layer.bias += shift
    return model


def quantised(case: Case, engine: Engine, kind: str = "nf4") -> str:
    """On a base in few bits a method trains, resumes bit for bit and merges onto what it was trained on, and the codes
    stay as they are; or it is refused with nothing touched, and the reason."""
    model = tiny()
    modules = [(name, id(module)) for name, module in model.named_modules()]
    scramble()
    try:
        run = rs.attach(model, case.method, base=kind, total_steps=TOTAL)  # type: ignore[arg-type]
    except (rs.errors.ConfigError, rs.errors.TargetError) as error:
        assert [(name, id(module)) for name, module in model.named_modules()] == modules, "a refusal changed the model"
        return str(error).replace(kind, "…")
    bases = {name: site.base for name, site in run.sites.items() if site.base.kind == kind}
    assert bases, "nothing is held in another storage"
    stored = [t for base in bases.values() for t in base.stored.values()]
    bytes_whole = sum(t.numel() * t.element_size() for t in stored)
    beside = {name: base.dense() for name, base in bases.items()}
    for name, weight in tiny().named_parameters():
        site = name.removesuffix(".weight")
        if site in bases and kind == "nf4" and run.adapter()[site].keeps is None:
            codes, state = bitsandbytes.functional.quantize_4bit(
                weight.detach(), quant_type=kind, compress_statistics=True
            )
            known = bitsandbytes.functional.dequantize_4bit(codes, state)
            assert torch.equal(beside[site], known), f"{site} is not what bitsandbytes makes of it"
        elif site in bases:
            off = (beside[site] - weight.detach()).norm() / weight.detach().norm()
            assert off < 0.2, f"{site} is off by {off:.2f} of its size"
    session = Session(engine, run, noisy=case.noisy)
    if engine == "fsdp2":
        held = sum(
            shard.local(t)[0].numel() * t.element_size() for base in bases.values() for t in base.stored.values()
        )
        assert held < 0.6 * bytes_whole, f"a rank holds {held} of {bytes_whole} bytes of codes"
    session.steps(1)
    saved = session.save()
    session.steps(2)
    again = Session.load(saved, engine, tiny(), noisy=case.noisy).steps(2)
    same(session.state(), again.state(), what="resumed on a base in few bits")
    shard.settle(session.model)
    with returned(session.model):
        now = {name: base.rows() for name, base in bases.items()}  # every rank
    for name, weight in beside.items():
        assert bases[name].changed or torch.equal(now[name], weight), f"the base of {name} was changed"
    if engine == "fsdp2":
        with pytest.raises(rs.errors.AttachError, match="merge it in one process"), run.merged():
            pass
    if engine == "one":
        acting = evaluate(session.model)
        with run.merged() as plain:
            assert gap(evaluate(plain), acting) < MERGED[torch.float32], "merged onto what it was trained on"
        assert torch.equal(evaluate(session.model), acting), "the base was not put back"
        merged = run.merge()
        for module in merged.modules():
            assert not isinstance(module, (Site, Base)), f"a {type(module).__name__} is left in the merged model"
            assert "bitsandbytes" not in type(module).__module__, "a quantised layer is left in the merged model"
        assert gap(evaluate(merged), acting) < MERGED[torch.float32]
    return ""
