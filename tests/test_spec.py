import pytest

from bonetune.errors import InputError, SpecError
from bonetune.spec import VARIANTS, ShardSpec, parse_variant


def test_shapes_are_those_of_peft_0_18():
    assert ShardSpec("bone", 4).shape(12, 8) == (4, 12)
    assert ShardSpec("mini", 4, mini_r=3).shape(12, 8) == (4, 3)
    assert ShardSpec("bat", 4).shape(12, 8) == (3, 4, 4)
    assert ShardSpec("bat-row", 4).shape(12, 8) == (2, 4, 4)
    assert ShardSpec("bat-free", 4).shape(12, 8) == (1, 4, 4)
    assert ShardSpec("bat-left", 4).shape(12, 8) == (3, 4, 4)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8", None])
@pytest.mark.parametrize("name", ["r", "mini_r"])
def test_sizes_are_positive_integers(name, value):
    with pytest.raises(InputError, match=f"`{name}` should be a positive integer, got"):
        ShardSpec(**{name: value})


def test_an_unknown_variant_names_the_nearest():
    with pytest.raises(InputError, match=r"Unknown variant 'bat_row'.*Did you mean 'bat-row'\?"):
        parse_variant("bat_row")
    with pytest.raises(InputError, match="Unknown variant"):
        ShardSpec(variant="batt")  # pyright: ignore[reportArgumentType]  (the wrong word is the point)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("out", "inp"), [(10, 6), (576, 1536), (7, 3), (192, 576)])
def test_the_remedy_of_an_error_works(variant, out, inp):
    """Whatever r is refused, the message's r is accepted."""
    for r in (1, 2, 5, 64, 1000):
        spec = ShardSpec(variant, r)
        remedy = spec.nearest_r([(out, inp)])
        ShardSpec(variant, remedy).check(out, inp)
        if remedy != r:
            with pytest.raises(SpecError, match=rf"layer.0.q_proj.*Use r={remedy}\b"):
                spec.check(out, inp, "layer.0.q_proj")


def test_the_remedy_fits_every_layer():
    spec = ShardSpec("bat", 50)
    shapes = [(576, 576), (192, 576), (1536, 576)]
    remedy = spec.nearest_r(shapes)
    assert spec.remedy(shapes) == f"r={remedy}"
    for shape in shapes:
        ShardSpec("bat", remedy).check(*shape)
    assert remedy == 48


def test_mini_r_must_divide_out():
    with pytest.raises(SpecError, match=r"`mini_r` \(5\) must divide out_features \(12\).*Use mini_r=4"):
        ShardSpec("mini", 4, mini_r=5).check(12, 8)


def test_the_remedy_of_mini_is_about_what_is_wrong():
    assert ShardSpec("mini", 4, mini_r=3).remedy([(32, 8), (16, 8)]) == "mini_r=2"
    assert ShardSpec("mini", 9, mini_r=3).remedy([(32, 8), (16, 12)]) == "r=8, mini_r=2"
