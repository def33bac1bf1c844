"""The merged files as a model of their own: what a wrong plan writes is noticed, though the files are as it says."""

import shutil
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from adapted_models import config
from conftest import llama
from merges import change_json, save_adapter, stored
from safetensors.torch import save_file

import bonetune
from bonetune.errors import RunError
from bonetune.formats.checkpoint import Checkpoint
from bonetune.merging.plan import make_plan, read_states
from bonetune.merging.structure import misfits

MERGE = sys.modules["bonetune.merging.merge"]
pytestmark = pytest.mark.filterwarnings("ignore:.*tied.*", "ignore:.*save_embedding_layers.*", "ignore:.*additionally.*")
Q, OUT = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qo")


@pytest.fixture
def adapter(tmp_path, tokenizer):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = config("bone", target_modules=["q_proj", "o_proj", "lm_head"], modules_to_save=["norm"])
    save_adapter(tmp_path / "base", tmp_path / "adapter", settings)
    return str(tmp_path / "adapter")


def changed(plan, change):
    return replace(plan, files={file: [new for out in outs for new in change(out)] for file, outs in plan.files.items()})


def without(name):
    return lambda out: [replace(out, change=None)] if out.name == name else [out]


def swapped(plan):
    of = {out.name: out.change for outs in plan.files.values() for out in outs}
    other = {Q: of[OUT], OUT: of[Q]}
    return changed(plan, lambda out: [replace(out, change=other.get(out.name, out.change))])


def twice(out):
    if out.name != Q:
        return [out]
    return [replace(out, change=replace(out.change, updates=out.change.updates * 2))]


WRONG = {
    "an update left away": (
        lambda plan: changed(plan, without(Q)),
        "the adapter's model.layers.0.self_attn.q_proj is in no weight",
    ),
    "an update of another layer": (swapped, "the adapter's .*proj is in no weight"),
    "an update taken twice": (lambda plan: changed(plan, twice), f"{Q} has an update of no adapter's"),
    "a saved norm left away": (
        lambda plan: changed(plan, without("model.norm.weight")),
        "model.norm.weight is not in its place",
    ),
    "no head": (
        lambda plan: changed(plan, lambda out: [] if out.name == "lm_head.weight" else [out]),
        "lm_head.weight is in none of the files",
    ),
    "ties that stay": (lambda plan: replace(plan, unties=False), "are tied, and differ"),
    "a tensor of its own": (
        lambda plan: changed(plan, lambda out: [out, replace(out, name="extra", change=None)] if out.name == Q else [out]),
        "extra is nothing of the model's",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_plan_is_noticed(tmp_path, adapter, monkeypatch, wrong):
    spoil, message = WRONG[wrong]
    monkeypatch.setattr(MERGE, "make_plan", lambda *arguments, **options: spoil(make_plan(*arguments, **options)))
    with pytest.raises(RunError, match=message):
        bonetune.merge(adapter, str(tmp_path / "out"), certify="layers")


def test_another_dtype_than_was_asked_for(tmp_path, adapter):
    bonetune.merge(adapter, str(tmp_path / "out"), certify="layers", dtype="bfloat16")
    plan = make_plan(read_states([adapter]), str(tmp_path / "base"), [1.0], torch.bfloat16)
    assert misfits(plan, tmp_path / "out") == []
    assert f"{Q} is BF16" in misfits(replace(plan, dtype=torch.float16), tmp_path / "out")


def test_another_shape_than_the_models(tmp_path, adapter):
    bonetune.merge(adapter, str(tmp_path / "out"), certify="layers")
    plan = make_plan(read_states([adapter]), str(tmp_path / "base"), [1.0], None)
    file = tmp_path / "out" / Checkpoint(tmp_path / "out").stored["model.norm.weight"].file
    tensors = {name: tensor for name, tensor in stored(tmp_path / "out").items() if name in plan_names(plan, file.name)}
    save_file(tensors | {"model.norm.weight": torch.zeros(3)}, file)
    assert "model.norm.weight has shape (3,), model.norm.weight has (32,)" in misfits(plan, tmp_path / "out")


def plan_names(plan, file):
    return {out.name for out in plan.files[file]}


def test_two_adapters_of_the_same_values(tmp_path, adapter):
    shutil.copytree(adapter, tmp_path / "copy")
    both = [adapter, str(tmp_path / "copy")]
    assert bonetune.merge(both, str(tmp_path / "out"), certify="layers").certificate.holds


def test_adapters_that_cancel(tmp_path, model_folder):
    """What is left of their updates is the rounding of sums."""
    save_adapter(model_folder, tmp_path / "one", config("bone"))
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    both = [str(tmp_path / "one"), str(tmp_path / "other")]
    result = bonetune.merge(both, str(tmp_path / "out"), scale=[1.0, -1.0], certify="layers")
    assert result.certificate.update_kept is None


def test_an_index_that_is_wrong(tmp_path, adapter):
    bonetune.merge(adapter, str(tmp_path / "out"), certify="layers")
    plan = make_plan(read_states([adapter]), str(tmp_path / "base"), [1.0], None)
    change_json(tmp_path / "out" / "model.safetensors.index.json", weight_map={Q: "model-00001-of-00001.safetensors"})
    assert len(misfits(plan, tmp_path / "out")) == 1


def mixture(kind):
    sides = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    sides |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sides, pad_token_id=0))


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts_that_are_stored_one_by_one_or_stacked(tmp_path, kind):
    mixture(kind).save_pretrained(tmp_path / "base")
    stacked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if kind == "GptOss" else None
    save_adapter(tmp_path / "base", tmp_path / "adapter", config("bat", target_modules=["q_proj"], target_parameters=stacked))
    certificate = bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out"), certify="layers").certificate
    assert certificate.holds
    assert len(certificate.checks) == (3 if stacked else 1)
