"""Method: one paper as a frozen dataclass, its registry, and the way from and to plain dictionaries."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import nn

from rankshift.core import config
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base
from rankshift.core.errors import ConfigError, WrongBase, nearest
from rankshift.core.event import Event, Moment
from rankshift.core.lesson import Lesson
from rankshift.core.random import Key
from rankshift.core.site import Spec, select
from rankshift.core.watch import Wish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

_REGISTRY: dict[str, type[Method]] = {}


class Shared(Protocol):
    """What the sites of one adapter share."""

    def describe(self) -> dict[str, Any]:
        """The plain values, as JSON knows them, from which it can be made again."""
        ...


@dataclass(frozen=True)
class Estate:
    """What one site's adapter of the next phase takes over."""

    rank: int
    tensors: Mapping[str, Tensor]  # by name in the new adapter, whole; every tensor of it
    slots: Tensor | None = None  # which rank slots of the old adapter the new one's are; None: it has the same


@dataclass(frozen=True)
class Subspace:
    """The subspace that one weight's gradient is projected into, as the optimizer's state has it."""

    shape: tuple[int, ...]  # of the weight as a matrix, (out, in); (experts, out, in) of a stack
    rank: int  # now, or to begin with
    limit: int  # the largest that it may have
    wish: float | None  # share of ‖G‖² that the rank is chosen to keep; None: it is fixed
    energy: Tensor | None  # (), the share kept at the last renewal; None before the first
    renewals: int
    renewed: int  # the weight's update in which the last one was
    bytes: int  # of basis and moments


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a paper chooses on the four axes. Subclasses set ``name``, ``paper`` and ``summary`` and override verbs."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    """Trainable parameters of one (out, in) layer, as a formula."""
    reversible: ClassVar[bool] = True
    """False if the method trains the base itself, so that there is nothing to disable."""
    trains_base: ClassVar[bool] = False
    """Whether the weights of the model are what trains: then those that somebody froze before stay frozen."""
    default_lr: ClassVar[float] = 2e-4
    """Peak learning rate where none is given: what the paper, or today's habit, recommends."""

    targets: str | tuple[str, ...] = "all-linear"
    """Layers to adapt: "all-linear" (every linear layer of the body, no head, no router), a name or a list of names,
    matched at the end of the dotted name, with * and ? as wildcards."""
    exclude: tuple[str, ...] = ()
    """Names, as in targets, of layers to leave alone."""
    tied: Literal["refuse", "untie"] = "refuse"
    """What to do where a target's weight is shared with another module: refuse, or give it a copy of its own."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole, as copies saved with the adapter: a new head, an embedding after adding tokens. They
    keep the base's dtype; in bf16, without fp32 masters, small steps are lost: load the base in fp32, use autocast."""

    def __init_subclass__(cls) -> None:
        if cls.__dict__.get("name"):  # an inherited name is another method's
            _REGISTRY[cls.name] = cls

    def __new__(cls, *args: Any, **values: Any) -> Method:
        if cls.__dict__.get("__dataclass_fields__"):
            config.check_keys(cls, values, cls.__name__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        config.conform_fields(self)
        self.check()

    # ---- verbs, in the order in which a run asks

    def check(self) -> None:
        """Raise ConfigError for values that no model could satisfy."""

    def sites(self, model: nn.Module) -> list[str]:
        """Names of the layers to stand at. Every pattern of ``targets`` must match."""
        return select(model, self.targets, self.exclude)

    def fit(self, spec: Spec) -> None:
        """Raise a TargetError for a layer this method cannot serve. Asked for all layers before one is touched."""

    def survey(self, model: nn.Module, specs: Sequence[Spec], data: Iterable[Any] | None, seed: int) -> dict[str, Any]:
        """A look at the whole model (and data) before a site is built. What it says under a site's name is handed to
        :meth:`rank_at` and :meth:`start`."""
        return {}

    def rank_at(self, name: str, found: Any = None) -> int:
        """The rank at a site, the one integer from which its shapes follow; 0 if the method has none."""
        return 0

    def share(
        self, specs: Sequence[Spec], ranks: Mapping[str, int], saved: Mapping[str, Any] | None = None
    ) -> Shared | None:
        """What all sites of one adapter share, made before the first of them and handed to :meth:`adapt`.

        Args:
            saved: what :meth:`Shared.describe` said in the run that is to be loaded.

        Raises:
            WrongBase: it cannot be made again as it was.
        """
        return None

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter | None:
        """The adapter to stand at one site, allocated and not yet filled; None to leave the layer as it is."""
        return None

    def start(self, adapter: Adapter, key: Key, found: Any = None) -> None:
        """Fill a new adapter with its initial values. Not called when values are loaded."""

    def copies(self) -> tuple[str, ...]:
        """Patterns of modules trained whole, as copies."""
        return self.modules_to_save

    def in_place(self, name: str, adapted: bool) -> bool:
        """Whether this parameter of the model is trained where it is. ``adapted``: it belongs to a site's base."""
        return False

    def learning_rate(self, name: str, leaf: str) -> float:
        """The factor on lr of a trainable tensor. ``leaf``: its name in the adapter, such as "A"; "" where it is the
        model's own, whatever that calls it."""
        return 1.0

    def decays(self, name: str, tensor: Tensor, leaf: str) -> bool:
        """Whether weight decay may apply to a trainable tensor; ``leaf`` as above."""
        return True

    def projects(self, model: nn.Module) -> dict[str, Spec]:
        """Weights of the model whose gradients are projected into a subspace, by name, and the layers they belong to.
        They train in place."""
        return {}

    def transform(self, name: str, tensor: Tensor, spec: Spec | None, leaf: str) -> Any:
        """The optimizer transform of a trainable tensor; None for AdamW. ``spec``: where :meth:`projects` named one;
        ``leaf`` as above."""
        return None

    def must_learn(self, name: str) -> bool:
        """Whether a tensor that trains in place must receive a gradient in the first update."""
        return True

    def events(self) -> tuple[Event, ...]:
        """What changes between steps."""
        return ()

    def metrics(self, adapters: Mapping[str, Adapter]) -> dict[str, float]:
        """What is worth seeing while it trains, for logs. Under sharding every rank must call this."""
        return {}

    def subspaces(
        self,
        specs: Mapping[str, Spec],
        states: Mapping[str, Mapping[str, Tensor]],
        adapters: Mapping[str, Adapter],
    ) -> dict[str, Subspace]:
        """Where gradients are projected to, by the name of the weight.

        Args:
            specs: what :meth:`projects` named.
            states: of the optimizer, by the name of a trainable tensor; empty before its first update.
        """
        return {}

    def hears(self, model: nn.Module, sites: Sequence[str]) -> tuple[str, ...] | None:
        """Names of the modules whose outputs :meth:`objective` compares with those of the model as it came, beside the
        model's own output. None: it compares nothing, and the batch need not be seen by the original."""
        return None

    def objective(self, task: Tensor, lesson: Lesson | None) -> Tensor:
        """The loss to train on, from that of the task. ``lesson``: what :meth:`hears` asked for, None if nothing."""
        return task

    @property
    def needs_total(self) -> bool:
        """Whether a schedule of this method needs the number of updates of the whole run."""
        return False

    @property
    def own_bias(self) -> bool:
        """Whether adapters have a bias also where the layer has none, so that they cannot be folded into it."""
        return False

    @property
    def holds(self) -> str | None:
        """The storage that the adapted layers are put into when a phase of this method begins; None: as they are."""
        return None

    @property
    def solitary(self) -> str:
        """Why no other adapter may stand beside one of this method, as words after its name; "" where one may."""
        return ""

    @property
    def waits(self) -> str:
        """Why an update must wait until all gradients are there, as words after its name; "" where it need not."""
        return "changes gradients" if any(event.moment is Moment.GRADS for event in self.events()) else ""

    def cannot_ride(self, optimizer: Optimizer) -> str:
        """Why this method's events cannot ride another optimizer than the run's, as words after its name; "" if they
        can."""
        return ""

    @property
    def adjustable(self) -> frozenset[str]:
        """Fields in which a run may differ from a saved one and go on from its state: they choose what happens from
        then on, not what the saved tensors are."""
        return frozenset()

    @property
    def trains_narrow(self) -> bool:
        """Whether what trains in place may be in bf16, because it is said how such a weight takes a small step."""
        return False

    @property
    def needs_data(self) -> bool:
        """Whether :meth:`survey` looks at data."""
        return False

    def watches(self, model: nn.Module) -> Wish | None:
        """What :meth:`next` wants to know of the training so far: ``run.watch`` has it, of those weights that train.
        None: nothing."""
        return None

    def next(self, run: Any) -> Method | None:
        """The next phase, when it is due."""
        return None

    def inherit(self, before: Method, adapters: Mapping[str, Adapter]) -> Mapping[str, Estate] | None:
        """Asked when a run shifts here: what is taken over from the adapters of ``before``, by site; sites not named
        become plain layers. None: ``before`` is folded into the base, and this method starts."""
        return None

    def phase_end(self, start: int, total: int | None) -> int | None:
        """The update at which a phase of this method ends that began at ``start``, if it has a learning-rate schedule
        of its own up to there; None if the run's goes on."""
        return None

    def check_span(self, start: int, end: int, total: int | None) -> str:
        """What a phase of this method will not come to, as a sentence to warn with; "" if there is nothing.

        Args:
            start: the update at which it begins, of ``total``.
            end: the update at which it ends, at the latest.

        Raises:
            ConfigError: it is too short for this method.
        """
        return ""

    @property
    def final(self) -> Method:
        """What this method is in the last of the phases that it goes through by itself, see :meth:`next`."""
        return self

    def lr_schedule(self, total: int, warmup: int) -> Callable[[int], float] | None:
        """The factor on the peak learning rate in every update, counted from 0, of a phase of this method; None:
        whatever schedule there is.

        Args:
            total: updates of the phase.
            warmup: the first of them, over which the rate rises.

        Raises:
            ConfigError: the method's own schedule cannot have this warm-up.
        """
        return None

    # ---- as data

    def to_mapping(self) -> dict[str, Any]:
        """{"method": name, field: value, …}, as JSON knows it."""
        fields = {f.name: config.plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"method": self.name, **fields}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "method") -> Method:
        """The inverse of :meth:`to_mapping`."""
        method = from_dict(values)
        if not isinstance(method, cls):
            raise ConfigError(f"{where} = {method.name!r} is not a {cls.__name__}.")
        return method


def compare(saved: Method, here: Method, what: str) -> str:
    """What is otherwise ``here`` than in a method whose state is to be gone on from, in words; "" if nothing is.

    Args:
        what: of which that state is, to begin a sentence with.

    Raises:
        WrongBase: the state cannot go on so.
    """
    if type(saved) is type(here):
        names = [f.name for f in dataclasses.fields(saved) if getattr(saved, f.name) != getattr(here, f.name)]
        now, then = (f"{type(m).__name__}({_written(m, names)})" for m in (here, saved))
        firm = [name for name in names if name not in here.adjustable]
        if not firm:
            return f"{what} was saved as {then} and goes on as {now}" if names else ""
        reason = f"{' and '.join(firm)} cannot change in a saved state"
    else:
        now, then, reason = type(here).__name__, type(saved).__name__, "the state of one is of no use to the other"
    raise WrongBase(
        f"{what} was saved as {then}, and here it is {now}: {reason}. Give the method as it was; or load the run as it "
        "was, with rs.load() or rs.restore(), and go on by run.shift(method), whose moments begin anew."
    )


def _written(method: Method, names: Sequence[str]) -> str:
    """Some fields as they are written in a call."""
    values = {name: config.plain(getattr(method, name)) for name in names}
    return ", ".join(f'{name}="{v}"' if isinstance(v, str) else f"{name}={v!r}" for name, v in values.items())


def methods() -> dict[str, type[Method]]:
    """All known methods by name: those imported and those that other packages register as entry points."""
    for entry in _announced():
        if entry.name not in _REGISTRY:
            entry.load()
    return dict(sorted(_REGISTRY.items()))


@functools.cache
def _announced() -> tuple[EntryPoint, ...]:
    """What other packages register; finding that reads the metadata of every package that is installed."""
    return tuple(entry_points(group="rankshift.methods"))


def spelled(name: Any) -> Any:
    """A method's name as it is registered, from any way to write it: "PCLoRA" and "pc_lora" are "pc-lora"."""
    if not isinstance(name, str):
        return name
    plain = {known.replace("-", ""): known for known in methods()}
    return plain.get(name.lower().replace("-", "").replace("_", ""), name)


def to_dict(method: Method) -> dict[str, Any]:
    """A method as a plain dictionary: ``{"method": "lora", "rank": 8, …}``."""
    return method.to_mapping()


def from_dict(values: Mapping[str, Any]) -> Method:
    """A method from ``{"method": "lora", "rank": 8}``; fields not given have their defaults.

    Raises:
        ConfigError: an unknown method, field or value, naming the nearest known one.
    """
    if not isinstance(values, Mapping) or "method" not in values:
        raise ConfigError(f'A method is written as {{"method": "lora", …}}; got {values!r}.')
    known = methods()
    name = spelled(values["method"])
    if name not in known:
        raise ConfigError(f"There is no method {name!r}. {nearest(str(name), known)}")
    fields = {key: value for key, value in values.items() if key != "method"}
    config.check_keys(known[name], fields, f"method {name}")
    method = known[name](**fields)
    assert isinstance(method, Method)
    return method
