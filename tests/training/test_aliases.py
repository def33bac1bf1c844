"""Words of other tools: read with a notice, not used with a notice, or refused with a reason."""

import dataclasses
import re
import warnings
from pathlib import Path

import pytest
import yaml

from bonetune.errors import InputError
from bonetune.training import ConfigNotice, RunConfig, make_config
from bonetune.training.aliases import CONVERTED, OWN_VALUES, QUANTIZATION_WORDS, WORDS, translate
from bonetune.training.words import IGNORED, REFUSED, RENAMED

MINIMAL = {"model_name_or_path": "m", "dataset_name": "d.jsonl", "output_dir": "o"}
DOCS = Path(__file__).parents[2] / "docs"
FLAG = re.compile(r"--(\w+) (.+?)(?= --|$)")


def read(settings, overrides=None):
    """The configuration and the text of its notices."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConfigNotice)
        config = make_config(MINIMAL | settings, overrides)
    return config, " ".join(str(warning.message) for warning in caught)


def test_own_keys_draw_no_notice():
    assert read({"learning_rate": 1e-4, "report_to": "none", "dtype": "torch.bfloat16", "max_steps": -1})[1] == ""
    assert read({"eos_token": "</s>", "tokenizer_name_or_path": "t"})[1] == ""


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        ({"lr": "2e-4"}, "learning_rate", 2e-4),
        ({"warmup_ratio": 0.1}, "warmup_steps", 0.1),
        ({"load_in_4bit": True}, "quantization", "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "quantization", "fp4"),
        ({"load_in_4bit": True, "use_bnb_nested_quant": True}, "bnb_4bit_use_double_quant", True),
        ({"load_in_4bit": False, "load_in_8bit": True}, "quantization", "int8"),
        ({"bits": 16, "double_quant": True, "quant_type": "nf4"}, "quantization", None),
        ({"quantization_bit": 8}, "quantization", "int8"),
        ({"torch_dtype": "torch.float16"}, "dtype", "float16"),
        ({"tokenizer_name": "t"}, "tokenizer_name_or_path", "t"),
        ({"tokenizer": "t"}, "tokenizer_name_or_path", "t"),
        ({"tokenizer_config": "t"}, "tokenizer_name_or_path", "t"),
        ({"dtype": None}, "dtype", "auto"),
        ({"adafactor": True}, "optim", "adafactor"),
        ({"max_steps": -1}, "max_steps", None),
        ({"report_to": "wandb"}, "report_to", ("wandb",)),
        ({"fsdp": "full_shard auto_wrap"}, "fsdp", True),
        ({"padding_free": True}, "packing", True),
        ({"dataset_text_field": "text"}, "dataset_field", ("text",)),
        ({"truncation_mode": "keep_start"}, "truncation", "right"),
        ({"truncation_mode": "keep_end"}, "truncation", "left"),
        ({"train_on_inputs": True}, "completion_only_loss", False),
        ({"flash_attn": "fa2"}, "attn_implementation", "flash_attention_2"),
        ({"sdp_attention": True}, "attn_implementation", "sdpa"),
        ({"lora_target": "all"}, "target_modules", "all-linear"),
        ({"lora_target": "q_proj,v_proj"}, "target_modules", ("q_proj", "v_proj")),
        ({"lora_target_linear": True}, "target_modules", "all-linear"),
        ({"val_set_size": 0.05}, "eval_size", 0.05),
        ({"val_set_size": 0}, "eval_size", None),
        ({"validation_split_percentage": 5}, "eval_size", 0.05),
        ({"train_sampling_strategy": "random"}, "group_by_length", False),
        ({"use_gradient_checkpointing": "unsloth"}, "gradient_checkpointing", True),
        ({"finetuning_type": "bat-row"}, "variant", "bat-row"),
        ({"init_weights": "bat"}, "variant", "bat"),
        ({"precision": "bf16-mixed"}, "bf16", True),
        ({"bone_config": {"bone_load": "", "bone_r": 32}}, "r", 32),
        ({"disha_config": {"mode": "bat", "load": "", "r": 16}}, "variant", "bat"),
    ],
)
def test_a_word_is_read_as_our_key(settings, key, value):
    config, notice = read(settings)
    assert getattr(config, key) == value
    assert all(word in notice for word in settings if word not in OWN_VALUES)


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        ({"padding_free": False, "packing": True}, "packing", True),
        ({"assistant_only_loss": False}, "completion_only_loss", True),
        ({"fp16": None, "weight_decay": None}, "weight_decay", 0.0),
    ],
)
def test_what_a_dumped_configuration_says_without_meaning_it(settings, key, value):
    assert getattr(read(settings)[0], key) == value


@pytest.mark.parametrize(("word", "key"), [(w, key) for key, words in RENAMED.items() for w in words.split()])
def test_every_renamed_word_takes_its_keys_value(word, key):
    default = RunConfig.model_fields[key].get_default(call_default_factory=True)
    value = {} if default == {} else "some" if key in MINIMAL else default if default is not None else ["x"]
    assert translate({word: value}) == ({key: value}, [f"Read under bonetune's names: {word} as {key}={value!r}."])


def test_every_word_has_one_meaning_and_every_meaning_is_a_key():
    listed = [word for words in (*RENAMED.values(), *IGNORED.values()) for word in words.split()]
    listed += [*REFUSED, *CONVERTED, *QUANTIZATION_WORDS]
    assert sorted(listed) == sorted(set(listed))
    assert not set(listed) & set(RunConfig.model_fields)
    assert set(RENAMED) <= set(RunConfig.model_fields)
    keys = {part for into in filter(None, WORDS.values()) for part in into.removesuffix(", negated").split(", ")}
    assert keys <= set(RunConfig.model_fields)


@pytest.mark.parametrize("word", sorted(REFUSED))
def test_what_has_no_counterpart_is_refused_with_its_reason(word):
    with pytest.raises(InputError, match=f"{word}: {re.escape(REFUSED[word])}"):
        make_config(MINIMAL | {word: 16})
    config, notice = read({word: False})
    assert config == make_config(MINIMAL)
    assert word in notice


@pytest.mark.parametrize("word", sorted(word for words in IGNORED.values() for word in words.split()))
def test_what_is_not_used_is_named(word):
    config, notice = read({word: 4})
    assert config == make_config(MINIMAL)
    assert f"Not used: {word} (" in notice


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 1e-4, "learning_rate": 1e-3}, "learning_rate and lr contradict each other: both are learning_rate, 0.001 and"),
        ({"epochs": 1, "num_epochs": 2}, "epochs and num_epochs contradict each other"),
        ({"load_in_4bit": True, "quantization": "int8"}, "quantization and load_in_4bit contradict"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "of 4 bits or of 8, not both"),
        ({"bits": 3}, "bits: weights of 3 bits are not known"),
        ({"warmup_ratio": 100}, "100 is not a share below 1"),
        ({"warmup_ratio": [1]}, r"warmup_ratio: \[1\] is not a value for it"),
        ({"adapter": "qlora"}, "adapter: 'qlora' is not of the Bone family"),
        ({"init_bone_weights": False}, "start at zero"),
        ({"use_bone": False}, "bonetune trains nothing else"),
        ({"train_sampling_strategy": "sequential"}, "always shuffled"),
        ({"bone_config": {"load": "a.pth", "r": 8}}, "a run starts with a new adapter"),
        ({"precision": "tf32"}, "precision: 'tf32' is not known"),
        ({"lora_alpha": 16, "use_dora": True}, "lora_alpha: .*; use_dora: .*"),
    ],
)
def test_what_cannot_be_read_is_one_error(settings, message):
    with pytest.raises(InputError, match=message):
        make_config(MINIMAL | settings)


def test_every_option_of_trl_is_known():
    from trl import ModelConfig, ScriptArguments, SFTConfig

    options = {field.name for options in (SFTConfig, ModelConfig, ScriptArguments) for field in dataclasses.fields(options)}
    assert options - set(WORDS) - set(RunConfig.model_fields) == set()


def test_equal_words_do_not_contradict():
    assert read({"lr": 1e-4, "learning_rate": 1e-4})[0].learning_rate == 1e-4


def test_an_override_wins_over_a_word_of_the_file():
    assert read({"epochs": 3}, ["num_train_epochs=1"])[0].num_train_epochs == 1
    assert read({"num_train_epochs": 3}, ["epochs=1"])[0].num_train_epochs == 1
    assert read({"load_in_4bit": True}, ["bnb_4bit_quant_type=fp4"])[0].quantization == "fp4"
    assert read({"load_in_4bit": True}, ["load_in_4bit=false"])[0].quantization is None
    assert read({"quantization": "int8"}, ["bits=16"])[0].quantization is None
    assert read({"quantization": "int8"}, ["load_in_4bit=false"])[0].quantization == "int8"


class TestDataSetsOfAxolotl:
    def read(self, *datasets):
        with pytest.warns(ConfigNotice):
            return make_config({k: v for k, v in MINIMAL.items() if k != "dataset_name"} | {"datasets": list(datasets)})

    def test_one_and_several(self):
        assert self.read({"path": "a.jsonl", "type": "alpaca"}).dataset_name == "a.jsonl"
        config = self.read(
            {"path": "a", "type": "chat_template", "split": "x"}, {"path": "b", "type": "chat_template", "split": "x"}
        )
        assert (config.dataset_name, config.dataset_format, config.dataset_split) == (("a", "b"), "messages", "x")

    def test_files_of_a_data_set(self):
        assert self.read({"path": "json", "data_files": ["a.json", "b.json"]}).dataset_name == ("a.json", "b.json")

    @pytest.mark.parametrize(
        ("datasets", "message"),
        [
            ("a.jsonl", "name the files in dataset_name"),
            ([{"path": "a", "type": "alpaca"}, {"path": "b", "type": "sharegpt"}], "differ in type"),
            ([{"path": "a", "type": "pygmalion"}], "type 'pygmalion' is not known"),
            ([{"path": "a", "shards": 4}], "shards of a data set have no counterpart"),
        ],
    )
    def test_what_cannot_be_read(self, datasets, message):
        with pytest.raises(InputError, match=f"datasets: .*{message}"):
            make_config({"datasets": datasets, "model": "m", "output": "o"})


def rows_of_the_pages():
    pages = [(DOCS / name).read_text(encoding="utf-8") for name in ("from-scripts.md", "from-rwkv-peft.md")]
    for line in "\n".join(pages).splitlines():
        if line.startswith("| `--") and "MODEL`, or" not in line and "FOLDER`" not in line and "FILE`" not in line:
            flags, here = (cell.strip() for cell in line[1:-1].split(" | ", 1))
            yield flags.strip("`"), here


ROWS = [row for row in rows_of_the_pages() if row[0] != "--merge True`, `--use_bone True"]


def test_the_pages_have_the_flags_of_the_scripts():
    assert len(ROWS) > 130


@pytest.mark.parametrize(("flags", "here"), ROWS, ids=[flags for flags, _ in ROWS])
def test_each_flag_of_the_papers_scripts_is_what_the_page_says(flags, here):
    given = {word: yaml.safe_load(value.strip("'")) for word, value in FLAG.findall(flags)}
    assert given
    if here.startswith("refused"):
        with pytest.raises(InputError, match=next(iter(given))):
            make_config(MINIMAL, given)
        return
    if here.startswith("not needed"):
        config, notice = read({}, given)
        assert config == make_config(MINIMAL)
        assert all(word in notice for word in given)
        return
    config, _ = read({}, given)
    said = [yaml.safe_load(text) for text in re.findall(r"`([^`]+)`", re.match(r"(?:`[^`]+`(?: and )?)+", here)[0])]
    settings = {key: value for setting in said for key, value in setting.items()}
    expected = make_config(MINIMAL | settings)
    assert {key: getattr(config, key) for key in settings} == {key: getattr(expected, key) for key in settings}
