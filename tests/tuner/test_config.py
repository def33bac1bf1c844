import json
from pathlib import Path

import peft
import pytest
from peft import PeftConfig

from bonetune import VARIANTS, BoneConfig
from bonetune.errors import InputError
from bonetune.spec import ShardSpec


def test_importing_bonetune_registers_with_peft():
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["BONE"] is BoneConfig  # pyright: ignore[reportArgumentType]  (keys are enum members)
    assert peft.get_peft_config({"peft_type": "BONE", "r": 8}) == BoneConfig(r=8)


def test_registering_again_changes_nothing():
    import bonetune.tuner

    before = dict(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    bonetune.tuner.register()
    assert before == peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING


@pytest.mark.parametrize("variant", VARIANTS)
def test_init_weights_may_name_the_variant(variant):
    assert BoneConfig(init_weights=variant) == BoneConfig(variant=variant)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "batt"}, "Unknown variant 'batt'.*Did you mean 'bat'"),
        ({"init_weights": "batt"}, "Unknown variant 'batt'"),
        ({"variant": "bat", "init_weights": "mini"}, "name two variants"),
        ({"r": 0}, "`r` should be a positive integer"),
        ({"rank_pattern": {"q_proj": -4}}, "`r` should be a positive integer"),
        ({"rank_pattern": {"(": 4}}, "`rank_pattern`=.*is not a regular expression"),
        ({"bias": "some"}, "Unknown bias 'some'"),
        ({"bone_dropout": 1.0}, "`bone_dropout` should be"),
        ({"exact_update": "false"}, "`exact_update` should be true or false, got 'false'"),
    ],
)
def test_bad_settings_are_one_clear_error(settings, message):
    with pytest.raises(InputError, match=message):
        BoneConfig(**settings)


@pytest.mark.parametrize("name", ["layers_to_transform", "layers_pattern"])
def test_a_regular_expression_takes_no_layers(name):
    with pytest.raises(ValueError, match=f"`{name}` cannot be used when `target_modules` is a str"):
        BoneConfig(target_modules=".*q_proj", **{name: "x"})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("zeros", [True, False])
def test_a_file_names_its_variant_and_comes_back(tmp_path, variant, zeros):
    config = BoneConfig(r=8, variant=variant, mini_r=4, init_weights=zeros, target_modules=["b", "a"], rank_pattern={"a": 4})
    config.save_pretrained(str(tmp_path))
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["variant"] == variant
    assert content["init_weights"] == (True if variant == "bone" else variant)
    assert content["target_modules"] == ["a", "b"]
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    config.init_weights = True  # random values are not drawn again when a file is loaded
    assert loaded == config


@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_bone_and_bat_files_hold_what_peft_0_18_wrote(tmp_path: Path, variant):
    """The keys of PEFT 0.18.1's adapter_config.json (and of PEFT's base class); `variant` is the only other one."""
    BoneConfig(variant=variant, target_modules=["a"]).save_pretrained(str(tmp_path))
    written = set(json.loads((tmp_path / "adapter_config.json").read_text()))
    bone = {"r", "init_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias"}
    assert written - set(PeftConfig().to_dict()) == bone | {"modules_to_save", "variant"}


def test_spec_follows_the_rank_pattern():
    config = BoneConfig(r=8, variant="bat", rank_pattern={"q_proj": 4, r"layers\.1\..*": 2})
    assert config.spec("model.layers.0.q_proj") == ShardSpec("bat", 4)
    assert config.spec("model.layers.1.k_proj") == ShardSpec("bat", 2)
    assert config.spec("model.layers.0.k_proj") == ShardSpec("bat", 8)
