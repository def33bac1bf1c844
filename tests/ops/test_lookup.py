"""Adapted embeddings: the rows looked up are those of the merged matrix."""

import pytest
import torch

from bonetune.ops import Rows, Update, delta
from bonetune.ops.lookup import looked_up
from bonetune.spec import VARIANTS, ShardSpec

IDS = torch.tensor([[0, 3, 23, 3], [7, 0, 12, 5]])


def case(variant, dim=12, r=4, dtype=torch.float64):
    torch.manual_seed(0)
    spec = ShardSpec(variant, r, 3)
    W = torch.randn(24, dim, dtype=torch.float64).to(dtype)
    return W, Update((torch.randn(spec.shape(24, dim), dtype=torch.float64) / 3).requires_grad_(), spec, scale=0.7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_the_update_and_their_gradient(variant):
    W, update = case(variant)
    expected = update.scale * delta(W, update.theta, update.spec)[IDS]
    got = looked_up(IDS, W, update)
    torch.testing.assert_close(got, expected)
    wanted, gradient = (torch.autograd.grad(y.square().sum(), update.theta)[0] for y in (expected, got))
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("variant", ["bone", "mini"])
def test_a_ragged_last_shard(variant):
    W, update = case(variant, dim=10)
    torch.testing.assert_close(looked_up(IDS, W, update), update.scale * delta(W, update.theta, update.spec)[IDS])


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_the_batch_and_dropout_of_whole_ids(variant):
    W, update = case(variant)
    expected = looked_up(IDS, W, update)
    torch.testing.assert_close(looked_up(IDS, W, update._replace(rows=Rows([1]))), expected[1:])
    mask = torch.tensor([[1.0], [0.0]], dtype=torch.float64).repeat(4, 1)
    dropped = looked_up(IDS, W, update._replace(dropout=lambda ones: ones * mask))
    torch.testing.assert_close(dropped, expected * mask.view(2, 4, 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bfloat16_matrix_with_a_wide_adapter(variant):
    W, update = case(variant, dtype=torch.bfloat16)
    update = update._replace(theta=update.theta.detach().float())
    expected = update.scale * delta(W.double(), update.theta.double(), update.spec)[IDS]
    got = looked_up(IDS, W, update).double()
    assert (got - expected).norm() < 2**-8 * expected.norm()
