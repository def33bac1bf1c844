import json

import numpy as np
import pytest
import torch
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


@pytest.mark.parametrize("task", [task.name for task in glue.TASKS])
def test_each_task_reads_the_public_fields_and_has_its_score(task, classifier, tmp_path):
    labels = [0, 1, 1, 0, 1, 0, 0, 1]
    fields = {"sst2": ["sentence"], "cola": ["sentence"], "qnli": ["question", "sentence"], "mrpc": ["sentence1", "sentence2"]}
    fields = fields.get(task.removeprefix("glue:"), ["premise", "hypothesis"])
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


@pytest.mark.parametrize("names", [None, {0: "not_equivalent", 1: "equivalent"}, {0: "1", 1: "0"}])
def test_mrpc_has_glues_f1_of_the_paraphrases(names, classifier, tmp_path):
    told = names or {0: "0", 1: "1"}
    if names is not None:
        classifier.model.config.id2label = names
        classifier.model.config.label2id = {name: number for number, name in names.items()}
    labels = [told[n] for n in (0, 1, 1, 0, 1, 1, 0, 1)]
    path = file(tmp_path / "dev.jsonl", "sentence1", "sentence2", labels=labels)
    (result,) = bonetune.evaluate(classifier, ["glue:mrpc"], data=path)
    given = [told[n] for n in answers(classifier, ["sentence1", "sentence2"])]
    positive = "equivalent" if "equivalent" in labels else "1"
    assert result.metrics["f1"] == pytest.approx(f1_score(labels, given, pos_label=positive))
    assert result.metrics["macro_f1"] == pytest.approx(f1_score(labels, given, average="macro"))
    assert result.metrics["f1"] != result.metrics["macro_f1"]
    (other,) = bonetune.evaluate(classifier, ["glue:qnli"], data=path, dataset_field=("sentence1", "sentence2", "label"))
    assert other.metrics["f1"] == pytest.approx(result.metrics["macro_f1"])
    assert "macro_f1" not in other.metrics


def test_mrpcs_f1_without_the_second_class_is_0(classifier, tmp_path):
    path = file(tmp_path / "dev.jsonl", "sentence1", "sentence2", labels=[0] * len(SENTENCES))
    classifier.model.score.weight.data[1] = classifier.model.score.weight.data[0]  # a tie is the first class
    (result,) = bonetune.evaluate(classifier, ["glue:mrpc"], data=path)
    assert (result.score, result.metrics["f1"], result.metrics["macro_f1"]) == (1, 0, 1)


def test_a_language_model_is_no_classifier(model_folder):
    with pytest.raises(InputError, match=r"glue:sst2 is not for a model of task type CAUSAL_LM: choose from exact-match, loss"):
        bonetune.evaluate(str(model_folder), ["glue:sst2"], data="x.jsonl")
