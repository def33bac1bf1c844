"""Other methods in the same loop: they learn, go on bit for bit, and what they leave is plain PEFT's or transformers'."""

import json
import re

import pytest
import torch
from conftest import llama
from interrupted import killed_and_resumed
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

import bonetune
from bonetune.errors import InputError
from bonetune.training import baselines, make_config, memory, plan, preflight
from bonetune.training.baselines import CHANGING_THE_BASE, KWARGS
from bonetune.training.folder import clear, finished
from bonetune.training.live_storages import LiveStorages
from bonetune.training.settings import AdapterSettings, Baseline, RWKVSettings

METHODS = list(KWARGS)
WORDS = ["the", "quick", "brown", "fox", "lazy", "dog"]
SIDES = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)] * 2  # (out, in) of llama()'s Linear layers
RATES = {"lora": 2e-2, "rslora": 2e-2, "dora": 2e-2, "full": 3e-3, "olora": 3e-3, "milora": 1e-2}


@pytest.fixture
def settings(tmp_path, model_folder):
    rows = [{"prompt": f"after {a} {b} comes", "completion": f" {b}"} for a in WORDS for b in WORDS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "r": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "max_steps": 8,
        "sample_prompts": 0,
        "rehearsal": False,
    }


def of(settings, method, **more):
    """The settings with a baseline, without what it has not."""
    given = settings | {"baseline": method, "learning_rate": RATES.get(method, settings["learning_rate"])} | more
    return {name: value for name, value in given.items() if (name, method) != ("r", "full")}


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(2, 40)[None]).logits


def tensors(folder):
    return load_file(
        folder / ("model.safetensors" if (folder / "model.safetensors").is_file() else "adapter_model.safetensors")
    )


def parameters(method, r):
    """Trainable ones, of adapters on all Linear layers."""
    if method == "full":
        return sum(p.numel() for p in llama().parameters())
    if method.startswith("miss"):
        return sum(out * r for out, _ in SIDES)
    return sum(r * (out + into) + (out if method == "dora" else 0) for out, into in SIDES)


def test_the_methods_are_those_of_the_settings():
    assert set(METHODS) == set(Baseline.__args__)
    named = {*baselines.FAMILYS_OWN, *baselines.ADAPTERS_OWN}
    assert named == {*AdapterSettings.model_fields, *RWKVSettings.model_fields} - {"bptt_length", "l2_wrap"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_and_leaves_what_plain_libraries_load(settings, tmp_path, method):
    seen, before = [], llama()
    result = bonetune.train(of(settings, method), on_plan=seen.append)
    run, planned = tmp_path / "run", seen[0]
    assert result.last_loss < 0.9 * result.first_loss
    trained = {name: p for name, p in planned.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert planned.trainable_parameters == result.trainable_parameters == parameters(method, 4)
    if method == "full":
        again = AutoModelForCausalLM.from_pretrained(run)
        AutoTokenizer.from_pretrained(run)
        assert not (run / "adapter_config.json").exists()
    else:
        again = PeftModel.from_pretrained(before, run)
        written = PeftConfig.from_pretrained(run)
        assert type(written).__name__ == ("MissConfig" if method.startswith("miss") else "LoraConfig")
        assert written.r == (8 if method in CHANGING_THE_BASE else 4)
    torch.testing.assert_close(logits(again), logits(planned.model), rtol=1e-4, atol=1e-4)
    assert (logits(again) - logits(llama())).norm() > 0.05 * logits(llama()).norm()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["method"] == method
    assert "variant" not in summary
    assert summary["init_seconds"] > 0
    assert ("r" in summary) == (method != "full")
    assert summary["trainable_parameters"] == result.trainable_parameters
    assert planned.describe().startswith("full fine-tuning" if method == "full" else f"{method}, r=4")
    for name in ("report.html", "README.md"):
        text = (run / name).read_text()
        assert not re.search(r"\bbone\b|bone_", text, re.IGNORECASE)
        assert not re.search("[>`]variant[<`]", text)
    card = (run / "README.md").read_text()
    assert "import bonetune" not in card
    assert ("model.merge_and_unload()" in card) == (method != "full")
    assert ("twice the rank" in card) == (method in CHANGING_THE_BASE)
    method_in_card = re.escape("full fine-tuning" if method == "full" else f"{method}, r = 4")
    assert re.search(rf"\| (Method) \| {method_in_card}", card)
    assert make_config(of(settings, method)) == bonetune.training.load_config(run / "run.yaml")
    assert finished(run)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("full", "lora-ga")])
def test_a_run_begins_as_the_model_that_it_is_given(settings, method):
    torch.testing.assert_close(logits(plan(of(settings, method)).model), logits(llama()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("full", {}),
        ("lora", {"baseline_kwargs": {"lora_dropout": 0.1}}),
        ("lora+", {}),
        ("dora", {}),
        ("pissa", {"baseline_kwargs": {"lora_alpha": 7}}),
        ("pissa", {"dtype": "bfloat16"}),
        ("lora-ga", {"baseline_kwargs": {"lora_alpha": 7, "gradient_batches": 2}}),
        ("milora", {"baseline_kwargs": {"lora_alpha": 7}}),
        ("miss-bat", {}),
    ],
    ids=str,
)
def test_a_killed_run_goes_on_bit_for_bit(settings, tmp_path, method, more):
    settings = of(settings, method, save_steps=2, max_steps=6, **more)
    bonetune.train(settings)
    killed_and_resumed(settings | {"output_dir": str(tmp_path / "again")}, 5)
    for place in ("", "checkpoint-6"):
        ours, theirs = (tensors(tmp_path / run / place) for run in ("run", "again"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), place
    seconds = [json.loads((tmp_path / run / "summary.json").read_text())["init_seconds"] for run in ("run", "again")]
    assert all(seconds)
    if method in CHANGING_THE_BASE:
        for file in (tmp_path / "again" / "initial_adapter").iterdir():
            file.unlink()
        with pytest.raises(InputError, match="which the run began with, is not there"):
            plan(settings | {"output_dir": str(tmp_path / "again"), "max_steps": 8}, resume=True)


def test_one_seed_one_beginning(settings):
    models = [plan(of(settings, "lora", seed=seed)).model.state_dict() for seed in (0, 0, 1)]
    name = next(name for name in models[0] if "lora_A" in name)
    assert torch.equal(models[0][name], models[1][name])
    assert not torch.equal(models[0][name], models[2][name])


def test_tied_embeddings_stay_tied(settings, tmp_path, tokenizer):
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    seen = []
    settings = of(settings, "full", model_name_or_path=str(tmp_path / "tied"), dtype="bfloat16", save_steps=3)
    bonetune.train(settings, on_plan=seen.append)
    model = seen[0].model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert seen[0].trainable_parameters == sum(p.numel() for p in base.parameters())
    assert "lm_head.weight" not in tensors(tmp_path / "run")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert again.dtype == torch.float32
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    killed_and_resumed(settings | {"output_dir": str(tmp_path / "again")}, 5)
    assert all(torch.equal(a, tensors(tmp_path / "run")[name]) for name, a in tensors(tmp_path / "again").items())


def test_lora_plus_has_two_rates(settings):
    from bonetune.training.signals import Termination
    from bonetune.training.trainer import make_trainer

    more = {"weight_decay": 0.1, "adam_beta2": 0.9, "baseline_kwargs": {"loraplus_lr_ratio": 4}}
    planned = plan(of(settings, "lora+", **more))
    trainer = make_trainer(planned, None, Termination())
    groups = trainer.create_optimizer().param_groups
    names = {id(p): name for name, p in planned.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == {name for name, p in planned.model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {5e-3}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {2e-2}
    assert {group["weight_decay"] for group in groups if group["params"]} == {0.1}
    assert {group["betas"] for group in groups} == {(0.9, 0.9)}


def test_what_each_method_s_tensors_begin_as(settings):
    """The decompositions, in float64."""
    weight = llama().model.layers[0].mlp.down_proj.weight.double()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    components = {"pissa": slice(0, 4), "milora": slice(-4, None)}
    for method, some in components.items():
        model = plan(of(settings, method, baseline_kwargs={"lora_alpha": 12})).model
        layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
        part = (u[:, some] * s[some]) @ vh[some]
        held = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert layer.scaling["default"] == 3
        torch.testing.assert_close(held.double(), part, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.base_layer.weight.double(), weight - part, rtol=1e-4, atol=1e-5)
        norms = [layer.lora_A["default"].weight.norm(dim=1), layer.lora_B["default"].weight.norm(dim=0)]
        torch.testing.assert_close(*norms)  # each has the root of the singular value


def test_lora_ga_begins_with_the_run_s_first_gradients(settings):
    """A are right singular vectors of the mean gradient of the first batches, in order; nothing of the gradients is kept."""
    config = of(settings, "lora-ga", packing=False, baseline_kwargs={"gradient_batches": 3})
    planned = plan(config)
    model = llama()
    target = model.model.layers[1].self_attn.v_proj
    for number in range(3):
        batch = planned.batch([planned.train[int(i)] for i in planned.batches.epoch(0)[number]])
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
        (out.loss / 3).backward()
    _, _, vh = torch.linalg.svd(target.weight.grad.double(), full_matrices=False)
    layer = planned.model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    a = layer.lora_A["default"].weight.double()
    assert ((a @ vh[:4].T).abs().diagonal() > 0.999).all()
    assert all(p.grad is None for p in planned.model.parameters())
    assert not any(hasattr(module, "_peft_loraga_grad") for module in planned.model.modules())


def test_ranks_by_name_and_some_layers_only(settings, tmp_path):
    told = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "layers_to_transform": [1]}
    for method in ("lora", "milora"):
        seen = []
        settings["output_dir"] = str(tmp_path / method)
        bonetune.train(of(settings, method, **told), on_plan=seen.append)
        assert seen[0].trainable_parameters == 4 * (32 + 32) + 2 * (16 + 32)
        layers = [module for module in seen[0].model.modules() if hasattr(module, "lora_A")]
        assert [layer.scaling["default"] for layer in layers] == [1, 1]
        again = PeftModel.from_pretrained(llama(), tmp_path / method)
        torch.testing.assert_close(logits(again), logits(seen[0].model), rtol=1e-4, atol=1e-4)


def test_rounding_of_what_is_left_of_a_narrow_base_is_told(settings, tmp_path, monkeypatch):
    # which is remarked on as well where it is so
    monkeypatch.setattr(preflight, "lacks_instructions_for", lambda dtype: False)
    seen = []
    result = bonetune.train(of(settings, "pissa", dtype="bfloat16"), on_plan=seen.append)
    (note,) = result.notes
    assert "rounded to bfloat16" in note
    base = llama().to(torch.bfloat16)
    again = PeftModel.from_pretrained(base, tmp_path / "run")
    one, two = logits(again).float(), logits(seen[0].model).float()
    assert 0 < (one - two).norm() < 0.05 * one.norm()
    assert plan(of(settings, "lora", dtype="bfloat16", output_dir=str(tmp_path / "other"))).notes == []
    assert {p.dtype for p in seen[0].model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in seen[0].model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["full", "lora", "pissa", "miss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_classifier(settings, tmp_path, tokenizer, method, dtype):
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    BertModel(BertConfig(**small, pad_token_id=1)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    rows = [{"text": f"{a} {b} over", "label": b} for a in WORDS for b in WORDS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []
    told = {"model_name_or_path": str(tmp_path / "bert"), "task_type": "SEQ_CLS", "dtype": dtype, "max_steps": 20}
    told["learning_rate"] = 1e-3 if method == "full" else 1e-2
    result = bonetune.train(of(settings, method, **told), on_plan=seen.append)
    assert result.last_loss < result.first_loss
    model = seen[0].model
    head = {name: p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name}
    assert {(tuple(p.shape), p.dtype) for p in head.values()} == {((6, 64), torch.float32), ((6,), torch.float32)}
    if method == "full":
        again = BertForSequenceClassification.from_pretrained(tmp_path / "run")
    else:
        again = bonetune.models.load_model(str(tmp_path / "run")).model
    # a narrow base's head computes in bfloat16 once it is loaded, and what pissa leaves of the base is rounded
    close = 1e-4 if dtype == "float32" or method == "full" else 0.02
    torch.testing.assert_close(logits(again).float(), logits(model).float(), rtol=close, atol=close)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
@pytest.mark.parametrize("method", ["lora", "dora", "miss"])
def test_on_codes(settings, tmp_path, tokenizer, method, kind):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    told = {"model_name_or_path": str(tmp_path / "base"), "quantization": kind}
    if (method, kind) == ("dora", "int8"):
        with pytest.raises(InputError, match="loses the scales on a CPU"):
            plan(of(settings, method, **told))
        return
    result = bonetune.train(of(settings, method, **told))
    assert result.last_loss < result.first_loss


def test_a_stream(settings):
    result = bonetune.train(
        of(settings, "lora-ga", streaming=True, truncation="drop", baseline_kwargs={"gradient_batches": 99})
    )
    assert result.last_loss < result.first_loss


def test_a_folder_of_full_is_the_run_s_and_others_models_are_not(settings, tmp_path):
    run = tmp_path / "run"
    bonetune.train(of(settings, "full"))
    (run / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="already holds a run"):
        plan(of(settings, "full"))
    bonetune.train(of(settings, "full", max_steps=2), overwrite=True)
    clear(run)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    llama().save_pretrained(run)
    with pytest.raises(InputError, match="holds a model, which baseline full would write over"):
        plan(of(settings, "full"))
    bonetune.train(of(settings, "pissa"))
    clear(run)
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"baseline": "lora", "learning_rate": None}, "learning_rate has a default for .*, none for baseline lora: set it"),
        ({"baseline": "loraa"}, "baseline: "),
        ({"baseline_kwargs": {"lora_alpha": 8}}, r"baseline_kwargs \(lora_alpha\) without baseline"),
        (
            {"baseline": "lora", "variant": "bat", "bone_dropout": 0.1},
            "variant, bone_dropout: the Bone family's, .* leave it out",
        ),
        ({"baseline": "lora", "trainable_token_indices": [1]}, "trainable_token_indices: the Bone family's"),
        ({"baseline": "full", "target_modules": ["q_proj"]}, "r, target_modules: an adapter's, and baseline full"),
        ({"baseline": "lora", "target_modules": []}, "target_modules names no layer"),
        ({"baseline": "lora", "baseline_kwargs": {"lora_alfa": 8}}, "lora has no 'lora_alfa'; did you mean 'lora_alpha'"),
        ({"baseline": "miss-bat", "baseline_kwargs": {"x": 8}}, "miss-bat has no 'x'; it takes nothing"),
        ({"baseline": "lora", "baseline_kwargs": {"lora_alpha": 0}}, "lora_alpha should be a number above 0, got 0"),
        ({"baseline": "lora", "baseline_kwargs": {"init_lora_weights": "pissa"}}, "of lora is true, gaussian or orthogonal"),
        ({"baseline": "pissa", "baseline_kwargs": {"init_lora_weights": "pissa_niter_x"}}, "is pissa or pissa_niter_N"),
        ({"baseline": "pissa", "quantization": "nf4"}, "changes the base's weights.*leave quantization out"),
        ({"baseline": "full", "quantization": "nf4"}, "changes the base's weights.*leave quantization out"),
        ({"baseline": "lora", "deepspeed": "zero.json"}, "on one device, or on several by DDP"),
        ({"baseline": "miss", "rank_pattern": {"q_proj": 2}}, "one r for all layers"),
        ({"baseline": "olora", "bias": "all"}, "without biases only: leave bias out"),
        ({"baseline": "olora", "rank_pattern": {"q": 2}, "baseline_kwargs": {"use_rslora": True}}, "has both: choose one"),
        (
            {"baseline": "pissa", "r": 20},
            r"r=20: baseline pissa takes 20 components .* \(16, 32\) has 16: choose r of at most 16",
        ),
        ({"baseline": "lora-ga", "r": 10}, "takes 20 components .* choose r of at most 8"),
        ({"baseline": "pissa", "target_modules": ["embed_tokens"]}, "is for Linear layers|PEFT cannot give"),
        ({"baseline": "miss-bat", "r": 5}, "PEFT cannot give LlamaForCausalLM what baseline miss-bat is: .*divisible"),
        ({"baseline": "lora", "target_modules": ["query"]}, "PEFT cannot give .*query"),
        ({"baseline": "lora", "modules_to_save": ["nowhere"]}, "modules_to_save names modules that the model does not have"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_error(settings, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        bonetune.train(settings | more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["full", "lora", "dora", "pissa", "miss", "miss-bat"])
def test_memory_is_predicted(settings, method):
    """Without values, the same notes of a step are taken as with values."""
    config = make_config(of(settings, method, packing=False))
    batch = memory.WorstBatch((64,) * 8)
    model = baselines.as_in_training(config, llama())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == parameters(method, 4)
    real = LiveStorages()
    with real:
        real.assign((p for p in memory._tensors(model) if not p.requires_grad), "frozen")
        real.assign(trained, "adapter")
        memory._train_for_two_steps(model, config, batch, "cpu", real)
    found = memory.predict(config, batch, device="cpu")
    assert found.adapter == 4 * parameters(method, 4)
    assert found.optimizer == 2 * found.adapter + 4 * len(trained)
    assert found.total - found.holes - memory.SCRATCH == pytest.approx(sum(real.peak().values()), rel=0.02)


def test_a_lora_sized_rate_is_not_remarked_on(settings):
    assert plan(settings | {"baseline": "lora", "learning_rate": 2e-2}).notes == []


def test_kwargs_reach_peft_and_the_description(settings, tmp_path):
    kwargs = {"lora_alpha": 8, "init_lora_weights": "pissa_niter_2"}
    result = bonetune.train(settings | {"baseline": "pissa", "baseline_kwargs": kwargs})
    assert result.last_loss < result.first_loss
    planned = plan(
        settings | {"baseline": "rslora", "output_dir": str(tmp_path / "new"), "baseline_kwargs": {"lora_dropout": 0.5}}
    )
    assert planned.describe().startswith("rslora, r=4, lora_alpha=4, lora_dropout=0.5: ")
    config = planned.model.peft_config["default"]
    assert (config.use_rslora, config.lora_dropout, config.lora_alpha) == (True, 0.5, 4)
    facts = (tmp_path / "run" / "README.md").read_text()
    assert "pissa, r = 4, lora\\_alpha = 8, init\\_lora\\_weights = pissa\\_niter\\_2" in facts
