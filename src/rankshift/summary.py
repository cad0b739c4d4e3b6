"""What a run has matched, what it trains and what that weighs; prints as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from rankshift.core.form import ConvForm, EmbeddingForm
from rankshift.core.site import bare, base_parameters, form_of

if TYPE_CHECKING:
    from rankshift.run import Run


@dataclass(frozen=True)
class Row:
    """Sites that share a layer name."""

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
    bytes_optimizer: int  # AdamW's two moments of what trains
    left_alone: tuple[str, ...]  # modules with weights outside every site that do not train

    @property
    def percent(self) -> float:
        """Trainable share of all parameters."""
        return 100 * self.trainable / max(1, self.total)

    def __str__(self) -> str:
        table = [("layer", "sites", "out × in", "rank", "trainable")]
        table += [(r.layer, str(r.sites), r.shape, r.rank, f"{r.trainable:,}") for r in self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(5)]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in table
        ]
        lines.insert(1, "─" * len(lines[0]))
        lines += [
            "",
            f"{self.method}: {self.trainable:,} of {self.total:,} parameters train ({self.percent:.2f} %)",
            f"base {_size(self.bytes_base)}, trained {_size(self.bytes_trainable)}, "
            f"gradients {_size(self.bytes_trainable)}, optimizer {_size(self.bytes_optimizer)}"
            + (f", frozen beside the base {_size(self.bytes_frozen)}" if self.bytes_frozen else ""),
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
        cells = [("", "before", "after", "left")]
        cells += [(k, f"{a:,}", f"{b:,}", f"{100 * b / max(1, a):.2f} %") for k, (a, b) in rows.items()]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in cells
        ]
        return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


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


def summarise(run: Run) -> Summary:
    """The summary of a run's active adapters and everything it trains in place."""
    trainable = dict(run.trainable())
    kinds: dict[str, list[tuple[str, int, int]]] = {}
    shapes: dict[str, set[str]] = {}
    for name, site in run.sites.items():
        if not site.active:
            continue
        leaf = name.rpartition(".")[2]
        count = sum(p.numel() for a in site.acting() for p in a.parameters() if p.requires_grad)
        rank = sum(a.rank for a in site.acting())
        kinds.setdefault(leaf, []).append((name, rank, count))
        shapes.setdefault(leaf, set()).add(f"{site.spec.out} × {site.spec.into}")
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
    in_sites = sum(row.trainable for row in rows)
    rest = sum(p.numel() for p in trainable.values()) - in_sites
    base = list(base_parameters(run.model))
    if rest:
        rows.append(Row("whole tensors", len(trainable) - _site_tensors(run), "various", "–", rest))
    alone = Counter(
        name.rpartition(".")[0].rpartition(".")[2] for name, p, adapted in base if not adapted and not p.requires_grad
    )
    extra = sum(
        p.numel() for s in run.sites.values() for a in s.acting() for leaf, p in a.named_parameters()
        if leaf not in a.derived
    )  # fmt: skip
    held = [t for s in run.sites.values() for a in s.acting() for t in [*a.parameters(), *a.buffers()]]
    moments = sum(2 * p.numel() * p.element_size() for p in trainable.values())
    return Summary(
        method=type(run.method).__name__,
        rows=tuple(rows),
        trainable=sum(p.numel() for p in trainable.values()),
        total=sum(p.numel() for _, p, _ in base) + extra,
        bytes_base=sum(p.numel() * p.element_size() for _, p, _ in base),
        bytes_frozen=sum(t.numel() * t.element_size() for t in held if not t.requires_grad),
        bytes_trainable=sum(p.numel() * p.element_size() for p in trainable.values()),
        bytes_optimizer=moments,
        left_alone=tuple(f"{leaf} (×{n})" if n > 1 else leaf for leaf, n in alone.most_common(8)),
    )


def _site_tensors(run: Run) -> int:
    return sum(1 for s in run.sites.values() for a in s.acting() for p in a.parameters() if p.requires_grad)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.1f} TiB"
