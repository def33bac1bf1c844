"""The notes of what lives when, against cases that can be counted by hand and against real tensors."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from bonetune.training.live_storages import LiveStorages, WithoutValues


def test_each_storage_counts_once_from_its_first_operation_to_its_end():
    with LiveStorages() as storages:
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100)[2:4].T
        c = a + 1  # 8000
        del a
        d = c * 2  # 12000: b holds on to the first
        del b, c
        e = d + 1  # 8000
        del d, e
    assert storages.peak() == {"transient": 12000}
    assert storages.highest(up_to=3999) == 0


def test_the_graph_keeps_what_backward_needs():
    """Of sum(relu(x W^T)): relu's result, until its gradient, of the same size, is made of it."""
    layer, x = nn.Linear(64, 128, bias=False), torch.randn(512, 64)
    with LiveStorages() as storages:
        storages.assign(layer.parameters(), "weights")
        storages.assign([x], "input")
        loss = layer(x).relu().sum()
        storages.assign_living("activations")
        loss.backward()
    result, number = 4 * 512 * 128, 4
    assert storages.peak() == {
        "weights": 4 * 128 * 64,
        "input": 4 * 512 * 64,
        "activations": result + number,  # and the loss
        "transient": result + number,  # and the loss's own gradient
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_values_the_same_is_noted(dtype):
    def step():
        weights = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((50, 32), (96, 32), (50, 96))]
        ids = torch.arange(40).view(4, 10)
        wanted = ids % 3 == 0
        optimizer = torch.optim.AdamW(weights)
        hidden = nn.functional.gelu(nn.functional.embedding(ids, weights[0]) @ weights[1].T)
        logits = (hidden @ weights[2].T)[wanted].float()
        nn.functional.cross_entropy(logits, ids[wanted]).backward()
        optimizer.step()
        return weights

    with LiveStorages() as real:
        step()
    with WithoutValues(), LiveStorages() as fake:
        weights = step()
    assert all(isinstance(weight, FakeTensor) for weight in weights)
    assert fake.peak() == pytest.approx(real.peak(), rel=0.01)


def test_integers_keep_their_values_and_masks_their_counts():
    with WithoutValues():
        mask = torch.arange(10) > 6
        x = torch.randn(10, 3)
        assert x[mask].shape == (3, 3)
        assert torch.where(mask, x[:, 0], 0.0).shape == (10,)
        assert mask.nonzero().tolist() == [[7], [8], [9]]
        with pytest.raises(DataDependentOutputException):
            bool((x > 0).any())


def test_nothing_is_allocated():
    with WithoutValues():
        huge = torch.empty(1 << 40)
        assert (huge @ torch.empty(1 << 40)).shape == ()
