import json
import math
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import bonetune
from bonetune.errors import InputError
from bonetune.models import load_model
from bonetune.training import make_config
from bonetune.training.model_card import write_card
from bonetune.training.report_page import write_report

SETTINGS = {"model_name_or_path": "some/model", "dataset_name": "some/data", "output_dir": "run", "variant": "bat", "r": 32}


def a_run(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(make_config(SETTINGS | changes).to_yaml())
    lines = [{"step": n, "loss": 2.0 / n, "seconds": n} for n in (1, 2)] + [{"step": 2, "eval_loss": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def cells(text):
    """The rows of the card's tables, without Markdown's escapes."""
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.endswith(" |")]
    return dict([re.sub(r"\\(.)", r"\1", part).strip() for part in re.split(r"(?<!\\)\|", row)[1:3]] for row in rows)


def test_the_front_matter_is_what_the_hub_reads(tmp_path):
    card = ModelCard.load(write_card(a_run(tmp_path / "mine")))
    assert card.data.to_dict() == {
        "base_model": "some/model",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["bone", "bonetune", "bat"],
        "datasets": ["some/data"],
    }
    assert card.text.lstrip().startswith("# mine\n")


@pytest.mark.parametrize("name", ["/models/base", "./base", "base dir/x", "a/b/c", "{here}"])
def test_what_lies_here_is_not_sought_on_the_hub(tmp_path, monkeypatch, name):
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    name = name.replace("{here}", "models/base")
    run = a_run(tmp_path / "run", model_name_or_path=name, dataset_name=["rows.jsonl", "org/data"])
    card = ModelCard.load(write_card(run))
    assert card.data.base_model is None
    assert card.data.datasets == ["org/data"]


def test_results_settings_and_versions(tmp_path):
    run = a_run(tmp_path / "run", rank_pattern={"q_proj": 8, ".*|k_proj": 4}, learning_rate=1e-4)
    (run / "environment.json").write_text(json.dumps({"environment": {"torch": "2.13", "trl": None, "python": "3.11"}}))
    (run / "certificate.json").write_text(json.dumps({"holds": True, "dtype": "bfloat16", "greedy_agreement": 0.995}))
    text = write_card(run).read_text()
    shown = cells(text)
    assert shown["Training loss"] == "2 → 1"
    assert shown["Evaluation loss"] == "0.5"
    assert shown["`learning_rate`"] == "0.0001"
    assert yaml.safe_load(shown["`rank_pattern`"]) == {"q_proj": 8, ".*|k_proj": 4}
    assert "`output_dir`" not in shown
    assert (shown["torch"], shown["python"]) == ("2.13", "3.11")
    assert "trl" not in shown
    assert "compared with the adapted one and is equal up to rounding. 99.5% of its greedy choices" in text


def test_a_certificate_of_layers_says_what_was_compared(tmp_path):
    run = a_run(tmp_path / "run")
    (run / "certificate.json").write_text(json.dumps({"method": "layers", "holds": True, "dtype": "bfloat16"}))
    assert "Each weight of the merged model (bfloat16) was compared" in write_card(run).read_text()


def test_a_certificate_that_does_not_hold_is_not_claimed(tmp_path):
    run = a_run(tmp_path / "run")
    (run / "certificate.json").write_text(json.dumps({"holds": False, "dtype": "bfloat16", "greedy_agreement": 0.2}))
    assert "equal up to rounding" not in write_card(run).read_text()


def test_an_instruction_s_prompt_is_shown_whole(tmp_path):
    template = "```\n# {instruction}\n````\n| x |"
    assert f"`````text\n{template}\n`````" in (
        write_card(a_run(tmp_path / "run", dataset_field=["q", "a"], prompt_template=template)).read_text()
    )
    assert "in this prompt" not in write_card(a_run(tmp_path / "other", prompt_template=template)).read_text()


@pytest.mark.parametrize(
    ("task", "loader", "pipeline"),
    [
        ("SEQ_CLS", "AutoPeftModelForSequenceClassification", "text-classification"),
        ("SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM", None),
    ],
)
def test_other_tasks(tmp_path, task, loader, pipeline):
    card = ModelCard.load(write_card(a_run(tmp_path / "run", task_type=task)))
    assert card.data.pipeline_tag == pipeline
    assert f"{loader}.from_pretrained(adapter)" in card.text
    assert "bonetune merge" not in card.text
    assert ("nats a supervised token" in card.text) == (task != "SEQ_CLS")


def test_losses_that_are_no_numbers(tmp_path):
    run = a_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": math.nan}) + "\n")
    assert cells(write_card(run).read_text())["Training loss"] == "not finite"


def test_no_run_no_card(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        write_card(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_real_run_s_card_says_how_it_is_loaded_and_merged(tmp_path, model_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{a} plus", "completion": f" {a}"} for a in ("one", "two", "three", "four")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model_name_or_path": str(model_folder), "dataset_name": "rows.jsonl", "output_dir": "my run", "r": 4}
    bonetune.train(settings, {"max_steps": 2, "per_device_train_batch_size": 2})
    card = write_card(tmp_path / "my run").read_text()
    assert write_report(tmp_path / "my run").stat().st_size > 1000
    said = {}
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(code, said)
    ids = torch.tensor([[5, 6, 7]])
    again = type(said["merged"]).from_pretrained(tmp_path / "merged")
    adapted = load_model("my run")
    torch.testing.assert_close(again(ids).logits, adapted.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert "`bonetune merge 'my run' --output merged`" in card
