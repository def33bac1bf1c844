"""Classifiers and encoder-decoders: trained, measured, loaded again, merged with a certificate, evaluated."""

import json

import numpy as np
import pytest
import torch
from conftest import llama
from scipy import stats
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import bonetune
from bonetune.errors import InputError
from bonetune.metrics import agreement
from bonetune.models import generate, load_model
from bonetune.training import plan

WORDS = ["the", "quick", "brown", "fox", "lazy", "dog"]
ENDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1}


def encoder(name):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    small |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # else steps depend on how they are cut
    small |= {"max_position_embeddings": 140, "initializer_range": 0.1, "pad_token_id": 1}
    return {"bert": lambda: BertModel(BertConfig(**small)), "roberta": lambda: RobertaModel(RobertaConfig(**small))}[name]()


def encoder_decoder(name):
    torch.manual_seed(0)
    if name == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
        return T5ForConditionalGeneration(T5Config(vocab_size=320, initializer_factor=0.5, **sizes, **ENDS))
    sizes = {"d_model": 32, "init_std": 0.1, "max_position_embeddings": 128}
    sizes |= {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (("layers", 2), ("ffn_dim", 48))}
    heads = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    return BartForConditionalGeneration(BartConfig(vocab_size=320, **sizes, **heads, **ENDS, forced_eos_token_id=None))


@pytest.fixture
def base(tmp_path, tokenizer):
    def saved(name):
        model = llama() if name == "llama" else encoder(name) if name in ("bert", "roberta") else encoder_decoder(name)
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return saved


@pytest.fixture
def settings(tmp_path):
    def of(model, rows, **more):
        held_out = [row for n, row in enumerate(rows) if n % 4 == 3]
        for name, some in (("rows", [row for row in rows if row not in held_out]), ("held_out", held_out)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        return {
            "model_name_or_path": model,
            "dataset_name": str(tmp_path / "rows.jsonl"),
            "eval_dataset_name": str(tmp_path / "held_out.jsonl"),
            "output_dir": str(tmp_path / "run"),
            "r": 4,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 3e-3,
            "max_steps": 12,
            "sample_prompts": 2,
            "sample_tokens": 3,
            "cache_tokens": False,
        } | more

    return of


def single(label_of):
    return [{"text": f"{a} {b} over", "label": label_of(n)} for n, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)]


def pairs(label_of):
    return [
        {"sentence1": row["text"], "sentence2": WORDS[n % 5], "label": row["label"]} for n, row in enumerate(single(label_of))
    ]


NAMED, NUMBER = lambda n: ["bad", "fine", "good"][n % 3], lambda n: round(n % 7 / 7 + 0.05, 3)
CLASSIFIERS = [
    ("bert", single, NAMED),
    ("bert", pairs, NUMBER),
    ("roberta", pairs, NAMED),
    ("llama", single, NAMED),
    ("llama", pairs, NUMBER),
]


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def outputs(model, tokenizer, rows):
    """Logits of each row by itself, without padding."""
    texts = [[value for name, value in row.items() if name != "label"] for row in rows]
    with torch.no_grad():
        return torch.cat([model(**tokenizer(*text, return_tensors="pt")).logits for text in texts])


def expected_metrics(logits, labels, classes):
    """Of scikit-learn's definitions, spelled out."""
    if not classes:
        given = logits[:, 0].double().numpy()
        return {"pearson": stats.pearsonr(given, labels).statistic, "spearman": stats.spearmanr(given, labels).statistic}
    wanted, given = np.array([classes.index(label) for label in labels]), logits.argmax(-1).numpy()
    f1 = []
    for c in sorted({*wanted.tolist(), *given.tolist()}):
        true, false, missed = (
            ((given == c) & (wanted == c)).sum(),
            ((given == c) & (wanted != c)).sum(),
            ((given != c) & (wanted == c)).sum(),
        )
        f1.append(2 * true / (2 * true + false + missed))
    one = np.eye(len(classes))
    a, b = one[wanted] - one[wanted].mean(0), one[given] - one[given].mean(0)  # Matthews' as a correlation of indicators
    spread = np.sqrt((a * a).sum() * (b * b).sum())
    return {"accuracy": (wanted == given).mean(), "f1": np.mean(f1), "matthews": (a * b).sum() / spread if spread else 0.0}


@pytest.mark.parametrize(("name", "shape", "label"), CLASSIFIERS)
def test_a_classifier(base, settings, tmp_path, name, shape, label):
    rows, run = shape(label), tmp_path / "run"
    bonetune.train(settings(base(name), rows, task_type="SEQ_CLS", max_steps=35))
    numbers = label is NUMBER
    classes = None if numbers else ("bad", "fine", "good")
    losses = [line["loss"] for line in lines(run) if "loss" in line]
    assert np.mean(losses[-7:]) < np.mean(losses[:7])  # epochs
    assert json.loads((run / "summary.json").read_text())["classes"] == list(classes or ())

    loaded = load_model(str(run))
    assert loaded.model.config.num_labels == (1 if numbers else 3)
    held_out = lines(tmp_path, "held_out.jsonl")
    logits = outputs(loaded.model, loaded.tokenizer, held_out)
    measured = [line for line in lines(run) if "eval_loss" in line][-1]
    want = expected_metrics(logits, [row["label"] for row in held_out], classes)
    assert {f"eval_{key}" for key in want} == measured.keys() - {"step", "epoch", "eval_loss"}
    for key, value in want.items():
        assert measured[f"eval_{key}"] == pytest.approx(value, abs=1e-5), key
    labels = torch.tensor([row["label"] if numbers else classes.index(row["label"]) for row in held_out])
    loss = (logits[:, 0] - labels).square().mean() if numbers else torch.nn.functional.cross_entropy(logits, labels)
    assert measured["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)

    train_rows = lines(tmp_path, "rows.jsonl")
    texts = ["\n".join(value for key, value in row.items() if key != "label") for row in train_rows]
    assert lines(run, "prompts.jsonl") == texts[:16]

    (scored,) = bonetune.evaluate(str(run), ["classification"], data=str(tmp_path / "held_out.jsonl"), batch_size=4)
    found = scored.metrics | {"pearson" if numbers else "accuracy": scored.score}
    assert found == pytest.approx(want, abs=1e-5)
    assert scored.interval[0] <= scored.score <= scored.interval[1]

    merged = bonetune.merge(str(run), str(tmp_path / "merged"))
    assert merged.certificate.holds
    assert merged.certificate.prompts == 16
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(outputs(plain, loaded.tokenizer, held_out), logits, rtol=1e-4, atol=1e-4)
    (again,) = bonetune.evaluate(str(tmp_path / "merged"), ["classification"], data=str(tmp_path / "held_out.jsonl"))
    assert again.score == pytest.approx(scored.score, abs=1e-4)


@pytest.mark.parametrize(("shape", "label"), [(single, NAMED), (single, NUMBER)])
def test_a_classifiers_step_does_not_depend_on_how_it_is_cut(base, settings, tmp_path, shape, label):
    of, losses = settings(base("bert"), shape(label), task_type="SEQ_CLS", max_steps=8), []
    for batch, accumulation in ((6, 1), (2, 3), (1, 6)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        bonetune.train(of | sizes | {"output_dir": str(tmp_path / f"{batch}")})
        losses.append([line["loss"] for line in lines(tmp_path / f"{batch}") if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_the_number_of_classes_can_be_told(base, settings):
    folder, numbered = base("bert"), single(lambda n: n % 2)

    def planned(rows, **more):
        return plan(settings(folder, rows, task_type="SEQ_CLS") | more)

    assert planned(numbered).classes == ("0", "1")
    told = planned(numbered, num_labels=4)
    assert told.classes == ("0", "1", "2", "3")
    assert told.loaded.model.config.num_labels == 4
    regression = planned(numbered, num_labels=1)
    assert regression.classes == ()
    assert regression.loaded.model.config.num_labels == 1
    assert regression.train[0].labels == [0.0]
    for rows, wrong in ((single(NAMED), 2), (single(NUMBER), 3)):
        with pytest.raises(InputError, match=f"num_labels is {wrong}, and"):
            planned(rows, num_labels=wrong)
    with pytest.raises(InputError, match="'bad' is no number"):
        planned(single(NAMED), num_labels=1)


def test_agreement_with_scipys_and_with_the_definitions():
    random = np.random.default_rng(0)
    given, wanted = random.normal(size=40).round(1), random.normal(size=40).round(1)  # with ties
    found = agreement(torch.tensor(given)[:, None], torch.tensor(wanted))
    assert found["pearson"] == pytest.approx(stats.pearsonr(given, wanted).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(given, wanted).statistic)
    logits, names = torch.tensor(random.normal(size=(40, 4))), ("a", "b", "c", "d")
    labels = random.integers(0, 3, 40)
    assert agreement(logits, torch.tensor(labels)) == pytest.approx(expected_metrics(logits, [names[i] for i in labels], names))
    assert agreement(logits.fill_(1), torch.tensor(labels))["matthews"] == 0


REWRITINGS = [{"prompt": f"{a} {b} over", "completion": f"{b} dog"} for a in WORDS for b in WORDS]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder(base, settings, tmp_path, name):
    folder, run = base(name), tmp_path / "run"
    changes = {"task_type": "SEQ_2_SEQ_LM", "max_steps": 60, "gradient_accumulation_steps": 2}
    result = bonetune.train(settings(folder, REWRITINGS, **changes))
    assert result.last_loss < 0.92 * result.first_loss
    loaded = load_model(str(run))
    tokenizer, held_out = loaded.tokenizer, lines(tmp_path, "held_out.jsonl")

    total = count = 0
    with torch.no_grad():
        for row in held_out:
            labels = torch.tensor([[*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]])
            inputs = tokenizer(row["prompt"], return_tensors="pt")
            inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
            total += loaded.model(**inputs, labels=labels).loss.item() * labels.numel()
            count += labels.numel()
    measured = [line for line in lines(run) if "eval_loss" in line]
    assert measured[-1]["eval_loss"] == pytest.approx(total / count, rel=1e-4)
    assert measured[-1]["eval_loss"] < measured[0]["eval_loss"]

    answers = generate(loaded.model, tokenizer, [row["prompt"] for row in held_out], max_new_tokens=6, batch_size=4)
    assert answers == [greedy(loaded.model, tokenizer, row["prompt"], 6) for row in held_out]
    data = str(tmp_path / "held_out.jsonl")
    match, loss = bonetune.evaluate(str(run), ["exact-match", "loss"], data=data, max_new_tokens=6)
    right = [answer.strip() == row["completion"] for answer, row in zip(answers, held_out, strict=True)]
    assert match.score == pytest.approx(np.mean(right))
    assert loss.score == pytest.approx(total / count, rel=1e-4)
    samples = lines(run, "samples.jsonl")
    assert [sample["expected"] for sample in samples] == ["the dog", "quick dog"]
    asked = [sample["prompt"] for sample in samples]
    assert [sample["after"] for sample in samples] == generate(loaded.model, tokenizer, asked, max_new_tokens=3)

    merged = bonetune.merge(str(run), str(tmp_path / "merged"))
    assert merged.certificate.holds
    assert merged.certificate.tokens > 0
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    assert generate(plain, tokenizer, [row["prompt"] for row in held_out], max_new_tokens=6) == answers
    (again,) = bonetune.evaluate(str(tmp_path / "merged"), ["loss"], data=data)
    assert again.score == pytest.approx(loss.score, rel=1e-4)


def greedy(model, tokenizer, prompt, count):
    """One token at a time, no cache, no padding."""
    ids, said = tokenizer(prompt, return_tensors="pt").input_ids, [model.config.decoder_start_token_id]
    for _ in range(count):
        with torch.no_grad():
            said.append(model(input_ids=ids, decoder_input_ids=torch.tensor([said])).logits[0, -1].argmax().item())
        if said[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(said[1:], skip_special_tokens=True)


def test_a_task_that_a_model_is_not_for(base, settings, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base("bert"), num_labels=3)
    model.save_pretrained(tmp_path / "classifier")
    settings(base("llama"), REWRITINGS)
    data = str(tmp_path / "rows.jsonl")
    with pytest.raises(
        InputError, match=r"exact-match is not for a model of task type SEQ_CLS: choose from classification, glue"
    ):
        bonetune.evaluate(str(tmp_path / "classifier"), ["exact-match"], data=data)
    with pytest.raises(InputError, match="classification is not for a model of task type CAUSAL_LM"):
        bonetune.evaluate(str(tmp_path / "llama"), ["loss", "classification"], data=data)
