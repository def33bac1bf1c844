import pytest
import yaml

from bonetune.errors import InputError
from bonetune.spec import VARIANTS, ShardSpec
from bonetune.training import ConfigNotice, RunConfig, default_learning_rate, load_config, lora_sized, make_config
from bonetune.training.presets import PRESETS

MINIMAL = {"model_name_or_path": "m", "dataset_name": "d.jsonl", "output_dir": "o"}


def test_file_and_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"r": 8, "learning_rate": "2e-4"}))
    config = load_config(path, ["r=16", "target_modules=[q_proj, v_proj]", "learning_rate=1e-5", "bf16=true", "--seed=3"])
    assert (config.r, config.learning_rate, config.bf16, config.seed) == (16, 1e-5, True, 3)
    assert config.target_modules == ("q_proj", "v_proj")
    assert load_config(path).learning_rate == 2e-4


def test_another_tokenizer_and_another_end():
    config = make_config(MINIMAL)
    assert (config.tokenizer_name_or_path, config.eos_token) == (None, None)
    config = make_config(MINIMAL | {"tokenizer_name_or_path": "t", "eos_token": "<|im_end|>"})
    assert (config.tokenizer_name_or_path, config.eos_token) == ("t", "<|im_end|>")


def test_token_ids_are_a_format():
    assert make_config(MINIMAL | {"dataset_format": "tokens", "truncation": "split"}).dataset_format == "tokens"


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
        ({"eos_token": 3}, "eos_token: input should be a valid string, got 3"),
        ({"task_type": "SEQ_CLS", "dataset_format": "tokens"}, "SEQ_CLS needs rows with a label"),
        ({"seed": 2**40}, "seed: input should be less than 4294967296"),
        ({"optim": "adamw_tpyo"}, "optim: transformers has no 'adamw_tpyo'; did you mean 'adamw_"),
        ({"prompt_template": "hello"}, r"prompt_template lacks \{instruction\}"),
        ({"layers_to_transform": [0]}, "layers_to_transform needs target_modules to be a list"),
        ({"eval_steps": 3}, "eval_steps without eval_dataset_name or eval_size"),
        ({"layers_pattern": "h"}, "layers_pattern without layers_to_transform"),
        ({"mini_r": 2}, "mini_r=2 is a size of variant mini; variant is bone"),
        ({"num_labels": 2}, "num_labels is for task_type SEQ_CLS; task_type is CAUSAL_LM"),
        ({"dataset_format": "classification"}, "classification needs task_type SEQ_CLS"),
        ({"task_type": "SEQ_CLS", "dataset_format": "text"}, "SEQ_CLS needs rows with a label"),
        ({"task_type": "SEQ_CLS", "packing": True}, "packing is for task_type CAUSAL_LM; task_type is SEQ_CLS"),
        ({"dataset_name": ["a", "b"], "dataset_weights": [1]}, "dataset_weights has 1 numbers for 2 of dataset_name"),
        ({"dataset_weights": [1, 2]}, "dataset_weights has 2 numbers for 1 of dataset_name"),
        ({"dataset_weights": [-1]}, r"dataset_weights\.0: input should be greater than 0, got -1"),
        ({"eval_size": 0.1, "eval_dataset_name": "e"}, "two evaluation sets: choose one"),
        ({"eval_size": 1.5}, "eval_size=1.5 is neither a share below 1 nor a whole number"),
        ({"streaming": True}, "streaming needs max_steps"),
        ({"streaming": True, "max_steps": 1, "eval_size": 0.1}, "eval_size=0.1 of a stream is not known"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are two precisions"),
        ({"bnb_4bit_use_double_quant": True}, "is for quantization nf4 or fp4; quantization is None"),
        ({"fsdp": True, "deepspeed": "zero.json"}, "fsdp and deepspeed both"),
        ({"fsdp_config": {}}, "fsdp_config without fsdp"),
        ({"packing": "sometimes"}, "packing: input should be a valid boolean.*, or input should be 'auto', got 'sometimes'"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\.q: input should be greater than 0, got 0"),
        ({"cutof_len": 3}, r"Unknown key 'cutof_len': did you mean 'cutoff_len', which is max_length here\?"),
        ({"lora_alfa": 3}, r"Unknown key 'lora_alfa': did you mean 'lora_alpha'\?"),
        ({"r.q_proj": 3}, r"Unknown key 'r\.q_proj'"),
        ({"deepspeed": "zero.json", "deepspeed.stage": 2}, r"deepspeed\.stage: there is 'zero\.json' already"),
        ({"preset": "paper-7"}, r"no preset 'paper-7': did you mean 'paper-7b'\?"),
        ({"preset": ["glue"]}, "no preset"),
        ({3: 4}, "The key 3 is no text"),
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


def test_all_contradictions_are_named_at_once():
    with pytest.raises(InputError, match=r"streaming needs max_steps.*; bf16 and fp16"):
        make_config(MINIMAL | {"streaming": True, "bf16": True, "fp16": True})


def test_what_fits_is_let_pass():
    make_config(MINIMAL | {"eval_size": 0.1, "eval_steps": 3})
    make_config(MINIMAL | {"eval_size": 100.0, "streaming": True, "max_steps": 3})
    make_config(MINIMAL | {"dataset_name": ["a", "b"], "dataset_weights": [1, 3]})
    make_config(MINIMAL | {"task_type": "SEQ_CLS", "num_labels": 3, "dataset_format": "classification"})
    make_config(MINIMAL | {"layers_to_transform": 3, "layers_pattern": "h", "target_modules": ["q"]})


def test_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'model_name_or_path = "m"\ndataset_name = "d.jsonl"\noutput_dir = "o"\nlearning_rate = 2e-4\n'
        'target_modules = ["q_proj"]\n\n[rank_pattern]\nq_proj = 8\n'
    )
    settings = {"learning_rate": 2e-4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 8}}
    assert load_config(path) == make_config(MINIMAL | settings)
    path.write_text("r = 1\nr = 2\n")
    with pytest.raises(InputError, match=r"run\.toml is not TOML"):
        load_config(path)


def test_numbers_are_numbers_and_stay_texts_where_quoted(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "lr_scheduler_kwargs: {min_lr: 1e-6, name: '1e-6'}\nrun_name: '1e5'\n")
    config = load_config(path)
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-6, "name": "1e-6"}
    path.write_text(config.to_yaml())
    assert load_config(path) == config


def test_a_key_twice_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(MINIMAL) + "r: 8\nlearning_rate: 1e-4\nr: 16\n")
    with pytest.raises(InputError, match="key 'r' stands there twice"):
        load_config(tmp_path / "run.yaml")


class TestEntriesOfMappings:
    def test_they_are_added_and_replaced(self):
        settings = MINIMAL | {"rank_pattern": {"q_proj": 8, "v_proj": 4}}
        config = make_config(settings, ["rank_pattern.q_proj=32", "rank_pattern.model.layers.0.k_proj=2"])
        assert config.rank_pattern == {"q_proj": 32, "v_proj": 4, "model.layers.0.k_proj": 2}
        assert make_config(settings, ["rank_pattern={o_proj: 2}"]).rank_pattern == {"o_proj": 2}
        assert settings["rank_pattern"] == {"q_proj": 8, "v_proj": 4}

    def test_free_mappings_are_nested(self):
        config = make_config(MINIMAL | {"deepspeed": {"zero_optimization": {"stage": 1, "overlap_comm": True}}},
                             ["deepspeed.zero_optimization.stage=2"])  # fmt: skip
        assert config.deepspeed == {"zero_optimization": {"stage": 2, "overlap_comm": True}}

    def test_in_a_file(self):
        assert make_config(MINIMAL | {"lr_scheduler_kwargs.num_cycles": 2}).lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        ({"target_modules": "q_proj, v_proj"}, "target_modules", ("q_proj", "v_proj")),
        ({"target_modules": r".*\.(q|v)_proj"}, "target_modules", r".*\.(q|v)_proj"),
        ({"target_modules": "q_{1,2}"}, "target_modules", "q_{1,2}"),
        ({"modules_to_save": "score"}, "modules_to_save", ("score",)),
        ({"dataset_field": "query,response"}, "dataset_field", ("query", "response")),
        ({"dataset_name": "a,b.jsonl"}, "dataset_name", "a,b.jsonl"),
    ],
)
def test_texts_for_lists(settings, key, value):
    assert getattr(make_config(MINIMAL | settings), key) == value


class TestPresets:
    @pytest.mark.parametrize("name", PRESETS)
    def test_they_are_below_everything_else(self, name):
        config = make_config(MINIMAL | {"preset": name, "r": 8}, {"max_length": 99})
        expected = PRESETS[name] | {"r": 8, "max_length": 99}
        assert config == make_config(MINIMAL | expected)

    def test_an_override_chooses_another(self):
        assert make_config(MINIMAL | {"preset": "paper-7b"}, ["preset=glue"]) == make_config(MINIMAL | {"preset": "glue"})

    @pytest.mark.parametrize("name", PRESETS)
    def test_the_resolved_file_needs_none(self, name, tmp_path):
        config = make_config(MINIMAL | {"preset": name})
        (tmp_path / "run.yaml").write_text(config.to_yaml())
        assert "preset" not in yaml.safe_load(config.to_yaml())
        assert load_config(tmp_path / "run.yaml") == config


def test_notices_come_once_from_a_file_and_never_from_a_resolved_one(tmp_path, recwarn):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(MINIMAL | {"epochs": 3, "tf32": True}))
    with pytest.warns(ConfigNotice) as caught:
        config = load_config(tmp_path / "run.yaml")
    assert len(caught) == 2
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml").num_train_epochs == 3
    assert not recwarn.list


def test_a_written_config_begins_with_the_model():
    assert make_config(MINIMAL).to_yaml().startswith("model_name_or_path: m\n")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_default_rate_falls_with_r_and_loras_is_told_apart(variant):
    rates = [default_learning_rate(ShardSpec(variant, r)) for r in (8, 16, 64, 256)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1]
    spec = ShardSpec(variant, 64)
    assert not lora_sized(default_learning_rate(spec), spec)
    assert lora_sized(2e-3, spec)


@pytest.mark.parametrize("variant", VARIANTS)
def test_default_rates_are_what_they_are_printed_as(variant):
    """0.0003, not 0.00030000000000000003, which is another rate than 3e-4 in a file, and another column in a table."""
    for r in range(1, 513):
        rate = default_learning_rate(ShardSpec(variant, r))
        assert rate == float(f"{rate:.0e}")


def test_every_field_has_a_default_but_the_three_that_say_what_to_do():
    assert {name for name, f in RunConfig.model_fields.items() if f.is_required()} == set(MINIMAL)
