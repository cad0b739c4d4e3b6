"""What a run has matched, what it trains and what that weighs; prints as a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rankshift.core.errors import ConfigError
from rankshift.core.form import ConvForm, EmbeddingForm
from rankshift.core.site import Site, bare, base_parameters, form_of, walk
from rankshift.optim import Adam, Transform
from rankshift.storage.quantised import held_in

if TYPE_CHECKING:
    from rankshift.core.method import Method, Subspace
    from rankshift.core.site import Spec
    from rankshift.placement import Placement
    from rankshift.run import Run


@dataclass(frozen=True)
class Row:
    """Sites, or projected weights, that share a layer name."""

    layer: str  # last part of the dotted name
    sites: int
    shape: str  # (out, in), or "various"
    rank: str
    trainable: int  # parameters


@dataclass(frozen=True)
class Summary:
    """Counts are parameters, sizes bytes."""

    method: str
    rows: tuple[Row, ...]
    trainable: int
    total: int
    bytes_base: int
    bytes_frozen: int  # what adapters hold and do not train: a shared pair of projections, an anchor
    bytes_trainable: int
    bytes_gradients: int  # of all at once
    bytes_optimizer: int  # its state for what trains, at the ranks of now
    bytes_adamw: int  # AdamW's state for the same tensors
    left_alone: tuple[str, ...]  # modules with weights outside every site that do not train
    held: tuple[tuple[str, int, float], ...] = ()  # (storage, layers, bits a weight) of those in fewer bits
    bytes_aside: int = 0  # what adapters hold on the CPU of every rank: SwitchLoRA's candidates

    @property
    def percent(self) -> float:
        """Trainable share of all parameters."""
        return 100 * self.trainable / max(1, self.total)

    def reduced(self, ranks: int) -> tuple[int, int]:
        """Bytes that each of so many ranks sends in an update, so that all have the mean gradient; and in full training
        of the same model."""
        return all_reduced(self.bytes_gradients, ranks), all_reduced(self.bytes_base, ranks)

    @property
    def stored(self) -> str:
        """ ", 196 layers in nf4 (4.13 bits a weight)"; "" where none is in fewer bits than it computes in."""
        parts = [f"{count} layers in {kind} ({bits:.3g} bits a weight)" for kind, count, bits in self.held]
        return "".join(f", {part}" for part in parts)

    def __str__(self) -> str:
        saved = 100 * (1 - self.bytes_optimizer / max(1, self.bytes_adamw))
        lines = [
            *_table(
                ("layer", "sites", "out × in", "rank", "trainable"),
                [(r.layer, str(r.sites), r.shape, r.rank, f"{r.trainable:,}") for r in self.rows],
            ),
            "",
            f"{self.method}: {self.trainable:,} of {self.total:,} parameters train ({self.percent:.2f} %)",
            f"base {size(self.bytes_base)}{self.stored}, trained {size(self.bytes_trainable)}, "
            f"gradients {size(self.bytes_gradients)}, optimizer {size(self.bytes_optimizer)}"
            + (f" ({saved:.0f} % below AdamW's {size(self.bytes_adamw)})" if saved >= 1 else "")
            + (f", frozen beside the base {size(self.bytes_frozen)}" if self.bytes_frozen else "")
            + (f", on the CPU of each rank {size(self.bytes_aside)}" if self.bytes_aside else ""),
            f"to average gradients, each of N ranks sends 2(N−1)/N · {size(self.bytes_gradients)} an update"
            + (
                f" ({100 * (1 - self.bytes_gradients / self.bytes_base):.1f} % below full training)"
                if self.bytes_gradients < self.bytes_base
                else ""
            ),
        ]
        if self.left_alone:
            lines.append("frozen as they are: " + ", ".join(self.left_alone))
        return "\n".join(lines)


@dataclass(frozen=True)
class Compression:
    """What thin layers save, as (before, after). Parameters, and multiply-adds of one token through every linear layer
    once. Products of activations with each other, as in attention, come on top and do not change. Those of convolutions
    depend on the size of the image and are not counted.
    """

    layers: int  # adapted ones
    adapted: tuple[int, int]  # parameters of the adapted layers, biases too
    total: tuple[int, int]  # parameters of the whole model
    macs_adapted: tuple[int, int]
    macs_total: tuple[int, int]

    @property
    def percent(self) -> float:
        """Share of the adapted layers' parameters that is saved."""
        return 100 * (1 - self.adapted[1] / max(1, self.adapted[0]))

    def __str__(self) -> str:
        rows = {
            f"parameters, {self.layers} adapted layers": self.adapted,
            "parameters, whole model": self.total,
        }
        if self.macs_adapted[0]:
            rows["multiply-adds a token, adapted linear layers"] = self.macs_adapted
            rows["multiply-adds a token, all linear layers"] = self.macs_total
        cells = [(k, f"{a:,}", f"{b:,}", f"{100 * b / max(1, a):.2f} %") for k, (a, b) in rows.items()]
        return "\n".join(_table(("", "before", "after", "left"), cells))


@dataclass(frozen=True)
class Projection:
    """One weight whose gradient is projected, as the optimizer's state has it now."""

    name: str  # of the weight, as in ``run.subspaces``
    shape: tuple[int, ...]  # (out, in); (experts, out, in) of a stack
    rank: int
    limit: int  # the largest rank that it may have
    energy: float  # share of ‖G‖² that the subspace kept when it was renewed; 0 before the first update
    saturated: bool  # its rank is chosen by energy, and the largest does not keep what was asked for
    renewals: int
    renewed: int  # the weight's update in which the last one was
    bytes: int  # of the state: basis, moments, and what else it holds

    def logged(self) -> dict[str, float]:
        """What is logged of one weight, under names that stay the same: ``subspace_rank/WEIGHT``, ``…energy/…``."""
        found = {"rank": self.rank, "energy": self.energy, "saturated": self.saturated, "renewals": self.renewals}
        return {f"subspace_{what}/{self.name}": float(value) for what, value in found.items()}


@dataclass(frozen=True)
class Projections:
    """The subspaces of all projected weights at one moment; prints as a table."""

    step: int
    rows: tuple[Projection, ...]
    by_energy: bool  # ranks follow the gradient

    def means(self) -> dict[str, float]:
        """What is logged of all together: mean rank and captured energy (of those that have a
        subspace yet), saturated share, sum of renewals."""
        if not self.rows:
            return {}
        count = len(self.rows)
        begun = [row.energy for row in self.rows if row.renewals]
        found = {
            "subspace_rank": sum(row.rank for row in self.rows) / count,
            "subspace_energy": sum(begun) / max(1, len(begun)),
        }
        if self.by_energy:
            found["subspace_saturated"] = sum(row.saturated for row in self.rows) / count
        return {**found, "subspace_renewals": sum(row.renewals for row in self.rows)}

    def __str__(self) -> str:
        cells = [
            (
                row.name, " × ".join(map(str, row.shape)), f"{row.rank} of {row.limit}",
                f"{100 * row.energy:.1f} %" + (" !" if row.saturated else "") if row.renewals else "–",
                str(row.renewals), str(row.renewed) if row.renewals else "–",
                size(row.bytes) if row.bytes else "–",
            )
            for row in self.rows
        ]  # fmt: skip
        lines = _table(("weight", "shape", "rank", "energy", "renewals", "last in", "state"), cells)
        if any(row.saturated for row in self.rows):
            lines += ["", "!: the largest rank keeps less than was asked for"]
        return "\n".join(lines)


def projections(step: int, found: Mapping[str, Subspace]) -> Projections:
    """What :meth:`Method.subspaces` found as plain numbers, with one transfer to the host."""
    seen = {name: s.energy for name, s in found.items() if s.energy is not None and s.renewals}
    read = torch.stack([energy.to(torch.float64) for energy in seen.values()]).tolist() if seen else []
    energies = dict(zip(seen, read, strict=True))
    rows = []
    for name, s in found.items():
        energy = energies.get(name, 0.0)
        short = s.wish is not None and name in energies and energy < s.wish - 1e-6  # by more than rounding
        rows.append(
            Projection(
                name, s.shape, s.rank, s.limit, energy, short and s.rank >= s.limit, s.renewals, s.renewed, s.bytes
            )
        )
    return Projections(step, tuple(rows), any(s.wish is not None for s in found.values()))


def compression(run: Run) -> Compression | None:
    """What ``run.compress()`` saves, known before the run ends; None if no layer becomes two thin ones."""
    before = after = macs = thin = layers = 0
    for site in run.sites.values():
        acting = site.acting()
        if len(acting) != 1 or not acting[0].leaves:
            continue
        layers += 1
        before += sum(p.numel() for p in site.base.parameters())
        after += sum(p.numel() for p in acting[0].parameters())
        if not isinstance(site.spec.form, ConvForm):
            macs += site.spec.out * site.spec.into
            thin += acting[0].rank * (site.spec.out + site.spec.into)
    if not layers:
        return None
    total = sum(p.numel() for _, p, _ in base_parameters(run.model))
    with bare(run.model):
        products = 0
        for module in run.model.modules():
            form, weight = form_of(module), getattr(module, "weight", None)
            if isinstance(weight, Tensor) and form is not None and not isinstance(form, (EmbeddingForm, ConvForm)):
                products += weight.numel()
    return Compression(
        layers, (before, after), (total, total - before + after), (macs, thin), (products, products - macs + thin)
    )


def summarise(run: Run, placement: Placement) -> Summary:
    """The summary of a run's active adapters and everything it trains in place."""
    base = {name: p for name, p, _ in base_parameters(run.model)}
    projected, ranks_now = placement.subspaces({}), run.subspaces
    # where a weight learns through tensors of its site, those are state of the optimizer: the weight is what trains
    through = {
        id(t): t for site in run.sites.values() if site.spec.weight in projected
        for a in site.acting() for t in [*a.parameters(), *a.buffers()]
    }  # fmt: skip
    trained = list(placement.trainable())
    learning = {name: t for name, t, *_ in trained if id(t) not in through} | {name: base[name] for name in projected}
    kinds: dict[str, list[tuple[str, int, int]]] = {}
    shapes: dict[str, set[str]] = {}
    factors = 0
    for name, site in run.sites.items():
        if not site.active or site.spec.weight in projected:
            continue
        leaf = name.rpartition(".")[2]
        tensors = [p for a in site.acting() for p in a.parameters() if p.requires_grad]
        factors += len(tensors)
        rank = sum(a.rank for a in site.acting())
        kinds.setdefault(leaf, []).append((name, rank, sum(p.numel() for p in tensors)))
        shapes.setdefault(leaf, set()).add(f"{site.spec.out} × {site.spec.into}")
    for name, found in projected.items():
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        kinds.setdefault(leaf, []).append((name, ranks_now.get(name, found.rank), math.prod(found.shape)))
        shapes.setdefault(leaf, set()).add(" × ".join(map(str, found.shape)))
    rows = []
    for leaf, members in kinds.items():
        ranks = sorted({rank for _, rank, _ in members})
        rows.append(
            Row(
                leaf,
                len(members),
                next(iter(shapes[leaf])) if len(shapes[leaf]) == 1 else "various",
                "–" if ranks == [0] else (str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"),
                sum(count for _, _, count in members),
            )
        )
    trainable = sum(p.numel() for p in learning.values())
    rest = trainable - sum(row.trainable for row in rows)
    if rest:
        rows.append(Row("whole tensors", len(learning) - factors - len(projected), "various", "–", rest))
    alone = Counter(
        name.rpartition(".")[0].rpartition(".")[2]
        for name, p, adapted in base_parameters(run.model)
        if not adapted and not p.requires_grad
    )
    extra = sum(
        p.numel() for s in run.sites.values() for a in s.acting() for leaf, p in a.named_parameters()
        if leaf not in a.derived and id(p) not in through
    )  # fmt: skip
    held = [t for s in run.sites.values() for a in s.acting() for t in [*a.parameters(), *a.buffers()]]
    state = sum(
        _state(_transform(method, name, tensor, placement.projected.get(name), leaf), tensor, ranks_now.get(name))
        for name, tensor, method, leaf in trained
    )
    return Summary(
        method=type(run.method).__name__,
        rows=tuple(rows),
        trainable=trainable,
        total=sum(p.numel() for p in base.values()) + _packed(run.model) + extra,
        bytes_base=_bytes(base.values()),
        bytes_frozen=_bytes(t for t in held if not t.requires_grad and id(t) not in through),
        bytes_trainable=_bytes(learning.values()),
        bytes_gradients=_bytes(t for _, t, *_ in trained),
        bytes_optimizer=state + _bytes(through.values()),
        bytes_adamw=sum(_state(Adam(), tensor) for tensor in learning.values()),
        held=_held(run.model),
        left_alone=tuple(f"{leaf} (×{n})" if n > 1 else leaf for leaf, n in alone.most_common(8)),
        bytes_aside=_bytes(t for s in run.sites.values() for a in s.acting() for t in a.aside().values()),
    )


def _packed(model: nn.Module) -> int:
    """How many more parameters the quantised weights of a model stand for than tensors that hold them have numbers."""
    more = 0
    for _, module, parameter in walk(model):
        if parameter is None and (base := held_in(module)) is not None:
            here = base if isinstance(module, Site) else module
            codes = sum(p.numel() for name, p in here.named_parameters(recurse=False) if name != "bias")
            more += math.prod(base.layout.shape) - codes
    return more


def _held(model: nn.Module) -> tuple[tuple[str, int, float], ...]:
    """(storage, layers, bits a weight) of those in fewer bits, with scales and columns beside."""
    found: dict[str, list[tuple[int, int]]] = {}
    for _, module, parameter in walk(model):
        if parameter is None and (base := held_in(module)) is not None:
            found.setdefault(base.kind, []).append((_bytes(base.stored.values()), math.prod(base.layout.shape)))
    return tuple(
        (kind, len(layers), 8 * sum(held for held, _ in layers) / sum(count for _, count in layers))
        for kind, layers in found.items()
    )


def all_reduced(count: int, ranks: int) -> int:
    """Bytes that each rank sends in an all-reduce of so many bytes, as a ring does it: 2(N−1)/N of them."""
    return 2 * (ranks - 1) * count // ranks


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _transform(method: Method, name: str, tensor: Tensor, spec: Spec | None, leaf: str) -> Transform:
    try:
        transform: Transform | None = method.transform(name, tensor, spec, leaf)
    except ConfigError:  # it cannot be trained as it stands, which is for run.optimizer() to say
        transform = None
    return transform or Adam()


def _state(transform: Transform, tensor: Tensor, rank: int | None = None) -> int:
    """Bytes of a tensor's optimizer state, counters aside."""
    like = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return _bytes(t for t in transform.init(like, None, rank).values() if t.dim())


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right, a rule under the head."""
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return [lines[0], "─" * len(lines[0]), *lines[1:]]


def size(count: float) -> str:
    """Bytes as people read them: "3.1 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.1f} TiB"
