"""What becomes of a step that is smaller than the distance to the next bf16 number, and random rounding itself."""

import math

import pytest
import torch
from torch import nn

import rankshift as rs
from rankshift.core.errors import ConfigError
from rankshift.core.random import Key, dither
from rankshift.optim import Adam, Clock, Optimizer, Project, rounding
from rankshift.optim import adam as adam_of
from rankshift.optim.moments import Blocks, Wide

CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16


def noise(shape, word=1):
    return dither(word, math.prod(shape), 0, CPU).reshape(shape)


def gradients(steps, shape=(48, 32), dtype=BF16):
    for step in range(steps):
        yield torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(dtype)


def weight(dtype=BF16, shape=(48, 32)):
    return nn.Parameter((1 + torch.rand(shape, generator=torch.Generator().manual_seed(7))).to(dtype))


def stepped(p, transform, steps, lr, seed=0, decay=0.0, dtype=None):
    """An optimizer after some updates of ``p``."""
    optimizer = Optimizer([{"params": [p]}], [transform], lr=lr, weight_decay=decay, seed=seed)
    for g in gradients(steps, p.shape):
        p.grad = g.to(dtype or p.dtype)
        optimizer.step()
    return optimizer


TRANSFORMS = {
    "adam": lambda how: Adam(store=Wide(), rounding=how),
    "project": lambda how: Project(rank=6, clock=Clock(4), transport="square", rounding=how),
    "fira": lambda how: Project(rank=6, clock=Clock(4), transport="square", residual=True, rounding=how),
}


# ---- the noise


def test_the_noise_is_splitmix64():
    """Against the published first numbers for the seed 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    words = [(number >> shift) & 0xFFFF for number in known for shift in (0, 16, 32, 48)]
    assert dither(1234567, 20, 0, CPU).tolist() == words


def test_a_part_of_the_noise_is_drawn_alone(monkeypatch):
    whole = dither(99, 1000, 0, CPU)
    for first, count in ((0, 1000), (1, 3), (4, 8), (333, 667), (999, 1), (10, 0)):
        assert torch.equal(dither(99, count, first, CPU), whole[first : first + count])
    monkeypatch.setattr("rankshift.core.random._DITHER", 101)
    assert torch.equal(dither(99, 997, 3, CPU), whole[3:])


def test_the_noise_is_even_and_unrelated_between_keys():
    a, b = (dither((Key(0) / "w" / step).word, 1 << 18, 0, CPU).double() / 65536 for step in (1, 2))
    counts = torch.histc(a, 64, 0, 1)
    assert ((counts - 4096).abs() < 5 * 64).all()
    for other in (b, a.roll(1), a.roll(4), b.roll(1)):
        assert torch.corrcoef(torch.stack([a, other]))[0, 1].abs() < 5 / 512


# ---- random rounding


def grid(value, dtype):
    """The numbers of a dtype on either side of ``value``, by arithmetic in float64."""
    digits, smallest = {BF16: (7, -126), FP16: (10, -14)}[dtype]
    exponent = torch.frexp(value.double()).exponent - 1
    spacing = 2.0 ** (exponent.clamp(min=smallest) - digits).double()
    low = (value.double() / spacing).floor() * spacing
    return low, low + spacing


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_weight_becomes_one_of_its_two_neighbours_and_itself_on_average(dtype):
    g = torch.Generator().manual_seed(0)
    value = torch.randn(400, generator=g) * 10.0 ** torch.randint(-7, 3, (400,), generator=g)
    value[:4] = torch.tensor([0.0, 1.0, -1.5, 2.0**-20])
    draws = 4000
    drawn = rounding.stochastic(value.expand(draws, -1).contiguous(), dtype, noise((draws, 400)))
    got = drawn.to(dtype)
    assert torch.equal(got.float(), drawn)  # nothing is left to round
    low, high = grid(value, dtype)
    got = got.double()
    assert ((got == low) | (got == high)).all()
    p = (value.double() - low) / (high - low)
    spread = (high - low) * (p * (1 - p) / draws).sqrt()
    assert ((got.mean(0) - value.double()).abs() <= 5 * spread + (high - low) * 2.0**-13).all()


def test_what_16_bits_can_hold_is_not_moved():
    for dtype in (BF16, FP16):
        value = torch.randn(1000, generator=torch.Generator().manual_seed(0)).mul(1e-3).to(dtype).float()
        assert torch.equal(rounding.stochastic(value, dtype, noise((1000,))), value)


def test_what_is_no_number_does_not_become_one():
    """A GPU's NaN is all ones below the sign: one more and its bits are those of −0."""
    for dtype in (BF16, FP16):
        value = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000], dtype=torch.int32).view(torch.float32)
        got = rounding.stochastic(value.expand(500, 4).contiguous(), dtype, noise((500, 4)))
        assert got[:, :3].isnan().all()
        assert (got[:, 3] == float("inf")).all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_small_steps_move_a_bf16_weight_except_to_the_nearest(name):
    moved = {}
    for how in rounding.ROUNDINGS:
        p = weight()
        before = p.detach().double()
        stepped(p, TRANSFORMS[name](how), 40, lr=2e-5)
        moved[how] = p.detach().double() - before
    p = weight(torch.float64)
    with torch.no_grad():
        p.copy_(weight())
    before = p.detach().clone()
    stepped(p, TRANSFORMS[name]("nearest"), 40, lr=2e-5)
    exact = p.detach() - before
    assert exact.abs().max() > 1e-4  # bf16 numbers from 1 to 2 lie 2⁻⁷ = 8e-3 apart
    assert (moved["nearest"] == 0).all()
    assert (moved["stochastic"] != 0).any()
    # a move of 2⁻⁷ where 1e-4 was due; the sum over 1536 weights tells whether they are right on average
    towards = (exact.sign() * moved["stochastic"]).sum()
    spread = (exact.abs().sum() * 2.0**-7).sqrt()
    assert (towards - exact.abs().sum()).abs() < 5 * spread


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_master_is_the_same_training_in_fp32(name):
    """bf16 weights from a master: the fp32 weights, on the same gradients, to the bit, and rounded."""
    p, q = weight(), nn.Parameter(weight().detach().float())
    optimizer = stepped(p, TRANSFORMS[name]("master"), 12, lr=1e-3, decay=0.1)
    stepped(q, TRANSFORMS[name]("nearest"), 12, lr=1e-3, decay=0.1, dtype=torch.float32)
    master = optimizer.state[p]["master"]
    assert master.dtype == torch.float32
    assert torch.equal(master, q)
    assert torch.equal(p, q.to(BF16))


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adam_with_a_master_is_torch_adamw_on_an_fp32_copy(decay):
    p, copy = weight(), nn.Parameter(weight().detach().float())
    stepped(p, Adam(store=Wide(), rounding="master"), 30, lr=1e-3, decay=decay)
    theirs = torch.optim.AdamW([copy], lr=1e-3, weight_decay=decay)
    for g in gradients(30):
        copy.grad = g.float()
        theirs.step()
    assert torch.equal(p, copy.to(BF16))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_random_rounding_is_repeated_by_the_same_seed_only(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        p = weight()
        stepped(p, TRANSFORMS[name]("stochastic"), 6, lr=1e-3, seed=seed)
        found.append(p.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_of_one_shape_are_rounded_unlike():
    p, q = weight(), weight()
    optimizer = Optimizer([{"params": [p, q]}], [Adam(store=Wide(), rounding="stochastic")], lr=1e-3)
    p.grad, q.grad = (next(gradients(1)) for _ in range(2))
    optimizer.step()
    assert not torch.equal(p, q)


@pytest.mark.parametrize("how", rounding.ROUNDINGS)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_weights_need_none_of_them(name, how, dtype):
    p, q = weight(dtype), weight(dtype)
    optimizer = stepped(p, TRANSFORMS[name](how), 5, lr=1e-3, decay=0.1)
    stepped(q, TRANSFORMS[name]("nearest"), 5, lr=1e-3, decay=0.1)
    assert torch.equal(p, q)
    assert "master" not in optimizer.state[p]


def test_a_weight_that_was_loaded_meanwhile_is_not_taken_back():
    p = weight()
    optimizer = stepped(p, Adam(store=Wide(), rounding="master"), 3, lr=1e-3)
    master = optimizer.state[p]["master"].clone()
    with torch.no_grad():
        p[:5] = 7.0
    p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert (p[:5] == 7).all()
    assert torch.equal(optimizer.state[p]["master"][5:], master[5:])


# ---- as a method says it


def model(dtype):
    return nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 8)).to(dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("kind", [rs.GaLore, rs.AdaRankGrad])
def test_how_16_bits_are_rounded_must_be_said(kind, dtype):
    run = rs.attach(model(dtype), kind(rank=4))
    with pytest.raises(ConfigError) as error:
        run.optimizer()
    for how in rounding.ROUNDINGS:
        assert f'rounding="{how}"' in str(error.value)
    assert "0.weight" in str(error.value)


def test_fp32_models_need_nothing_and_unknown_words_are_refused():
    run = rs.attach(model(torch.float32), rs.GaLore(rank=4))
    optimizer = run.optimizer()
    assert Adam() in optimizer.transforms  # what is not projected is torch's AdamW
    for field in ({"rounding": "up"}, {"moments": "4bit"}):
        with pytest.raises(ConfigError, match=next(iter(field.values()))):
            rs.GaLore(**field)


@pytest.mark.parametrize("how", ["stochastic", "master"])
def test_what_is_not_projected_is_treated_alike(how):
    """Norms in bf16 move by small steps too, and their moments are in fp32."""
    run = rs.attach(model(BF16).train(), rs.GaLore(rank=4, rounding=how))
    optimizer = run.optimizer(lr=1e-4)
    before = {name: p.detach().clone() for name, p in run.trainable()}
    for step in range(60):
        x = torch.randn(6, 16, generator=torch.Generator().manual_seed(step)).to(BF16)
        run.model(x).float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in run.trainable():
        state = optimizer.state[p]
        assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}, name
        where = state["master"] if how == "master" else p
        assert not torch.equal(where, before[name].to(where.dtype)), name


def test_bytes_with_a_master():
    run = rs.attach(model(BF16).train(), rs.GaLore(rank=4, rounding="master"))
    optimizer = run.optimizer(lr=1e-3)
    run.model(torch.ones(2, 16, dtype=BF16)).float().square().sum().backward()
    optimizer.step()
    p = dict(run.trainable())["0.weight"]  # (24, 16): moments (24, 4), basis (16, 4), mass (4,)
    sizes = {name: t.untyped_storage().nbytes() for name, t in optimizer.state[p].items() if t.dim()}
    assert sum(sizes.values()) == 4 * (2 * 24 * 4 + 16 * 4 + 4 + 24 * 16)
    assert sizes["master"] == 4 * 24 * 16


def test_an_fp32_weight_is_stepped_where_it_lies():
    """One product into the weight; conv weights with their channels last have no such view, and go another way."""
    for shape, memory in (((48, 32), torch.contiguous_format), ((8, 4, 3, 3), torch.channels_last)):
        from rankshift.core.form import ConvForm, Form

        form = Form() if len(shape) == 2 else ConvForm(4, (3, 3), (1, 1), 0, (1, 1))
        moved = []
        for where in (memory, torch.contiguous_format):
            p = nn.Parameter(weight(torch.float64, shape).detach().to(memory_format=where))
            address = p.data_ptr()
            stepped(p, Project(rank=3, form=form), 5, lr=1e-2, decay=0.1)
            assert p.data_ptr() == address
            assert p.is_contiguous(memory_format=where)
            moved.append(p.detach().clone())
        torch.testing.assert_close(*moved, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("how", rounding.ROUNDINGS)
@pytest.mark.parametrize("store", [Wide(), Blocks(least=0)], ids=["fp32", "8 bits"])
@pytest.mark.parametrize("width", [3, 40, 300])
def test_a_large_tensor_is_stepped_piece_by_piece_to_the_same_bits(store, how, width, monkeypatch):
    """As an embedding is, which would otherwise be held in fp32 several times over."""

    def trained():
        ps = [weight(BF16, (900, width)), weight(BF16, (5,)), weight(BF16, ())]
        optimizer = Optimizer([{"params": ps}], [Adam(store=store, rounding=how)], lr=1e-3, weight_decay=0.1)
        for step in range(3):
            for i, p in enumerate(ps):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(9 * step + i)).to(BF16)
            optimizer.step()
        return [t for p in ps for t in (p, *optimizer.state[p].values())]

    whole = trained()
    sizes = []
    kernel = adam_of.adam
    monkeypatch.setattr(adam_of, "_TOGETHER", 257 * width)
    monkeypatch.setattr(rounding, "_TOGETHER", 100)
    monkeypatch.setattr(
        adam_of, "adam", lambda ps, *a, **k: (sizes.append(sum(p.numel() for p in ps)), kernel(ps, *a, **k))
    )
    for a, b in zip(trained(), whole, strict=True):
        assert torch.equal(a, b)
    assert max(sizes) == 256 * width


def test_a_large_weight_is_rounded_piece_by_piece_to_the_same_bits(monkeypatch):
    project = TRANSFORMS["project"]("stochastic")
    found = []
    for size in (1 << 24, 100):
        monkeypatch.setattr(rounding, "_TOGETHER", size)
        p = weight(BF16, (700, 9))
        stepped(p, project, 3, lr=1e-2)
        found.append(p.detach())
    assert torch.equal(*found)
