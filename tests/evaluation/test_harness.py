import copy
import gc
import json
import logging
import random
import sys
import tempfile
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import rwkv_models
import torch
import tqdm
import yaml
from adapted_models import config
from conftest import llama
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import get_peft_model

from bonetune.errors import InputError
from bonetune.evaluation import harness
from bonetune.evaluation.gsm8k import few_shot_prompts, judge_lm_eval
from bonetune.evaluation.ledger import Ledger
from bonetune.evaluation.task import Request
from bonetune.models import Loaded, generate
from bonetune.rwkv import WorldTokenizer

QUESTIONS = ["the quick brown fox", "a", "what is one plus two? three", "the lazy dog jumps over", "user"]
CHOICES = [" fox jumps", " dog", " three."]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path, tokenizer):
    """Tasks on rows of which the model answers the first two as expected: two that generate, two that choose, a group."""
    said = generate(llama(), tokenizer, QUESTIONS, max_new_tokens=6, stop=["\n"])
    rows = [
        {"question": question, "answer": said[n] if n < 2 else "?", "choices": CHOICES, "label": n % 3}
        for n, question in enumerate(QUESTIONS)
    ]
    test, train = write_rows(tmp_path / "test.jsonl", rows), write_rows(tmp_path / "train.jsonl", rows[2:])
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": test, "train": train}, "cache_dir": str(tmp_path / "cache")},
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 2.5},
    }
    plain = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    tasks = {
        "generate": common
        | {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
            "filter_list": [
                {"name": "first", "filter": [{"function": "regex", "regex_pattern": "^(.{0,3})"}, {"function": "take_first"}]},
                {"name": "whole", "filter": [{"function": "take_first"}]},
            ],
            "metric_list": [plain],
        },
        "choose": common
        | {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{label}}",
            "target_delimiter": "",
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
        },
        "likely": common
        | {
            "output_type": "loglikelihood",
            "doc_to_target": "{{question}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            ],
        },
    }
    written = {name: {"task": f"tiny_{name}", **content} for name, content in tasks.items()}
    parts = [{**written["choose"], "task": name} for name in ("part_a", "part_b")]
    group = {"group": "tiny_group", "task": parts, "metadata": {"version": 4}}
    written["group"] = group | {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    written["scoreless"] = group | {"group": "tiny_scoreless"}
    written["choose"]["tag"] = written["likely"]["tag"] = "tiny_tag"
    for name, content in written.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return {name: str(tmp_path / f"{name}.yaml") for name in written}


def ours(name, model, tokenizer, shots="", **request):
    prepared = harness.task(f"lm-eval:{name}{shots}").prepare(Request(**({"batch_size": 2} | request)))
    told = []
    loaded = Loaded(model, tokenizer, "base")
    result = prepared.run(loaded, Ledger(prepared.items, lambda done, total: told.append((done, total))))
    assert told[-1] == (prepared.items, prepared.items)
    assert [record["row"] for record in result.records] == list(range(1, result.items + 1))
    json.dumps(result.summary() | {"records": result.records})
    return result


def theirs(file, model, tokenizer, **settings):
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    manager = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(language_model, tasks=[file], task_manager=manager, bootstrap_iters=1000, **settings)


@pytest.mark.parametrize(("shots", "number"), [("", None), ("@1", 1)])
def test_generation_is_the_harnesss(files, tokenizer, shots, number):
    model = llama()
    result = ours(files["generate"], model, tokenizer, shots)
    found = theirs(files["generate"], model, tokenizer, num_fewshot=number)
    for name in ("first", "whole"):
        samples = [sample for sample in found["samples"]["tiny_generate"] if sample["filter"] == name]
        assert [record["prompt"] for record in result.records] == [sample["arguments"][0][0] for sample in samples]
        assert [record["output"] for record in result.records] == [sample["resps"][0][0] for sample in samples]
        scores = [sample["exact_match"] for sample in samples]
        if name == "first":
            answers = [record.get("answer", record["output"]) for record in result.records]
            assert answers == [sample["filtered_resps"][0] for sample in samples]
            assert [record["correct"] for record in result.records] == scores
            assert result.score == found["results"]["tiny_generate"]["exact_match,first"]
        else:
            assert [record["metrics"]["exact_match,whole"] for record in result.records] == scores
            assert result.metrics["exact_match,whole"] == found["results"]["tiny_generate"]["exact_match,whole"]
            if not number:
                assert scores[:2] == [1, 1]
    assert result.interval[0] <= result.score <= result.interval[1]
    assert result.protocol.startswith(f"lm-eval:{files['generate']}{shots}: lm-evaluation-harness {lm_eval.__version__}, ")
    assert f"tiny_generate version 2.5, {number or 0} examples shown, exact_match after the filter first" in result.protocol


def test_choices_are_the_harnesss(files, tokenizer):
    model = llama()
    result = ours(files["choose"], model, tokenizer, limit=4)
    found = theirs(files["choose"], model, tokenizer, limit=4)
    samples = found["samples"]["tiny_choose"]
    assert result.items == 4
    for record, sample in zip(result.records, samples, strict=True):
        assert record["prompt"] == sample["arguments"][0][0]
        assert record["choices"] == CHOICES
        assert record["loglikelihoods"] == [one[0][0] for one in sample["resps"]]
        assert record["output"] == CHOICES[int(np.argmax(record["loglikelihoods"]))]
        assert record["expected"] == CHOICES[sample["target"]]
        assert record["correct"] == (record["output"] == record["expected"]) == bool(sample["acc"])
        assert record["metrics"] == {"acc_norm,none": sample["acc_norm"]}
    assert result.score == found["results"]["tiny_choose"]["acc,none"]
    assert result.metrics["acc_norm,none"] == found["results"]["tiny_choose"]["acc_norm,none"]


def test_a_score_that_is_no_mean(files, tokenizer):
    model = llama()
    result = ours(files["likely"], model, tokenizer)
    found = theirs(files["likely"], model, tokenizer)["results"]["tiny_likely"]
    assert result.score == found["perplexity,none"]
    assert not result.higher_is_better
    half = 1.959963984540054 * found["perplexity_stderr,none"]
    assert result.interval == pytest.approx((result.score - half, result.score + half))
    assert [record["score"] for record in result.records] == [record["loglikelihood"] for record in result.records]


def test_a_group(files, tokenizer, monkeypatch):
    index = TaskManager(include_defaults=False, include_path=str(Path(files["group"]).parent))
    monkeypatch.setattr(harness, "manager", lambda with_its_own=True: index)
    model = llama()
    result = ours("tiny_group", model, tokenizer, limit=3)
    assert result.items == 6
    assert [record["task"] for record in result.records] == ["tiny_group::part_a"] * 3 + ["tiny_group::part_b"] * 3
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    found = lm_eval.simple_evaluate(language_model, tasks=["tiny_group"], task_manager=index, limit=3)["results"]
    assert result.score == found["tiny_group"]["acc,none"] == sum(record["correct"] for record in result.records) / 6
    for part in ("part_a", "part_b"):
        assert result.metrics[f"tiny_group::{part}:acc,none"] == found[f"tiny_group::{part}"]["acc,none"]
    assert "tiny_group version 4" in result.protocol
    for name, message in [
        ("tiny_scoreless", "is a name for 2 tasks, without a score of its own: choose tiny_scoreless::part_a, tiny"),
        ("tiny_tag", "is a name for 2 tasks, without a score of its own: choose tiny_choose, tiny_likely"),
    ]:
        with pytest.raises(InputError, match=message):
            ours(name, model, tokenizer)


def likelihood(model, tokenizer, question, choice):
    before, ids = len(tokenizer(question).input_ids), tokenizer(question + choice, return_tensors="pt").input_ids
    with torch.no_grad():
        found = model(ids).logits[0].log_softmax(-1)
    return float(sum(found[place - 1, ids[0, place]] for place in range(before, ids.shape[1])))


@pytest.mark.parametrize(
    "targets",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}],
)
def test_an_adapter_on_tied_embeddings_stays_what_it_is(files, tokenizer, targets):
    with pytest.warns(UserWarning, match="tied"):
        model = get_peft_model(llama(tie_word_embeddings=True), config(**targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.train()
    before = copy.deepcopy(model.state_dict())
    result = ours(files["choose"], model, tokenizer)
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    model.eval()
    for record in result.records:
        expected = [likelihood(model, tokenizer, record["prompt"], choice) for choice in CHOICES]
        assert record["loglikelihoods"] == pytest.approx(expected, abs=1e-4)
    assert ours(files["generate"], model, tokenizer).items == 5


@pytest.mark.parametrize("version", rwkv_models.VERSIONS)
def test_rwkv(files, version):
    model, tokenizer = rwkv_models.model(version, vocab_size=65536), WorldTokenizer()
    result = ours(files["generate"], model, tokenizer)
    prompts = [record["prompt"] for record in result.records]
    assert prompts == QUESTIONS
    expected = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=2, stop=["\n"])
    assert [record["output"] for record in result.records] == expected
    for record in ours(files["choose"], model, tokenizer).records:
        expected = [likelihood(model, tokenizer, record["prompt"], choice) for choice in CHOICES]
        assert record["loglikelihoods"] == pytest.approx(expected, abs=1e-3)


def test_the_users_limits(files, tokenizer):
    model = llama()
    longer = ours(files["generate"], model, tokenizer, max_new_tokens=9)
    assert [record["output"] for record in longer.records] == generate(
        model, tokenizer, QUESTIONS, max_new_tokens=9, stop=["\n"], batch_size=2
    )
    assert longer.protocol.endswith("; at most 9 new tokens")
    with pytest.raises(InputError, match=r"does not fit base: .*requested max tokens to generate \(200\)"):
        ours(files["generate"], model, tokenizer, max_new_tokens=200)


@pytest.fixture
def shuffling(files, tmp_path):
    """A task whose own code shuffles the choices, and prints; in two files that share no cache."""
    (tmp_path / "mixing.py").write_text(
        "import random\n\n\ndef mixed(row):\n    choices, right = list(row['choices']), row['choices'][row['label']]\n"
        "    random.shuffle(choices)\n    return {'choices': choices, 'label': choices.index(right)}\n\n\n"
        "def process(rows):\n    print('mixed')\n    return rows.map(mixed)\n"
    )
    made = []
    for name in ("one", "two"):
        content = yaml.safe_load(Path(files["choose"]).read_text()) | {"task": f"tiny_{name}"}
        content["dataset_kwargs"]["cache_dir"] = str(tmp_path / name)
        made.append(tmp_path / f"{name}.yaml")
        made[-1].write_text(yaml.safe_dump(content) + "process_docs: !function mixing.process\n")
    return list(map(str, made))


def test_a_task_that_shuffles_is_the_harnesss(shuffling, model, tokenizer, capfd):
    result = ours(shuffling[0], model, tokenizer)
    assert capfd.readouterr() == ("", "")
    samples = theirs(shuffling[1], model, tokenizer)["samples"]["tiny_two"]
    for record, sample in zip(result.records, samples, strict=True):
        assert record["choices"] == [one[1] for one in sample["arguments"]]
        assert record["correct"] == bool(sample["acc"])
    assert any(record["choices"] != CHOICES for record in result.records)


def test_the_users_rows_in_a_task_that_shuffles(shuffling, files, tmp_path, model, tokenizer, monkeypatch):
    index = TaskManager(include_defaults=False, include_path=str(tmp_path))
    monkeypatch.setattr(harness, "manager", lambda with_its_own=True: index)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    result = ours("tiny_one", model, tokenizer, data=str(tmp_path / "test.jsonl"), few_shot=str(tmp_path / "train.jsonl"))
    gc.collect()
    assert not any((tmp_path / "temporary").iterdir())
    expected = ours(shuffling[1], model, tokenizer)
    assert [record["expected"] for record in result.records] == [CHOICES[n % 3] for n in range(5)]
    assert result.records == expected.records


def test_it_is_quiet_and_leaves_no_trace(files, model, tokenizer, capfd, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    logging.getLogger("lm_eval").setLevel(logging.DEBUG)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    bar = lm_eval.api.task.tqdm
    for name in ("generate", "choose", "likely"):
        ours(files[name], model, tokenizer)
    assert capfd.readouterr() == ("", "")
    assert lm_eval.api.task.tqdm is bar is tqdm.tqdm
    assert logging.getLogger("lm_eval").level == logging.DEBUG
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert not any((tmp_path / "here").iterdir())


@pytest.fixture
def only_gsm8k(monkeypatch):
    """The harness's own file of the task, without the fourteen thousand others."""
    folder = Path(lm_eval.__file__).parent / "tasks/gsm8k"
    index = TaskManager(include_defaults=False, include_path=str(folder))
    monkeypatch.setattr(harness, "manager", lambda with_its_own=True: index)


def problems(count, first=0):
    rows = [(number, number % 4 + 2) for number in range(first, first + count)]
    return [{"question": f"{n}. Add {a} and 3.", "answer": f"{a} + 3 = {a + 3}\n#### {a + 3}"} for n, a in rows]


@pytest.mark.parametrize(("shots", "shown"), [("", 5), ("@2", 2), ("@0", 0)])
def test_the_users_rows_in_a_task_of_the_harness(only_gsm8k, tokenizer, tmp_path, shots, shown):
    test, train = problems(4), problems(12, 100)
    told = {"data": write_rows(tmp_path / "test.jsonl", test), "max_new_tokens": 8, "limit": 3}
    if shown:
        told["few_shot"] = write_rows(tmp_path / "train.jsonl", train)
    result = ours("gsm8k", llama(max_position_embeddings=1024), tokenizer, shots, **told)
    assert [record["prompt"] for record in result.records] == few_shot_prompts(test[:3], train, shown)
    for record, row in zip(result.records, test, strict=False):
        judged = judge_lm_eval(record["output"], row)
        assert (record["answer"], record["correct"]) == (judged["answer"], judged["correct"])
        assert record["metrics"] == {"exact_match,flexible-extract": judged["flexible"]}
    assert f"gsm8k version 3.0, {shown} examples shown, exact_match after the filter strict-match" in result.protocol
    assert result.protocol.endswith("; on the user's rows")


def test_what_cannot_be_asked(only_gsm8k, files, tmp_path, tokenizer):
    rows = write_rows(tmp_path / "rows.jsonl", problems(3))
    others = write_rows(tmp_path / "others.jsonl", [{"text": "a"}])
    known = "lm-evaluation-harness .* knows no task 'gsm8'"
    for name, request, message in [
        ("gsm8", {}, f"lm-eval:gsm8: {known}: did you mean gsm8k"),
        ("gsm8k@five", {}, "knows no task 'gsm8k@five'"),
        ("nothing like it", {}, "`lm_eval ls tasks` lists those there are"),
        ("", {}, "lm-eval: names no task: write lm-eval:NAME"),
        ("missing.yaml", {}, "there is no such file"),
        ("gsm8k", {}, "lm-eval:gsm8k: its data, openai/gsm8k, is not to be had .* pass data"),
        ("gsm8k", {"data": rows}, "shows 5 examples: pass few_shot, the rows to take them from, or write @0 behind it"),
        ("gsm8k", {"few_shot": rows}, "takes examples from its own data: pass data with few_shot"),
        ("gsm8k", {"data": others, "few_shot": others}, "the rows of .*others.jsonl are not what the task reads"),
        ("gsm8k", {"data": str(tmp_path / "no.jsonl")}, "does not exist"),
        ("gsm8k", {"split": "train"}, "is scored on the split that the harness has for it"),
        ("math_word_problems", {"data": rows}, "is a name for several tasks, so data cannot replace it"),
        (files["choose"], {"data": rows}, "takes no data: name it in the file"),
        (files["group"], {}, "is no task that the harness can load"),
    ]:
        with pytest.raises(InputError, match=message):
            harness.prepare(f"lm-eval:{name}", Request(**request))


def changed(files, name, **changes):
    content = yaml.safe_load(Path(files[name]).read_text()) | changes
    path = Path(files[name]).with_name(f"changed_{name}.yaml")
    path.write_text(yaml.safe_dump(content))
    return f"lm-eval:{path}"


def test_tasks_that_are_not_for_us(files):
    with pytest.raises(InputError, match="runs the programs that the model writes"):
        harness.prepare(changed(files, "generate", unsafe_code=True), Request())
    with pytest.raises(InputError, match="shows pictures or plays sounds"):
        harness.prepare(changed(files, "generate", doc_to_image="{{question}}"), Request())
    with pytest.raises(InputError, match="tiny_generate is asked without examples, by its own rule: leave @2 out"):
        harness.prepare(changed(files, "generate", num_fewshot=0) + "@2", Request())


def test_what_a_result_depends_on(files):
    identity = harness.prepare(f"lm-eval:{files['generate']}@1", Request(limit=3)).identity
    assert identity["harness"] == lm_eval.__version__
    assert identity["tasks"] == {"tiny_generate": {"version": 2.5, "shots": 1}}
    assert json.loads(json.dumps(identity)) == identity


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"not installed .*: pip install 'bonetune\[lm-eval\]'"):
        harness.prepare("lm-eval:gsm8k", Request())
