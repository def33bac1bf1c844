"""The Triton kernels by Triton's interpreter, on CPU tensors: against the equations in float64, and against PyTorch's path."""

import importlib
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.interpreter import bfloat16_products
from bonetune.errors import InputError
from bonetune.ops import Rows, Update, adapted_linear, apply, column, operators
from bonetune.ops.backend import SIZES, use_kernels
from bonetune.spec import VARIANTS, ShardSpec

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'bonetune[triton]'")
kernels = importlib.import_module("bonetune.ops.kernels.column")

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of a tensor's norm


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What is allocated is full of NaN until a kernel writes to it."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, plain=plain, **kwargs: poisoned(plain(*args, **kwargs)))
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poisoned(plain(*args, **kwargs)))
    with bfloat16_products():
        yield


def poisoned(tensor):
    if torch.compiler.is_compiling() or not tensor.is_floating_point() or tensor.device.type != "cpu":
        return tensor  # a compiled function would have the poison in its graph
    return tensor.fill_(float("nan"))


class Frozen:
    def __init__(self, weight, bias, plain):
        self._weight, self.bias, self.plain, self.stored = weight, bias, plain, True

    def __call__(self, x):
        return nn.functional.linear(x, self._weight, self.bias)

    def product(self, x):
        return nn.functional.linear(x, self._weight)

    def weight(self):
        return self._weight


def close(got, want, dtype, what):
    assert got.shape == want.shape, what
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < TOLERANCE[dtype], f"{what}: relative error {error:.2e}"


def make(variants, r, out, features, n, dtype, exact=False):
    g = torch.Generator().manual_seed(r + n)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    W, bias, x = (randn(out, features) / features**0.5).to(dtype), randn(out).to(dtype), randn(n, features).to(dtype)
    specs = [ShardSpec(v, r, 3 if out % 3 == 0 else 4) for v in variants]
    thetas = [(randn(*s.shape(out, features)) / r**0.5).requires_grad_() for s in specs]
    updates = [Update(t, s, scale=0.7 - k / 5, exact=exact) for k, (t, s) in enumerate(zip(thetas, specs, strict=True))]
    return W, bias, x.requires_grad_(), updates


def results(y, x, updates):
    """Y, and each gradient by name."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    gradients = torch.autograd.grad((y * weights).sum(), [x, *(u.theta for u in updates)])
    return {"y": y, **dict(zip(["x", *(f"{u.spec.variant} {k}" for k, u in enumerate(updates))], gradients, strict=True))}


def check(W, bias, x, updates, plain, dtype):
    wide = [u._replace(theta=u.theta.detach().double().requires_grad_()) for u in updates]
    x64 = x.detach().double().requires_grad_()
    expected = results(apply(x64, W.double(), wide, bias.double()), x64, wide)
    got = results(adapted_linear(Frozen(W, bias, plain), x, updates, backend="triton"), x, updates)
    for name, value in got.items():
        close(value, expected[name], dtype, f"{[u.spec.variant for u in updates]} {name}")
    with torch.no_grad():
        y = adapted_linear(Frozen(W, bias, plain), x, updates, backend="triton")
    close(y, expected["y"], dtype, "y without gradients")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_every_gradient_equal_the_equations(variant, r, dtype):
    out, features, n = 3 * r, 5 * r if r < 64 else 2 * r, 80
    check(*make([variant], r, out, features, n, dtype), plain=True, dtype=dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [17, 33, 64, 65, 131])
def test_any_number_of_rows(variant, n):
    check(*make([variant], 16, 48, 112, n, torch.float32), plain=True, dtype=torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float16(variant):
    check(*make([variant], 32, 96, 64, 40, torch.float16), plain=True, dtype=torch.float16)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("exact", [False, True])
def test_layers_that_must_be_called(variant, exact):
    check(*make([variant], 32, 64, 96, 40, torch.float32, exact), plain=False, dtype=torch.float32)
    check(*make([variant], 32, 64, 96, 40, torch.float32, exact), plain=True, dtype=torch.float32)


@pytest.mark.parametrize("variants", [("bone", "mini", "bat-row", "bat-free"), ("bat-left",) * 2, ("bat",) * 2, VARIANTS])
def test_several_adapters(variants):
    check(*make(variants, 16, 48, 80, 70, torch.float32), plain=len(set(variants)) < 6, dtype=torch.float32)


@pytest.mark.parametrize("variant", ["bone", "mini"])
def test_a_ragged_last_shard(variant):
    check(*make([variant], 32, 45, 75, 35, torch.float32), plain=True, dtype=torch.float32)


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loops_of_several_steps(monkeypatch, variant, programs):
    """Devices are so wide that small tensors' loops would all have one step, unless fewer programs are enough."""
    monkeypatch.setattr("bonetune.ops.kernels.tiles.PROGRAMS", programs)
    for n in (40, 200):
        check(*make([variant], 16, 144, 368, n, torch.float32), plain=True, dtype=torch.float32)
    check(*make([variant], 64, 192, 320, 70, torch.bfloat16), plain=True, dtype=torch.bfloat16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_each_time(variant):
    def bits():
        W, bias, x, updates = make([variant], 16, 64, 64, 200, torch.bfloat16)
        return results(adapted_linear(Frozen(W, bias, True), x, updates, backend="triton"), x, updates)

    for (name, one), other in zip(bits().items(), bits().values(), strict=True):
        assert torch.equal(one, other), name


def calls():
    """Each operator with arguments, those that may be None with and without."""
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    v, dp, t, M, W, y = randn(20, 48), randn(20, 48), randn(20, 16), randn(3, 16, 16), randn(32, 48), randn(20, 32)
    B = randn(2, 16, 16)
    yield operators.shard_sum, (v, 16)
    yield operators.shard_add_, (v.clone(), t)
    yield operators.block_product, (v, M.mT, 0.5, t, dp, True)
    yield operators.block_product, (v, M[:1], 0.5, None, None, False)
    yield operators.block_backward, (v, M, 0.5, dp, t, t, dp, True)
    yield operators.block_backward, (v, M[:1], 0.5, dp, None, None, None, False)
    yield operators.bat_weight, (W, B, 0.5, W)
    yield operators.bat_weight, (W, B, 0.5, None)
    v_, W_, y_, bias = (a.bfloat16() for a in (v, W, y, randn(32)))
    yield operators.bat_product, (v_, W_, B, bias, 0.5, True)
    yield operators.bat_product, (v_, W_, B, None, 0.5, False)
    yield operators.bat_product_backward, (y_, W_, B, 0.5, True)
    yield operators.bat_gradient, (v, y, W, 16, 0.5)
    yield operators.gathered_product, (t[:, None], [randn(16, 40), randn(16, 40)], [0, -1] * 10, [0.5, 2.0])
    yield operators.gathered_block_product, (v[:, None], [M, M], [1] * 20, [0.5, 2.0], t[:, None], True)


@pytest.mark.parametrize(("operator", "arguments"), [pytest.param(*c, id=f"{c[0]._name}-{k}") for k, c in enumerate(calls())])
def test_compilers_are_told_the_truth_about_operators(operator, arguments):
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("operator", "arguments"), [pytest.param(*c, id=f"{c[0]._name}-{k}") for k, c in enumerate(calls())])
def test_operators_launch_on_the_device_of_their_tensors_whatever_their_strides(monkeypatch, operator, arguments):
    """Triton launches on the current device, and its kernels take rows without gaps."""
    expected, entered = operator(*arguments), []

    @contextmanager
    def device(x):
        entered.append(x.device)
        yield

    monkeypatch.setattr(operators, "_device", device)
    spread = [gaps(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    got = operator(*spread)
    assert entered == [torch.device("cpu")]
    for one, other in zip(*(results if isinstance(results, tuple) else (results,) for results in (got, expected)), strict=True):
        assert one is other is None or torch.equal(one, other)


def gaps(tensor):
    """The same values, with something between them in memory."""
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]


def test_what_is_written_to_may_have_gaps():
    y, t = gaps(torch.randn(4, 32)), torch.randn(4, 16)
    expected = y + t.repeat(1, 2)
    operators.shard_add_(y, t)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rows_and_a_single_one(variant, rows):
    W, bias, x, updates = make([variant], 16, 48, 64, rows, torch.float32)
    got = results(adapted_linear(Frozen(W, bias, True), x, updates, backend="triton"), x, updates)
    expected = results(apply(x, W, updates, bias), x, updates)
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


OPERATORS = {
    "bone": {"shard_sum", "shard_add_"},
    "mini": {"shard_sum", "shard_add_"},
    "bat-row": {"shard_sum", "block_product", "block_backward"},
    "bat-free": {"shard_sum", "block_product", "block_backward"},
    "bat-left": {"shard_sum", "shard_add_", "block_product", "block_backward"},
    "bat": {"bat_weight", "bat_gradient"},
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_do_go_through_the_kernels(monkeypatch, variant, autocast):
    ran = set()
    for name in {name for names in OPERATORS.values() for name in names}:
        plain = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *a, name=name, plain=plain: ran.add(name) or plain(*a))
    W, bias, x, updates = make([variant], 16, 48, 64, 200, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = adapted_linear(Frozen(W, bias, True), x, updates, backend="triton")
    expected = results(apply(x, W, updates, bias), x, updates)
    for name, value in results(y, x, updates).items():
        close(value, expected[name], torch.bfloat16 if autocast else torch.float32, name)
    # under autocast, W' is built in the dtype of W, which is wider than what is multiplied: PyTorch does it
    assert ran == (set() if autocast and variant == "bat" else OPERATORS[variant])


def test_float32_products_follow_torchs_settings(monkeypatch):
    from bonetune.ops.kernels.tiles import precision

    for settings, expected in (
        ({"fp32_precision": "none"}, "tf32x3"),
        ({"fp32_precision": "tf32"}, "tf32"),
        ({"allow_tf32": True}, "tf32"),  # before torch 2.9
        ({"allow_tf32": False}, "tf32x3"),
    ):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(**settings))
        assert precision(torch.float32) == expected
    assert precision(torch.bfloat16) == "ieee"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's tracer and inductor have their own
@pytest.mark.parametrize(
    "compiler",
    [
        "aot_eager",
        # It lays out what it stores as the operators' fake implementations say.
        pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ by g++")),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_without_a_break(variant, compiler):
    W, bias, x, updates = make([variant], 16, 48, 64, 40, torch.float32)
    layer = Frozen(W, bias, True)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: adapted_linear(layer, x, updates, backend="triton"), backend=compiler, fullgraph=True)
    expected = results(adapted_linear(layer, x, updates, backend="triton"), x, updates)
    for name, value in results(compiled(x), x, updates).items():
        close(value, expected[name], torch.float32, name)


def test_auto_leaves_cpus_to_torch_and_triton_says_what_it_cannot_do(monkeypatch):
    x = torch.randn(20, 48)
    assert not use_kernels("auto", x, [16])
    assert use_kernels("triton", x, [16])
    assert not use_kernels("torch", x, [16])
    with pytest.raises(InputError, match="r of 16, 32, 64, 128, not 24"):
        use_kernels("triton", x, [16, 24])
    with pytest.raises(InputError, match="not float64"):
        use_kernels("triton", x.double(), [16])
    with pytest.raises(InputError, match="choose one of auto, torch, triton"):
        use_kernels("cuda", x, [16])
    monkeypatch.setattr("bonetune.ops.backend.INSTALLED", False)
    with pytest.raises(InputError, match="pip install"):
        use_kernels("triton", x, [16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 21, 70])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_row_with_its_own_adapter(variant, tokens, dtype):
    out, features, rows = 48, 80, 6
    W, bias, _, updates = make([variant] * 3, 16, out, features, rows, dtype)
    x = torch.randn(rows, tokens, features, generator=torch.Generator().manual_seed(1)).to(dtype)
    owners = [Rows(o) for o in ([0, 3], [5], [1, 4])]  # row 2 has none
    updates = [u._replace(theta=u.theta.detach(), rows=o) for u, o in zip(updates, owners, strict=True)]
    wide = [u._replace(theta=u.theta.double()) for u in updates]
    y = adapted_linear(Frozen(W, bias, True), x, updates, backend="triton")
    close(y, apply(x.double(), W.double(), wide, bias.double()), dtype, "y")
    close(y[2], nn.functional.linear(x[2], W, bias), dtype, "the row without an adapter")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_with_two_adapters_of_one_kind_gets_both(variant):
    W, bias, _, updates = make([variant] * 3, 16, 48, 80, 5, torch.float32)
    x = torch.randn(5, 3, 80, generator=torch.Generator().manual_seed(1))
    rows = ([0, 3], [3, 4], [1])
    updates = [u._replace(theta=u.theta.detach(), rows=Rows(o)) for u, o in zip(updates, rows, strict=True)]
    expected = apply(x.double(), W.double(), [u._replace(theta=u.theta.double()) for u in updates], bias.double())
    close(adapted_linear(Frozen(W, bias, True), x, updates, backend="triton"), expected, torch.float32, "y")


@pytest.mark.parametrize("variant", VARIANTS)
def test_loops_of_several_steps_in_a_mixed_batch(monkeypatch, variant):
    monkeypatch.setattr("bonetune.ops.kernels.tiles.PROGRAMS", 1)
    W, bias, _, updates = make([variant] * 2, 16, 144, 368, 3, torch.float32)
    x = torch.randn(3, 5, 368, generator=torch.Generator().manual_seed(1))
    updates = [u._replace(theta=u.theta.detach(), rows=Rows([k])) for k, u in enumerate(updates)]
    expected = apply(x.double(), W.double(), [u._replace(theta=u.theta.double()) for u in updates], bias.double())
    close(adapted_linear(Frozen(W, bias, True), x, updates, backend="triton"), expected, torch.float32, "y")


def test_the_tables_are_for_what_bat_asks_of_them():
    for size in (2, 4):
        assert tuple(kernels.PRODUCT[size]) == tuple(kernels.PRODUCT_BACKWARD[size]) == column.FUSED[size]
        assert tuple(kernels.GRADIENT[size]) == column.REDUCED[size]


@pytest.mark.parametrize("variant", ["bone", "bat-row", "bat-free", "bat-left"])
def test_a_broken_adapter_breaks_its_own_rows_alone(variant):
    W, bias, _, updates = make([variant] * 2, 16, 48, 80, 3, torch.float32)
    x = torch.randn(3, 2, 80, generator=torch.Generator().manual_seed(1))
    broken, whole = (u._replace(theta=u.theta.detach(), rows=Rows([k])) for k, u in enumerate(updates))
    broken = broken._replace(theta=torch.full_like(broken.theta, float("nan")))
    y = adapted_linear(Frozen(W, bias, True), x, [broken, whole], backend="triton")
    assert y[0].isnan().all()
    assert y[1].isfinite().all()
    close(y[2], nn.functional.linear(x[2], W, bias), torch.float32, "the row without an adapter")


def test_a_mixed_batch_on_a_trainable_weight_has_its_gradients():
    W, bias, _, updates = make(["bat-left"], 16, 48, 80, 3, torch.float32)
    x = torch.randn(3, 2, 80, generator=torch.Generator().manual_seed(1))
    updates = [u._replace(theta=u.theta.detach(), rows=Rows([1])) for u in updates]
    gradients = []
    for function in (
        lambda w: adapted_linear(Frozen(w, bias, False), x, updates, backend="triton"),
        lambda w: apply(x, w, updates),
    ):
        weight = W.clone().requires_grad_()
        function(weight).sum().backward()
        gradients.append(weight.grad)
    close(*gradients, torch.float32, "W")


def test_adapters_of_several_kinds_in_one_batch():
    variants = ("bone", "bat-row", "bat-left", "bat", "bone")
    W, bias, _, updates = make(variants, 16, 48, 80, 5, torch.float32)
    x = torch.randn(5, 3, 80, generator=torch.Generator().manual_seed(1))
    updates = [u._replace(theta=u.theta.detach(), rows=Rows([k])) for k, u in enumerate(updates)]
    updates[0] = updates[0]._replace(spec=ShardSpec("bone", 32), theta=torch.randn(32, 48) / 6)  # another r: apart
    expected = apply(x.double(), W.double(), [u._replace(theta=u.theta.double()) for u in updates], bias.double())
    close(adapted_linear(Frozen(W, bias, True), x, updates, backend="triton"), expected, torch.float32, "y")
