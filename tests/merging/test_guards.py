"""What a merge refuses, and what it does with a result that is not the adapted model."""

import json
import shutil
import sys

import pytest
import torch
from adapted_models import config
from conftest import llama
from merges import change_json, merge_in_memory, save_adapter, stored
from peft import MissConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import bonetune
from bonetune.errors import AdapterFileError, InputError, RunError
from bonetune.formats.checkpoint import Checkpoint
from bonetune.merging import streamed

STREAMED = sys.modules["bonetune.merging.streamed"]


@pytest.fixture
def base(tmp_path, model_folder):
    return shutil.copytree(model_folder, tmp_path / "base")


@pytest.fixture
def adapter(tmp_path, base):
    save_adapter(base, tmp_path / "adapter", config("bone"))
    return str(tmp_path / "adapter")


def without_the_update(monkeypatch):
    merge_rows = streamed.merge_rows
    monkeypatch.setattr(STREAMED, "merge_rows", lambda weight, updates, first, into: merge_rows(weight, [], first, into))


@pytest.mark.parametrize("certify", ["logits", "layers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_without_the_update_is_never_certified(tmp_path, base, dtype, certify, monkeypatch):
    """However small the update: what was lost is not equal up to rounding."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config("bone", init_weights=True)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bone_block" in name:
                parameter.uniform_(-2e-3, 2e-3)
    model.save_pretrained(tmp_path / "adapter")
    without_the_update(monkeypatch)
    for _ in range(2):  # an older one that was put aside gives way
        with pytest.raises(RunError, match=r"is not the adapted one, so .*merged was not written; it is kept as .*\.rejected"):
            bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), dtype=dtype, certify=certify)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "merged.rejected"}
    certificate = json.loads((tmp_path / "merged.rejected" / "certificate.json").read_text())
    assert (certificate["holds"], certificate["method"]) == (False, certify)
    assert not (tmp_path / "adapter" / "certificate.json").exists()


def test_in_memory_too(tmp_path, adapter, monkeypatch):
    monkeypatch.setattr("peft.PeftModel.merge_and_unload", lambda self: self.unload(), raising=False)
    monkeypatch.setattr("bonetune.BoneModel.merge_and_unload", lambda self: self.unload())
    with pytest.raises(RunError, match="is not the adapted one"):
        merge_in_memory(monkeypatch, adapter, str(tmp_path / "merged"))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "merged.rejected"}


def test_what_was_there_stays_if_the_new_one_is_rejected(tmp_path, adapter, monkeypatch):
    output = tmp_path / "merged"
    bonetune.merge(adapter, str(output))
    before = stored(output)
    without_the_update(monkeypatch)
    with pytest.raises(RunError):
        bonetune.merge(adapter, str(output), overwrite=True, certify="layers")
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored(output).items())


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*")
@pytest.mark.parametrize("wrong", ["an embedding", "a formula", "another tensor", "names"])
def test_layers_notice(tmp_path, adapter, monkeypatch, wrong, base):
    if wrong == "a formula":
        merge_rows = streamed.merge_rows

        def shifted(weight, updates, first, into):
            return merge_rows(weight, [u._replace(theta=u.theta.roll(1, 0)) for u in updates], first, into)

        monkeypatch.setattr(STREAMED, "merge_rows", shifted)
        message = "outputs of .* differ most"
    elif wrong == "an embedding":
        save_adapter(base, tmp_path / "adapter", config("bat", target_modules=["q_proj", "embed_tokens"]))
        merge_rows = streamed.merge_rows

        def one_row(weight, updates, first, into):
            bounds = merge_rows(weight, updates, first, into)
            into[len(into) // 2] += 10 * (len(into) == 320)
            return bounds

        monkeypatch.setattr(STREAMED, "merge_rows", one_row)
        message = "outputs of model.embed_tokens.weight differ most"
    elif wrong == "another tensor":
        copied = streamed.copy_bytes
        monkeypatch.setattr(
            STREAMED, "copy_bytes", lambda source, target, start, at, length: copied(source, target, start, at, length - 1)
        )
        message = "is not what it was to be"
    else:
        header = streamed._header

        def renamed(*arguments):
            raw, starts = header(*arguments)
            return raw.replace(b"model.norm.weight", b"model.n0rm.weight"), starts

        monkeypatch.setattr(STREAMED, "_header", renamed)
        message = "model.n0rm.weight in model.safetensors is nothing of the model's; model.norm.weight is missing from"
    with pytest.raises(RunError, match=message):
        bonetune.merge(adapter, str(tmp_path / "merged"), certify="layers")


def test_auto_is_layers_where_memory_is_short(tmp_path, adapter, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100_000))
    assert bonetune.merge(adapter, str(tmp_path / "short")).certificate.to_dict()["method"] == "layers"
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10_000_000))
    assert bonetune.merge(adapter, str(tmp_path / "ample")).certificate.to_dict()["method"] == "logits"


class TestWithoutTheAdaptedModel:
    """What PEFT does not make in memory can be merged and compared layer by layer."""

    @pytest.fixture(params=["MiSS, scaled", "Bone and MiSS", "trained tokens and another adapter"])
    def merged(self, request, tmp_path, base):
        settings = {"target_modules": ["q_proj", "down_proj"]}
        save_adapter(base, tmp_path / "bone", config("bone", **settings), 1)
        save_adapter(base, tmp_path / "tokens", config("bone", trainable_token_indices=[3, 5], **settings), 2)
        save_adapter(base, tmp_path / "miss", MissConfig(r=4, task_type="CAUSAL_LM", init_weights=False, **settings))
        adapters, scale = {
            "MiSS, scaled": (["miss"], 0.5),
            "Bone and MiSS": (["bone", "miss"], 1.0),
            "trained tokens and another adapter": (["tokens", "bone"], 1.0),
        }[request.param]
        paths = [str(tmp_path / name) for name in adapters]
        return lambda certify: bonetune.merge(paths, str(tmp_path / "merged"), scale=scale, certify=certify)

    def test_auto_is_layers(self, merged):
        certificate = merged("auto").certificate.to_dict()
        assert (certificate["method"], certificate["holds"]) == ("layers", True)

    def test_logits_cannot_be_had(self, merged):
        with pytest.raises(InputError, match="use --certify layers"):
            merged("logits")


def test_adapters_for_different_tasks(tmp_path, adapter, base):
    shutil.copytree(adapter, tmp_path / "other")
    change_json(tmp_path / "other" / "adapter_config.json", task_type="SEQ_CLS")
    with pytest.raises(InputError, match=r"different tasks, .*adapter for CAUSAL_LM, .*other for SEQ_CLS: merge those of one"):
        bonetune.merge([adapter, str(tmp_path / "other")], str(tmp_path / "merged"))


@pytest.mark.parametrize("asks", ["first", "second"])
def test_code_that_only_the_adapters_trust_is_not_run(tmp_path, base, tokenizer, asks):
    for seed, name in enumerate(("first", "second")):
        save_adapter(base, tmp_path / name, config("bone"), seed)
    tokenizer.save_pretrained(tmp_path / "first")
    change_json(
        tmp_path / "first" / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": [f"own_{asks}.Own", None]},
    )
    (tmp_path / "first" / f"own_{asks}.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast\n\n\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    (tmp_path / asks / "run.yaml").write_text("trust_remote_code: true\n")
    adapters = [str(tmp_path / name) for name in ("first", "second")]
    with pytest.raises(InputError, match=rf"{asks} was trained with trust_remote_code.*--trust-remote-code"):
        bonetune.merge(adapters, str(tmp_path / "merged"), certify="layers")
    assert not (tmp_path / "ran").exists()
    bonetune.merge(adapters, str(tmp_path / "merged"), certify="layers", trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_the_certificate_names_every_file_the_base_and_the_adapter(tmp_path, adapter, base):
    from bonetune.formats.tensors import sha256

    bonetune.merge(adapter, str(tmp_path / "merged"), certify="layers")
    content = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert content["files"] == {
        path.name: sha256(path) for path in (tmp_path / "merged").iterdir() if path.name != "certificate.json"
    }
    assert content["base_fingerprint"] == Checkpoint(base).fingerprint
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert content["adapters"] == [{name: sha256(tmp_path / "adapter" / name) for name in names}]


class TestBaseModel:
    def test_of_another_fingerprint(self, tmp_path, adapter, base):
        (tmp_path / "adapter" / "summary.json").write_text(json.dumps({"base": "the/right-one", "base_fingerprint": "f" * 64}))
        own = Checkpoint(base).fingerprint[:12]
        with pytest.raises(InputError, match=rf"trained on the/right-one .*ffffffffffff, and .*base has {own}: .*--any-base"):
            bonetune.merge(adapter, str(tmp_path / "merged"))
        assert bonetune.merge(adapter, str(tmp_path / "merged"), any_base=True).certificate.holds

    def test_that_training_notes(self, tmp_path, base):
        rows = [{"prompt": "the quick", "completion": " fox"}] * 4
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = {"model_name_or_path": str(base), "dataset_name": str(tmp_path / "rows.jsonl")}
        run |= {"output_dir": str(tmp_path / "run"), "r": 4, "max_steps": 1, "sample_prompts": 0, "cache_tokens": False}
        bonetune.train(run)
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["base_fingerprint"] == Checkpoint(base).fingerprint
        assert bonetune.merge(str(tmp_path / "run"), str(tmp_path / "merged"), certify="layers").certificate.holds
        shutil.copytree(base, tmp_path / "other")
        tensors = stored(tmp_path / "other")
        tensors["model.norm.weight"] += 1
        save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match="--any-base"):
            bonetune.merge(str(tmp_path / "run"), str(tmp_path / "again"), base=str(tmp_path / "other"))

    def test_that_a_conversion_notes(self, tmp_path, adapter, base):
        (tmp_path / "adapter" / "conversion.json").write_text(json.dumps({"base_fingerprint": "f" * 64}))
        with pytest.raises(InputError, match=r"trained on a base model with the fingerprint ffffffffffff, .*--any-base"):
            bonetune.merge(adapter, str(tmp_path / "merged"))

    def test_that_holds_the_adapter_already(self, tmp_path, adapter):
        bonetune.merge(adapter, str(tmp_path / "merged"))
        merged = str(tmp_path / "merged")
        with pytest.raises(InputError, match=r"was made by merging .*adapter already: .*--base"):
            bonetune.merge(adapter, str(tmp_path / "twice"), base=merged)
        save_adapter(merged, tmp_path / "next", config("bat"))
        assert bonetune.merge(str(tmp_path / "next"), str(tmp_path / "further")).certificate.holds

    def test_of_other_shapes(self, tmp_path, adapter, tokenizer):
        llama(hidden_size=64).save_pretrained(tmp_path / "wide")
        tokenizer.save_pretrained(tmp_path / "wide")
        with pytest.raises(AdapterFileError, match=r"q_proj.* has shape \(4, 32\), bone needs \(4, 64\)"):
            bonetune.merge(adapter, str(tmp_path / "merged"), base=str(tmp_path / "wide"))

    def test_that_lacks_a_file(self, tmp_path, adapter, base, tokenizer):
        llama().save_pretrained(tmp_path / "parts", max_shard_size="30KB")
        tokenizer.save_pretrained(tmp_path / "parts")
        next((tmp_path / "parts").glob("*.safetensors")).unlink()
        with pytest.raises(InputError, match=r"lacks 1 of its \d+ files"):
            bonetune.merge(adapter, str(tmp_path / "merged"), base=str(tmp_path / "parts"))

    def test_with_values_that_are_not_finite(self, tmp_path, adapter, base):
        tensors = stored(base)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(RunError, match=r"merged model.layers.1.mlp.up_proj.weight would have values that are not finite"):
            bonetune.merge(adapter, str(tmp_path / "merged"), certify="layers")
        assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_values_that_the_dtype_does_not_reach(tmp_path, base):
    save_adapter(base, tmp_path / "adapter", config("bone"))
    with pytest.raises(RunError, match="not finite as float16"):
        bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), scale=1e6, dtype="float16", certify="layers")
    tensors = stored(base)
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"merged model.norm.weight would have values .* float16"):
        bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), dtype="float16", certify="layers")


def test_an_output_that_would_destroy_what_is_merged(tmp_path, adapter, base):
    (tmp_path / "link").symlink_to(tmp_path / "adapter")
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "inside").symlink_to(base)
    for output in ("adapter", "adapter/merged", "link", "link/merged", "base", "place/inside", "base/merged", "."):
        with pytest.raises(InputError, match="is, holds or lies in what is merged"):
            bonetune.merge(adapter, str(tmp_path / output), overwrite=True)
    assert AutoModelForCausalLM.from_pretrained(base)


def test_a_failure_in_memory_leaves_nothing(tmp_path, adapter, monkeypatch):
    def broken(*arguments):
        raise OSError("disk broken")

    monkeypatch.setattr(sys.modules["bonetune.merging.merge"], "certify", broken)
    with pytest.raises(OSError, match="disk broken"):
        merge_in_memory(monkeypatch, adapter, str(tmp_path / "merged"))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_rows_of_tokens_that_no_one_knows(tmp_path, base):
    save_adapter(base, tmp_path / "adapter", config("bone", trainable_token_indices=[3, 5]))
    for indices, message in (([3], "does not say which tokens"), ([3, 5000], "do not fit the base model's shape")):
        change_json(tmp_path / "adapter" / "adapter_config.json", trainable_token_indices=indices)
        with pytest.raises(AdapterFileError, match=message):
            bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))


def test_into_a_file_of_rwkv(tmp_path):
    from bonetune.formats import bone
    from bonetune.formats.state import AdapterState, Source
    from bonetune.formats.tensors import sha256
    from bonetune.ops import merge
    from bonetune.spec import ShardSpec

    torch.manual_seed(0)
    weights = {"emb.weight": torch.randn(8, 12), "blocks.0.att.key.weight": torch.randn(16, 12)}
    torch.save(weights, tmp_path / "base.pth")
    state = AdapterState(config("bone"), {"blocks.0.att.key": torch.randn(4, 16)}, {}, Source(bone.NAME, ""))
    bone.write(state, tmp_path / "adapter")
    options = {"base": str(tmp_path / "base.pth"), "scale": 0.5}
    with pytest.raises(InputError, match="no RWKV-6 or RWKV-7 model"):  # it has weights, and nothing to say
        bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out.pth"), certify="logits", **options)
    assert not (tmp_path / "out.pth").exists()
    assert bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out.pth"), **options).certificate.holds
    merged = torch.load(tmp_path / "out.pth", weights_only=True)
    update = bonetune.ops.Update(state.tensors["blocks.0.att.key"], ShardSpec("bone", 4), 0.5)
    assert torch.equal(merged["blocks.0.att.key.weight"], merge(weights["blocks.0.att.key.weight"], [update]))
    assert torch.equal(merged["emb.weight"], weights["emb.weight"])
    content = json.loads((tmp_path / "out.pth.certificate.json").read_text())
    assert content["files"] == {"out.pth": sha256(tmp_path / "out.pth")}
