"""PreLoRA(quantise=…): the adapted layers are put into fewer bits when they freeze, once, and are the run's own from
then on: saved, resumed and merged as they are."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

import rankshift as rs
from laws.world import batch, loss_of, tiny
from rankshift.core.errors import ConfigError

TARGETS = ("q", "up", "down")
SECOND = [rs.LoRA(rank=2), rs.VeRA(rank=3), rs.PaCA(rank=2)]


def method(second: rs.Method, kind: str | None) -> rs.PreLoRA:
    return rs.PreLoRA(
        then=second, targets=TARGETS, quantise=kind, joint=0 if isinstance(second, rs.PaCA) else 2, window=1, windows=2,
        weight_change=1e6, loss_change=1e6, min_rank=2, max_rank=2,
    )  # type: ignore[arg-type]  # fmt: skip


class Loop:
    def __init__(self, run: rs.Run):
        self.run, self.optimizer = run, run.optimizer(lr=1e-2)

    def step(self) -> None:
        ids = batch(self.run.step)
        self.run.loss(loss_of(self.run.model, ids)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if (after := self.run.due()) is not None:
            self.run = self.run.shift(after)
            self.optimizer = self.run.optimizer(lr=1e-2)

    def until_frozen(self) -> Loop:
        while self.run.method.stage != "frozen":  # type: ignore[attr-defined]
            self.step()
        return self

    def save(self) -> Any:
        return copy.deepcopy((self.run.state_dict(), self.optimizer.state_dict()))

    @classmethod
    def load(cls, state: Any) -> Loop:
        loop = cls(rs.restore(tiny(), state[0]))
        loop.optimizer.load_state_dict(state[1])
        return loop


@torch.no_grad()
def out(model: nn.Module) -> Tensor:
    result: Tensor = model(batch(-1)[:, :-1])
    return result


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("second", SECOND, ids=lambda m: m.name)
def test_it_freezes_into_fewer_bits_and_goes_on(second: rs.Method, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(rs.attach(tiny(), method(second, kind)))
    before = loop.save()
    with caplog.at_level("WARNING", "rankshift"):
        loop.until_frozen()
    assert f"weights are held in {kind} from here on, off by" in caplog.text
    assert {site.base.kind for site in loop.run.sites.values()} == {kind}
    rest = {name for name, p in loop.run.model.named_parameters() if p.requires_grad}
    assert any(name.startswith("head") for name in rest), "what has no adapter trains on"
    codes = {name: site.base.codes.clone() for name, site in loop.run.sites.items()}
    at_the_freeze = loop.save()
    for _ in range(2):
        loop.step()
    in_the_middle = loop.save()
    for _ in range(2):
        loop.step()
    for state, name in ((before, "before"), (at_the_freeze, "at the freeze"), (in_the_middle, "after it")):
        again = Loop.load(state)
        while again.run.step < loop.run.step:
            again.step()
        assert torch.equal(out(again.run.model), out(loop.run.model)), f"resumed {name}"
    for name, site in loop.run.sites.items():
        assert torch.equal(site.base.codes, codes[name]), "codes moved"
    y, merged = out(loop.run.model), loop.run.merge()
    assert (out(merged) - y).abs().max() < 2e-5
    assert {type(merged.get_submodule(name)) for name in codes} == {nn.Linear}


def test_the_codes_are_those_of_the_weights_as_they_had_been_trained() -> None:
    plain, held = (Loop(rs.attach(tiny(), method(SECOND[0], kind))).until_frozen() for kind in (None, "nf4"))
    for name, site in held.run.sites.items():
        weight = plain.run.sites[name].base.weight.detach()
        codes, _ = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        assert torch.equal(site.base.codes, codes)
        assert torch.equal(held.run.adapter()[name].A, plain.run.adapter()[name].A)  # type: ignore[arg-type]
    assert held.run.summary().bytes_base < plain.run.summary().bytes_base
    assert held.run.summary().total == plain.run.summary().total


def test_an_unknown_storage_is_refused_at_attach() -> None:
    with pytest.raises(ConfigError, match="quantise = 'nf5' is not one of"):
        rs.attach(tiny(), method(SECOND[0], "nf5"))
