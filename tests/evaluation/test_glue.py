import json

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score
from transformers import LlamaConfig, LlamaForSequenceClassification

import bonetune
from bonetune.errors import InputError
from bonetune.evaluation import glue
from bonetune.models import Loaded

SENTENCES = ["the fox", "a dog jumps", "what is one", "lazy", "two plus three", "over the dog", "quick", "is it"]


@pytest.fixture
def classifier(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 320}
    config = LlamaConfig(**sizes, initializer_range=1.0, num_labels=2, pad_token_id=1)
    return Loaded(LlamaForSequenceClassification(config).eval(), tokenizer, "m", task_type="SEQ_CLS")


def file(path, *fields, labels):
    rows = [
        {"idx": n} | {field: f"{n} {sentence}" for n, field in enumerate(fields)} | {"label": label}
        for n, (sentence, label) in enumerate(zip(SENTENCES, labels, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers(loaded, fields):
    texts = [[f"{n} {sentence}" for sentence in SENTENCES] for n in range(len(fields))]
    return [
        int(loaded.model(**loaded.tokenizer(*pair, return_tensors="pt")).logits.argmax()) for pair in zip(*texts, strict=True)
    ]


FIELDS = {
    "glue:sst2": ["sentence"],
    "glue:cola": ["sentence"],
    "glue:qnli": ["question", "sentence"],
    "glue:qqp": ["question1", "question2"],
    **dict.fromkeys(("glue:mnli", "glue:mnli-mismatched", "glue:mnli-overall"), ("premise", "hypothesis")),
    **dict.fromkeys(("glue:mrpc", "glue:rte", "glue:stsb", "glue:wnli"), ("sentence1", "sentence2")),
}


def test_all_of_glues_tasks_are_there():
    assert {task.name for task in glue.TASKS} == FIELDS.keys()


@pytest.mark.parametrize("task", sorted(FIELDS.keys() - {"glue:stsb"}))
def test_each_task_reads_the_public_fields_and_has_its_score(task, classifier, tmp_path):
    labels = [0, 1, 1, 0, 1, 0, 0, 1]
    fields = FIELDS[task]
    (result,) = bonetune.evaluate(classifier, [task], data=file(tmp_path / "dev.jsonl", *fields, labels=labels))
    given = answers(classifier, fields)
    assert len(set(given)) == 2, "the model says always the same"
    if task == "glue:cola":
        assert result.score == pytest.approx(np.corrcoef(given, labels)[0, 1])
        assert result.interval[0] <= result.score <= result.interval[1]
        assert result.metrics["accuracy"] == np.mean(np.equal(given, labels))
    else:
        assert result.score == np.mean(np.equal(given, labels))
        assert result.interval[0] < result.score < result.interval[1]
    assert result.task == task
    assert [record["correct"] for record in result.records] == [a == b for a, b in zip(given, labels, strict=True)]


def named(classifier, names):
    classifier.model.config.id2label = dict(enumerate(names))
    classifier.model.config.label2id = {name: number for number, name in enumerate(names)}


@pytest.mark.parametrize(
    ("task", "names", "positive"),
    [
        ("glue:mrpc", None, "1"),
        ("glue:mrpc", ("not_equivalent", "equivalent"), "equivalent"),
        ("glue:mrpc", ("equivalent", "not_equivalent"), "equivalent"),  # as training sorts them
        ("glue:mrpc", ("1", "0"), "1"),
        ("glue:qqp", None, "1"),
        ("glue:qqp", ("duplicate", "not_duplicate"), "duplicate"),
    ],
)
def test_f1_is_glues_of_the_paraphrases(task, names, positive, classifier, tmp_path):
    told = names or ("0", "1")
    if names is not None:
        named(classifier, names)
    labels = [told[n] for n in (0, 1, 1, 0, 1, 1, 0, 1)]
    path = file(tmp_path / "dev.jsonl", *FIELDS[task], labels=labels)
    (result,) = bonetune.evaluate(classifier, [task], data=path)
    given = [told[n] for n in answers(classifier, FIELDS[task])]
    assert f"; f1 of the class {positive}; " in result.protocol
    assert result.metrics["f1"] == pytest.approx(f1_score(labels, given, pos_label=positive))
    assert result.metrics["macro_f1"] == pytest.approx(f1_score(labels, given, average="macro"))
    assert result.metrics["f1"] != result.metrics["macro_f1"]
    (other,) = bonetune.evaluate(classifier, ["glue:qnli"], data=path, dataset_field=(*FIELDS[task], "label"))
    assert other.metrics["f1"] == pytest.approx(result.metrics["macro_f1"])
    assert "macro_f1" not in other.metrics


@pytest.mark.parametrize("names", [("different", "same"), ("LABEL_1", "LABEL_0")])
def test_which_class_is_the_paraphrases_must_be_told(names, classifier, tmp_path):
    named(classifier, names)
    path = file(tmp_path / "dev.jsonl", "sentence1", "sentence2", labels=[names[n % 2] for n in range(8)])
    with pytest.raises(
        InputError, match=rf"F1 of the class 'equivalent', and the model's classes are {', '.join(names)}: call"
    ):
        bonetune.evaluate(classifier, ["glue:mrpc"], data=path)


def test_stsb_is_a_regression(classifier, tokenizer, tmp_path):
    labels = [0.0, 1.5, 5.0, 2.25, 3.0, 4.0, 1.5, 2.0]
    path = file(tmp_path / "dev.jsonl", "sentence1", "sentence2", labels=labels)
    with pytest.raises(InputError, match="glue:stsb is a number to be predicted, and m has 2 classes: train with num_labels 1"):
        bonetune.evaluate(classifier, ["glue:stsb"], data=path)
    torch.manual_seed(0)
    config = LlamaConfig(**classifier.model.config.to_diff_dict() | {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}})
    loaded = Loaded(LlamaForSequenceClassification(config).eval(), tokenizer, "m", task_type="SEQ_CLS")
    (result,) = bonetune.evaluate(loaded, ["glue:stsb"], data=path)
    assert result.score == pytest.approx(stats.pearsonr([record["output"] for record in result.records], labels).statistic)
    assert result.metrics["spearman"] == pytest.approx(
        stats.spearmanr([record["output"] for record in result.records], labels).statistic
    )


def test_mnlis_sets_together_are_scored_as_the_rows_of_both(classifier, tmp_path, monkeypatch):
    labels = [0, 1, 1, 0, 1, 0, 0, 1]
    rows = [
        {"premise": f"0 {sentence}", "hypothesis": f"1 {sentence}", "label": label}
        for sentence, label in zip(SENTENCES, labels, strict=True)
    ]
    sets = {"validation_matched": rows[:3], "validation_mismatched": rows[3:]}
    monkeypatch.setattr("bonetune.evaluation.task.read_rows", lambda source, split: {"nyu-mll/glue:mnli": sets}[source][split])
    told = []
    (result,) = bonetune.evaluate(classifier, ["glue:mnli-overall"], on_items=lambda *items: told.append(items[1:]))
    right = np.equal(answers(classifier, FIELDS["glue:mnli"]), labels)
    assert (result.score, result.items, told[-1]) == (right.mean(), 8, (8, 8))
    assert result.interval[0] < result.score < result.interval[1]
    assert result.metrics == {"matched": right[:3].mean(), "mismatched": right[3:].mean()}
    assert [(record["row"], record["correct"]) for record in result.records] == list(enumerate(right, 1))
    assert "of both development sets together" in result.protocol
    (one,) = bonetune.evaluate(classifier, ["glue:mnli-overall"], dataset_split="validation_mismatched")
    assert (one.score, one.items) == (right[3:].mean(), 5)


def test_mrpcs_f1_without_the_second_class_is_0(classifier, tmp_path):
    path = file(tmp_path / "dev.jsonl", "sentence1", "sentence2", labels=[0] * len(SENTENCES))
    classifier.model.score.weight.data[1] = classifier.model.score.weight.data[0]  # a tie is the first class
    (result,) = bonetune.evaluate(classifier, ["glue:mrpc"], data=path)
    assert (result.score, result.metrics["f1"], result.metrics["macro_f1"]) == (1, 0, 1)


def test_a_language_model_is_no_classifier(model_folder):
    with pytest.raises(InputError, match=r"glue:sst2 is not for a model of task type CAUSAL_LM: choose from exact-match, loss"):
        bonetune.evaluate(str(model_folder), ["glue:sst2"], data="x.jsonl")
