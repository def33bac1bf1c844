import json
import resource
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from adapted_models import config
from peft import LoKrConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bonetune
from bonetune.conversion import staging
from bonetune.errors import AdapterFileError, InputError, RunError
from bonetune.formats import Checkpoint, lora
from bonetune_cli.main import main

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path, model_folder):
    return save(tmp_path / "adapter", model_folder, config(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))


def save(folder, model_folder, settings):
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), settings).save_pretrained(folder)
    return folder


def left(folder):
    return {item.name for item in folder.iterdir()}


def test_the_report_says_what_was_mapped_and_of_which_files(tmp_path, adapter, model_folder):
    result = bonetune.convert(str(adapter), str(tmp_path / "lora"), to="lora")
    report = json.loads((tmp_path / "lora" / "conversion.json").read_text())
    assert (report["read_as"], report["written_as"], report["variant"]) == ("peft-bone", "lora", "bone")
    assert report["base"] == str(model_folder)
    assert set(report["layers"]) == {f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")}
    assert report["layers"]["model.layers.0.mlp.up_proj"]["shape"] == [4, 48]
    assert any("--max-lora-rank 8" in note for note in result.notes)
    assert report["certificate"] == json.loads((tmp_path / "lora" / "certificate.json").read_text())
    assert report["certificate"]["holds"]
    assert set(report["certificate"]["files"]) == left(tmp_path / "lora") - {"conversion.json", "certificate.json"}
    assert set(report["certificate"]["adapters"][0]) == {ADAPTER, "adapter_config.json"}
    assert report["certificate"]["versions"]["torch"]


def test_what_lies_beside_an_adapter_goes_along(tmp_path, adapter, tokenizer):
    tokenizer.save_pretrained(adapter)
    (adapter / "prompts.jsonl").write_text('"the quick"\n')
    (adapter / "optimizer.pt").write_text("no")
    bonetune.convert(str(adapter), str(tmp_path / "miss"), to="miss")
    assert left(tmp_path / "miss") >= {"tokenizer.json", "prompts.jsonl", "chat_template.jinja"}
    assert "optimizer.pt" not in left(tmp_path / "miss")


@pytest.mark.parametrize("to", ["miss", "lora", "peft-bone"])
def test_the_answers_may_be_compared(tmp_path, adapter, to):
    result = bonetune.convert(str(adapter), str(tmp_path / to), to=to, certify="logits")
    assert result.certificate.holds
    assert result.certificate.effect > 0.01
    assert result.certificate.greedy_agreement == 1


@pytest.mark.parametrize("certify", ["layers", "logits"])
def test_a_wrong_file_never_takes_its_place(tmp_path, adapter, monkeypatch, certify):
    """A writer that is wrong in one layer: the certificate reads what was written, and keeps it aside."""
    right = lora.write

    def wrong(fitted, path, rank=None):
        made = right(fitted, path, rank)
        tensors = load_file(path / ADAPTER)
        name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
        tensors[name] = tensors[name].flip(0).contiguous()
        save_file(tensors, path / ADAPTER)
        return made

    monkeypatch.setattr(lora, "write", wrong)
    with pytest.raises(RunError, match=r"was left alone and it lies at .*out\.rejected"):
        bonetune.convert(str(adapter), str(tmp_path / "out"), to="lora", certify=certify)
    assert left(tmp_path) == {"adapter", "out.rejected"}
    assert not json.loads((tmp_path / "out.rejected" / "certificate.json").read_text())["holds"]


@pytest.mark.parametrize("to", ["lora", "peft-bone"])
def test_what_was_trained_whole_is_in_the_certificate(tmp_path, model_folder, monkeypatch, to):
    adapter = save(tmp_path / "adapter", model_folder, config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    from bonetune.formats import peft_folder

    right = peft_folder.save_file

    def wrong(content, path, metadata):
        right({name: tensor for name, tensor in content.items() if "lm_head" not in name}, path, metadata=metadata)

    monkeypatch.setattr(peft_folder, "save_file", wrong)
    with pytest.raises(RunError, match=r"NOT equal within 1e-05: .*1 tensors trained whole differ, lm_head\.weight"):
        bonetune.convert(str(adapter), str(tmp_path / "out"), to=to, certify="layers", base=str(model_folder))


def test_answers_are_held_to_the_tolerance(tmp_path, model_folder):
    adapter = save(tmp_path / "adapter", model_folder, config("bat", target_modules=["up_proj"]))

    def convert(**settings):
        return bonetune.convert(
            str(adapter), str(tmp_path / "out"), to="lora", base=str(model_folder), certify="logits", **settings
        )

    with pytest.raises(RunError, match=r"What was written is not the adapter.* NOT equal"):
        convert(rank=2)
    with pytest.raises(RunError, match="NOT equal"):
        convert(rank=32, tolerance=1e-12)
    assert convert(rank=32).certificate.holds


def test_another_base_of_the_same_shapes_is_found_by_its_fingerprint(tmp_path, model_folder):
    from conftest import llama

    adapter = save(tmp_path / "adapter", model_folder, config("bat", target_modules=["up_proj"]))
    (adapter / "summary.json").write_text(json.dumps({"base_fingerprint": Checkpoint(model_folder).fingerprint}))
    other = llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")

    def convert(name, **settings):
        return bonetune.convert(str(adapter), str(tmp_path / name), to="lora", rank=32, **settings)

    with pytest.raises(InputError, match=r"was trained on a base model with the fingerprint .*--any-base"):
        convert("out", base=str(tmp_path / "other"))
    assert convert("out", base=str(model_folder)).certificate.holds
    assert convert("any", base=str(tmp_path / "other"), any_base=True).certificate.holds


def test_every_layer_is_held_to_the_tolerance(tmp_path, model_folder):
    """A small update that truncation loses does not hide behind a large one."""
    adapter = save(tmp_path / "adapter", model_folder, config("bat", target_modules=["q_proj", "up_proj"]))
    tensors = load_file(adapter / ADAPTER)
    save_file({name: tensor * (1e-3 if "q_proj" in name else 1) for name, tensor in tensors.items()}, adapter / ADAPTER)
    made = bonetune.convert(str(adapter), str(tmp_path / "loose"), to="lora", rank=4, base=str(model_folder), tolerance=1)
    q = {name: error for name, error in made.certificate.errors.items() if "q_proj" in name}
    with pytest.raises(RunError, match="NOT equal"):
        bonetune.convert(
            str(adapter), str(tmp_path / "out"), to="lora", rank=4, base=str(model_folder), tolerance=min(q.values()) * 0.99
        )
    for name, error in made.certificate.errors.items():
        assert error >= made.layers[name].error > 0


def test_the_base_that_was_passed_is_the_result_s(tmp_path, adapter, model_folder):
    content = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/gone/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    bonetune.convert(str(adapter), str(tmp_path / "lora"), to="lora", base=str(model_folder))
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model_folder)
    with pytest.raises(InputError, match="/gone/base"):
        bonetune.convert(str(adapter), str(tmp_path / "out"), to="lora")
    assert bonetune.convert(str(adapter), str(tmp_path / "miss"), to="miss").certificate.holds


def test_miss_has_linear_layers_only(tmp_path, model_folder):
    adapter = tmp_path / "adapter"
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder), config(target_modules=["embed_tokens", "q_proj"])
    )
    model.save_pretrained(adapter, save_embedding_layers=False)
    with pytest.raises(InputError, match=r"MiSS adapts Linear layers only, and model\.embed_tokens is none \(of 1 such\)"):
        bonetune.convert(str(adapter), str(tmp_path / "miss"), to="miss")


def test_a_revision_of_the_base_is_asked_for(tmp_path, adapter):
    changes = {"base_model_name_or_path": "someone/model", "revision": "v1"}
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match="is of revision v1 of someone/model: pass --base"):
        bonetune.convert(str(adapter), str(tmp_path / "lora"), to="lora")


def test_training_on_codes_is_told(tmp_path, model_folder):
    adapter = save(tmp_path / "adapter", model_folder, config("bat", target_modules=["up_proj"]))
    (adapter / "run.yaml").write_text("quantization: nf4\n")
    made = bonetune.convert(str(adapter), str(tmp_path / "lora"), to="lora", rank=32, base=str(model_folder))
    assert any("trained on nf4 weights" in note for note in made.notes)


def test_tensors_that_differ_in_a_bit_are_found(tmp_path, adapter, monkeypatch):
    from bonetune.formats import miss

    right = miss.write

    def wrong(state, path):
        right(state, path)
        tensors = load_file(path / ADAPTER)
        name = min(tensors)
        tensors[name].view(torch.int32)[0, 0] ^= 1
        save_file(tensors, path / ADAPTER)

    monkeypatch.setitem(sys.modules["bonetune.conversion.convert"]._SAME_TENSORS, "miss", wrong)
    with pytest.raises(RunError, match="NOT equal: 1 of 4 tensors differ"):
        bonetune.convert(str(adapter), str(tmp_path / "out"), to="miss")


def test_a_truncation_that_costs_too_much_says_which_rank_would_do(tmp_path, model_folder):
    adapter = save(tmp_path / "adapter", model_folder, config("bat", target_modules=["up_proj"]))

    def convert(name, **settings):
        return bonetune.convert(str(adapter), str(tmp_path / name), to="lora", base=str(model_folder), **settings)

    with pytest.raises(RunError, match=r"NOT equal within 0\.1: .* Pass --rank (8|16|32) \(error at most 0\.1 in each") as told:
        convert("lora", rank=2)
    rank = int(str(told.value).split("--rank ")[1].split()[0])
    assert convert("lora", rank=rank).certificate.holds
    assert convert("loose", rank=2, tolerance=1).certificate.holds


def test_rounding_is_told_and_what_it_cannot_hold_refused(tmp_path, adapter):
    result = bonetune.convert(str(adapter), str(tmp_path / "half"), to="peft-bone", dtype="bfloat16")
    told = next(note for note in result.notes if "rounded to bfloat16, by 0.00" in note)
    assert 5e-4 < float(told.split(" by ")[1].split()[0]) < 4e-3
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "half" / ADAPTER).values())
    assert bonetune.convert(str(tmp_path / "half"), str(tmp_path / "wide"), to="miss", dtype="float32").notes == ()
    tensors = load_file(adapter / ADAPTER)
    save_file({name: tensor * 1e6 for name, tensor in tensors.items()}, adapter / ADAPTER)
    with pytest.raises(InputError, match=r"dtype float16 does not hold the tensors of .*: they would change by (inf|nan)"):
        bonetune.convert(str(adapter), str(tmp_path / "out"), to="miss", dtype="float16")
    save_file({name: tensor * 1e-8 for name, tensor in tensors.items()}, adapter / ADAPTER)
    with pytest.raises(InputError, match=r"dtype float16 does not hold .*: they would change by 1 of their size"):
        bonetune.convert(str(adapter), str(tmp_path / "out"), to="lora", dtype="float16")


def test_nothing_that_lies_there_is_replaced_unasked(tmp_path, adapter):
    out = tmp_path / "out"
    bonetune.convert(str(adapter), str(out), to="miss")
    with pytest.raises(InputError, match="already exists: pass --overwrite"):
        bonetune.convert(str(adapter), str(out), to="lora")
    assert bonetune.convert(str(adapter), str(out), to="lora", overwrite=True).certificate.holds
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="holds something else than a converted adapter"):
        bonetune.convert(str(adapter), str(tmp_path / "mine"), to="miss", overwrite=True)
    assert left(tmp_path) == {"adapter", "out", "mine"}


def test_a_file_comes_with_its_reports_beside_it(tmp_path):
    tensors = {"blocks.0.att.key.bone_block": torch.randn(4, 24)}
    save_file(tensors, tmp_path / "bare.safetensors")
    out = tmp_path / "rwkv.pth"
    bonetune.convert(str(tmp_path / "bare.safetensors"), str(out), to="rwkv-disha", variant="bone")
    assert left(tmp_path) == {"bare.safetensors", "rwkv.pth", "rwkv.pth.conversion.json", "rwkv.pth.certificate.json"}
    bonetune.convert(str(tmp_path / "bare.safetensors"), str(out), to="rwkv-disha", variant="bone", overwrite=True)


@pytest.mark.parametrize("where", ["adapter", "adapter/inside", "link", "."])
def test_the_destination_is_not_the_source(tmp_path, adapter, where):
    (tmp_path / "link").symlink_to(adapter)
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}
    with pytest.raises(InputError, match=r"is the adapter .* itself, or one lies in the other"):
        bonetune.convert(str(adapter), str(tmp_path / where), to="miss", overwrite=True)
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == before


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"to": "safetensors"}, "Unknown format 'safetensors' to convert to: choose one of peft-bone"),
        ({"to": "miss", "read_as": "peft"}, "Unknown format 'peft' to read from"),
        ({"to": "miss", "read_as": "lora"}, "peft_type 'BONE', and lora is LORA"),
        ({"to": "miss", "variant": "bat"}, "says that it is bone, and --variant bat was passed"),
        ({"to": "miss", "rank": 4}, "rank is of a LoRA"),
        ({"to": "lora", "rank": 0}, "rank is of a LoRA, and at least 1"),
        ({"to": "lora", "rank": 4}, "rank is for the BAT variants"),
        ({"to": "miss", "tolerance": 0.1}, "tolerance is of layers or logits"),
        ({"to": "gguf-lora", "dtype": "bfloat16"}, "gguf-lora is written in float32 or float16, not in bfloat16"),
        ({"to": "gguf", "certify": "layers"}, "certify is of adapters, not for gguf"),
        ({"to": "miss", "read_as": "tensors", "variant": "bat"}, r"has adapter_config\.json beside it"),
        ({"to": "lora", "certify": "tensors"}, "is not possible for lora: choose one of auto, layers, logits"),
        ({"to": "lora", "tolerance": float("nan")}, "tolerance should be a number"),
        ({"to": "lora", "dtype": "int8"}, "Unknown dtype"),
        ({"to": "lora", "base": "nowhere/at/all"}, "does not exist"),
        ({"to": "rwkv-disha"}, r"RWKV-PEFT adapts layers like blocks\.0\.att\.key"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, adapter, settings, fault):
    with pytest.raises(InputError, match=fault) as told:
        bonetune.convert(str(adapter), str(tmp_path / "out"), **settings)
    assert "\n" not in str(told.value)
    assert left(tmp_path) == {"adapter"}


def test_a_file_without_a_configuration_does_not_say_its_variant(tmp_path, model_folder):
    adapter = save(tmp_path / "adapter", model_folder, config("bat-row", target_modules=["up_proj"]))
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="it may be bat, bat-row, bat-free, bat-left: pass --variant"):
        bonetune.convert(str(adapter), str(tmp_path / "out"), to="peft-bone")
    result = bonetune.convert(str(adapter / ADAPTER), str(tmp_path / "out"), to="peft-bone", variant="bat-row")
    assert (result.variant, result.read_as) == ("bat-row", "tensors")
    with pytest.raises(AdapterFileError, match="cannot be read as bone"):
        bonetune.convert(str(adapter), str(tmp_path / "other"), to="peft-bone", variant="bone")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"something.weight": torch.ones(2)}, "The format of .* is not clear: its tensors are called something.weight"),
        ({"a.disha": torch.ones(2, 2), "b.bone_block": torch.ones(2, 2)}, "it looks like rwkv-disha and tensors"),
    ],
)
def test_ambiguity_is_an_error_that_says_what_to_pass(tmp_path, content, fault):
    save_file(content, tmp_path / "some.safetensors")
    with pytest.raises(InputError, match=rf"{fault}.*\. Pass --from"):
        bonetune.convert(str(tmp_path / "some.safetensors"), str(tmp_path / "out"), to="peft-bone")


def test_other_methods_and_empty_folders_are_named(tmp_path, model_folder):
    with pytest.raises(InputError, match="There is no adapter at"):
        bonetune.convert(str(tmp_path / "none"), str(tmp_path / "out"), to="miss")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no adapter"):
        bonetune.convert(str(tmp_path / "empty"), str(tmp_path / "out"), to="miss")
    save(tmp_path / "lokr", model_folder, LoKrConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterFileError, match="PEFT's method LOKR"):
        bonetune.convert(str(tmp_path / "lokr"), str(tmp_path / "out"), to="miss")


def test_another_base_is_found_by_its_shapes(tmp_path, adapter):
    from conftest import llama

    llama(intermediate_size=64).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterFileError, match=r"up_proj\.?.* has shape \(4, 48\), bone needs \(4, 64\)"):
        bonetune.convert(str(adapter), str(tmp_path / "out"), to="lora", base=str(tmp_path / "other"))
    with pytest.raises(AdapterFileError, match="has shape"):
        bonetune.convert(str(adapter), str(tmp_path / "out"), to="miss", base=str(tmp_path / "other"))


def test_a_full_disk_leaves_nothing(tmp_path, adapter, monkeypatch):
    from bonetune.formats import peft_folder

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft_folder, "save_file", full)
    with pytest.raises(RunError, match=r"out could not be written \(No space left on device\): the disk has .* free"):
        bonetune.convert(str(adapter), str(tmp_path / "out"), to="miss")
    assert left(tmp_path) == {"adapter"}


@contextmanager
def no_file_longer_than(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("to", ["miss", "lora", "gguf-lora", "gguf", "rwkv-disha"])
def test_every_writer_that_finds_no_room_leaves_nothing(tmp_path, adapter, model_folder, to):
    source = {"gguf": model_folder, "rwkv-disha": tmp_path / "bare.safetensors"}.get(to, adapter)
    save_file({"blocks.0.att.key.bone_block": torch.randn(4, 24)}, tmp_path / "bare.safetensors")
    settings = {"variant": "bone"} if to == "rwkv-disha" else {}
    with no_file_longer_than(400), pytest.raises(RunError, match=r"out could not be written \(File too large\).* free"):
        bonetune.convert(str(source), str(tmp_path / "out"), to=to, **settings)
    assert left(tmp_path) == {"adapter", "bare.safetensors"}


def write(staged, text="new"):
    """A file with its reports, as a conversion leaves them."""
    staged.write_text(text)
    for name in ("conversion.json", "certificate.json", "Modelfile"):
        staged.with_name(f"{staged.name}.{name}").write_text(text)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def reject(target):
    with staging.staged_for(target) as staged:
        write(staged)
        raise staging.Rejected("the model", "another.")


def test_what_is_kept_aside_replaces_nothing_of_the_users(tmp_path):
    (tmp_path / "m.rejected").mkdir()
    (tmp_path / "m.rejected" / "thesis.txt").write_text("years")
    (tmp_path / "m.rejected-2.certificate.json").write_text("mine")
    before = contents(tmp_path)
    for _ in range(2):  # the second one replaces the first
        with pytest.raises(RunError, match=r"m was left alone and it lies at .*m\.rejected-3\. It is another\.$"):
            reject(tmp_path / "m")
    made = {f"m.rejected-3{end}": "new" for end in ("", ".conversion.json", ".certificate.json", ".Modelfile")}
    assert contents(tmp_path) == before | made


@pytest.mark.parametrize("name", ["m", "m.conversion.json", "m.certificate.json", "m.Modelfile"])
def test_what_appears_meanwhile_stays(tmp_path, name):
    def convert(**settings):
        with staging.staged_for(tmp_path / "m", **settings) as staged:
            write(staged)
            (tmp_path / name).write_text("mine")

    with pytest.raises(InputError, match=rf"There already is .*{name}: pass --overwrite"):
        convert()
    assert contents(tmp_path) == {name: "mine"}
    (tmp_path / name).unlink()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("years")
    if name != "m":
        with pytest.raises(InputError, match="m was not made by a conversion"):
            convert(overwrite=True)
        assert contents(tmp_path) == {name: "mine", "m/thesis.txt": "years"}


def test_a_modelfile_that_lies_there_stays(tmp_path, model_folder):
    (tmp_path / "m.gguf.Modelfile").write_text("FROM mine")
    with pytest.raises(InputError, match=r"m\.gguf\.Modelfile: pass --overwrite"):
        bonetune.convert(str(model_folder), str(tmp_path / "m.gguf"), to="gguf")
    assert contents(tmp_path) == {"m.gguf.Modelfile": "FROM mine"}
    bonetune.convert(str(model_folder), str(tmp_path / "m.gguf"), to="gguf", overwrite=True)
    assert (tmp_path / "m.gguf.Modelfile").read_text().startswith("FROM ./m.gguf")


@pytest.mark.parametrize("after", range(9))
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["fails", "Ctrl-C"])
def test_taking_its_place_is_all_or_nothing(tmp_path, monkeypatch, after, error):
    """Interrupted after each of the eight renames of four files that replace four."""
    right, done = Path.rename, []

    def rename(path, place):
        if len(done) == after:
            done.append(None)
            raise error
        done.append(path)
        return right(path, place)

    write(tmp_path / "m", "old")
    before = contents(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        try:
            with staging.staged_for(tmp_path / "m", overwrite=True) as staged:
                write(staged)
        except (OSError, KeyboardInterrupt):
            assert after < 8
    assert contents(tmp_path) == (dict.fromkeys(before, "new") if after == 8 else before)


def test_the_base_that_was_trained_on_stays_known(tmp_path, adapter):
    (adapter / "summary.json").write_text(json.dumps({"base_fingerprint": "abc"}))
    bonetune.convert(str(adapter), str(tmp_path / "miss"), to="miss")
    shutil.rmtree(adapter)
    (tmp_path / "miss" / "summary.json").unlink()
    bonetune.convert(str(tmp_path / "miss"), str(tmp_path / "bone"), to="peft-bone")
    assert json.loads((tmp_path / "bone" / "conversion.json").read_text())["base_fingerprint"] == "abc"


@pytest.mark.parametrize("name", ["summary.json", "conversion.json"])
@pytest.mark.parametrize("content", [b"garbage", b"\xff\xfe", b"[1]", b"", b'{"base_fingerprint": ["a"]}', b"[" * 10**5])
def test_garbage_beside_an_adapter_is_named(tmp_path, adapter, name, content):
    (adapter / name).write_bytes(content)
    with pytest.raises(
        AdapterFileError, match=rf"adapter/{name} (is not a JSON file: |should hold|has a base_fingerprint)"
    ) as told:
        bonetune.convert(str(adapter), str(tmp_path / "out"), to="miss")
    assert "\n" not in str(told.value)
    assert left(tmp_path) == {"adapter"}


def test_on_the_command_line(tmp_path, adapter, monkeypatch, capfd):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bonetune", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capfd.readouterr()

    code, out, _ = call(adapter, tmp_path / "lora", "--to", "lora")
    assert code == 0
    assert "4 layers as LoRA of rank 4" in out
    assert "equal within" in out
    code, out, _ = call(adapter, tmp_path / "json", "--to", "miss", "--json")
    assert json.loads(out)["certificate"]["holds"]
    code, out, err = call(adapter, tmp_path / "lora", "--to", "lora")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
