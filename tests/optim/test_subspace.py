"""Subspaces: finders against LAPACK in float64, the rank rule against singular values, transport against sampling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankshift.optim import subspace
from rankshift.optim.subspace import FINDERS, Moments, find, needed, transport

D = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(rows: int, s: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """A matrix (l, s) with these singular values."""
    g = generator(seed)
    U = torch.linalg.qr(torch.randn(rows, len(sigma), generator=g, dtype=D)).Q
    V = torch.linalg.qr(torch.randn(s, len(sigma), generator=g, dtype=D)).Q
    return (U * sigma.to(D)) @ V.mT


def power_law(rows: int, s: int, seed: int = 0) -> Tensor:
    """What gradients look like: singular values that fall as 1/i, with noise."""
    n = min(rows, s)
    noise = torch.randn(rows, s, generator=generator(seed + 1), dtype=D)
    return matrix(rows, s, 1 / torch.arange(1, n + 1, dtype=D), seed) + 0.1 * noise / noise.norm()


def found(A: Tensor, width: int, finder: str, seed: int = 5, **settings) -> subspace.Basis:
    draw = torch.randn(
        *A.shape[:-2], A.shape[-1], min(A.shape[-1], width + 8), generator=generator(seed), dtype=A.dtype
    )
    wide = width if finder in ("svd", "eigh") else width + 8
    return find(A, wide, finder, begin=draw, **settings)


def held(A: Tensor, basis: subspace.Basis, rank: int) -> Tensor:
    """E: the share of ‖A‖² that the leading directions hold."""
    Q = basis.vectors[..., :rank]
    return subspace.captured((A @ Q).square().sum((-2, -1)), basis.total)


def optimal(A: Tensor, rank: int) -> Tensor:
    sigma = torch.linalg.svdvals(A.to(D)).square()
    return sigma[..., :rank].sum(-1) / sigma.sum(-1)


# ---- finders


@pytest.mark.parametrize("finder", ["svd", "eigh"])
@pytest.mark.parametrize(("rows", "s"), [(40, 23), (23, 40), (31, 31)])
def test_exact_finders_give_the_leading_singular_subspace_with_its_energies(finder, rows, s):
    A = power_law(rows, s)
    basis = found(A, 7, finder)
    _, sigma, Vh = torch.linalg.svd(A)
    V = Vh[:7].mT
    Q = basis.narrow(7)
    torch.testing.assert_close(Q @ Q.mT, V @ V.mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(basis.energies[:7], sigma[:7].square(), rtol=1e-10, atol=0)
    torch.testing.assert_close((Q * V).sum(0).abs(), torch.ones(7, dtype=D), rtol=0, atol=1e-9)  # one by one, in order


@pytest.mark.parametrize("finder", FINDERS)
def test_energies_are_what_each_direction_holds_and_the_total_is_exact(finder):
    """‖A q‖², which A itself says; also where the finder is not exact."""
    A = power_law(60, 40)
    basis = found(A, 9, finder)
    torch.testing.assert_close((A @ basis.vectors).square().sum(0), basis.energies, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(basis.total, A.norm() ** 2, rtol=1e-12, atol=0)
    assert bool((basis.energies.diff() <= 1e-15).all())  # falling
    kept = (A @ basis.narrow(9)).norm() ** 2 / A.norm() ** 2
    torch.testing.assert_close(held(A, basis, 9), kept, rtol=1e-9, atol=0)


@pytest.mark.parametrize("finder", ["range", "warm"])
def test_cheap_finders_keep_nearly_the_optimal_energy(finder):
    for seed in range(5):
        A = power_law(120, 80, seed)
        basis = found(A, 16, finder, seed + 20)
        share = held(A, basis, 16) / optimal(A, 16)
        assert (0.99 if finder == "range" else 0.95) <= share <= 1 + 1e-12


def test_more_power_is_nearer_the_optimum():
    g = generator()
    A = torch.randn(120, 80, generator=g, dtype=D)  # no gap anywhere: the hardest case
    shares = [float(held(A, found(A, 16, "range", power=q), 16)) for q in (0, 1, 2, 8)]
    assert shares == sorted(shares)
    assert shares[0] < 0.95 * float(optimal(A, 16))
    assert shares[-1] > 0.99 * float(optimal(A, 16))


def test_warm_goes_on_from_the_last_basis():
    """One iteration from where a slowly drifting subspace was is better than one from nowhere."""
    A, later = power_law(120, 80), power_law(120, 80) + 0.02 * power_law(120, 80, seed=9)
    last = found(A, 16, "svd").narrow(16)
    draw = torch.randn(80, 24, generator=generator(3), dtype=D)
    warm = find(later, 24, "warm", begin=torch.cat([last, draw], -1)[:, :24], power=0)
    cold = find(later, 24, "range", begin=draw, power=0)
    missing = [1 - float(held(later, b, 16) / optimal(later, 16)) for b in (warm, cold)]
    assert missing[0] < 0.2 * missing[1]


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("finder", ["range", "warm"])
def test_directions_inside_a_sketch_are_those_of_the_gradient_in_it(finder, on_gpu, monkeypatch):
    """Rayleigh and Ritz: in the span that was found, that of AᵀA Z, the Gram of A is diagonal, by energy."""
    if on_gpu:
        monkeypatch.setattr(subspace, "orthonormal", subspace.cholesky_qr)
    A = power_law(60, 40)
    begin = torch.randn(40, 9, generator=generator(5), dtype=D)
    Q = find(A, 9, finder, begin=begin, power=0).vectors
    close = 1e-5 if on_gpu else 1e-11  # 1e-7 of noise, over the least direction
    span = torch.linalg.qr(A.mT @ (A @ begin)).Q
    torch.testing.assert_close(Q @ Q.mT, span @ span.mT, rtol=0, atol=close)
    gram = Q.mT @ A.mT @ A @ Q
    energies = torch.linalg.svdvals(A @ span).square()
    torch.testing.assert_close(gram, torch.diag(energies), rtol=close, atol=close)


HARD = {
    "rank one": matrix(20, 12, torch.ones(1)),
    "rank three of equal size": matrix(20, 12, torch.ones(3)),
    "zeros": torch.zeros(20, 12, dtype=D),
    "one row": torch.randn(1, 12, generator=generator(), dtype=D),
    "one column": torch.randn(12, 1, generator=generator(), dtype=D),
    "one number": torch.ones(1, 1, dtype=D),
    "wide": torch.randn(5, 30, generator=generator(), dtype=D),
    "ill-conditioned": matrix(30, 20, torch.logspace(0, -12, 20)),
    "large numbers": 1e12 * torch.randn(20, 12, generator=generator(), dtype=D),
    "small numbers": 1e-12 * torch.randn(20, 12, generator=generator(), dtype=D),
}


@pytest.mark.parametrize("dtype", [torch.float32, D], ids=str)
@pytest.mark.parametrize("finder", FINDERS)
@pytest.mark.parametrize("case", HARD)
def test_columns_are_orthonormal_whatever_the_matrix(case, finder, dtype):
    A = HARD[case].to(dtype)
    basis = found(A, 6, finder)
    rank = min(6, *A.shape)
    Q = basis.narrow(rank)
    assert Q.shape == (A.shape[-1], rank)
    # fp32: a dozen products of 1e-7 each
    torch.testing.assert_close(Q.mT @ Q, torch.eye(rank, dtype=dtype), rtol=0, atol=1e-5 if dtype != D else 1e-12)
    assert bool(torch.isfinite(basis.energies).all())
    assert bool((basis.energies >= 0).all())
    if bool(A.any()) and case != "ill-conditioned":
        assert held(A, basis, rank) >= 0.95 * optimal(A, rank) - 1e-6
    if case == "zeros":
        assert held(A, basis, rank) == 0


@pytest.mark.parametrize("finder", FINDERS)
def test_a_batch_is_its_matrices_one_by_one(finder):
    stack = torch.stack([power_law(24, 15, seed) for seed in range(4)])
    draw = torch.randn(4, 15, 13, generator=generator(), dtype=D)
    together = find(stack, 13 if finder in ("range", "warm") else 5, finder, begin=draw)
    for i in range(4):
        alone = find(stack[i], 13 if finder in ("range", "warm") else 5, finder, begin=draw[i])
        torch.testing.assert_close(together.vectors[i, :, :5], alone.vectors[:, :5], rtol=0, atol=1e-9)
        torch.testing.assert_close(together.energies[i, :5], alone.energies[:5], rtol=1e-9, atol=0)


@pytest.mark.parametrize("finder", FINDERS)
def test_signs_are_decided(finder):
    """The largest entry of each direction is positive: −A has A's basis, and so do other roundings of A."""
    A = power_law(40, 23)
    basis, other = found(A, 7, finder), found(-A * (1 + 1e-12), 7, finder)
    largest = basis.vectors.gather(0, basis.vectors.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
    torch.testing.assert_close(basis.vectors[:, :7], other.vectors[:, :7], rtol=0, atol=1e-7)


@pytest.mark.parametrize("finder", ["eigh", "range", "warm"])
def test_rows_may_lie_elsewhere(finder):
    """With ``reduce`` adding what other ranks' rows give, a part of the rows finds the whole's basis."""
    A = power_law(40, 23)
    draw = torch.randn(23, 15, generator=generator(), dtype=D)
    width = 15 if finder != "eigh" else 7
    whole = find(A, width, finder, begin=draw)
    sums: list[Tensor] = []

    def listen(part: Tensor) -> Tensor:
        sums.append(part)
        return part

    find(A, width, finder, begin=draw, reduce=listen)
    answers = iter(sums)
    here = find(A[:13], width, finder, begin=draw, reduce=lambda part: next(answers))
    if finder == "eigh":
        torch.testing.assert_close(here.vectors, whole.vectors, rtol=0, atol=1e-12)
    torch.testing.assert_close(here.energies, whole.energies, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(here.total, whole.total, rtol=1e-12, atol=0)


def test_narrow_holds_no_more_than_it_shows():
    Q = found(power_law(40, 23), 20, "svd").narrow(3)
    assert Q.untyped_storage().nbytes() == 23 * 3 * 8


# ---- the rank rule


@pytest.mark.parametrize("energy", [0.3, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("finder", ["svd", "eigh"])
def test_the_rank_is_the_least_that_keeps_the_energy(energy, finder):
    for seed in range(10):
        A = power_law(30, 20, seed)
        rank = int(needed(found(A, 20, finder), energy))
        assert optimal(A, rank) >= energy - 1e-12
        assert optimal(A, rank - 1) < energy


def test_the_rank_from_a_sketch_keeps_the_energy_and_is_nearly_minimal():
    for seed in range(10):
        A = power_law(120, 80, seed)
        basis = found(A, 40, "range", seed)
        rank = int(needed(basis, 0.8))
        assert (A @ basis.narrow(rank)).norm() ** 2 / A.norm() ** 2 >= 0.8 - 1e-12
        assert optimal(A, rank - 1) < 0.8 * 1.02


def test_all_of_the_energy_is_full_rank_and_the_true_rank_where_there_is_one():
    full = torch.randn(20, 12, generator=generator(), dtype=D)
    assert int(needed(found(full, 12, "svd"), 1.0).clamp(max=12)) == 12
    for rank in (1, 3, 7):
        assert int(needed(found(matrix(20, 12, torch.ones(rank)), 12, "eigh"), 0.999)) == rank


def test_too_few_directions_are_told_by_one_more():
    A = torch.randn(60, 40, generator=generator(), dtype=D)
    assert int(needed(found(A, 4, "svd"), 0.9)) == 5


def test_ranks_are_rounded_up_and_never_over_the_limit():
    assert [subspace.rounded_up(r, 8, 20) for r in (1, 8, 9, 16, 17, 20)] == [8, 8, 16, 16, 20, 20]
    assert [subspace.rounded_up(r, 1, 6) for r in (1, 5, 6, 7)] == [1, 5, 6, 6]


# ---- transport


def rotation(r: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(r, r, generator=generator(seed), dtype=D)).Q


def basis_of(s: int, r: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(s, r, generator=generator(seed), dtype=D)).Q


def full_mass(r: int) -> Tensor:
    return torch.ones(r, dtype=D)


def test_by_sampling_centred_is_right_and_square_nearly_and_a_linear_map_is_not():
    """x with means and a diagonal covariance, y = R x: E[y²] of a million samples against each map."""
    g, r = generator(), 6
    mean, deviation = torch.randn(r, generator=g, dtype=D), 0.5 + torch.rand(r, generator=g, dtype=D)
    R = rotation(r, 1)
    x = mean + deviation * torch.randn(400_000, r, generator=g, dtype=D)
    truth = (x @ R.mT).square().mean(0)
    moments = Moments(mean[None], x.square().mean(0)[None], full_mass(r))
    centred = transport(moments, R, "centred", seen=1.0)
    torch.testing.assert_close(centred.second[0], truth, rtol=0.02, atol=0)  # 1/√n of the sampling
    torch.testing.assert_close(centred.first[0], (x @ R.mT).mean(0), rtol=0, atol=0.01)
    plain = Moments(torch.zeros(1, r, dtype=D), (deviation**2)[None], full_mass(r))
    around_zero = ((x - mean) @ R.mT).square().mean(0)
    torch.testing.assert_close(transport(plain, R, "square", 1.0).second[0], around_zero, rtol=0.02, atol=0)
    assert bool(((moments.second @ R.mT) < 0).any())  # what is printed in the paper's transcription


def test_centred_is_the_formula_of_ldadam():
    g = generator(2)
    r, beta1, beta2, t = 5, 0.9, 0.99, 7
    M, V = torch.randn(4, r, generator=g, dtype=D), torch.rand(4, r, generator=g, dtype=D) + 1
    R = basis_of(9, 3, 3).mT @ basis_of(9, r, 4)
    m_hat, v_hat = M / (1 - beta1**t), V / (1 - beta2**t)
    wanted = torch.zeros(4, 3, dtype=D)
    for row in range(4):
        for i in range(3):
            spread = sum(R[i, j] ** 2 * (v_hat[row, j] - m_hat[row, j] ** 2) for j in range(r))
            wanted[row, i] = abs(spread + sum(R[i, j] * m_hat[row, j] for j in range(r)) ** 2)
    moved = transport(Moments(M, V, (1 - beta2**t) * full_mass(r)), R, "centred", seen=1 - beta1**t)
    # the mass moves too, so that what Adam divides by it is the formula's value
    torch.testing.assert_close(moved.second / moved.mass, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(moved.first, M @ R.mT, rtol=1e-12, atol=1e-12)


def test_centred_takes_the_magnitude_of_an_estimate_below_zero():
    """Where averages over unlike windows say m² > v: |…| of the sum, not 0, nor a sum of magnitudes. By hand."""
    R = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=D)
    M, V = torch.tensor([[2.0, 1.0]], dtype=D), torch.tensor([[1.0, 3.0]], dtype=D)
    # v − m² = (−3, 2); (R∘R)(v − m²) = (0.36·−3 + 0.64·2, 0.64·−3 + 0.36·2) = (0.2, −1.2)
    # R m = (2, −1), so the estimates are 4.2 and −0.2
    moved = transport(Moments(M, V, full_mass(2)), R, "centred", seen=1.0)
    torch.testing.assert_close(moved.second, torch.tensor([[4.2, 0.2]], dtype=D), rtol=1e-12, atol=0)
    half = transport(Moments(0.25 * M, 0.5 * V, 0.5 * full_mass(2)), R, "centred", seen=0.25)  # the same averages
    torch.testing.assert_close(half.second, torch.tensor([[2.1, 0.1]], dtype=D), rtol=1e-12, atol=0)
    torch.testing.assert_close(half.mass, 0.5 * full_mass(2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("how", ["square", "centred"])
def test_a_new_basis_of_the_same_span_moves_no_first_moment(how):
    g = generator()
    old = basis_of(11, 4, 0)
    new = old @ rotation(4, 1)
    M, V = torch.randn(6, 4, generator=g, dtype=D), torch.rand(6, 4, generator=g, dtype=D) + 3
    moved = transport(Moments(M, V, 0.3 * full_mass(4)), new.mT @ old, how, seen=0.5)
    torch.testing.assert_close(moved.first @ new.mT, M @ old.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(moved.mass, 0.3 * full_mass(4), rtol=1e-12, atol=0)  # nothing of it is unseen


@pytest.mark.parametrize("how", ["square", "centred"])
def test_a_signed_permutation_permutes_the_moments(how):
    g = generator()
    M, V, c = (torch.rand(6, 4, generator=g, dtype=D) for _ in range(3))
    order, signs = torch.tensor([2, 0, 3, 1]), torch.tensor([1.0, -1, -1, 1], dtype=D)
    R = torch.zeros(4, 4, dtype=D)
    R[range(4), order] = signs
    moved = transport(Moments(M, V + 1, c[0] + 0.1), R, how, seen=0.7)
    torch.testing.assert_close(moved.first, M[:, order] * signs, rtol=1e-13, atol=0)
    torch.testing.assert_close(moved.second, (V + 1)[:, order], rtol=1e-12, atol=0)
    torch.testing.assert_close(moved.mass, (c[0] + 0.1)[order], rtol=1e-13, atol=0)


@pytest.mark.parametrize("how", ["square", "centred"])
def test_ten_thousand_renewals_leave_v_finite_and_not_negative(how):
    """100 tensors through 100 renewals each, of ranks that go up and down, with an update of Adam between them."""
    g, beta1, beta2 = generator(), 0.9, 0.999
    ranks = [4, 4, 2, 6, 3]
    old = torch.linalg.qr(torch.randn(100, 9, 4, generator=g, dtype=D)).Q
    moments = Moments(*(torch.zeros(100, 5, 4, dtype=D) for _ in range(2)), torch.zeros(100, 4, dtype=D))
    for n in range(100):
        X = torch.randn(100, 5, old.shape[-1], generator=g, dtype=D)
        moments = Moments(
            beta1 * moments.first + (1 - beta1) * X,
            beta2 * moments.second + (1 - beta2) * X.square(),
            beta2 * moments.mass + (1 - beta2),
        )
        new = torch.linalg.qr(torch.randn(100, 9, ranks[n % 5], generator=g, dtype=D)).Q
        moved = transport(moments, new.mT @ old, how, seen=1 - beta1 ** (n + 1))
        for value in (moved.first, moved.second, moved.mass):
            assert bool(torch.isfinite(value).all())
        assert bool((moved.second >= 0).all())
        assert bool((moved.mass >= 0).all())
        assert bool((moved.mass.sum(-1) <= moments.mass.sum(-1) + 1e-12).all())
        if how == "square":
            assert bool((moved.second.sum(-1) <= moments.second.sum(-1) + 1e-12).all())
        old, moments = new, moved


def test_what_was_never_seen_has_no_mass():
    Q = basis_of(8, 8, 0)
    old, new = Q[:, :3], Q[:, 3:6]
    moved = transport(
        Moments(*(torch.ones(2, 3, dtype=D) for _ in range(2)), full_mass(3)), new.mT @ old, "square", 1.0
    )
    for value in (moved.first, moved.second, moved.mass):
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-14)


def test_none_leaves_everything_and_reset_nothing():
    moments = Moments(*(torch.ones(2, 3, dtype=D) for _ in range(2)), full_mass(3))
    assert transport(moments, rotation(3, 0), "none", 1.0) is moments
    moved = transport(moments, torch.ones(5, 3, dtype=D), "reset", 1.0)
    assert moved.first.shape == moved.second.shape == (2, 5)
    assert not any(value.any() for value in (moved.first, moved.second, moved.mass))


# ---- batches


def test_what_is_of_one_kind_goes_together_up_to_a_limit():
    kinds, sizes = ["a", "b", "a", "a", "c"], [20, 20, 20, 20, 40]
    assert subspace.alike(kinds, sizes, 40) == [[0, 2], [3], [1], [4]]
    assert subspace.alike(kinds, sizes, 1) == [[0], [2], [3], [1], [4]]  # never none


# ---- Cholesky's factorisation, as on GPUs ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["full", "graded", "rank 3", "zero"])
def test_cholesky_gives_an_orthonormal_basis_of_the_columns(kind: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    Y = torch.randn(60, 8, generator=g, dtype=torch.float64)
    if kind == "graded":
        Y = Y * 10.0 ** -torch.arange(8, dtype=torch.float64)
    elif kind == "rank 3":
        Y = Y[:, :3] @ torch.randn(3, 8, generator=g, dtype=torch.float64)
    elif kind == "zero":
        Y = Y * 0
    Q = subspace.cholesky_qr(Y.to(dtype), torch.randn(60, 8, generator=g, dtype=torch.float64).to(dtype)).double()
    close = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(Q.mT @ Q, torch.eye(8, dtype=torch.float64), atol=close, rtol=0)
    left = Y - Q @ (Q.mT @ Y)
    assert left.norm() <= 2e-6 * Y.norm()  # the noise that keeps it definite
