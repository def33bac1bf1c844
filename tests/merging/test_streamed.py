"""Merging file by file: the same bits as in memory, and what is not touched byte for byte."""

import json
import shutil
import sys

import pytest
import torch
from adapted_models import IDS, config, logits
from conftest import llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merges import assert_same_bits, files, merge_in_memory, save_adapter, stored
from peft import MissConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import bonetune
from bonetune import VARIANTS
from bonetune.errors import InputError
from bonetune.formats.checkpoint import read_header

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*save_embedding_layers.*", "ignore:.*tied.*", "ignore:.*additionally.*", "ignore:.*bias configured.*"
)


def base(folder, tokenizer, dtype=torch.float32, shards=None, make=llama, **changes):
    make(**changes).to(dtype).save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    tokenizer.save_pretrained(folder)
    return folder


def gpt2(**changes):
    torch.manual_seed(0)
    sides = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 320, "n_positions": 128}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.1}
    return GPT2LMHeadModel(GPT2Config(**(sides | ends | changes)))


def merge_both(adapter, tmp_path, monkeypatch, **options):
    """The two merged models' folders; the streamed one's result."""
    merge_in_memory(monkeypatch, adapter, str(tmp_path / "memory"), **options)
    result = bonetune.merge(adapter, str(tmp_path / "streamed"), certify="layers", **options)
    assert result.in_memory is None
    assert result.certificate.holds
    assert_same_bits(tmp_path / "streamed", tmp_path / "memory")
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [None, "40KB"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_as_in_memory(tmp_path, tokenizer, monkeypatch, variant, dtype, shards):
    folder = base(tmp_path / "base", tokenizer, dtype, shards)
    save_adapter(folder, tmp_path / "adapter", config(variant))
    merge_both(str(tmp_path / "adapter"), tmp_path, monkeypatch, scale=0.5)
    assert {file.name for file in folder.glob("*.safetensors")} == {
        file.name for file in (tmp_path / "streamed").glob("*.safetensors")
    }
    AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")


@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype_is_rounded_to_once(tmp_path, tokenizer, monkeypatch, stored_as, dtype):
    save_adapter(base(tmp_path / "base", tokenizer, stored_as, "40KB"), tmp_path / "adapter", config("bat-row"))
    merge_both(str(tmp_path / "adapter"), tmp_path, monkeypatch, dtype=dtype)
    assert {tensor.dtype for tensor in stored(tmp_path / "streamed").values()} == {getattr(torch, dtype)}
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "memory")]
    assert configs[0]["dtype"] == configs[1]["dtype"] == dtype
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    tensors = stored(tmp_path / "streamed")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "streamed").dtype == getattr(torch, dtype)


@pytest.mark.parametrize("variant", ["bone", "bat", "bat-left"])
def test_weights_that_are_stored_transposed(tmp_path, tokenizer, monkeypatch, variant):
    folder = base(tmp_path / "base", tokenizer, make=gpt2)
    save_adapter(folder, tmp_path / "adapter", config(variant, target_modules=["c_attn", "c_proj", "c_fc"], bias="all"))
    merge_both(str(tmp_path / "adapter"), tmp_path, monkeypatch)


def test_names_without_the_bodys_are_kept(tmp_path, tokenizer):
    folder = base(tmp_path / "base", tokenizer, make=gpt2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.transformer.save_pretrained(folder)  # as the hub's GPT-2: h.0.attn..., and no head
    adapted = save_adapter(folder, tmp_path / "adapter", config("bat", target_modules=["c_attn"]))
    bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out"), certify="layers")
    assert stored(tmp_path / "out").keys() == stored(folder).keys()
    assert "h.0.attn.c_attn.weight" in stored(tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)


WHOLE = {
    "a head": {"modules_to_save": ["lm_head"]},
    "an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "rows of tokens": {"trainable_token_indices": [3, 7, 11]},
    "rows by name": {"trainable_token_indices": {"embed_tokens": [3, 7]}},
    "an embedding and the head it is tied to": {
        "target_modules": ["q_proj", "embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "a tied head alone": {"target_modules": ["q_proj", "lm_head"]},
    "a saved embedding": {"modules_to_save": ["embed_tokens"]},
    "norms": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("what", WHOLE)
def test_what_is_trained_beside_linear_layers(tmp_path, tokenizer, monkeypatch, what, tied):
    folder = base(tmp_path / "base", tokenizer, shards="40KB", tie_word_embeddings=tied)
    changes = WHOLE[what] | ({} if tied else {"ensure_weight_tying": False})
    adapted = save_adapter(folder, tmp_path / "adapter", config("bone", **changes))
    said = logits(adapted)
    merge_both(str(tmp_path / "adapter"), tmp_path, monkeypatch)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    torch.testing.assert_close(logits(merged), said, rtol=1e-4, atol=1e-4)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "memory")]
    assert configs[0]["tie_word_embeddings"] == configs[1]["tie_word_embeddings"]


@pytest.mark.parametrize("init", [True, "bat", "mini"])
def test_adapters_of_pefts_miss(tmp_path, tokenizer, init):
    folder = base(tmp_path / "base", tokenizer)
    settings = MissConfig(r=4, mini_r=4, init_weights=init, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "miss_block" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    result = bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out"), certify="logits")
    assert (result.in_memory, result.certificate.holds) == (None, True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


def test_what_is_not_touched_stays_byte_for_byte(tmp_path, tokenizer):
    folder = base(tmp_path / "base", tokenizer, torch.bfloat16, "40KB")
    (folder / "LICENSE").write_text("do as you like")
    (folder / "modeling_odd.py").write_text("raise SystemExit")
    (folder / "optimizer.pt").write_bytes(b"of a run")
    (folder / "generation_config.json").write_text('{"temperature":  0.5, "eos_token_id": 1}\n')
    save_adapter(folder, tmp_path / "adapter", config("bone", target_modules=["o_proj"], layers_to_transform=[1]))
    result = bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out"), certify="layers")
    before, after = files(folder), files(tmp_path / "out")
    assert after.keys() == before.keys() - {"modeling_odd.py", "optimizer.pt"}
    different = [name for name in after if after[name] != before[name]]
    (changed,) = different  # the file of the one weight
    headers = [read_header(place / changed) for place in (folder, tmp_path / "out")]
    assert headers[0] == headers[1]
    starts = [content[: headers[0].data_start] for content in (before[changed], after[changed])]
    assert starts[0] == starts[1]
    assert result.certificate.unchanged == len(stored(folder)) - 1
    with safe_open(tmp_path / "out" / changed, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_code_comes_along_if_it_is_trusted(tmp_path, tokenizer):
    folder = base(tmp_path / "base", tokenizer)
    (folder / "modeling_odd.py").write_text("")
    save_adapter(folder, tmp_path / "adapter", config("bone"))
    (tmp_path / "adapter" / "run.yaml").write_text("trust_remote_code: true\n")
    with pytest.raises(InputError, match=r"trained with trust_remote_code.*--trust-remote-code"):
        bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out"), certify="layers")
    bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out"), certify="layers", trust_remote_code=True)
    assert (tmp_path / "out" / "modeling_odd.py").is_file()


def test_the_adapters_own_tokenizer_takes_the_place_of_the_bases(tmp_path, tokenizer):
    folder = base(tmp_path / "base", tokenizer)
    save_adapter(folder, tmp_path / "adapter", config("bone"))
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(tmp_path / "adapter")
    bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out"), certify="layers")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == tokenizer.chat_template


def test_without_a_tokenizer(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter", config("bone"))
    assert bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out"), certify="layers").certificate.holds


def test_in_memory_where_names_differ_and_said_so(tmp_path, tokenizer):
    folder = base(tmp_path / "base", tokenizer, make=gpt2)
    save_adapter(folder, tmp_path / "adapter", config("bone", target_modules=["c_attn"]))
    file = folder / "model.safetensors"
    tensors = {name.replace("c_attn.weight", "qkv"): tensor for name, tensor in stored(folder).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(bonetune.errors.InputError, match=r"--certify layers .* because .*c_attn.weight is not in"):
        bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out"), certify="layers")


@given(st.data())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_of_any_size(tmp_path_factory, tokenizer, data):
    tmp_path = tmp_path_factory.mktemp("pieces")
    variant = data.draw(st.sampled_from(VARIANTS))
    folder = base(tmp_path / "base", tokenizer, data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    adapted = save_adapter(folder, tmp_path / "adapter", config(variant, mini_r=data.draw(st.sampled_from([1, 2, 8, 16]))))
    streamed = sys.modules["bonetune.merging.streamed"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "_PIECE_ELEMENTS", data.draw(st.integers(1, 3000)))
        patch.setattr(streamed, "_COPY_BYTES", data.draw(st.integers(1, 9999)))
        patch.setattr(streamed, "_FLUSH_BYTES", data.draw(st.integers(1, 9999)))
        bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out"), certify="layers")
    exact, merged = adapted.merge_and_unload().state_dict(), stored(tmp_path / "out")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.float(), exact[name].float(), rtol=1e-5, atol=1e-5)


class TestSeveralAdapters:
    @pytest.fixture
    def two(self, tmp_path, tokenizer):
        folder = base(tmp_path / "base", tokenizer, shards="40KB")
        save_adapter(folder, tmp_path / "a", config("bat"), seed=1)
        save_adapter(folder, tmp_path / "b", config("bone", target_modules=["q_proj", "up_proj"], r=8), seed=2)
        return [str(tmp_path / "a"), str(tmp_path / "b")]

    def test_add_up_as_adapters_that_are_active_together(self, two, tmp_path, monkeypatch):
        merge_both(two, tmp_path, monkeypatch, scale=[0.5, -2.0])
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), two[0], "first")
        model.load_adapter(two[1], "second")
        model.base_model.set_adapter(["first", "second"])
        for name, scale in (("first", 0.5), ("second", -2.0)):
            for layer in bonetune.tuner.layers_of(model).values():
                layer.set_scale(name, scale)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
        torch.testing.assert_close(logits(merged), logits(model.eval()), rtol=1e-4, atol=1e-4)

    def test_the_order_is_of_no_account(self, two, tmp_path):
        for name, adapters in (("one", two), ("other", two[::-1])):
            assert bonetune.merge(adapters, str(tmp_path / name), certify="logits").certificate.holds
        one, other = (stored(tmp_path / name) for name in ("one", "other"))
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-6, atol=1e-6)

    def test_a_parameter_that_two_of_them_replace(self, two, tmp_path):
        for name, seed in (("c", 3), ("d", 4)):
            save_adapter(tmp_path / "base", tmp_path / name, config("bone", modules_to_save=["lm_head"]), seed)
        with pytest.raises(bonetune.errors.InputError, match=r"a?nd .*d both name lm_head.weight"):
            bonetune.merge([str(tmp_path / "c"), str(tmp_path / "d")], str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    def test_of_different_base_models(self, two, tmp_path):
        shutil.copytree(tmp_path / "base", tmp_path / "elsewhere")
        save_adapter(tmp_path / "elsewhere", tmp_path / "c", config("bone"))
        adapters = [two[0], str(tmp_path / "c")]
        with pytest.raises(bonetune.errors.InputError, match=r"name different base models, .*pass --base"):
            bonetune.merge(adapters, str(tmp_path / "out"))
        assert bonetune.merge(adapters, str(tmp_path / "out"), base=str(tmp_path / "base")).certificate.holds

    def test_the_wrong_number_of_scales(self, two, tmp_path):
        with pytest.raises(bonetune.errors.InputError, match="3 scales for 2 adapters"):
            bonetune.merge(two, str(tmp_path / "out"), scale=[1.0, 2.0, 3.0])


def test_the_merged_model_says_what_the_adapted_one_does(tmp_path, model_folder):
    adapted = save_adapter(model_folder, tmp_path / "adapter", config("bat-left"))
    bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out"), certify="layers")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
    torch.testing.assert_close(merged, logits(adapted), rtol=1e-4, atol=1e-4)
