"""Moments in 8 bits: the numbers they can be, what they cost, and that training on them is Adam."""

import io
import math

import pytest
import torch
from torch import nn

import rankshift as rs
from rankshift.core.random import dither
from rankshift.optim import Adam, Clock, Optimizer, Project
from rankshift.optim.moments import Blocks, Wide, decode, encode

HALF = 1 << 15  # noise that takes the nearest


def noise(shape, word=1):
    return dither(word, math.prod(shape), 0, torch.device("cpu")).reshape(shape)


def codes(unsigned):
    return decode(torch.arange(256, dtype=torch.uint8), unsigned, torch.float64)


def stored(name, value, store=None):
    """A value after it was written and read again; the state."""
    store = store or Blocks(least=0)
    state = {"key": torch.tensor(3), "step": torch.tensor(1)}
    state |= store.init(name, tuple(value.shape), value, False)
    store.write(state, name, value.clone())
    return store.read(state, name), state


def storage(state):
    return sum(t.untyped_storage().nbytes() for t in state.values() if torch.is_tensor(t) and t.dim())


# ---- the map


@pytest.mark.parametrize("unsigned", [False, True])
def test_the_map_is_that_of_bitsandbytes_but_for_its_lowest_number(unsigned):
    theirs = pytest.importorskip("bitsandbytes.functional").create_dynamic_map(signed=not unsigned).double()
    assert len(theirs) == 256
    torch.testing.assert_close(codes(unsigned)[1:], theirs[1:], rtol=2e-7, atol=0)
    assert codes(unsigned)[0] == (0 if unsigned else -1)


@pytest.mark.parametrize("unsigned", [False, True])
def test_rounding_in_the_middle_takes_the_nearest_as_bitsandbytes_does(unsigned):
    library = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    x = x.square() if unsigned else x
    absmax = x.abs().amax(-1, keepdim=True)
    mine = encode(x / absmax, unsigned, torch.full(x.shape, HALF, dtype=torch.int32))
    nearest = (x.double() / absmax.double())[..., None].sub(codes(unsigned)).abs().amin(-1)
    error = (decode(mine, unsigned, torch.float64) - x.double() / absmax.double()).abs()
    assert (error <= nearest + 1e-6).logical_or((unsigned and x > 0) & (mine == 1)).all()

    theirs, quant = library.quantize_blockwise(x, code=library.create_dynamic_map(signed=not unsigned), blocksize=256)
    assert torch.equal(quant.absmax, absmax.flatten())
    assert (mine == theirs.view_as(mine)).double().mean() > 0.95  # theirs is not always the nearest
    back = library.dequantize_blockwise(theirs, quant)
    assert error.mean() <= (back.double() - x).div(absmax).abs().mean() * 1.001


@pytest.mark.parametrize("unsigned", [False, True])
def test_a_number_becomes_one_of_its_two_neighbours_and_itself_on_average(unsigned):
    x = torch.linspace(0.0 if unsigned else -1.0, 1.0, 301, dtype=torch.float64)
    draws = 4000
    got = decode(encode(x.expand(draws, -1), unsigned, noise((draws, 301))), unsigned, torch.float64)
    known = codes(unsigned)
    at = torch.searchsorted(known, x, right=True).sub(1).clamp(0, 254)
    low, high = known[at], known[at + 1]
    assert ((got == low) | (got == high)).all()
    p = (x - low) / (high - low)
    spread = (high - low) * (p * (1 - p) / draws).sqrt()
    assert ((got.mean(0) - x).abs() <= 5 * spread + (high - low) * 2.0**-15).all()


def test_squares_are_never_negative_and_become_zero_only_from_zero():
    v = torch.rand(8, 512, generator=torch.Generator().manual_seed(0)) ** 30
    v[:, ::7] = 0
    for step in range(20):
        state = {"key": torch.tensor(3), "step": torch.tensor(step)} | Blocks(least=0).init("v_sq", (8, 512), v, False)
        Blocks().write(state, "v_sq", v)
        got = Blocks().read(state, "v_sq")
        assert (got >= 0).all()
        assert torch.equal(got == 0, v == 0)


def test_a_block_of_zeros_and_one_of_the_smallest_numbers():
    value = torch.zeros(3, 256)
    value[1] = 1e-40
    value[2, 5] = -7.0
    got, _ = stored("exp_avg", value)
    assert torch.isfinite(got).all()
    assert torch.equal(got[0], value[0])
    assert torch.equal(got[2], value[2])


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_magnitude_of_a_block_is_kept_exactly(sign):
    value = torch.rand(5, 256, generator=torch.Generator().manual_seed(0)) - 0.5
    value[:, 100] = sign * torch.tensor([3.0, 0.7, 0.51, 5e5, 11.0])
    assert torch.equal(stored("exp_avg", value)[0][:, 100], value[:, 100])


# ---- blocks and bytes

SHAPES = {  # shape: blocks, by hand
    (6, 256): 6,
    (6, 512): 12,
    (6, 300): 12,  # 256 and 44 in each row
    (64, 128): 32,
    (65, 128): 33,
    (64, 4): 1,
    (7, 3): 1,  # 64 rows fit
    (70, 3): 2,
    (70, 100): 35,
    (3, 40, 16): 9,  # 640 numbers each
    (6, 3, 3, 3): 1,  # 8 entries of 27 fit
    (1, 1): 1,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_byte_a_number_and_four_a_block(shape):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got, state = stored("exp_avg", value)
    assert got.shape == value.shape
    assert state["exp_avg"].shape == value.shape
    assert (state["exp_avg"].dtype, state["exp_avg_absmax"].dtype) == (torch.uint8, torch.float32)
    assert storage(state) == math.prod(shape) + 4 * SHAPES[shape]
    assert (got - value).abs().max() <= 0.0142 * value.abs().max()  # as far as two codes lie apart at the most


@pytest.mark.parametrize("width", [1, 2, 4, 64, 128, 256, 512, 768, 1024])
def test_the_published_formula_where_the_width_is_a_power_of_two_or_a_multiple_of_the_block(width):
    rows = 1024
    _, state = stored("exp_avg", torch.ones(rows, width))
    assert storage(state) == rows * width * (1 + 4 / 256)


@pytest.mark.parametrize("width", [3, 5, 100, 130, 257, 300, 1000])
def test_and_at_most_twice_its_overhead_elsewhere(width):
    rows = 777
    _, state = stored("exp_avg", torch.ones(rows, width))
    assert storage(state) <= rows * width * (1 + 4 / 128) + 4


def test_blocks_do_not_know_their_neighbours():
    value = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    other = value.clone()
    other[10:12] *= 1000  # rows 10 and 11 are one block
    a, b = stored("exp_avg", value)[0], stored("exp_avg", other)[0]
    assert torch.equal(a[:10], b[:10])
    assert torch.equal(a[12:], b[12:])


def test_float64_stays_float64():
    value = torch.randn(8, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got, state = stored("exp_avg", value)
    assert got.dtype == state["exp_avg_absmax"].dtype == torch.float64


@pytest.mark.parametrize("shape", [(), (3,), (100_000,), (64, 63)], ids=str)
def test_what_is_small_and_vectors_stay_in_fp32(shape):
    p = torch.zeros(shape, dtype=torch.bfloat16)
    state = Adam(store=Blocks()).init(p)
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    assert not any(name.endswith("absmax") for name in state)


def test_a_projected_moment_is_in_8_bits_however_small_its_rank():
    p = torch.zeros(128, 64)
    for rank in (2, 4, 64):
        state = Project(rank=64, store=Blocks()).init(p, None, rank)
        assert state["exp_avg"].dtype == torch.uint8
        expected = 2 * (128 * rank * (1 + 4 / 256))
        names = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")
        assert storage({name: state[name] for name in names}) == expected


# ---- training


def noisy(scale, steps, quiet=None, after=0):
    """Gradients of 128×64 numbers of their own scales; those in ``quiet`` a tenth as large from some update on."""
    g = torch.Generator().manual_seed(1)
    mean = 0.3 * scale * torch.randn(scale.shape, generator=g).sign()
    for t in range(steps):
        grad = mean + scale * torch.randn(scale.shape, generator=g)
        yield grad if quiet is None or t < after else torch.where(quiet, 0.1 * grad, grad)


def adam_in_float64(gradients, lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8):
    """Kingma & Ba's algorithm, number by number; weights from zero, and the second moment."""
    w = m = v = torch.zeros(128, 64, dtype=torch.float64)
    for t, g in enumerate(gradients, 1):
        g = g.double()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        w = w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return w, v


def in_8_bits(gradients, store, lr=1e-3, betas=(0.9, 0.99)):
    p = nn.Parameter(torch.zeros(128, 64))
    optimizer = Optimizer([{"params": [p]}], [Adam(store=store)], lr=lr, betas=betas)
    for g in gradients:
        p.grad = g
        optimizer.step()
    return p.detach().double(), store.read(optimizer.state[p], "exp_avg_sq").double()


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def scale():
    return torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).exp()


def test_three_hundred_updates_stay_near_float64_and_nearer_than_bitsandbytes(scale):
    library = pytest.importorskip("bitsandbytes")
    exact, _ = adam_in_float64(noisy(scale, 300))
    mine, _ = in_8_bits(noisy(scale, 300), Blocks())
    p = nn.Parameter(torch.zeros(128, 64))
    theirs = library.optim.Adam8bit([p], lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
    for g in noisy(scale, 300):
        p.grad = g
        theirs.step()
    assert theirs.state[p]["state1"].dtype == torch.uint8
    assert apart(mine, exact) < 0.10
    assert apart(mine, exact) < 0.7 * apart(p.detach().double(), exact)


def test_a_second_moment_falls_where_gradients_become_small(scale):
    quiet = torch.rand(128, 64, generator=torch.Generator().manual_seed(2)) < 0.5
    _, exact = adam_in_float64(noisy(scale, 400, quiet, 150))
    _, mine = in_8_bits(noisy(scale, 400, quiet, 150), Blocks())
    ratio = (mine[quiet] / exact[quiet]).log().mean().exp()
    assert 0.7 < ratio < 1.4  # rounded to the nearest it stays tens of times too large
    assert 0.9 < mine[~quiet].sum() / exact[~quiet].sum() < 1.1


def test_the_first_update_is_that_of_fp32_also_where_little_is_projected():
    """galore-torch's 8-bit optimizer leaves a layer exactly as it was whose X has fewer than 4096 numbers."""
    for shape, rank in (((96, 96), 4), ((40, 24), 2), ((768, 8), 1)):
        weights = []
        for store in (Blocks(), Wide()):
            p = nn.Parameter(torch.zeros(shape))
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            optimizer = Optimizer([{"params": [p]}], [Project(rank=rank, store=store)], lr=1e-2)
            optimizer.step()
            weights.append(p.detach().clone())
            for _ in range(3):
                optimizer.step()
            assert (p - weights[-1]).norm() > 2 * weights[-1].norm()  # three more steps of the same gradient
        assert torch.equal(*weights)
        assert weights[0].abs().max() > 1e-3


@pytest.mark.parametrize("transport", ["none", "reset", "square", "centred"])
def test_many_renewals_keep_second_moments_non_negative_and_steps_bounded(transport):
    p = nn.Parameter(torch.zeros(96, 64))
    energy = None if transport == "none" else 0.6
    project = Project(rank=12, energy=energy, clock=Clock(1), transport=transport, store=Blocks())
    optimizer = Optimizer([{"params": [p]}], [project], lr=1e-3, betas=(0.9, 0.99))
    g = torch.Generator().manual_seed(0)
    ranks = set()
    for step in range(60):
        factors = torch.randn(96, 1 + step % 9, generator=g), torch.randn(1 + step % 9, 64, generator=g)
        p.grad = factors[0] @ factors[1]
        before = p.detach().clone()
        optimizer.step()
        state = optimizer.state[p]
        ranks.add(state["basis"].shape[-1])
        assert (Blocks().read(state, "exp_avg_sq") >= 0).all()
        assert torch.isfinite(p).all()
        step_norm = (p - before).norm() / (1e-3 * math.sqrt(96 * state["basis"].shape[-1]))
        assert step_norm < 4
    assert len(ranks) > 3 or energy is None


# ---- through files


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(128, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.norm = nn.LayerNorm(64)

    def forward(self, ids):
        x = self.embed(ids)
        return self.norm(x + self.down(torch.tanh(self.up(x)))) @ self.embed.weight.T


def small(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small().to(dtype)


def train(run, optimizer, steps):
    for _ in range(steps):
        ids = torch.randint(128, (4, 9), generator=torch.Generator().manual_seed(run.step))
        logits = run.model(ids[:, :-1]).flatten(0, 1).float()
        nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


METHODS = {
    "8 bits": (torch.float32, {"moments": "8bit"}),
    "8 bits, stochastic": (torch.bfloat16, {"moments": "8bit", "rounding": "stochastic"}),
    "8 bits, master": (torch.bfloat16, {"moments": "8bit", "rounding": "master"}),
    "master": (torch.bfloat16, {"rounding": "master"}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
}


@pytest.mark.parametrize("kind", METHODS)
def test_resume_across_renewals_and_changes_of_rank_is_exact(kind):
    dtype, fields = METHODS[kind]
    method = rs.AdaRankGrad(rank=16, energy=0.7, every=3, earliest=1, stagger=False, **fields)

    def begin():
        run = rs.attach(small(dtype).train(), method)
        return run, run.optimizer(lr=1e-2, weight_decay=0.1)

    straight, optimizer = begin()
    ranks = []
    for _ in range(8):
        train(straight, optimizer, 1)
        ranks.append(straight.subspaces["up.weight"])
    assert len(set(ranks)) > 1

    for k in (2, 4, 6):
        run, first = begin()
        train(run, first, k)
        buffer = io.BytesIO()
        torch.save({"run": run.state_dict(), "optimizer": first.state_dict()}, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        again = rs.restore(small(dtype).train(), state["run"])
        second = again.optimizer(lr=1e-2, weight_decay=0.1)
        second.load_state_dict(state["optimizer"])
        for (name, p), (_, q) in zip(run.trainable(), again.trainable(), strict=True):
            for key, value in first.state[p].items():
                assert second.state[q][key].dtype == value.dtype, (name, key)
        train(again, second, 8 - k)
        for (name, p), (_, q) in zip(straight.trainable(), again.trainable(), strict=True):
            assert torch.equal(p, q), (k, name)
            for key, value in optimizer.state[p].items():
                assert torch.equal(value, second.state[q][key]), (k, name, key)


def test_bytes_of_a_whole_model_are_those_of_the_formula():
    run = rs.attach(small(torch.bfloat16).train(), rs.GaLore(rank=16, moments="8bit", rounding="master"))
    optimizer = run.optimizer(lr=1e-2)
    train(run, optimizer, 2)
    parameters = dict(run.model.named_parameters())
    for name, (length, s) in {"up.weight": (96, 64), "down.weight": (96, 64)}.items():
        # moments, basis and mass in fp32, energy kept as a number, fp32 master
        expected = 2 * length * 16 * (1 + 4 / 256) + 4 * s * 16 + 4 * 16 + 4 * length * s
        assert storage(optimizer.state[parameters[name]]) == expected
    assert storage(optimizer.state[parameters["embed.weight"]]) == 128 * 64 * (2 * (1 + 4 / 256) + 4)
    assert storage(optimizer.state[parameters["up.bias"]]) == 96 * (2 * 4 + 4)


def test_rows_that_do_not_split_into_blocks_are_refused_with_a_way_out(monkeypatch):
    from rankshift.core import shard
    from rankshift.core.errors import ConfigError

    p = torch.zeros(96, 64)
    monkeypatch.setattr(shard, "share", lambda tensor: 24)  # of four ranks
    Blocks().check((96, 32), p)  # blocks of 8 rows
    Blocks().check((96, 300), p)
    Blocks().check((96, 4), torch.zeros(9, 9))  # in fp32
    with pytest.raises(ConfigError, match=r"blocks of 16 rows, and a rank holds 24 of the 96 rows.*from 32 on"):
        Blocks().check((96, 16), p)


def test_the_noise_of_two_updates_and_of_two_moments_differs():
    value = torch.full((4, 256), 0.503)
    value[:, 0] = 1
    written = []
    for name, step in (("exp_avg", 1), ("exp_avg", 2), ("other", 1), ("exp_avg", 1)):
        state = Blocks(least=0).init(name, (4, 256), value, False)
        state |= {"key": torch.tensor(3), "step": torch.tensor(step)}
        Blocks().write(state, name, value)
        written.append(state[name])
    assert torch.equal(written[0], written[3])
    assert not torch.equal(written[0], written[1])
    assert not torch.equal(written[0], written[2])
