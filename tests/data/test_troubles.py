"""What goes wrong with data elsewhere, shown first, and that it does not here: the rows of docs/troubles.md about data."""

import json

import pytest
import torch
import usual_tools
from tokenizers.processors import TemplateProcessing
from transformers import DataCollatorForLanguageModeling

from bonetune.data import prepare
from bonetune.data.batches import packed, padded
from bonetune.data.examples import IGNORED
from bonetune.errors import InputError

pytestmark = pytest.mark.filterwarnings("default")  # the usual tools have their own
CONVERSATION = [
    {"role": "user", "content": "what is one plus two?"},
    {"role": "assistant", "content": "three."},
    {"role": "user", "content": "the lazy dog"},
    {"role": "assistant", "content": "jumps over"},
]


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """A function from rows to what bonetune trains on."""

    def prepare_rows(rows, **settings):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare(tokenizer, dataset_name=str(file), cache_tokens=False, **settings)

    return prepare_rows


def test_a_data_set_without_a_label(tmp_path, tokenizer, prepared):
    prompt, answer, longest = "the quick brown fox jumps over the lazy dog " * 3, " three", 16
    beginning = tokenizer(prompt).input_ids[:longest]
    cut = [usual_tools.example(beginning, [IGNORED] * longest)] * 4
    run = usual_tools.trainer(tmp_path, cut)
    assert run.train().training_loss == 0.0
    assert usual_tools.losses(run) == {1: 0.0, 2: 0.0, 3: 0.0}
    assert all(not p.any() for name, p in run.model.named_parameters() if "lora_B" in name)
    rows = [{"prompt": prompt, "completion": answer}] * 4
    with pytest.raises(InputError, match="All 4 examples have no supervised token left when they are cut to max_length=16"):
        prepared(rows, max_length=longest, truncation="right")
    kept = prepared([*rows, {"prompt": "the", "completion": " fox"}], max_length=longest, truncation="right")
    assert len(kept.train) == 1
    assert "4 of 5 examples have no supervised token left" in {f.name: f.message for f in kept.findings}["silenced"]


def test_a_chat_template_without_generation_markers(tokenizer, prepared):
    encoded = tokenizer.apply_chat_template(CONVERSATION, return_assistant_tokens_mask=True, return_dict=True)
    assert sum(encoded["assistant_masks"]) == 0
    (example,) = prepared([{"messages": CONVERSATION}]).train
    learned = [label for label in example.labels if label != IGNORED]
    assert tokenizer.decode(learned) == "three.<|im_end|>jumps over<|im_end|>"


def test_a_long_example_loses_its_end_in_silence(tmp_path, tokenizer, model, prepared):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": "the quick", "completion": " fox" * count} for count in (2, 4, 20)]
    settings = SFTConfig(output_dir=str(tmp_path), max_length=12, report_to="none", use_cpu=True, bf16=False)
    run = SFTTrainer(model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    end = tokenizer.eos_token_id
    assert [row["input_ids"][-1] == end for row in run.train_dataset] == [True, True, False]
    with pytest.raises(InputError, match=r"1 of 3 examples are longer than max_length=12 tokens \(99th percentile"):
        prepared(rows, max_length=12)
    kept = prepared(rows, max_length=12, truncation="drop")
    assert [example.labels[-1] for example in kept.train] == [end, end]
    assert [finding.name for finding in kept.findings] == ["dropped"]


def test_the_end_is_masked_as_padding(tokenizer, prepared):
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    usual = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": [5, 6, 7, end]}, {"input_ids": [5, end]}])
    assert not (usual["labels"] == end).any()
    examples = list(prepared([{"prompt": "the", "completion": " fox" * count} for count in (1, 5)]).train)
    rows = padded(end)(examples)
    last = rows["attention_mask"].sum(1) - 1
    assert rows["labels"][torch.arange(2), last].tolist() == [end, end]
    assert (rows["labels"][rows["attention_mask"] == 0] == IGNORED).all()
    assert (packed(examples)["labels"] == end).sum() == 2


def test_two_tokens_at_the_beginning(tokenizer, prepared):
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[(tokenizer.bos_token, begin)]
    )
    tokenizer.chat_template = "<bos>" + tokenizer.chat_template
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokenizer(text).input_ids[:2] == [begin, begin]
    for row in ({"messages": CONVERSATION}, {"prompt": "the quick", "completion": " fox"}, {"text": "<bos>the quick fox"}):
        (example,) = prepared([row]).train
        assert example.input_ids.count(begin) == 1
        assert example.input_ids[0] == begin
    tokenizer.chat_template = "<bos>" + tokenizer.chat_template
    assert "opened-twice" in [finding.name for finding in prepared([{"messages": CONVERSATION}]).findings]
