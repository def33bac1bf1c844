"""The equations against a computation of their own: one element at a time, in float64, straight from the papers' words."""

import itertools

import pytest
import torch

from bonetune.errors import SpecError
from bonetune.ops import Rows, Update, apply, delta, merge, unmerge
from bonetune.spec import VARIANTS, ShardSpec

BLOCKWISE = [v for v in VARIANTS if v not in ("bone", "mini")]
# (out, in, r, mini_r): tall, wide and square; ragged where the variant allows it
SIZES = [(12, 8, 4, 3), (6, 12, 3, 2), (8, 8, 4, 8), (4, 4, 1, 1)]
RAGGED = [(12, 10, 4, 3), (5, 7, 7, 1), (6, 11, 3, 6)]


def elementwise_delta(W, theta, variant, r, mini_r):
    """Delta(W)[o, i] for each o, i, with the sums written as loops: the oracle."""
    out, inp = W.shape
    result = torch.zeros(out, inp, dtype=torch.float64)
    for o, i in itertools.product(range(out), range(inp)):
        a, row, b, col = o // r, o % r, i // r, i % r
        if variant == "bone":
            result[o, i] = theta[i % r, o]
        elif variant == "mini":
            result[o, i] = theta[i % r, o % mini_r]
        elif variant == "bat-left":
            result[o, i] = theta[a][col, row]
            result[o, i] += sum(theta[a][k, row] * W[a * r + k, i] for k in range(r))
        else:
            B = theta[{"bat": a, "bat-row": b, "bat-free": 0}[variant]]
            result[o, i] = B[row, col] + sum(W[o, b * r + k] * B[k, col] for k in range(r))
    return result


def random_case(variant, out, inp, r, mini_r, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    spec = ShardSpec(variant, r, mini_r)
    W = torch.randn(out, inp, generator=generator, dtype=torch.float64).to(dtype)
    theta = torch.randn(spec.shape(out, inp), generator=generator, dtype=torch.float64).to(dtype) / 4
    return W, theta, spec


CASES = [(v, *s) for v in VARIANTS for s in SIZES if v not in BLOCKWISE or s[0] % s[2] == 0]
CASES += [(v, *s) for v in ("bone", "mini") for s in RAGGED]


@pytest.mark.parametrize(("variant", "out", "inp", "r", "mini_r"), CASES)
def test_delta_is_the_papers_formula(variant, out, inp, r, mini_r):
    W, theta, spec = random_case(variant, out, inp, r, mini_r)
    torch.testing.assert_close(delta(W, theta, spec), elementwise_delta(W, theta, variant, r, mini_r), rtol=1e-13, atol=1e-13)


def test_the_variants_are_six_different_functions():
    """On a square weight four tensors have one shape; a swapped layout, a sign or a lost `+ B` gives another matrix."""
    W, theta, _ = random_case("bat", 8, 8, 2, 1)
    results = [delta(W, theta, ShardSpec(v, 2)) for v in ("bat", "bat-row", "bat-left")]
    results += [-results[0], results[0] - delta(torch.zeros_like(W), theta, ShardSpec("bat", 2))]
    for first, second in itertools.combinations(results, 2):
        assert (first - second).abs().max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_delta_is_linear_in_the_trainable_tensor(variant):
    W, one, spec = random_case(variant, 12, 8, 4, 3)
    _, two, _ = random_case(variant, 12, 8, 4, 3, seed=1)
    torch.testing.assert_close(delta(W, 2 * one - 3 * two, spec), 2 * delta(W, one, spec) - 3 * delta(W, two, spec))


@pytest.mark.parametrize("variant", VARIANTS)
def test_unmerge_inverts_merge(variant):
    W, theta, spec = random_case(variant, 12, 8, 4, 3)
    merged = merge(W, [Update(theta, spec, scale=0.7)])
    assert (merged - W).abs().max() > 0.1
    torch.testing.assert_close(unmerge(merged, [Update(theta, spec, scale=0.7)]), W, rtol=1e-10, atol=1e-10)


def test_unmerge_of_a_singular_update_raises():
    W, _, spec = random_case("bat", 8, 8, 4, 1)
    theta = -torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    with pytest.raises(torch.linalg.LinAlgError):
        unmerge(merge(W, [Update(theta, spec)]), [Update(theta, spec)])


def test_several_updates_add_in_any_order_each_from_the_frozen_weight():
    W, _, _ = random_case("bone", 12, 8, 4, 3)
    updates = []
    for seed, variant in enumerate(VARIANTS):
        _, theta, spec = random_case(variant, 12, 8, 4, 3, seed=seed)
        updates.append(Update(theta, spec, scale=1 + seed / 10))
    expected = W + sum(u.scale * elementwise_delta(W, u.theta, u.spec.variant, 4, 3) for u in updates)
    torch.testing.assert_close(merge(W, updates), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merge(W, updates[::-1]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_rounds_once(variant, dtype):
    W, theta, spec = random_case(variant, 12, 8, 4, 3, dtype=dtype)
    exact = merge(W.double(), [Update(theta.double(), spec)])
    merged = merge(W, [Update(theta, spec)])
    assert merged.dtype == dtype
    # equal to the correctly rounded sum but where float32's own error tips a tie
    assert (merged == exact.to(dtype)).float().mean() > 0.98


@pytest.mark.parametrize("variant", VARIANTS)
def test_apply_is_the_product_with_the_merged_weight(variant):
    W, theta, spec = random_case(variant, 12, 8, 4, 3)
    x, bias = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    update = Update(theta, spec, scale=0.5)
    torch.testing.assert_close(apply(x, W, [update], bias), x @ merge(W, [update]).T + bias)


def test_dropout_touches_only_what_enters_the_update():
    W, theta, spec = random_case("bat", 8, 8, 4, 1)
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(apply(x, W, [Update(theta, spec, dropout=torch.zeros_like)]), x @ W.T)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tensor_of_another_shape_is_refused(variant):
    W, theta, spec = random_case(variant, 12, 8, 4, 3)
    with pytest.raises(ValueError, match="has shape"):
        delta(W, theta[..., :-1], spec)


@pytest.mark.parametrize("variant", BLOCKWISE)
def test_bat_refuses_ragged_weights(variant):
    with pytest.raises(SpecError, match=r"r=4 does not divide"):
        delta(torch.zeros(12, 10), torch.zeros(3, 4, 4), ShardSpec(variant, 4))


@pytest.mark.parametrize("variant", VARIANTS)
def test_leading_dimensions_number_weights_that_have_tensors_of_their_own(variant):
    cases = [random_case(variant, 12, 8, 4, 3, seed=seed) for seed in range(3)]
    W, theta, spec = torch.stack([w for w, _, _ in cases]), torch.stack([t for _, t, _ in cases]), cases[0][2]
    torch.testing.assert_close(delta(W, theta, spec), torch.stack([delta(w, t, s) for w, t, s in cases]))
    update = Update(theta, spec, scale=0.7)
    torch.testing.assert_close(unmerge(merge(W, [update]), [update]), W, rtol=1e-9, atol=1e-9)


def test_unmerge_of_several_updates():
    """Any number of bone and mini together with BAT updates of one variant and r."""
    for variant in BLOCKWISE:
        cases = [random_case(v, 12, 8, 4, 3, seed=seed) for seed, v in enumerate(["bone", variant, "mini", variant])]
        W, updates = cases[0][0], [Update(theta, spec, scale=0.3 + i / 10) for i, (_, theta, spec) in enumerate(cases)]
        torch.testing.assert_close(unmerge(merge(W, updates), updates), W, rtol=1e-9, atol=1e-9)


def test_unmerge_refuses_bat_updates_of_different_kinds():
    W, row, spec = random_case("bat-row", 12, 8, 4, 3)
    _, free, other = random_case("bat-free", 12, 8, 4, 3)
    with pytest.raises(ValueError, match=r"different kinds: bat-row \(r=4\), bat-free \(r=4\)"):
        unmerge(W, [Update(row, spec), Update(free, other)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_may_be_for_some_rows_of_the_batch(variant):
    W, theta, spec = random_case(variant, 12, 8, 4, 3)
    x, rows = torch.randn(4, 5, 8, dtype=torch.float64), [3, 1]
    y = apply(x, W, [Update(theta, spec, rows=Rows(rows))])
    torch.testing.assert_close(y[rows], apply(x[rows], W, [Update(theta, spec)]))
    torch.testing.assert_close(y[[0, 2]], x[[0, 2]] @ W.T)
