"""What the laws try: for every registered method a few configurations. A method without a row fails the suite."""

from __future__ import annotations

from dataclasses import dataclass

from rankshift.core.method import Method
from rankshift.methods import (
    AdaRankGrad,
    FlatLoRA,
    Full,
    GaLore,
    LoRA,
    MELoRA,
    PaCA,
    PCLoRA,
    PreLoRA,
    ReLoRA,
    SoRA,
    SwitchLoRA,
    VeRA,
)


@dataclass(frozen=True)
class Case:
    """One configuration, and what its paper promises of it."""

    label: str
    method: Method
    identity: float | None = 0.0
    """How far attaching may move the function, in float64: 0 where the branch starts at an exact zero; None where the
    method does not start at the base."""
    off: Method | None = None
    """The parent method: with its dose at zero, ``method`` must be this one bit for bit."""
    kept: tuple[float, float, float] | None = (1, 0, 1)
    """Values kept for backward per token of a linear layer: multiples of in, out and rank. None: not claimed."""
    alone: bool = False
    """Checked in one process only: what it adds to another case of its method is nothing that engines could touch."""
    resident: bool = False
    """While it acts, an adapter keeps columns in the base's weight, and gives them back bit for bit."""
    sums: bool = True
    """The change of an adapter is the same wherever it stands, so two together are the sum of what each is alone.
    False where it follows from the weight below (DoRA's row norms)."""
    graphs: int = 1
    """Graphs that compiling makes over a run: one more where a part of the layer goes."""
    step: int = 0
    """The update at which the equation is looked at, for methods whose equation changes with time."""
    narrow: bool = True
    """Serves a model in bf16; False: refuses it before anything changes."""
    noisy: bool = False
    """Training forwards draw from the global generator (dropout), so no number of ranks equals another."""


ROUNDING = 1e-13  # a branch that starts as the difference of two equal products of numbers around one

CASES: dict[str, tuple[Case, ...]] = {
    "adarankgrad": (
        # ranks of 2 to 5 that rise and fall in every update; "down" is projected on its output side
        Case("adarankgrad", AdaRankGrad(rank=6, every=2, earliest=1, rounding="stochastic"), kept=(1, 0, 0)),
        Case(
            "adarankgrad-multiples",
            AdaRankGrad(
                rank=8,
                every=1,
                earliest=1,
                energy=0.99,
                multiple=3,
                transport="centred",
                stagger=False,
                rounding="master",
            ),
            kept=(1, 0, 0),
            alone=True,
        ),
        Case(
            "adarankgrad-projected",
            AdaRankGrad(rank=6, every=2, earliest=1, side="in", gradient="projected", rounding="nearest"),
            kept=(1, 0, 1),
        ),
    ),
    "galore": (
        Case("galore", GaLore(rank=3, every=2, rounding="master"), kept=(1, 0, 0)),
        Case(
            "galore-in",
            GaLore(
                rank=4, every=2, side="in", finder="eigh", transport="centred", residual="fira", rounding="stochastic"
            ),
            kept=(1, 0, 0),
        ),
        Case(
            "galore-warm",
            GaLore(
                rank=2, every=1, side="larger", finder="warm", transport="square", rest="freeze", rounding="nearest"
            ),
            kept=(1, 0, 0),
        ),
        Case(
            "galore-projected",
            GaLore(rank=3, every=2, transport="square", gradient="projected", begin=2, rounding="stochastic"),
            kept=(1, 0, 1),
        ),
        Case(
            "galore-paper",
            GaLore(rank=3, every=2, finder="svd", stagger=False, rounding="nearest", targets=("q", "up", "down")),
            kept=None,
            alone=True,
        ),
    ),
    "flat-lora": (
        Case("flat-lora", FlatLoRA(rank=4, alpha=8, sigma=0.3)),
        Case("flat-lora-zero", FlatLoRA(rank=4, alpha=8, sigma=0), off=LoRA(rank=4, alpha=8), alone=True),
        Case(
            "flat-dora",
            FlatLoRA(rank=3, alpha=4, dora=True, schedule="constant", init="pissa", targets=("q", "v", "up")),
            identity=ROUNDING,
            kept=(1, 1, 2),
            sums=False,
            alone=True,
        ),
    ),
    "full": (
        Case("full", Full(), kept=(1, 0, 0)),
        Case("full-part", Full(targets=("blocks.0", "head")), kept=None, alone=True),
    ),
    "lora": (
        Case("lora", LoRA(rank=4, alpha=8)),
        Case(
            "lora-plus",
            LoRA(rank=3, scaling="rslora", init="gaussian", lr_ratio=4.0, targets=("q", "k", "up")),
            alone=True,
        ),
        Case(
            "lora-extras",
            LoRA(
                rank=2,
                alpha=3,
                bias="lora_only",
                lora_bias=True,
                modules_to_save=("head", "norm2"),
                targets=("q", "v", "up"),
            ),
            kept=None,
        ),
        Case("lora-embedding", LoRA(rank=2, alpha=2, targets=("embed", "down")), kept=None),
        Case("lora-fa", LoRA(rank=4, alpha=8, train="B", precondition=True), kept=(0, 0, 1)),
        Case("lora-pissa", LoRA(rank=3, alpha=6, init="pissa"), identity=ROUNDING, kept=(1, 0, 2)),
        Case(
            "lora-orthogonal",
            LoRA(rank=4, alpha=4, init="orthogonal", dropout=0.2),
            identity=ROUNDING,
            kept=None,
            alone=True,
            noisy=True,
        ),
        Case("dora", LoRA(rank=4, alpha=8, dora=True), identity=ROUNDING, kept=(1, 1, 1), sums=False),
    ),
    "melora": (
        Case("melora", MELoRA(rank=2, blocks=2, alpha=4, targets=("q", "k", "v", "o", "up", "down")), kept=(1, 0, 2)),
        Case("melora-one", MELoRA(rank=4, blocks=1, alpha=8), off=LoRA(rank=4, alpha=8), alone=True),
        Case(
            "melora-dropout",
            MELoRA(rank=1, blocks=2, dropout=0.3, targets=("q", "up")),
            kept=None,
            alone=True,
            noisy=True,
        ),
    ),
    "paca": (
        Case("paca", PaCA(rank=2, alpha=3), kept=(0, 0, 1), resident=True),
        Case("paca-redraw", PaCA(rank=2, redraw_every=2), kept=(0, 0, 1), resident=True),
        Case(
            "paca-blocks",
            PaCA(rank=2, select="blocks", block=2, redraw_every=1000),
            off=PaCA(rank=2, select="blocks", block=2),
            kept=(0, 0, 1),
            resident=True,
            alone=True,
        ),
    ),
    "pc-lora": (
        Case(
            "pc-lora",
            PCLoRA(rank=3, decay_end=0.5, targets=("q", "k", "v", "o", "up")),
            sums=False,
            graphs=2,
            step=1,
        ),
        Case(
            "pc-lora-match",
            PCLoRA(rank=2, decay="sine", decay_end=1.0, bias="match", logits=True),
            sums=False,
            step=2,
            alone=True,
        ),
    ),
    "prelora": (
        # laws end no phase: nothing changes by less than 0 %, so the first stage looks and stays; the second is long
        Case("prelora", PreLoRA(window=1, weight_change=0, max_rank=8), kept=(1, 0, 0), off=Full(), narrow=False),
        Case(
            "prelora-joint",
            PreLoRA(stage="joint", then=LoRA(rank=4, alpha=8), max_rank=8, ranks={"blocks.0.q": 8, "blocks.0.up": 2}),
            kept=(1, 0, 1),
            narrow=False,
        ),
        Case(
            "prelora-frozen",
            PreLoRA(stage="frozen", then=LoRA(rank=4, alpha=8), max_rank=8, ranks={"blocks.0.q": 8, "blocks.0.up": 2}),
            narrow=False,
        ),
        Case(
            "prelora-vera",
            PreLoRA(stage="joint", then=VeRA(rank=4), targets=("q", "up", "down")),
            kept=None,
            narrow=False,
            alone=True,
        ),
        Case(
            "prelora-paca",
            PreLoRA(stage="frozen", then=PaCA(rank=2), joint=0, max_rank=8),
            kept=(0, 0, 1),
            resident=True,
            narrow=False,
            alone=True,
        ),
    ),
    "relora": (
        Case("relora", ReLoRA(rank=4, alpha=8, every=2, lossy=True)),
        Case(
            "relora-magnitude",
            ReLoRA(rank=3, alpha=2, every=1, reset="magnitude", ratio=0.6, rest="freeze", lossy=True),
        ),
        Case(
            "relora-random",
            ReLoRA(rank=2, every=1, reset="random", ratio=0.5, targets=("embed", "up"), lossy=True),
            kept=None,
        ),
        Case(
            "relora-dropout",
            ReLoRA(rank=2, every=2, dropout=0.2, targets=("q", "up"), lossy=True),
            kept=None,
            alone=True,
            noisy=True,
        ),
        Case(
            "relora-never",
            ReLoRA(rank=4, alpha=8, every=None, rest="freeze", lossy=True),
            off=LoRA(rank=4, alpha=8),
            alone=True,
        ),
    ),
    "sora": (
        # 6 of 28 gates close in four updates, one or more of them in each
        Case("sora", SoRA(rank=4, alpha=8, sparsity=12, gate_init="normal")),
        Case("sora-off", SoRA(rank=4, alpha=8, sparsity=0, gate_lr_ratio=0), off=LoRA(rank=4, alpha=8), alone=True),
        Case(
            "sora-embedding",
            SoRA(rank=3, alpha=2, sparsity=5, gate_lr_ratio=2, dropout=0.1, targets=("embed", "up")),
            kept=None,
            alone=True,
            noisy=True,
        ),
    ),
    "switchlora": (
        # one or two of four vectors in every update, and then those that are frozen stand in the way
        Case(
            "switchlora",
            SwitchLoRA(rank=4, interval=2, freeze=1, ratio=5, rest_lr_ratio=0.5),
            identity=ROUNDING,
            narrow=False,
        ),
        Case(
            "switchlora-frozen",
            SwitchLoRA(rank=7, interval=4, freeze=2, ratio=5, rest="freeze", targets=("q", "k", "up", "down")),
            identity=ROUNDING,
            narrow=False,
        ),
        Case(
            "switchlora-never",
            SwitchLoRA(rank=3, interval=float("inf"), targets=("v", "up")),
            identity=ROUNDING,
            narrow=False,
            alone=True,
        ),
    ),
    "vera": (
        Case("vera", VeRA(rank=4), kept=(0, 0, 1)),
        Case(
            "vera-saved",
            VeRA(
                rank=20,
                save_projection=True,
                dropout=0.2,
                modules_to_save=("head",),
                head_lr_ratio=0.5,
                targets=("q", "up", "down"),
            ),
            kept=None,
            alone=True,
            noisy=True,
        ),
    ),
}


def rows() -> list[Case]:
    """All cases, in order."""
    return [case for cases in CASES.values() for case in cases]
