"""What a layer in fewer bits is to the model around it: its hooks, mode, attributes, flags, and who shards it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import rankshift as rs
from laws.pool import Pool
from laws.world import batch, loss_of, tiny
from rankshift.core.errors import AttachError, WrongBase

KINDS = ["nf4", "int8", "fp8"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["detach", "merge", "requantised"])
def test_hooks_run_once_and_the_mode_stays(kind: Any, end: str) -> None:
    """At layers with an adapter and without, with none acting, after one is added, and on what is given back."""
    model = tiny(blocks=2).eval()
    names = [f"blocks.0.{leaf}" for leaf in ("q", "k", "v", "o", "up", "down")]
    runs: Counter[str] = Counter()
    hooks = []
    for name in names:
        layer = model.get_submodule(name)
        hooks.append(layer.register_forward_hook(lambda *_, name=name: runs.update([name])))
        hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: runs.update([f"before {name}"])))
    expected = 0

    def once_more() -> None:
        nonlocal expected
        expected += 1
        loss_of(model, batch(0))
        assert set(runs.values()) == {expected}
        assert len(runs) == 2 * len(names)

    run = rs.attach(model, rs.LoRA(rank=2, targets=("q",)), base=kind)
    assert not any(site.base.training for site in run.sites.values())
    assert not model.blocks[0].k.training  # type: ignore[index,union-attr]
    once_more()
    with run.disabled():
        once_more()
    run.add("other", rs.LoRA(rank=2, targets=("k",)))
    once_more()
    with run.disabled():
        once_more()
    copied = copy.deepcopy(model)
    model.blocks[1].train()  # type: ignore[index,operator]
    if end == "detach":
        run.detach()
    else:
        run.merge("dequantised" if end == "merge" else "requantised")
    once_more()
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type]
        layers = [block.get_submodule(name.rpartition(".")[2]) for name in names]
        assert {layer.training for layer in layers} == {index == 1}
        assert not {"Site", "Held", "FourBit", "Int8", "FP8"} & {type(layer).__name__ for layer in layers}
    for hook in hooks:
        hook.remove()
    loss_of(model, batch(0))
    assert set(runs.values()) == {expected}, "a hook that was removed runs"
    loss_of(copied, batch(0))
    assert set(runs.values()) == {expected + 1}, "a copy has the hooks that it was copied with"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_model_code_may_ask_of_a_layer(kind: Any, dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    shapes = {name: m.weight.shape for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    run = rs.attach(model, rs.LoRA(rank=2, targets=("q",)), base=kind)

    def asked(dtype: torch.dtype) -> None:
        for name in ("blocks.0.q", "blocks.0.down"):
            layer: Any = model.get_submodule(name)
            weight: Tensor = layer.weight
            assert (weight.shape, weight.dtype, weight.device.type) == (shapes[name], dtype, "cpu")
            assert (layer.out_features, layer.in_features) == tuple(weight.shape)
            assert not weight.requires_grad
            assert weight.isnan().all(), "there are no values: who reads them sees it"
            assert weight.untyped_storage().nbytes() == dtype.itemsize
            assert not hasattr(layer, "quant_state")

    asked(dtype)
    model.to(torch.float16)
    asked(torch.float16)
    assert not [name for name in model.state_dict() if name.endswith(("q.base.weight", "down.weight"))]
    back = run.detach()
    if kind == "fp8":
        layer: Any = back.get_submodule("blocks.0.down")
        assert (layer.weight.shape, layer.weight.dtype) == (shapes["blocks.0.down"], torch.float16)


class Casting(nn.Module):
    """T5's way: x takes the dtype of the weight that it is multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.to(self.first.weight.dtype)).relu()
        y: Tensor = self.second(x.to(self.second.weight.dtype))
        return y


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_is_cast_to_the_dtype_of_the_weight(kind: Any) -> None:
    torch.manual_seed(0)
    model, x = Casting(), torch.randn(5, 64)
    want = model(x)
    rs.attach(model, rs.LoRA(rank=2, targets=("first",)), base=kind)
    assert (model(x) - want).norm() / want.norm() < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_keeps_wide_stays(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    """T5's second matrices, which transformers never quantises."""
    settings = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 1, "vocab_size": 97}
    config = transformers.T5Config(**settings, feed_forward_proj="gated-gelu", decoder_start_token_id=0)  # type: ignore[arg-type,call-arg]
    torch.manual_seed(0)
    model: Any = transformers.T5ForConditionalGeneration(config).bfloat16()
    model.eval()
    ids = torch.arange(24).reshape(2, 12)
    want = model(input_ids=ids, labels=ids).logits
    run = rs.attach(model, rs.LoRA(rank=2), base=kind)
    assert "wo stay as they are" in caplog.text
    assert {site.base.kind for name, site in run.sites.items() if name.endswith("wo")} == {"dense"}
    assert {site.base.kind for name, site in run.sites.items() if not name.endswith("wo")} == {kind}
    assert (model(input_ids=ids, labels=ids).logits - want).norm() / want.norm() < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_codes_do_not_train_and_torch_says_so(kind: Any) -> None:
    """They are parameters, so that FSDP2 shards them, and integers; what is named beside them trains."""
    model = tiny()
    run = rs.attach(model, rs.LoRA(rank=2), base=kind)
    with pytest.raises(RuntimeError, match="floating point dtype can require gradients"):
        model.requires_grad_(True)
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())

    run = rs.attach(tiny(), rs.LoRA(rank=2), base=kind)
    run.model.embed.requires_grad_(True)  # type: ignore[operator,union-attr]
    codes = {name: p.clone() for name, p in run.model.named_parameters() if not p.is_floating_point()}
    before = run.model.embed.weight.detach().clone()  # type: ignore[union-attr,operator]
    assert "embed.weight" in dict(run.trainable())
    optimizer = run.optimizer(lr=1e-2)
    loss_of(run.model, batch(0)).backward()
    optimizer.step()
    assert not torch.equal(run.model.embed.weight, before)  # type: ignore[arg-type,union-attr]
    assert all(torch.equal(run.model.get_parameter(name), value) for name, value in codes.items())


# ---- originals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_originals_are_read_and_never_written(dtype: torch.dtype, tmp_path: Any) -> None:
    """Of the dtype and device that the merged weight has: what is added to is a copy."""
    model = tiny().to(dtype)
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = {name: p.clone() for name, p in originals.items()}
    run = rs.attach(model, rs.LoRA(rank=2, targets=("q", "down")), base="nf4")
    for adapter in run.adapter().values():
        nn.init.normal_(adapter.B)  # type: ignore[arg-type]
    run.export(tmp_path, format="merged", onto="original", original=originals)
    assert all(torch.equal(originals[name], kept[name]) for name in kept)
    with run.merged("original", originals):
        pass
    merged = run.merge("original", originals)
    assert all(torch.equal(originals[name], kept[name]) for name in kept)
    assert not torch.equal(merged.blocks[0].q.weight, kept["blocks.0.q.weight"])  # type: ignore[index,union-attr,arg-type]
    assert torch.equal(merged.blocks[0].k.weight, kept["blocks.0.k.weight"])  # type: ignore[index,union-attr,arg-type]
    with torch.no_grad():
        for p in merged.parameters():
            p.add_(1)
    assert all(torch.equal(originals[name], kept[name]) for name in kept), "the merged model is made of them"


def test_originals_of_another_shape_are_another_model(tmp_path: Any) -> None:
    model = tiny()
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = rs.attach(model, rs.LoRA(rank=2, targets=("q",)), base="nf4")
    y = loss_of(run.model, batch(0))
    for name, shape in (
        ("blocks.0.q.weight", (12, 13)),
        ("blocks.0.up.weight", (12, 18)),
        ("blocks.0.k.weight", (144,)),
    ):
        wrong = originals | {name: torch.zeros(shape)}
        out, into = originals[name].shape
        with pytest.raises(
            WrongBase, match=rf"{name} is \({out}, {into}\) here, and the original base has .{shape[0]},"
        ):
            run.merge("original", wrong)
        with pytest.raises(WrongBase, match="it is another model"):
            run.export(tmp_path / "out", format="merged", onto="original", original=wrong)
    with pytest.raises(WrongBase, match=r"blocks.0.v.weight is \(12, 12\) here, and the original base lacks it"):
        run.merge("original", {name: p for name, p in originals.items() if name != "blocks.0.v.weight"})
    assert not list(tmp_path.iterdir())
    assert torch.equal(loss_of(run.model, batch(0)), y)


# ---- codes that FSDP2 is told to leave alone -------------------------------------------------------------------------


@pytest.fixture(name="two", scope="module")
def two_fixture() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.stop()


def left_out() -> None:
    from torch.distributed.fsdp import fully_shard

    run = rs.attach(tiny(), rs.LoRA(rank=2), base="nf4")
    want = loss_of(run.model, batch(0)).detach()
    codes: Any = {p for p in run.model.parameters() if not p.is_floating_point()}
    fully_shard(run.model, ignored_params=codes)
    optimizer = run.optimizer(lr=1e-2)
    loss = loss_of(run.model, batch(0))
    torch.testing.assert_close(loss.detach(), want)
    loss.backward()
    optimizer.step()
    for act in (run.merge, run.merged().__enter__):
        with pytest.raises(AttachError, match="sharded by FSDP2"):
            act()
    with pytest.raises(AttachError, match="sharded already"):
        run.add("other", rs.LoRA(rank=2))


def test_codes_that_are_left_out_of_sharding(two: Pool) -> None:
    """They work as they are; a merge, which needs all to be in one piece, is refused all the same."""
    two.run(left_out)


def four_bit(folder: Path, stored: torch.dtype) -> Any:
    """What transformers loads in nf4, computing in fp32, with its codes as numbers of this dtype."""
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=stored,
    )  # fmt: skip
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=options, dtype=torch.float32)
    return found.train()


def losses_of(run: rs.Run) -> list[float]:
    ids, found = torch.arange(24).reshape(2, 12), []
    optimizer = run.optimizer(lr=1e-2)
    for _ in range(3):
        loss = run.model(input_ids=ids, labels=ids).loss
        found.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def half_of(folder: Path, stored: torch.dtype) -> tuple[list[float], set[float], set[torch.dtype]]:
    from torch.distributed.fsdp import fully_shard

    run = rs.attach(four_bit(folder, stored), rs.LoRA(rank=2))
    for layer in run.model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(run.model)
    codes: list[Any] = [site.base.codes for site in run.sites.values()]
    return losses_of(run), {c.to_local().nbytes / c.nbytes for c in codes}, {c.dtype for c in codes}


@pytest.mark.parametrize("stored", [torch.uint8, torch.bfloat16])
def test_codes_that_transformers_loaded_are_sharded_however_they_were_stored(
    two: Pool, stored: torch.dtype, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = four_bit(tmp_path, stored)
    assert model.model.layers[0].mlp.up_proj.weight.dtype is stored
    alone = losses_of(rs.attach(model, rs.LoRA(rank=2)))
    assert alone[2] < alone[0]
    one, other = two.run(half_of, tmp_path, stored)
    assert one == other
    losses, shares, dtypes = one
    assert losses == pytest.approx(alone, abs=1e-5)
    assert shares == {0.5}
    assert dtypes == {torch.uint8}


def test_a_merge_in_fp32_leaves_nothing_out() -> None:
    """In bf16 the sum is rounded once, by a share of W, whatever small ΔW is."""
    run = rs.attach(tiny().bfloat16(), rs.LoRA(rank=2), base="nf4")
    for adapter in run.adapter().values():
        nn.init.normal_(adapter.B, std=0.002)  # type: ignore[arg-type]
    ids = batch(0)
    rounded = run.parity(ids)
    run.model.float()
    exact = run.parity(ids)
    assert rounded.median > 0.01
    assert exact.median < 1e-5
    assert exact.largest < 1e-5
    assert {p.dtype for p in run.merge().parameters()} == {torch.float32}
