"""Layers of written weights, compared with what training computes."""

import json
import math

import pytest
import torch

from bonetune import VARIANTS
from bonetune.certificates import LAYER_TOLERANCE, LayersCertificate, check_layer, random_inputs
from bonetune.ops import Update, apply, merge
from bonetune.spec import ShardSpec

OUT, IN = 96, 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def layer(variant="bone", size=0.01, dtype=torch.float32, name="layer", lost=False, scale=1.0):
    """A check of a layer whose update is of that size, merged and rounded; `lost`: without it; `scale`: too much of it."""
    torch.manual_seed(0)
    spec, W = ShardSpec(variant, 8, 4), (torch.randn(OUT, IN) * 0.05).to(dtype).float()
    update = Update(torch.randn(spec.shape(OUT, IN)) * size, spec)
    written = merge(W, [] if lost else [update._replace(scale=scale)]).to(dtype).float()
    x = random_inputs(name, IN)
    return check_layer(name, apply(x, W, [update]), x @ written.T, dtype, x @ W.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rounding_is_allowed(variant, dtype):
    certificate = LayersCertificate((layer(variant, dtype=dtype),))
    assert certificate.holds
    assert certificate.update_kept == pytest.approx(1, abs=0.1)
    assert "equal up to rounding" in str(certificate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_alone_comes_near_what_is_allowed(dtype):
    """So the tolerance is no wider than it need be."""
    assert layer(dtype=dtype).error > 0.15 * LAYER_TOLERANCE[str(dtype).removeprefix("torch.")] or dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.05, 1e-3, 1e-4])
def test_an_update_that_was_lost_is_noticed_however_small_it_is(dtype, size):
    certificate = LayersCertificate((layer(size=size, dtype=dtype, lost=True),))
    assert not certificate.holds
    assert certificate.update_kept == pytest.approx(0, abs=0.1)
    assert "NOT equal" in str(certificate)


def test_one_wrong_layer_among_many_is_named():
    certificate = LayersCertificate((*(layer(name=f"right.{n}") for n in range(9)), layer(name="wrong", scale=1.3)))
    assert not certificate.holds
    assert certificate.worst is not None
    assert certificate.worst.name == "wrong"
    assert "wrong differ most" in str(certificate)


def test_a_layer_without_an_update_does_not_count():
    certificate = LayersCertificate((layer(size=0.0), layer(name="other")))
    assert certificate.holds
    assert certificate.checks[0].kept is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_updates_that_cancel_do_not_count(dtype):
    torch.manual_seed(0)
    spec, W = ShardSpec("bat", 8), (torch.randn(OUT, IN) * 0.05).to(dtype).float()
    update = Update(torch.randn(spec.shape(OUT, IN)), spec)
    x = random_inputs("layer", IN)
    expected = apply(x, W, [update, update._replace(scale=-1.0)])
    check = check_layer("layer", expected, x @ W.T, dtype, x @ W.T)
    assert check.effect is not None
    assert (check.kept, check.effect < 1e-6) == (None, True)
    assert LayersCertificate((check,)).holds


def test_layers_that_are_all_zero_show_nothing():
    dead = check_layer("dead", *[torch.zeros(4, 8)] * 2, "float32", torch.zeros(4, 8))
    assert not LayersCertificate((dead,)).holds
    assert LayersCertificate((dead, layer())).holds
    assert LayersCertificate(()).holds


def test_a_tolerance_that_is_given_takes_the_place_of_the_stated_ones():
    checks = (layer(dtype=torch.bfloat16),)
    assert not LayersCertificate(checks, tolerance=1e-6).holds
    assert LayersCertificate((layer(scale=1.3),), tolerance=10.0).holds


def test_what_is_wrong_besides():
    certificate = LayersCertificate((layer(),), problems=("norm.weight is not what it was to be",))
    assert not certificate.holds
    assert "norm.weight is not" in str(certificate)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_equals_nothing(value):
    y = torch.ones(4, 8)
    for pair in ((y, y * value), (y * value, y), (y * value, y * value)):
        assert not LayersCertificate((check_layer("layer", *pair, "float32"),)).holds


def test_as_json():
    certificate = LayersCertificate((layer(dtype=torch.bfloat16), layer(name="other")), unchanged=3)
    content = json.loads(json.dumps(certificate.to_dict()))
    assert (content["method"], content["holds"], content["unchanged"]) == ("layers", True, 3)
    assert content["tolerance"] == {name: LAYER_TOLERANCE[name] for name in ("bfloat16", "float32")}
    assert content["layers"].keys() == {"layer", "other"}
    assert content["largest_error"] == content["layers"][content["worst_layer"]]


def test_inputs_are_the_same_for_the_same_name():
    assert torch.equal(random_inputs("a", 5), random_inputs("a", 5))
    assert not torch.equal(random_inputs("a", 5), random_inputs("b", 5))
