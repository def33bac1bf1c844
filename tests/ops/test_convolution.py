"""Adapted convolutions against the convolution with the merged kernel, offset by offset, in float64."""

import pytest
import torch
from torch import nn

from bonetune.ops import Rows, Update, merge
from bonetune.ops.convolution import adapted_convolution, as_kernel, matrices
from bonetune.spec import VARIANTS, ShardSpec

BLOCKWISE = [v for v in VARIANTS if v not in ("bone", "mini")]
# each with 12 output and 8 input channels in a group
LAYERS = {
    "1x1": lambda: nn.Conv2d(8, 12, 1),
    "3x3": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "stride, dilation": lambda: nn.Conv2d(8, 12, (3, 2), stride=2, dilation=(1, 2), padding=(2, 0)),
    "circular": lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"),
    "no bias": lambda: nn.Conv2d(8, 12, 2, bias=False),
    "groups": lambda: nn.Conv2d(16, 12, 3, groups=2),
    "1d": lambda: nn.Conv1d(8, 12, 3, padding="same"),
    "3d": lambda: nn.Conv3d(8, 12, 2),
}


class Frozen:
    """A frozen convolution as `adapted_convolution` asks for it."""

    def __init__(self, layer, plain):
        self.layer, self.plain = layer, plain
        self.bias, self.groups = layer.bias, layer.groups

    def __call__(self, x):
        return self.layer(x)

    def convolved(self, x, kernel, bias=None):
        return self.layer._conv_forward(x, kernel, bias)

    def weight(self):
        return self.layer.weight


def case(name, variants, r=4, n=3):
    torch.manual_seed(0)
    layer = LAYERS[name]().double().requires_grad_(False)
    stack = matrices(layer.weight)
    updates = []
    for i, variant in enumerate(variants):
        spec = ShardSpec(variant, r, 3)
        shape = (*stack.shape[:-2], *spec.shape(12, 8))
        updates.append(Update((torch.randn(shape, dtype=torch.float64) / 3).requires_grad_(), spec, scale=0.7 - i / 10))
    x = torch.randn(n, layer.in_channels, *[7] * (layer.weight.dim() - 2), dtype=torch.float64, requires_grad=True)
    return layer, x, updates


def by_the_merged_kernel(layer, x, updates):
    """The convolution with the merged kernel: autograd goes through `merge`."""
    kernel = as_kernel(merge(matrices(layer.weight), updates), layer.weight.shape)
    return layer._conv_forward(x, kernel, layer.bias)


def assert_same(expected, got, inputs):
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    wanted, gradients = (torch.autograd.grad(y.square().sum(), inputs) for y in (expected, got))
    torch.testing.assert_close(gradients, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_convolution_with_the_merged_kernel(variant, name, plain):
    layer, x, updates = case(name, [variant])
    got = adapted_convolution(Frozen(layer, plain), x, updates)
    assert_same(by_the_merged_kernel(layer, x, updates), got, [x, updates[0].theta])


@pytest.mark.parametrize("name", ["1x1", "3x3", "groups"])
def test_ragged_shards_of_channels(name):
    layer, x, updates = case(name, ["bone", "mini"], r=3)
    assert_same(by_the_merged_kernel(layer, x, updates), adapted_convolution(Frozen(layer, True), x, updates), [x])


def test_all_variants_at_once_and_exact_ones():
    layer, x, updates = case("3x3", VARIANTS)
    for changed in (updates, [u._replace(exact=True) for u in updates]):
        got = adapted_convolution(Frozen(layer, True), x, changed)
        assert_same(by_the_merged_kernel(layer, x, updates), got, [x, *(u.theta for u in updates)])


def test_without_a_batch_dimension():
    layer, x, updates = case("3x3", ["bone", "bat"])
    one = adapted_convolution(Frozen(layer, True), x[0], updates)
    torch.testing.assert_close(one, adapted_convolution(Frozen(layer, True), x, updates)[0])


def test_a_1x1_convolution_is_adapted_as_the_linear_of_its_weight():
    for variant in VARIANTS:
        layer, x, (update,) = case("1x1", [variant])
        weight = merge(layer.weight[:, :, 0, 0], [update])
        expected = nn.functional.linear(x.movedim(1, -1), weight, layer.bias).movedim(-1, 1)
        torch.testing.assert_close(adapted_convolution(Frozen(layer, True), x, [update]), expected)


def test_each_offset_is_a_linear_layer_of_its_own():
    """The kernel's matrices are its offsets', in the order in which they lie in the kernel."""
    kernel = torch.randn(12, 8, 3, 2)
    stack = matrices(kernel)
    for position, (row, column) in enumerate((i, j) for i in range(3) for j in range(2)):
        assert torch.equal(stack[position], kernel[:, :, row, column])
    assert torch.equal(as_kernel(stack, kernel.shape), kernel)
    assert matrices(kernel[:, :, :1, :1]).shape == (12, 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_enters_the_update_alone(variant):
    layer, x, (update,) = case("3x3", [variant])
    nothing = adapted_convolution(Frozen(layer, True), x, [update._replace(dropout=torch.zeros_like)])
    torch.testing.assert_close(nothing, layer(x))
    half = adapted_convolution(Frozen(layer, True), x, [update._replace(dropout=lambda v: 0.5 * v)])
    torch.testing.assert_close(half, by_the_merged_kernel(layer, x, [update._replace(scale=update.scale / 2)]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_is_for_its_rows(variant):
    layer, x, (update,) = case("3x3", [variant])
    y = adapted_convolution(Frozen(layer, True), x, [update._replace(rows=Rows([2, 0]))])
    expected = by_the_merged_kernel(layer, x, [update])
    torch.testing.assert_close(y[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(y[1], layer(x)[1])
