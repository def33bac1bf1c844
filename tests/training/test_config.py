import pytest
import yaml

from bonetune.errors import InputError
from bonetune.spec import VARIANTS, ShardSpec
from bonetune.training import RunConfig, default_learning_rate, load_config, lora_sized, make_config

MINIMAL = {"model_name_or_path": "m", "dataset_name": "d.jsonl", "output_dir": "o"}


def test_file_and_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"r": 8, "learning_rate": "2e-4"}))
    config = load_config(path, ["r=16", "target_modules=[q_proj, v_proj]", "learning_rate=1e-5", "bf16=true", "--seed=3"])
    assert (config.r, config.learning_rate, config.bf16, config.seed) == (16, 1e-5, True, 3)
    assert config.target_modules == ("q_proj", "v_proj")
    assert load_config(path).learning_rate == 2e-4


def test_a_written_config_reads_back(tmp_path):
    config = make_config(MINIMAL | {"variant": "bat-row", "dataset_field": ["query", "response"], "rank_pattern": {"q": 4}})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "run.yaml") == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learnin_rate": 1}, r"Unknown key 'learnin_rate': did you mean 'learning_rate'\?"),
        ({"xyzzy": 1}, r"Unknown key 'xyzzy'\.$"),
        ({"r": "many"}, "r: input should be a valid integer.*got 'many'"),
        ({"r": 0}, "r: input should be greater than 0, got 0"),
        ({"variant": "batt"}, "variant: input should be 'bone'.*got 'batt'"),
        ({"learning_rate": "fast"}, "learning_rate: input should be a valid number.*got 'fast'"),
        ({"output_dir": None}, "output_dir: input should be a valid string"),
        ({"r": True}, "r: input should not be a boolean, got True"),
        ({"learning_rate": ".inf"}, "learning_rate: input should be a (finite|valid) number"),
        ({"seed": 2**40}, "seed: input should be less than 4294967296"),
        ({"optim": "adamw_tpyo"}, "optim: transformers has no 'adamw_tpyo'; did you mean 'adamw_"),
        ({"prompt_template": "hello"}, r"prompt_template lacks \{instruction\}"),
        ({"layers_to_transform": [0]}, "layers_to_transform needs target_modules to be a list"),
        ({"eval_steps": 3}, "eval_steps without eval_dataset_name"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(settings, message):
    with pytest.raises(InputError, match=message):
        make_config(MINIMAL | settings)


def test_all_that_is_wrong_is_named_at_once():
    with pytest.raises(InputError) as caught:
        make_config({"model_name_or_path": "m", "r": -1, "lerning_rate": 1})
    for part in ("Missing key 'dataset_name'", "Missing key 'output_dir'", "r: input", "did you mean 'learning_rate'"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "is not YAML"), ("- 1\n- 2\n", "holds a list, not settings"), ("", "Missing key 'model_name_or_path'")],
)
def test_a_file_that_is_no_configuration(tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "run.yaml")


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nope\.yaml cannot be read: No such file"):
        load_config(tmp_path / "nope.yaml")


@pytest.mark.parametrize("override", ["r", "=3", "r=[1"])
def test_what_is_no_override(tmp_path, override):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(InputError, match="is not"):
        load_config(tmp_path / "run.yaml", [override])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_default_rate_falls_with_r_and_loras_is_told_apart(variant):
    rates = [default_learning_rate(ShardSpec(variant, r)) for r in (8, 16, 64, 256)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1]
    spec = ShardSpec(variant, 64)
    assert not lora_sized(default_learning_rate(spec), spec)
    assert lora_sized(2e-3, spec)


def test_every_field_has_a_default_but_the_three_that_say_what_to_do():
    assert {name for name, f in RunConfig.model_fields.items() if f.is_required()} == set(MINIMAL)
