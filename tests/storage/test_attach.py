"""attach(base=…) and models that came quantised: what is held, saved, merged, exported and refused."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from torch import Tensor, nn

import rankshift as rs
from laws.world import batch, loss_of, tiny
from rankshift.core.base import Dense
from rankshift.core.errors import ConfigError, UnsupportedLayer, WrongBase
from rankshift.run import Run
from rankshift.storage.four_bit import FourBit

IDS = torch.arange(24).reshape(2, 12) % 97


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bf16, as files."""
    folder = tmp_path_factory.mktemp("base")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def loaded(folder: Path, four_bit: bool = False) -> Any:
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if four_bit:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).train()


def trained(run: rs.Run, steps: int = 3) -> float:
    optimizer = run.optimizer(lr=1e-2)
    for _ in range(steps):
        loss = run.model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    was, _ = model.training, model.eval()
    out: Tensor = model(IDS).logits
    model.train(was)
    return out.float()


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


# ---- models that transformers loads ----------------------------------------------------------------------------------


def test_a_model_that_transformers_quantised_is_the_one_that_attach_quantises(saved: Path) -> None:
    theirs = rs.attach(loaded(saved, four_bit=True), rs.LoRA(rank=4), seed=0)
    ours = rs.attach(loaded(saved), rs.LoRA(rank=4), base="nf4", seed=0)
    for name, site in ours.sites.items():
        for leaf, tensor in site.base.stored.items():
            assert torch.equal(tensor, theirs.sites[name].base.stored[leaf]), f"{name}.{leaf}"
    assert trained(theirs) == trained(ours)
    assert torch.equal(logits(theirs.model), logits(ours.model))
    assert theirs.summary().total == ours.summary().total == rs.attach(loaded(saved), rs.LoRA(rank=4)).summary().total


@pytest.mark.parametrize("four_bit", [True, False])
def test_saved_exported_merged_and_detached(saved: Path, four_bit: bool, tmp_path: Path) -> None:
    run = rs.attach(loaded(saved, four_bit), rs.LoRA(rank=4), base=None if four_bit else "nf4")
    trained(run)
    y = logits(run.model)
    run.save(tmp_path / "run")
    again = rs.load(loaded(saved, four_bit), tmp_path / "run")
    assert torch.equal(logits(again.model), y)

    run.export(tmp_path / "merged", format="merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert far(logits(loaded(tmp_path / "merged")), y) < 0.02  # bf16
    run.export(tmp_path / "peft", format="peft")
    assert far(logits(rs.load(loaded(saved, four_bit=True), tmp_path / "peft").model), y) < 0.02

    plain = again.detach()
    assert "Linear4bit" in kinds(plain)
    assert not kinds(plain) & {"FourBit", "Site", "LoRALayer"}
    assert far(logits(plain), logits(loaded(saved, four_bit=True))) < 0.02

    merged = run.merge()
    assert not kinds(merged) & {"FourBit", "Site", "Linear4bit"}
    assert far(logits(merged), y) < 0.02
    merged.save_pretrained(tmp_path / "again")
    assert far(logits(loaded(tmp_path / "again")), y) < 0.02


def test_onto_what(saved: Path) -> None:
    run = rs.attach(loaded(saved), rs.LoRA(rank=4), base="nf4")
    trained(run)
    y = logits(run.model)
    off = {}
    for onto, original in (("dequantised", None), ("original", saved), ("requantised", None)):
        with run.merged(onto, original) as model:  # type: ignore[arg-type]
            off[onto] = far(logits(model), y)
        assert torch.equal(logits(run.model), y), "the base was not put back"
    assert off["dequantised"] < 0.02 < min(off["original"], off["requantised"])
    for source in (loaded(saved), dict(loaded(saved).named_parameters())):
        with run.merged("original", source) as model:
            assert far(logits(model), y) == off["original"]
    with pytest.raises(ConfigError, match="belong together"), run.merged("original"):
        pass
    with pytest.raises(WrongBase, match="another model"), run.merged("original", {}):
        pass
    copy_of = copy.deepcopy(run.model)
    assert torch.equal(logits(copy_of), y)
    plain = run.merge("requantised")
    assert "Linear4bit" in kinds(plain)
    assert far(logits(plain), y) == pytest.approx(off["requantised"], abs=0.02)
    dense = rs.attach(loaded(saved), rs.LoRA(rank=4))
    with pytest.raises(ConfigError, match="no weight of this model is held in fewer bits"):
        dense.merge("requantised")


def test_every_linear_layer_of_the_body_is_held_whatever_is_adapted(saved: Path) -> None:
    run = rs.attach(loaded(saved), rs.LoRA(rank=4, targets=("q_proj",)), base="nf4")
    dense = [name for name, module in run.model.named_modules() if type(module) is nn.Linear]
    assert dense == ["lm_head"]
    trained(run)
    y = logits(run.model)
    run.add("more", rs.LoRA(rank=2, targets=("up_proj",)))
    assert torch.equal(logits(run.model), y)
    run.use("default", "more")
    merged = run.merge()
    assert not kinds(merged) & {"FourBit", "Linear4bit"}
    assert far(logits(merged), y) < 0.02


# ---- columns beside (QPaCA) ------------------------------------------------------------------------------------------


def test_qpaca_trains_the_original_columns_and_the_codes_are_made_without_them() -> None:
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = rs.attach(model, rs.PaCA(rank=3), base="nf4", seed=5)
    assert run.sites
    for name, site in run.sites.items():
        at, weight = run.adapter()[name].channels, before[f"{name}.weight"]  # type: ignore[union-attr]
        assert torch.equal(site.base.columns(at, slice(None)), weight[:, at])
        assert torch.equal(run.adapter()[name].origin, weight[:, at])  # type: ignore[arg-type]
        codes, state = bitsandbytes.functional.quantize_4bit(
            weight.index_fill(1, at, 0.0), quant_type="nf4", compress_statistics=True
        )
        assert torch.equal(site.base.codes, codes)
        known = bitsandbytes.functional.dequantize_4bit(codes, state).index_copy(1, at, weight[:, at])
        assert torch.equal(site.base.dense(), known)
    codes = {name: site.base.codes.clone() for name, site in run.sites.items()}
    optimizer = run.optimizer(lr=1e-2)
    for step in range(3):
        loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, site in run.sites.items():
        adapter: Any = run.adapter()[name]
        assert torch.equal(site.base.codes, codes[name])
        want = adapter.origin + adapter.scale * adapter.D
        assert torch.equal(site.base.dense()[:, adapter.channels], want.detach())
    with run.disabled():
        for name, site in run.sites.items():
            at = run.adapter()[name].channels  # type: ignore[union-attr]
            assert torch.equal(site.base.dense()[:, at], before[f"{name}.weight"][:, at])


def test_qpaca_on_a_model_that_came_quantised_takes_what_there_is(saved: Path) -> None:
    model = loaded(saved, four_bit=True)
    layer = model.model.layers[0].mlp.up_proj
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    run = rs.attach(model, rs.PaCA(rank=4))
    adapter: Any = run.adapter()["model.layers.0.mlp.up_proj"]
    assert torch.equal(adapter.origin, weight[:, adapter.channels])
    called = loaded(saved, four_bit=True)
    assert far(logits(model), logits(called)) < 0.02
    trained(run)
    if called.model.layers[0].mlp.up_proj.weight.shape != (4096, 1):  # where the CPU has AVX-512
        with pytest.raises(UnsupportedLayer, match="rounds their scales"):
            rs.attach(called, rs.PaCA(rank=4))


@pytest.mark.parametrize("eight", [False, True])
def test_qpaca_on_a_model_that_came_quantised_is_saved_and_loaded(saved: Path, eight: bool, tmp_path: Path) -> None:
    def fresh() -> Any:
        if not eight:
            return loaded(saved, four_bit=True)
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        return transformers.AutoModelForCausalLM.from_pretrained(
            saved, dtype=torch.bfloat16, quantization_config=config
        ).train()

    run = rs.attach(fresh(), rs.PaCA(rank=4))
    trained(run)
    y = logits(run.model)
    with run.disabled():
        before = logits(run.model)
    run.save(tmp_path / "run")
    again = rs.load(fresh(), tmp_path / "run")
    assert torch.equal(logits(again.model), y)
    with again.disabled():
        assert torch.equal(logits(again.model), before)
    for name, site in run.sites.items():
        other = again.sites[name].base
        assert torch.equal(site.base.at, other.at)  # type: ignore[arg-type]
        assert not len(other.own)  # type: ignore[arg-type]
    merged = again.merge()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert far(logits(merged), y) < 0.05


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("first", [rs.LoRA(rank=2), rs.PaCA(rank=2)], ids=lambda m: m.name)
def test_two_adapters_with_columns_of_their_own(first: rs.Method, kind: Any, tmp_path: Path) -> None:
    """What the first one keeps is the weight's own; what a later one borrows is not."""
    run = rs.attach(tiny(), first, base=kind, seed=1)
    ids = batch(0)[:, :-1]
    with torch.no_grad():
        y = run.model(ids)
    run.add("second", rs.PaCA(rank=3))
    run.use("second")
    optimizer = run.optimizer(lr=1e-2)
    for step in range(2):
        loss_of(run.model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        z = run.model(ids)
        run.use("default")
        assert torch.equal(run.model(ids), y), "the first one, as it was"
        with run.disabled():
            base = run.model(ids)
        run.save(tmp_path / "run")
        for again in (rs.load(tiny(), tmp_path / "run"), rs.restore(tiny(), run.state_dict())):
            assert torch.equal(again.model(ids), y)
            again.use("second")
            assert torch.equal(again.model(ids), z)
            with again.disabled():
                assert torch.equal(again.model(ids), base)
        run.use("second")
        run.delete("default")
        run.save(tmp_path / "run")
        assert torch.equal(rs.load(tiny(), tmp_path / "run").model(ids), z)


def test_the_state_of_a_model_says_where_its_columns_belong() -> None:
    one, other = (rs.attach(tiny(), rs.PaCA(rank=2), base="nf4", seed=seed) for seed in (1, 2))
    other.model.load_state_dict(one.model.state_dict())
    with torch.no_grad():
        assert torch.equal(other.model(batch(0)), one.model(batch(0)))
        with one.disabled(), other.disabled():
            assert torch.equal(other.model(batch(0)), one.model(batch(0)))


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize(
    "method", [rs.LoRA(rank=2), rs.LoRA(rank=2, dora=True), rs.PaCA(rank=2)], ids=["lora", "dora", "paca"]
)
def test_a_model_in_another_dtype(kind: Any, method: rs.Method) -> None:
    """Codes stay; what they stand for is of the new dtype."""
    run = rs.attach(tiny(), method, base=kind)
    codes = {name: site.base.codes.clone() for name, site in run.sites.items()}
    run.model.to(torch.bfloat16)
    for name, site in run.sites.items():
        assert torch.equal(site.base.codes, codes[name])
        assert site.base.dense().dtype == torch.bfloat16
    with torch.no_grad():
        y = run.model(batch(0))
        merged = run.merge()
        assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
        assert (merged(batch(0)) - y).abs().max() < 0.1


def test_an_update_asks_the_device_nothing_about_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    run = rs.attach(tiny(), rs.PaCA(rank=2), base="nf4")
    optimizer = run.optimizer(lr=1e-2)

    def update(step: int) -> None:
        loss_of(run.model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()

    update(0)
    with monkeypatch.context() as watched:
        watched.setattr(torch, "isin", lambda *_: pytest.fail("waited for the device"))
        update(1)
    copied = copy.deepcopy(run.model)
    with torch.no_grad():
        assert torch.equal(copied(batch(0)), run.model(batch(0)))


def test_dora_is_the_identity_on_what_is_held() -> None:
    run = rs.attach(tiny(), rs.LoRA(rank=2, dora=True), base="nf4")
    with torch.no_grad():
        y = run.model(batch(0))
        with run.disabled():
            assert (run.model(batch(0)) - y).abs().max() < 1e-5


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [rs.Full(), rs.GaLore(rank=2), rs.AdaRankGrad(rank=2), rs.SwitchLoRA(rank=2), rs.PreLoRA(window=1, windows=2)],
    ids=lambda method: method.name,
)
def test_what_trains_the_weights_is_refused(method: rs.Method, saved: Path) -> None:
    model = tiny()
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ConfigError, match="trains the weights of the model"):
        rs.attach(model, method, base="nf4", total_steps=20)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    with pytest.raises(UnsupportedLayer, match=r"is held in nf4|is in bfloat16"):
        rs.attach(loaded(saved, four_bit=True), method, total_steps=20)


def test_relora_must_say_that_it_may_lose() -> None:
    with pytest.raises(UnsupportedLayer, match="lossy=True"):
        rs.attach(tiny(), rs.ReLoRA(rank=2), base="nf4", total_steps=2000)
    rs.attach(tiny(), rs.ReLoRA(rank=2, lossy=True), base="nf4", total_steps=2000)
    with pytest.raises(UnsupportedLayer, match="redraw_every"):
        rs.attach(tiny(), rs.PaCA(rank=2, redraw_every=5), base="nf4")


def test_bad_bases(saved: Path) -> None:
    with pytest.raises(ConfigError, match="none of nf4"):
        rs.attach(tiny(), rs.LoRA(rank=2), base="nf5")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there is none"):
        rs.attach(nn.Sequential(nn.Conv1d(3, 4, 2)), rs.LoRA(rank=2, targets="0"), base="nf4")
    with torch.device("meta"):
        empty = tiny()
    with pytest.raises(ConfigError, match="no values yet"):
        rs.attach(empty, rs.LoRA(rank=2), base="nf4")
    with pytest.raises(UnsupportedLayer, match="held in nf4 already"):
        rs.attach(loaded(saved, four_bit=True), rs.LoRA(rank=2), base="fp4")


def test_what_nobody_targets_and_cannot_be_held_stays_dense() -> None:
    shared = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    shared[1].weight = shared[0].weight
    run = rs.attach(shared, rs.LoRA(rank=2, targets="2"), base="nf4")
    assert type(shared[0]) is nn.Linear
    assert shared[0].weight is shared[1].weight
    assert run.sites["2"].base.kind == "nf4"
    run = rs.attach(nn.Sequential(*twice()), rs.LoRA(rank=2, targets="0", tied="untie"), base="nf4")
    assert run.sites["0"].base.kind == "nf4"
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "l": nn.Linear(8, 8)})
    rs.attach(model, rs.LoRA(rank=2, targets="l"), base="nf4")
    assert type(model["attention"].out_proj).__name__ == "NonDynamicallyQuantizableLinear"


def twice() -> list[nn.Module]:
    one, other = nn.Linear(8, 8), nn.Linear(8, 8)
    other.weight = one.weight
    return [one, other]


def test_another_base_is_not_loaded_onto(saved: Path, tmp_path: Path) -> None:
    run = rs.attach(loaded(saved, four_bit=True), rs.LoRA(rank=2))
    run.save(tmp_path / "run")
    with pytest.raises(WrongBase, match="base in nf4"):
        rs.load(loaded(saved), tmp_path / "run")
    ours = rs.attach(tiny(), rs.LoRA(rank=2), base="nf4")
    with pytest.raises(WrongBase, match="holds its base as nf4, and this one as it came:"):
        rs.attach(tiny(), rs.LoRA(rank=2)).load_state_dict(ours.state_dict())
    one, other = (rs.attach(tiny(), rs.PaCA(rank=2), base="nf4", seed=seed) for seed in (1, 2))
    layers = len(one.sites)
    beside = f"nf4 with {2 * layers} columns of {layers} layers beside"
    with pytest.raises(
        WrongBase, match=rf"holds its base as {beside}, and this one as {beside}: .*same base= and seed"
    ):
        one.load_state_dict(other.state_dict())
    with pytest.raises(WrongBase, match=rf"holds its base as {beside}, and this one as it came: "):
        rs.attach(tiny(), rs.PaCA(rank=2)).load_state_dict(other.state_dict())
    rs.restore(tiny(), other.state_dict())
    ours.save(tmp_path / "ours")
    with pytest.raises(WrongBase, match="other values"):
        rs.load(tiny(seed=3), tmp_path / "ours")


def test_shift_does_not_round_away_what_was_trained() -> None:
    run = rs.attach(tiny(), rs.LoRA(rank=2), base="nf4")
    for adapter in run.adapter().values():
        nn.init.normal_(adapter.B)  # type: ignore[arg-type]
    y = loss_of(run.model, batch(0))
    with pytest.raises(rs.errors.AttachError, match="would round what was trained"):
        run.shift(rs.VeRA(rank=4))
    assert {type(site.base) for site in run.sites.values()} == {FourBit}
    assert run.method == rs.LoRA(rank=2)
    assert torch.equal(loss_of(run.model, batch(0)), y)
    plain = run.merge()
    rs.attach(plain, rs.VeRA(rank=4), base="nf4")


def test_each_weight_is_let_go_before_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is never a second copy of the model."""
    model = tiny(blocks=3)
    weights = [weakref.ref(module.weight) for module in model.modules() if isinstance(module, nn.Linear)]
    alive = []
    whole = FourBit.quantised.__func__  # type: ignore[attr-defined]

    def seen(cls: Any, *args: Any, **options: Any) -> Any:
        alive.append(sum(weight() is not None for weight in weights))
        return whole(cls, *args, **options)

    monkeypatch.setattr(FourBit, "quantised", classmethod(seen))
    rs.attach(model, rs.LoRA(rank=2, targets=("q", "up")), base="nf4")
    assert alive == list(range(len(weights), len(weights) - len(alive), -1))
    assert len(alive) >= 6


def test_interrupted_it_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny(), []
    whole = FourBit.quantised.__func__  # type: ignore[attr-defined]

    def once(cls: Any, *args: Any, **options: Any) -> Any:
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return whole(cls, *args, **options)

    monkeypatch.setattr(FourBit, "quantised", classmethod(once))
    with pytest.raises(KeyboardInterrupt) as caught:
        rs.attach(model, rs.LoRA(rank=2), base="nf4")
    assert any("load the model again" in note for note in caught.value.__notes__)
    assert not any(isinstance(module, (rs.core.site.Site, Dense)) for module in model.modules())  # type: ignore[attr-defined]


@pytest.mark.parametrize("rounds", [False, True])
def test_an_error_before_anything_was_rounded_does_not_say_otherwise(
    saved: Path, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a model whose layers came in 4 bits: those are as they came."""
    model = loaded(saved, four_bit=True)
    if rounds:
        model.model.layers[1].mlp.up_proj = nn.Linear(64, 128, bias=False, dtype=torch.bfloat16)
    monkeypatch.setattr(Run, "_look_out" if rounds else "_hold", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        rs.attach(model, rs.LoRA(rank=2), base="nf4")
    assert any("load the model again" in note for note in getattr(caught.value, "__notes__", ())) is rounds


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["blocks.1.up", "blocks.1.q"])
@pytest.mark.parametrize(
    ("kind", "value"), [("nf4", torch.inf), ("fp8", torch.nan), ("int8", 1e5), ("int8", -torch.inf)]
)
def test_a_weight_that_is_not_finite_is_refused_by_name_before_any_is_rounded(
    kind: Any, value: float, name: str
) -> None:
    """Adapted or not; int8 goes by way of fp16."""
    model = tiny(blocks=2)
    model.get_submodule(name).weight.data[3, 5] = value  # type: ignore[index,union-attr]
    before = [*model.modules(), *model.parameters()]
    with pytest.raises(UnsupportedLayer, match=rf"^{name} has weights that are not finite.*base=None") as caught:
        rs.attach(model, rs.LoRA(rank=2, targets=("q", "k")), base=kind)
    assert not getattr(caught.value, "__notes__", ())
    assert [*map(id, (*model.modules(), *model.parameters()))] == [*map(id, before)]
    model.get_submodule(name).weight.data[3, 5] = 0.0  # type: ignore[index,union-attr]
    rs.attach(model, rs.LoRA(rank=2, targets=("q", "k")), base=kind)


def test_what_stays_dense_may_hold_anything() -> None:
    model = tiny(blocks=2)
    with torch.no_grad():
        model.blocks[1].up.weight[3, 5] = torch.inf  # type: ignore[index,union-attr]
    rs.attach(model, rs.LoRA(rank=2, targets=("q", "k"), modules_to_save=("up",)), base="nf4")


# ---- exported onto what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["nf4", "fp4", "int8"])
def test_exported_requantised_it_is_what_transformers_loads(saved: Path, base: Any, tmp_path: Path) -> None:
    run = rs.attach(loaded(saved), rs.LoRA(rank=4, targets=("q_proj", "down_proj")), base=base)
    trained(run)
    y, before = logits(run.model), json.dumps(run.model.config.to_dict(), default=str)  # type: ignore[operator,union-attr]
    run.export(tmp_path / "few", format="merged", onto="requantised")
    assert torch.equal(logits(run.model), y)
    assert json.dumps(run.model.config.to_dict(), default=str) == before  # type: ignore[operator,union-attr]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "few", dtype=torch.bfloat16).train()
    merged = run.merge("requantised")
    layers = {name: m for name, m in merged.named_modules() if type(m).__module__.startswith("bitsandbytes")}
    assert len(layers) == 14
    for name, module in theirs.named_modules():
        assert (name in layers) is type(module).__module__.startswith("bitsandbytes")
        if name in layers:
            assert torch.equal(module.weight.view(-1), layers[name].weight.view(-1)), name  # type: ignore[operator,union-attr]
    ids = {"input_ids": IDS}
    assert torch.equal(theirs(**ids).logits, merged(**ids).logits)


def test_exported_onto_the_originals_it_is_what_merge_leaves(saved: Path, tmp_path: Path) -> None:
    run = rs.attach(loaded(saved), rs.LoRA(rank=4, targets=("q_proj", "down_proj")), base="nf4")
    trained(run)
    run.export(tmp_path / "model", format="merged", onto="original", original=saved)
    wrote, merged = loaded(tmp_path / "model").state_dict(), run.merge("original", saved).state_dict()
    assert wrote.keys() == merged.keys()
    assert all(torch.equal(wrote[name], merged[name]) for name in wrote)
    was = loaded(saved).state_dict()
    moved = {name for name in was if not torch.equal(was[name], wrote[name])}
    assert len(moved) == 4, moved  # what was not adapted is the original again


@pytest.mark.parametrize("four_bit", [True, False])
def test_an_adapter_whose_base_peft_has_not_is_exported_with_a_warning(
    saved: Path, four_bit: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PaCA's columns: where the base was rounded by attach they were left out of the codes."""
    run = rs.attach(loaded(saved, four_bit), rs.PaCA(rank=48), base=None if four_bit else "nf4")
    trained(run)
    y = logits(run.model)
    run.export(tmp_path / "merged", format="merged")
    assert far(logits(loaded(tmp_path / "merged")), y) < 0.02
    assert not caplog.messages
    run.export(tmp_path / "peft")
    off = far(logits(rs.load(loaded(saved, four_bit=True), tmp_path / "peft").model), y)
    if four_bit:
        assert not caplog.messages
        assert off < 0.02
    else:
        assert len(caplog.messages) == 1
        assert 'format="merged", or train on a model that came quantised' in caplog.text
        assert off > 0.02


def test_exports_that_cannot_be(saved: Path, tmp_path: Path) -> None:
    run = rs.attach(loaded(saved), rs.LoRA(rank=4), base="fp8")
    with pytest.raises(rs.errors.ExportError, match="our own format"):
        run.export(tmp_path / "few", format="merged", onto="requantised")
    with pytest.raises(ConfigError, match="is for a plain model"):
        run.export(tmp_path / "peft", onto="requantised")
    with pytest.raises(ConfigError, match="belong together"):
        run.export(tmp_path / "few", format="merged", onto="original")
    assert not any(tmp_path.iterdir())
    run.export(tmp_path / "few", format="merged")
