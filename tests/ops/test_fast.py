"""The derived forward and backward against the equations, autograd through the equations, and finite differences."""

import pytest
import torch
from torch import nn

from bonetune.ops import Rows, Update, adapted_linear, apply, column, shards
from bonetune.spec import VARIANTS, ShardSpec

BLOCKWISE = [v for v in VARIANTS if v not in ("bone", "mini")]
SIZES = [(12, 8, 4, 3), (6, 12, 3, 2), (8, 8, 4, 8)]
RAGGED = [(12, 10, 4, 3), (5, 7, 7, 1), (6, 11, 3, 6)]
CASES = [(v, *s) for v in VARIANTS for s in SIZES] + [(v, *s) for v in ("bone", "mini") for s in RAGGED]


class Frozen:
    """The smallest frozen layer: what `adapted_linear` needs, nothing else."""

    plain = False
    stored = True

    def __init__(self, weight, bias=None):
        self._weight, self.bias = weight, bias

    def __call__(self, x):
        return nn.functional.linear(x, self._weight, self.bias)

    def product(self, x):
        return nn.functional.linear(x, self._weight)

    def weight(self):
        return self._weight


class Plain(Frozen):
    """One that lets the product be computed together with the update, and must not be called."""

    plain = True

    def __call__(self, x):
        raise AssertionError("a plain layer was called")


def layers_for(updates):
    """The kinds of frozen layers to try; one that must not be called only where the updates can do without."""
    alone = {"bone": 0, "mini": 0, "bat-row": 0, "bat-free": 0, "bat-left": 1, "bat": 2}
    alike = len({alone[u.spec.variant] for u in updates}) == 1
    together = alike and all(u.dropout is None and u.rows is None for u in updates)
    return [Frozen, Plain] if together else [Frozen]


def make(variants, out, inp, r, mini_r, dtype=torch.float64, theta_dtype=None, n=(2, 5), scale=0.7, exact=False):
    g = torch.Generator().manual_seed(3)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    specs = [ShardSpec(v, r, mini_r) for v in variants]
    W, bias, x = (t.to(dtype) for t in (randn(out, inp) / inp**0.5, randn(out), randn(*n, inp)))
    thetas = [(randn(*s.shape(out, inp)) / 4).to(theta_dtype or dtype).requires_grad_() for s in specs]
    updates = [Update(t, s, scale=scale - i / 10, exact=exact) for i, (t, s) in enumerate(zip(thetas, specs, strict=True))]
    return W, bias, x.requires_grad_(), updates


def gradients(y, x, updates):
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    return torch.autograd.grad((y * weights).sum(), [x, *(u.theta for u in updates)])


def assert_equals_reference(W, bias, x, updates, rtol=1e-11, atol=1e-11):
    expected = apply(x, W, updates, bias)
    names, wanted = ["x", *(u.spec.variant for u in updates)], gradients(expected, x, updates)
    for layer in layers_for(updates):
        y = adapted_linear(layer(W, bias), x, updates)
        torch.testing.assert_close(y, expected, rtol=rtol, atol=atol)
        for name, got, want in zip(names, gradients(y, x, updates), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda m, name=name: f"gradient of {name}: {m}")
        with torch.no_grad():
            torch.testing.assert_close(adapted_linear(layer(W, bias), x, updates), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("variant", "out", "inp", "r", "mini_r"), CASES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [(2, 5), (3, 7)])  # few rows are computed in another way
def test_one_adapter(variant, out, inp, r, mini_r, bias, n):
    W, b, x, updates = make([variant], out, inp, r, mini_r, n=n)
    assert_equals_reference(W, b if bias else None, x, updates)


@pytest.mark.parametrize("variant", BLOCKWISE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [(1,), (3, 7)])
def test_exact_updates(variant, bias, n):
    W, b, x, updates = make([variant], 12, 8, 4, 1, n=n, exact=True)
    assert_equals_reference(W, b if bias else None, x, updates)


@pytest.mark.parametrize("first", VARIANTS)
@pytest.mark.parametrize("second", VARIANTS)
@pytest.mark.parametrize("exact", [True, False])
def test_two_adapters_add(first, second, exact):
    assert_equals_reference(*make([first, second], 12, 8, 4, 3, n=(3, 7), exact=exact))


def test_adapters_of_which_one_is_exact():
    W, bias, x, (first, second) = make(["bat-row", "bat-row"], 12, 8, 4, 3)
    assert_equals_reference(W, bias, x, [first, second._replace(exact=True)])


@pytest.mark.parametrize("exact", [True, False])
def test_all_six_at_once(exact):
    assert_equals_reference(*make(VARIANTS, 12, 8, 4, 3, exact=exact))


def test_column_adapters_of_different_shard_sizes():
    W, bias, x, (small,) = make(["bat"], 12, 24, 2, 1)
    *_, (large,) = make(["bat"], 12, 24, 6, 1)
    assert_equals_reference(W, bias, x, [small, large])


def test_no_adapter_is_the_frozen_layer():
    W, bias, x, _ = make([], 12, 8, 4, 3)
    torch.testing.assert_close(adapted_linear(Frozen(W, bias), x, []), apply(x, W, [], bias))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    W, bias, x, (update,) = make([variant], 8, 6, 2, 4)
    W.requires_grad_()

    def function(x, theta, W):
        return adapted_linear(Frozen(W, bias), x, [Update(theta, update.spec, update.scale)])

    assert torch.autograd.gradcheck(function, (x, update.theta, W))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [(3,), (17,)])
def test_gradcheck_of_a_plain_layer(variant, n):
    W, bias, x, (update,) = make([variant], 4, 6, 2, 2, n=n)

    def function(x, theta):
        return adapted_linear(Plain(W, bias), x, [Update(theta, update.spec, update.scale)])

    assert torch.autograd.gradcheck(function, (x, update.theta))


@pytest.mark.parametrize("variants", [[v] for v in VARIANTS] + [["bat", "bat-left"], ["bat-row", "bat"]])
def test_dropout_enters_the_update_alone(variants):
    W, bias, x, updates = make(variants, 12, 8, 4, 3)
    mask = (torch.arange(8, dtype=torch.float64) % 3 > 0) * 1.5
    updates = [Update(u.theta, u.spec, u.scale, dropout=lambda t: t * mask) for u in updates]
    assert_equals_reference(W, bias, x, updates)


@pytest.mark.parametrize("exact", [True, False])
def test_a_band_of_w_at_a_time_gives_the_same(exact, monkeypatch):
    monkeypatch.setattr(column, "SCRATCH_ELEMENTS", 1)
    assert_equals_reference(*make(["bat"], 12, 8, 2, 3, n=(3, 7), exact=exact))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(7,), (0,), (1, 1), (2, 3, 4)])
def test_any_leading_shape(variant, shape):
    assert_equals_reference(*make([variant], 12, 8, 4, 3, n=shape))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_input_that_is_not_contiguous(variant):
    W, bias, x, updates = make([variant], 12, 8, 4, 3, n=(5, 2))
    assert_equals_reference(W, bias, x.detach().transpose(0, 1).requires_grad_(), updates)


# Relative error (in the Frobenius norm) allowed where products run in a narrow dtype: a few roundings of its epsilon.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("wide_adapter", [True, False])
@pytest.mark.parametrize("layer", [Frozen, Plain])
def test_narrow_dtypes(variant, dtype, bound, wide_adapter, layer):
    W, bias, x, updates = make([variant], 64, 96, 16, 8, dtype, torch.float32 if wide_adapter else dtype, n=(40,))
    y = adapted_linear(layer(W, bias), x, updates)
    exact = [Update(u.theta.detach().double().requires_grad_(), u.spec, u.scale) for u in updates]
    exact_x = x.detach().double().requires_grad_()
    expected = apply(exact_x, W.double(), exact, bias.double())
    assert y.dtype == dtype
    pairs = [(y, expected), *zip(gradients(y, x, updates), gradients(expected, exact_x, exact), strict=True)]
    for got, want in pairs:
        assert torch.linalg.norm(got.double() - want) <= bound * torch.linalg.norm(want)
    assert pairs[-1][0].dtype == updates[0].theta.dtype


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer", [Frozen, Plain])
def test_autocast_computes_in_the_autocast_dtype(variant, layer):
    W, bias, x, updates = make([variant], 64, 96, 16, 8, torch.float32, n=(40,))
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted_linear(layer(W, bias), x, updates)
    expected = apply(x, W, updates, bias)
    assert y.dtype == torch.bfloat16
    pairs = [(y, expected), *zip(gradients(y, x, updates), gradients(expected, x, updates), strict=True)]
    for got, want in pairs:
        assert got.dtype == want.dtype or got is y
        assert torch.linalg.norm(got.float() - want) <= 1.5e-2 * torch.linalg.norm(want)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [Frozen, Plain])
def test_saves_no_transformed_weight(variant, dtype, layer):
    """What autograd keeps: parameters, the input, and what is smaller; never a tensor of W's or its blocks' shape."""
    out, inp, r = 96, 128, 16
    W, bias, x, updates = make([variant], out, inp, r, 8, dtype, torch.float32, n=(3, 7))
    parameters = {t.data_ptr() for t in (W, bias, updates[0].theta)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted_linear(layer(W, bias), x, updates)
    others = [t for t in saved if t.data_ptr() not in parameters and t.data_ptr() != x.data_ptr()]
    assert saved
    allowed = {"bone": 21 * r, "mini": 21 * r, "bat-left": 21 * (out + r)}.get(variant, 0)
    assert sum(t.numel() for t in others) <= allowed
    assert all(t.numel() < out * inp for t in others)


def gain(variant, layer, n, exact, size=1e-4, batches=1):
    """<y - x W^T, u> / <u, u> over a bfloat16 base, u the true update of y: 1 if it survives, 0 if it is rounded away."""
    torch.manual_seed(5)
    out = inp = 256
    W, spec = (torch.randn(out, inp) / inp**0.5).bfloat16(), ShardSpec(variant, 32, 16)
    theta = torch.randn(spec.shape(out, inp)) * size
    found = wanted = 0.0
    for _ in range(batches):
        x = torch.randn(n, inp).bfloat16()
        with torch.no_grad():
            y = adapted_linear(layer(W), x, [Update(theta, spec, exact=exact)]).double()
        base = x.double() @ W.double().T
        update = apply(x.double(), W.double(), [Update(theta.double(), spec)]) - base
        found, wanted = found + ((y - base) * update).sum(), wanted + update.square().sum()
    return (found / wanted).item()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "batches"), [(16, 100), (128, 12), (1024, 2)])
def test_updates_of_1e_4_survive_a_bfloat16_base(variant, n, batches):
    """Few rows, fewer rows than out (x is transformed), more rows than out (W is): each is a way of its own."""
    assert abs(gain(variant, Plain, n, exact=True, batches=batches) - 1) < 0.03


@pytest.mark.parametrize("variant", BLOCKWISE)
def test_without_exact_they_survive_in_part(variant):
    """What docs/math.md says of the default, so that it is changed there if it changes here."""
    assert 0.6 < gain(variant, Plain, 1024, exact=False) < 0.97
    assert abs(gain(variant, Plain, 1024, exact=False, size=5e-3) - 1) < 0.02


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("n", [20, 300])
def test_gradients_at_tiny_updates_over_a_bfloat16_base(variant, exact, n):
    """Relative error in the Frobenius norm against float64: the dtype's epsilon, 2^-8, in x and dy's products, no more."""
    W, bias, x, updates = make([variant], 256, 192, 32, 16, torch.bfloat16, torch.float32, n=(n,), exact=exact)
    with torch.no_grad():
        updates[0].theta.mul_(4e-4)
    wide = [Update(u.theta.detach().double().requires_grad_(), u.spec, u.scale) for u in updates]
    wide_x = x.detach().double().requires_grad_()
    expected = gradients(apply(wide_x, W.double(), wide, bias.double()), wide_x, wide)
    for layer in (Frozen, Plain):
        got = gradients(adapted_linear(layer(W, bias), x, updates), x, updates)
        for actual, want in zip(got, expected, strict=True):
            assert torch.linalg.norm(actual.double() - want) <= 2**-8 * torch.linalg.norm(want)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer", [Frozen, Plain])
def test_the_output_may_be_written_to(variant, layer):
    W, bias, x, updates = make([variant], 12, 8, 4, 3, n=(3, 7))
    expected = gradients(apply(x, W, updates, bias).relu(), x, updates)
    y = adapted_linear(layer(W, bias), x, updates).relu_()
    for got, want in zip(gradients(y, x, updates), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [3, 20, 60])
def test_a_weight_that_is_not_contiguous(variant, n):
    W, bias, x, updates = make([variant], 48, 32, 8, 8, n=(n,))
    assert_equals_reference(W.T.contiguous().T, bias, x, updates)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer", [Frozen, Plain])
def test_gradients_that_are_not_contiguous(variant, layer):
    W, bias, x, updates = make([variant], 12, 8, 4, 3, n=(20,))
    leaves = [x, *(u.theta for u in updates)]
    for dy in (torch.ones((), dtype=torch.float64).expand(20, 12), torch.arange(240.0, dtype=torch.float64).reshape(12, 20).T):
        expected = torch.autograd.grad(apply(x, W, updates, bias), leaves, dy)
        for got, want in zip(
            torch.autograd.grad(adapted_linear(layer(W, bias), x, updates), leaves, dy), expected, strict=True
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("variants", [["bat-row", "bat-free"], ["bone", "bat-row"], ["bat-left", "bat-left"], ["bat", "bat"]])
@pytest.mark.parametrize("n", [(2, 5), (3, 7), (40,)])
def test_shard_sizes_that_differ(variants, n):
    first, second = variants
    W, bias, x, (small,) = make([first], 24, 24, 2, 1, n=n)
    *_, (large,) = make([second], 24, 24, 6, 1, n=n)
    assert_equals_reference(W, bias, x, [small, large, small._replace(scale=0.3)])


def test_many_bands_over_bfloat16_accumulate_like_one(monkeypatch):
    W, bias, x, (update,) = make(["bat"], 512, 64, 16, 1, torch.bfloat16, torch.float32, n=(40,))
    wide = update._replace(theta=update.theta.detach().double().requires_grad_())
    wide_x = x.detach().double().requires_grad_()
    want, _ = gradients(apply(wide_x, W.double(), [wide], bias.double()), wide_x, [wide])
    monkeypatch.setattr(column, "SCRATCH_ELEMENTS", 1)
    got, _ = gradients(adapted_linear(Plain(W, bias), x, [update]), x, [update])
    assert torch.linalg.norm(got.double() - want) <= 2**-8 * torch.linalg.norm(want)


def test_a_narrow_adapter_over_a_wide_base_is_scaled_in_the_wider_dtype():
    W, bias, x, (update,) = make(["bone"], 64, 96, 16, 8, torch.float32, torch.bfloat16, n=(40,), scale=0.7)
    expected = apply(x.double(), W.double(), [update._replace(theta=update.theta.double())], bias.double())
    y = adapted_linear(Plain(W, bias), x, [update]).double()
    assert torch.linalg.norm(y - expected) <= 1e-6 * torch.linalg.norm(expected)


@pytest.fixture
def cuda_autocast_sums():
    """CUDA's autocast sums in float32; the CPU's does not, unless it is told to."""
    library = torch.library.Library("aten", "IMPL")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def wide_sum(x, dim, keepdim=False, dtype=None):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.sum(
                x, dim, keepdim, dtype=dtype or (torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else None)
            )

    library.impl("sum.dim_IntList", wide_sum, "AutocastCPU")
    yield
    library._destroy()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer", [Frozen, Plain])
@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.usefixtures("cuda_autocast_sums")
def test_autocast_that_sums_in_float32(variant, layer, n):
    W, bias, x, updates = make([variant], 64, 96, 16, 8, torch.float32, n=(n,))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ones(2, 3, dtype=torch.bfloat16).sum(-1).dtype == torch.float32
        y = adapted_linear(layer(W, bias), x, updates)
    assert y.dtype == torch.bfloat16
    expected = apply(x, W, updates, bias)
    for got, want in zip(gradients(y, x, updates), gradients(expected, x, updates), strict=True):
        assert torch.linalg.norm(got.float() - want) <= 1.5e-2 * torch.linalg.norm(want)


@pytest.mark.parametrize("first", VARIANTS)
@pytest.mark.parametrize("second", VARIANTS)
def test_rows_of_a_batch_with_adapters_of_their_own(first, second):
    """Row 0 has no adapter, 1 and 4 the first, 2 the second, 3 both."""
    W, bias, x, (one, two) = make([first, second], 12, 8, 4, 3, n=(5, 3))
    updates = [one._replace(rows=Rows([1, 3, 4])), two._replace(rows=Rows([3, 2]))]
    assert_equals_reference(W, bias, x, updates)


def test_a_mixed_batch_makes_each_shard_sum_and_the_frozen_product_once(monkeypatch):
    W, bias, x, updates = make(["bone", "mini", "bone"], 12, 8, 4, 3, n=(3, 2))
    updates = [u._replace(rows=Rows([i])) for i, u in enumerate(updates)]
    sums, products = [], []
    monkeypatch.setattr(shards, "shard_sum", lambda v, r, **_: sums.append(v.shape) or v.unflatten(-1, (-1, r)).sum(-2))

    class Counted(Frozen):
        def __call__(self, x):
            products.append(x.shape)
            return super().__call__(x)

    adapted_linear(Counted(W, bias), x, updates)
    assert sums == [x.shape]
    assert products == [x.shape]


def test_a_weight_that_is_made_anew_is_not_kept():
    """A quantized or sharded weight: `bat` asks for it again in backward."""

    class Made(Frozen):
        stored = False
        times = 0

        def weight(self):
            self.times += 1
            return self._weight.clone()

    W, bias, x, updates = make(["bat"], 12, 8, 4, 3)
    kept, layer = [], Made(W, bias)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = adapted_linear(layer, x, updates)
    assert W.shape not in kept
    assert layer.times == 1
    torch.testing.assert_close(gradients(y, x, updates), gradients(apply(x, W, updates, bias), x, updates))
    assert layer.times == 2
