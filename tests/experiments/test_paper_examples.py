"""The comparisons of examples/paper as a dry run checks them: small models, and the data sets' fields as they are published."""

from pathlib import Path

import pytest
import rwkv_models
from transformers import LlamaConfig, MistralConfig, RobertaConfig, RobertaForMaskedLM

from bonetune.data.slices import Slice
from bonetune.errors import InputError
from bonetune.experiments.compare import plan_comparison
from bonetune.experiments.matching import sized
from bonetune.experiments.settings import load_comparison

PAPER = Path(__file__).parents[2] / "examples" / "paper"
FILES = sorted(file.stem for file in PAPER.glob("*.yaml"))
GLUE = [name for name in FILES if name.startswith("glue-")]
RATE = {"mnli": 5e-4, "sst2": 5e-4, "cola": 4e-4, "qnli": 4e-4, "mrpc": 4e-4}

SQUARE = {
    "task_id": "HumanEval/0",
    "prompt": 'def square(n):\n    """The square of n."""\n',
    "canonical_solution": "    return n * n\n",
    "test": "def check(candidate):\n    assert candidate(3) == 9\n",
    "entry_point": "square",
}
GSM8K = {"question": "What is half of 36?", "answer": "36 / 2 = 18\n#### 18"}
MATH = {"problem": "What is $x+x$?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{2x}$."}
META = {"type": "GSM_Rephrased", "query": "What is 1 + 1?", "original_question": "1 + 1?", "response": "2. The answer is: 2"}
CODE = {"query": "Write a function.", "answer": "```python\ndef f(): ...\n```", "resource": "evolinstruct", "lang": "python"}
TEXTS = {
    "mnli": ("premise", "hypothesis"),
    "sst2": ("sentence",),
    "cola": ("sentence",),
    "qnli": ("question", "sentence"),
    "mrpc": ("sentence1", "sentence2"),
}
# A row of each data set, by its name on the hub and its configuration's, and the splits that it has.
HUB = {
    ("meta-math/MetaMathQA", None): (META, ["train"]),
    ("m-a-p/CodeFeedback-Filtered-Instruction", None): (CODE, ["train"]),
    ("openai/gsm8k", "main"): (GSM8K, ["train", "test"]),
    ("DigitalLearningGmbH/MATH-lighteval", None): (MATH, ["train", "test"]),
    ("openai/openai_humaneval", None): (SQUARE, ["test"]),
} | {
    ("nyu-mll/glue", task): (
        dict.fromkeys(fields, "a text"),
        ["train", *(("validation_matched", "validation_mismatched") if task == "mnli" else ("validation",))],
    )
    for task, fields in TEXTS.items()
}


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    """The data sets, of twelve rows each; their tokens are kept nowhere but here."""

    def load_dataset(name, configuration, *, split, streaming):
        row, splits = HUB[name, configuration]
        part = Slice.parse(split)
        assert part.name in splits
        labels = 3 if configuration == "mnli" else 2
        rows = [row | ({"label": n % labels, "idx": n} if name == "nyu-mll/glue" else {}) for n in range(12)]
        start, stop = part.bounds(len(rows))
        assert not streaming
        return rows[start:stop]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def stand_in(model_folder, tokenizer, tmp_path):
    """A small model of the kind that a file of this name is about."""

    def made(name):
        if "rwkv" in name:
            sizes = {"vocab_size": 65536, "hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 1}
            return rwkv_models.file(tmp_path / "base.pth", "x060", **sizes)
        if name not in GLUE:
            return model_folder
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        RobertaForMaskedLM(RobertaConfig(vocab_size=320, **sizes)).save_pretrained(tmp_path / "roberta")
        tokenizer.save_pretrained(tmp_path / "roberta")
        return tmp_path / "roberta"

    return made


def on(name, model, *overrides):
    return load_comparison(PAPER / f"{name}.yaml", [f"train.model_name_or_path={model}", *overrides])


def test_there_are_files():
    assert len(FILES) == 9
    assert len(GLUE) == 5


@pytest.mark.parametrize("name", FILES)
def test_a_dry_run_finds_nothing_wrong(name, stand_in):
    comparison = on(name, stand_in(name), "methods.lora.r=4", "methods.pissa.r=4", "methods.bone.r=8")
    plans = {plan.sized.name: plan for plan in plan_comparison(comparison).methods}
    assert {"lora", "pissa", "bone"} <= set(plans)
    rate = RATE[name.removeprefix("glue-")] if name in GLUE else 2e-5
    for plan in plans.values():
        assert plan.rates == (rate,)
        assert not plan.sized.matched
    assert plans["bone"].described == "bone, r=8"
    if name in GLUE or "rwkv" in name:  # their layers have as many inputs as outputs, in all
        assert plans["lora"].sized.trainable_parameters == plans["bone"].sized.trainable_parameters
    assert comparison.output_dir == f"comparisons/{name}"
    assert comparison.references == ("lora",)


@pytest.mark.parametrize("name", FILES)
def test_without_its_rates_each_method_is_swept(name, stand_in):
    methods = load_comparison(PAPER / f"{name}.yaml").methods
    grids = [f"methods.{method}.learning_rates=null" for method in methods]
    sizes = [f"methods.{method}.r=4" for method in methods]
    plans = plan_comparison(on(name, stand_in(name), *grids, *sizes)).methods
    assert all(len(plan.rates) == 3 for plan in plans)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.datset_name=x", "datset_name"),
        ("train.dataset_field=[query, responce]", "responce"),
        ("tests={tasks: ['gsm8k:metamat']}", "Unknown task 'gsm8k:metamat'"),
        ("methods.pissa.baseline_kwargs={lora_alhpa: 36}", "did you mean 'lora_alpha'"),
    ],
)
def test_a_slip_is_found(override, message, model_folder):
    with pytest.raises(InputError, match=message):
        plan_comparison(on("metamath-llama2-7b", model_folder, override, "methods.bone.r=8"))


MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}


@pytest.mark.parametrize(
    ("name", "config", "sizes"),
    [
        ("metamath-llama2-7b", LlamaConfig(), {"lora": 89.9, "olora": 89.9, "pissa": 89.9, "bone": 87.0}),
        ("code-llama2-7b", LlamaConfig(), {"lora": 89.9, "olora": 89.9, "pissa": 89.9, "bone": 87.0}),
        ("metamath-mistral-7b", MistralConfig(**MISTRAL), {"lora": 94.4, "dora": 95.8, "pissa": 94.4, "bone": 88.1}),
        ("glue-sst2", RobertaConfig(**ROBERTA), dict.fromkeys(("lora", "pissa", "bone"), 0.3)),
    ],
)
def test_the_sizes_are_the_papers(name, config, sizes, tokenizer, tmp_path):
    """Millions of trainable parameters, from the model's configuration alone; a classifier's head is not counted."""
    config.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    head = 768 * 768 + 768 + 2 * 768 + 2 if name in GLUE else 0
    found = {size.name: size.trainable_parameters - head for size in sized(on(name, tmp_path / "model")).values()}
    assert {method: count / 1e6 for method, count in found.items()} == pytest.approx(sizes, abs=0.06)
    if name in GLUE:
        assert set(found.values()) == {294_912}
