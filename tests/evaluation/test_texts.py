import json
import math

import pytest
import torch
from adapted_models import adapted
from conftest import llama
from peft import LoraConfig, get_peft_model
from tokenizers import processors

import bonetune
from bonetune.errors import InputError
from bonetune.evaluation import texts
from bonetune.models import Loaded

TEXTS = ["the quick brown fox jumps over the lazy dog " * 9, "what is one plus two?", "a", "three"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def losses(model, tokenizer, text, window):
    """Sum and number of the losses of a text's tokens, in float64, each predicted once from those of its window."""
    ids, total = tokenizer(text).input_ids, 0.0
    for start in range(0, len(ids) - 1, window - 1):
        part = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            log_p = model(part).logits.double().log_softmax(-1)[0, :-1]
        total -= log_p.gather(-1, part[0, 1:, None]).sum().item()
    return total, len(ids) - 1


@pytest.mark.parametrize("window", [8, 20])
def test_perplexity(data, tokenizer, window, monkeypatch):
    monkeypatch.setattr(texts, "WINDOW", window)
    model = llama()
    (result,) = bonetune.evaluate(Loaded(model, tokenizer, "m"), ["perplexity"], data=data)
    found = [losses(model, tokenizer, text, window) for text in TEXTS]
    nats, tokens = sum(total for total, _ in found), sum(count for _, count in found)
    assert result.score == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert result.metrics["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    # without an opening token the first one is not predicted
    predicted = sum(len(tokenizer.decode(tokenizer(text).input_ids[1:]).encode()) for text in TEXTS)
    assert result.metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / predicted, rel=1e-5)
    assert result.metrics["dropped"] == 1
    assert result.interval[0] < result.score < result.interval[1]
    assert not result.higher_is_better
    assert [r["supervised_tokens"] for r in result.records] == [count for _, count in found if count]


@pytest.mark.parametrize("kind", ["bone", "lora"])
def test_forgetting_is_measured_against_the_model_without_the_adapter(data, tokenizer, kind):
    if kind == "bone":
        model = adapted(base=llama())
    else:
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_alpha=64)
        model = get_peft_model(llama(), config).eval()
    (result,) = bonetune.evaluate(Loaded(model, tokenizer, "m"), ["forgetting"], data=data)
    (before,) = bonetune.evaluate(Loaded(llama(), tokenizer, "m"), ["perplexity"], data=data)
    (after,) = bonetune.evaluate(Loaded(model, tokenizer, "m"), ["perplexity"], data=data)
    assert result.metrics["base_loss"] == pytest.approx(before.metrics["loss"], rel=1e-5)
    assert result.score == pytest.approx(after.metrics["loss"] - before.metrics["loss"], abs=1e-6)
    assert abs(result.score) > 1e-2
    assert result.interval[0] <= result.score <= result.interval[1]


def test_forgetting_of_a_whole_model_needs_its_base(data, tokenizer, model_folder):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(InputError, match="m has no adapter: name it with base"):
        bonetune.evaluate(Loaded(model, tokenizer, "m"), ["forgetting"], data=data)
    (result,) = bonetune.evaluate(Loaded(model, tokenizer, "m"), ["forgetting"], data=data, base=str(model_folder))
    assert result.score == pytest.approx(result.metrics["loss"] - result.metrics["base_loss"])
    assert abs(result.score) > 1e-2


def test_only_plain_text_will_do(tmp_path, tokenizer):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InputError, match="perplexity is measured on plain text, and the rows are prompt-completion"):
        bonetune.evaluate(Loaded(llama(), tokenizer, "m"), ["perplexity"], data=str(rows))


def test_only_models_that_write_on_have_a_perplexity(data, tokenizer):
    with pytest.raises(InputError, match="perplexity is not for a model of task type SEQ_2_SEQ_LM"):
        bonetune.evaluate(Loaded(llama(), tokenizer, "m", task_type="SEQ_2_SEQ_LM"), ["perplexity"], data=data)


def test_a_ruined_model_has_an_infinite_perplexity(data, tokenizer):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    (result,) = bonetune.evaluate(Loaded(model, tokenizer, "m"), ["perplexity"], data=data)
    assert result.metrics["loss"] > 710
    assert result.score == math.inf


def test_a_model_that_computes_no_numbers_has_no_perplexity(data, tokenizer):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[7] = math.nan
    (result,) = bonetune.evaluate(Loaded(model, tokenizer, "m"), ["perplexity"], data=data)
    assert math.isnan(result.score)
    assert math.isnan(result.metrics["loss"])


@pytest.mark.parametrize("text", ["the fox", "\u2705 fox", "\u00e4x"])
def test_only_bytes_that_are_predicted_count(tokenizer, text):
    first = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids[0])  # a sign of a name is a byte
    assert texts.predicted_bytes(tokenizer, text) == len(text.encode()) - len(first)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    assert texts.predicted_bytes(tokenizer, text) == len(text.encode())


@pytest.mark.parametrize(
    ("other", "message"),
    [("tokenizer", "other tokens of the same texts, for their tokenizers differ"), ("window", "windows of 128 and 32 tokens")],
)
def test_a_base_that_reads_texts_otherwise_is_refused(data, tokenizer, tmp_path, other, message):
    llama(**({"max_position_embeddings": 32} if other == "window" else {})).save_pretrained(tmp_path / "base")
    saved = tokenizer
    if other == "tokenizer":
        saved = tokenizer.train_new_from_iterator(["one two three"] * 9, 270)
    saved.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=message):
        bonetune.evaluate(Loaded(llama(), tokenizer, "m"), ["forgetting"], data=data, base=str(tmp_path / "base"))
