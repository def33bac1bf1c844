"""RWKV models through the whole job: train, save, evaluate, convert, merge, and the official package runs what comes out."""

import json
import random
import re

import official_rwkv
import pytest
import rwkv_models
import torch
from interrupted import killed_and_resumed
from safetensors.torch import load_file

import bonetune
from bonetune import BoneLayer, InputError
from bonetune.data import write_binidx
from bonetune.losses import completion_loss
from bonetune.models import load_model
from bonetune.rwkv import from_pth, parameters_of, save_pth
from bonetune.training import make_config, plan
from bonetune.training.memory import measure, predict

VERSIONS = rwkv_models.VERSIONS
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
SIZES = {"vocab_size": 320, "hidden_size": 64, "head_size": 16, "num_hidden_layers": 2}


def texts(step, number, seed):
    """Walks around the circle of words, `step` at a time, from anywhere."""
    draw = random.Random(seed)
    starts = [(draw.randrange(8), draw.randrange(6, 20)) for _ in range(number)]
    return [" ".join(WORDS[(start + step * i) % 8] for i in range(length)) for start, length in starts]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def job(tmp_path, tokenizer):
    """Settings of a run on a base of some version, in a folder with its tokenizer."""
    tokenizer.save_pretrained(tmp_path)

    def make(version, base=None, **changes):
        if base is None:
            base = rwkv_models.file(tmp_path / "base.pth", version, **SIZES)
        return {
            "model_name_or_path": str(base),
            "dataset_name": write_rows(tmp_path / "train.jsonl", [{"text": text} for text in texts(3, 64, 1)]),
            "eval_dataset_name": write_rows(tmp_path / "held.jsonl", [{"text": text} for text in texts(3, 12, 2)]),
            "output_dir": str(tmp_path / "run"),
            "r": 8,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "max_steps": 6,
            "sample_prompts": 0,
            "cache_tokens": False,
        } | changes

    return make


def losses(run, name="loss"):
    return [line[name] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if name in line]


def pretrained(path, version, tokenizer):
    """A model that walks one way."""
    model = rwkv_models.model(version, **SIZES).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for number in range(60):
        rows = [tokenizer(text).input_ids for text in texts(1, 8, 100 + number)]
        lengths = [0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()]
        ids = torch.tensor([[token for row in rows for token in row]])
        labels = ids.clone()
        labels[0, lengths[:-1]] = -100
        completion_loss(model, labels=labels, input_ids=ids, cu_seq_lens_q=torch.tensor(lengths)).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_pth(model.eval(), path)
    return path


@pytest.mark.parametrize("variant", ["bone", "bat-row"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.filterwarnings("ignore:.*LoRA's size.*")
def test_the_whole_job(job, tmp_path, tokenizer, version, variant):
    base = pretrained(tmp_path / "base.pth", version, tokenizer)
    settings = job(version, base, variant=variant, learning_rate=3e-3, max_steps=60, train_parts=["time", "ln"])
    held = settings["eval_dataset_name"]
    (before,) = bonetune.evaluate(str(base), ["loss"], data=held)
    result = bonetune.train(settings)
    (after,) = bonetune.evaluate(str(tmp_path / "run"), ["loss"], data=held)
    assert after.score < 0.5 * before.score
    assert not any("padded" in note for note in result.notes)  # packed, by the boundaries

    adapter = tmp_path / "run"
    merged = bonetune.merge(str(adapter), str(tmp_path / "merged.pth"), certify="logits")
    assert merged.certificate.holds
    file = torch.load(tmp_path / "merged.pth", weights_only=True)
    assert list(file) == list(torch.load(base, weights_only=True))

    converted = bonetune.convert(str(adapter), str(tmp_path / "rwkv-0.pth"), to="rwkv-disha")
    assert converted.certificate.holds
    bonetune.convert(str(tmp_path / "rwkv-0.pth"), str(tmp_path / "again"), to="peft-bone", base=str(base))
    bonetune.merge(str(tmp_path / "rwkv-0.pth"), str(tmp_path / "from-file.pth"), base=str(base))
    again = torch.load(tmp_path / "from-file.pth", weights_only=True)
    assert all(torch.equal(file[name], tensor) for name, tensor in again.items())

    ids = tokenizer(texts(3, 1, 9)[0]).input_ids
    adapted, reread = load_model(str(adapter)).model, load_model(str(tmp_path / "again")).model
    with torch.no_grad():
        wanted = adapted(torch.tensor([ids])).logits[0]
        assert torch.equal(reread(torch.tensor([ids])).logits[0], wanted)
        with adapted.disable_adapter():
            assert torch.equal(adapted(torch.tensor([ids])).logits, from_pth(base)(torch.tensor([ids])).logits)
    said = official_rwkv.logits(tmp_path / "merged.pth", ids, tmp_path)
    assert (said - wanted).abs().max() <= 5e-5 * max(1, said.abs().max())


@pytest.mark.parametrize("variant", bonetune.VARIANTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_target_gets_a_gradient(job, version, variant):
    planned = plan(
        job(version, variant=variant, mini_r=4 if variant == "mini" else 1, train_parts=["time", "ln", "emb", "head"])
    )
    layers = {name for name, module in planned.model.named_modules() if isinstance(module, BoneLayer)}
    kinds = {name.split(".", 4)[-1] for name in layers}
    both = {"att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"}
    assert kinds == both | ({"att.gate", "ffn.receptance"} if version == "x060" else set())
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in planned.model.named_parameters():
            if "bone_block" in name:
                parameter.normal_(std=0.01)  # so that what comes before an adapter feels it
    batch = planned.batch([planned.train[i] for i in range(4)])
    inputs = {name: value for name, value in batch.items() if name not in ("supervised", "tokens", "examples")}
    planned.task.loss(planned.model, **inputs, supervised=1).backward()
    trained = {name: p for name, p in planned.model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    parts = parameters_of(from_pth(planned.config.model_name_or_path), ["time", "ln", "emb", "head"])
    assert len(trained) == len(layers) + len(parts)


@pytest.mark.parametrize("changes", [{}, {"bptt_length": 16, "l2_wrap": 1e-3}, {"packing": False}])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_killed_run_goes_on_bit_for_bit(job, tmp_path, version, changes):
    settings = job(version, train_parts=["time", "ln"], bone_dropout=0.1, save_steps=2, eval_steps=3, **changes)
    bonetune.train(settings)
    killed_and_resumed(settings | {"output_dir": str(tmp_path / "again")}, 5)
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "again"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert losses(tmp_path / "run") == losses(tmp_path / "again")
    assert losses(tmp_path / "run", "eval_loss") == losses(tmp_path / "again", "eval_loss")


@pytest.mark.parametrize("version", VERSIONS)
def test_segments_packed_rows_and_padded_ones_begin_with_one_loss(job, tmp_path, version):
    first = []
    for name, changes in (("packed", {}), ("padded", {"packing": False}), ("segments", {"bptt_length": 8})):
        bonetune.train(job(version, max_steps=1, group_by_length=False, output_dir=str(tmp_path / name), **changes))
        first.append(losses(tmp_path / name)[0])
    assert first[1] == pytest.approx(first[0], rel=1e-5)
    assert first[2] == pytest.approx(first[0], rel=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_state_tuning_alone(job, tmp_path, version):
    settings = job(version, target_modules=[], train_parts=["state"], learning_rate=0.1, max_steps=30)
    bonetune.train(settings)
    run = tmp_path / "run"
    trained = load_file(run / "adapter_model.safetensors")
    assert sorted(trained) == [f"base_model.model.blocks.{number}.att.time_state" for number in range(2)]
    held = settings["eval_dataset_name"]
    scores = [bonetune.evaluate(name, ["loss"], data=held)[0].score for name in (settings["model_name_or_path"], str(run))]
    assert scores[1] < 0.95 * scores[0]
    ids = torch.tensor([[5, 6, 7]])
    adapted = load_model(str(run)).model
    bonetune.convert(str(run), str(tmp_path / "state.pth"), to="rwkv-disha")
    assert torch.load(tmp_path / "state.pth", weights_only=True).keys() == {f"blocks.{n}.att.time_state" for n in range(2)}
    bonetune.convert(str(tmp_path / "state.pth"), str(tmp_path / "again"), to="peft-bone", base=settings["model_name_or_path"])
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path / "again")).model(ids).logits, adapted(ids).logits)
    if version == "x070":
        with pytest.raises(InputError, match="RWKV-7 model, in whose files other programs do not read states"):
            bonetune.merge(str(run), str(tmp_path / "merged.pth"))
        return
    bonetune.merge(str(run), str(tmp_path / "merged.pth"))
    with torch.no_grad():
        wanted = adapted(ids).logits[0]
    said = official_rwkv.logits(tmp_path / "merged.pth", ids[0].tolist(), tmp_path)
    assert (said - wanted).abs().max() <= 5e-5
    assert torch.equal(from_pth(tmp_path / "merged.pth")(ids).logits[0], wanted)


@pytest.mark.filterwarnings("ignore:.*LoRA's size.*")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("version", VERSIONS)
def test_quantized_bases(job, tmp_path, version, kind):
    pytest.importorskip("bitsandbytes")
    settings = job(version, quantization=kind, variant="bat-row", train_parts=["ln"], max_steps=12, learning_rate=2e-3)
    bonetune.train(settings)
    run = tmp_path / "run"
    assert losses(run)[-1] < 0.9 * losses(run)[0]
    model = load_model(str(run)).model
    kinds = {type(module.get_base_layer()).__name__ for module in model.modules() if isinstance(module, BoneLayer)}
    assert kinds == {"Linear4bit" if kind == "nf4" else "Linear8bitLt"}
    with pytest.raises(InputError, match="trained on quantized weights"):
        bonetune.merge(str(run), str(tmp_path / "merged.pth"))
    merged = bonetune.merge(str(run), str(tmp_path / "merged.pth"), into="original")
    assert merged.certificate.holds


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_whole_parameters_are_trained_in_float32(job, dtype):
    planned = plan(job("x070", dtype=dtype, train_parts=["time", "ln", "emb", "head"]))
    assert {p.dtype for p in planned.model.parameters() if p.requires_grad} == {torch.float32}
    frozen = {p.dtype for p in planned.model.parameters() if not p.requires_grad}
    assert frozen == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    "changes", [{}, {"packing": False}, {"bptt_length": 16}, {"gradient_checkpointing": True}, {"bf16": True}]
)
def test_training_over_bfloat16(job, tmp_path, changes):
    bonetune.train(job("x060", dtype="bfloat16", train_parts=["time", "ln"], max_steps=10, **changes))
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    model = load_model(str(tmp_path / "run"), "bfloat16").model
    assert model.dtype == torch.bfloat16
    assert model(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16


def test_token_files_are_trained_on(job, tmp_path, tokenizer):
    settings = job("x070", truncation="split", max_length=24)
    documents = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts(3, 64, 1)]
    write_binidx(tmp_path / "data", documents)
    bonetune.train(settings | {"dataset_name": str(tmp_path / "data.bin")})
    bonetune.train(settings | {"output_dir": str(tmp_path / "text")})
    assert losses(tmp_path / "run") == losses(tmp_path / "text")
    write_binidx(tmp_path / "wrong", [[1, 2, 320]])
    with pytest.raises(InputError, match="320"):
        plan(settings | {"dataset_name": str(tmp_path / "wrong.bin"), "output_dir": str(tmp_path / "new")})


def test_chat_and_estimate(job, tmp_path):
    settings = job("x070")
    bonetune.train(settings)
    predicted, measured = predict(make_config(settings)), measure(make_config(settings))
    assert predicted.frozen == sum(p.numel() * 4 for p in from_pth(settings["model_name_or_path"]).parameters())
    assert measured.total > 0
    chat = bonetune.Chat(str(tmp_path / "run"), prompt_template="User: {instruction}\n\nAssistant:", max_new_tokens=5)
    assert isinstance("".join(chat.ask("hello")), str)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_parts": ["tmie"]}, "train_parts"),
        ({"task_type": "SEQ_2_SEQ_LM", "dataset_field": ["text", "text"]}, "SEQ_2_SEQ_LM is not for it"),
        ({"attn_implementation": "sdpa"}, "does not attend"),
        ({"bptt_length": 8, "packing": True}, "choose one"),
        ({"model_name_or_path": "missing.pth"}, "missing.pth does not exist"),
        ({"target_modules": []}, "No `target_modules` passed"),
        (
            {"target_modules": [], "train_parts": ["state"], "learning_rate": None},
            "learning_rate has a default for adapted layers",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(job, changes, message):
    settings = job("x070")
    with pytest.raises((InputError, ValueError), match=message):
        plan(settings | changes)


def test_what_is_rwkv_s_is_refused_elsewhere(job, model_folder):
    settings = job("x070") | {"model_name_or_path": str(model_folder)}
    with pytest.raises(InputError, match="has no such parameters"):
        plan(settings | {"train_parts": ["time"]})
    with pytest.raises(InputError, match="carry a state from one token to the next, and LlamaForCausalLM does not"):
        plan(settings | {"bptt_length": 8})


def test_an_adapter_of_another_model_is_named(job, tmp_path):
    bonetune.train(job("x070"))
    wider = rwkv_models.file(tmp_path / "wider.pth", "x070", **(SIZES | {"hidden_size": 128}))
    with pytest.raises(InputError, match="shape"):
        load_model(str(tmp_path / "run"), base=str(wider))
    other = rwkv_models.file(tmp_path / "other.pth", "x070", seed=5, **SIZES)
    with pytest.raises(InputError, match="--any-base"):
        bonetune.merge(str(tmp_path / "run"), str(tmp_path / "merged.pth"), base=str(other))
    assert bonetune.merge(str(tmp_path / "run"), str(tmp_path / "merged.pth"), base=str(other), any_base=True).certificate.holds
    (tmp_path / "base.pth").unlink()
    with pytest.raises(InputError, match="no base model"):
        bonetune.merge(str(tmp_path / "run"), str(tmp_path / "else.pth"))


def test_a_tokenizer_of_another_model_is_named(job, tmp_path):
    settings = job("x070")
    (tmp_path / "alone").mkdir()
    lonely = rwkv_models.file(tmp_path / "alone" / "model.pth", "x070", **SIZES)
    for use in (
        lambda: bonetune.evaluate(str(lonely), ["loss"], data=settings["eval_dataset_name"]),
        lambda: bonetune.Chat(str(lonely)),
        lambda: plan(settings | {"model_name_or_path": str(lonely)}),
    ):
        with pytest.raises(InputError, match=r"has 65530 tokens, and .* embeddings for 320"):
            use()


def test_a_merge_replaces_models_only(job, tmp_path):
    bonetune.train(job("x070"))
    run = tmp_path / "run"
    before = (run / "adapter_model.safetensors").read_bytes()
    (tmp_path / "data.pth").write_text("mine")
    for output, message in (
        (run / "adapter_model.safetensors", "ends in .pth"),
        (tmp_path / "merged", "ends in .pth"),
        (tmp_path / "data.pth", "holds something else"),
        (tmp_path / "base.pth", "is what is merged"),
    ):
        with pytest.raises(InputError, match=message):
            bonetune.merge(str(run), str(output), overwrite=True)
    assert (run / "adapter_model.safetensors").read_bytes() == before
    assert (tmp_path / "data.pth").read_text() == "mine"
    bonetune.merge(str(run), str(tmp_path / "merged.pth"))
    assert bonetune.merge(str(run), str(tmp_path / "merged.pth"), overwrite=True).certificate.holds


def test_what_is_missing_or_not_written_is_said(job, tmp_path):
    bonetune.train(job("x070"))
    bonetune.convert(str(tmp_path / "run"), str(tmp_path / "rwkv-0.pth"), to="rwkv-disha")
    with pytest.raises(InputError, match="needs --base FILE"):
        bonetune.merge(str(tmp_path / "rwkv-0.pth"), str(tmp_path / "merged.pth"))
    with pytest.raises(InputError, match="GGUF is not written of those"):
        bonetune.convert(str(tmp_path / "base.pth"), str(tmp_path / "model.gguf"), to="gguf")


@pytest.mark.parametrize("parts", [["time"], ["state"]])
def test_what_the_card_shows_runs(job, tmp_path, monkeypatch, parts):
    bonetune.train(job("x060", train_parts=parts))
    monkeypatch.chdir(tmp_path)
    shown = re.findall(r"```python\n(.*?)```", (tmp_path / "run" / "README.md").read_text(), re.DOTALL)
    assert len(shown) == 2
    names = {}
    for code in shown:
        exec(code, names)
    bonetune.merge("run", "certified.pth")
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(from_pth("merged.pth")(ids).logits, from_pth("certified.pth")(ids).logits)
    assert "base_model:" not in (tmp_path / "run" / "README.md").read_text()
