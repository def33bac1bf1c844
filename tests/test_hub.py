"""`push` and `pull` against a stand-in for the hub's HTTP interface, through huggingface_hub itself."""

import hashlib
import json
import shutil
import sys

import huggingface_hub.constants
import pytest
import torch
import yaml
from conftest import llama
from hub_stand_in import READER, WRITER, hub_stand_in
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bonetune
from bonetune import BoneConfig, InputError
from bonetune_cli.main import main

BASE = "someone/tiny-llama"
# of how huggingface_hub itself uploads large files without xet
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the stand-in keeps large files the older way
    monkeypatch.setenv("HF_TOKEN", WRITER)
    with hub_stand_in() as standing_in:
        yield standing_in


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    torch.manual_seed(0)
    model = get_peft_model(llama(), BoneConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "bone_block" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()  # PEFT's form to be filled in
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": BASE}, indent=2))
    return folder


@pytest.fixture
def run(tmp_path, model_folder):
    rows = [{"prompt": "the quick", "completion": " fox"}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model_name_or_path": str(model_folder), "dataset_name": str(tmp_path / "rows.jsonl"), "r": 4, "max_steps": 2}
    bonetune.train(settings | {"output_dir": str(tmp_path / "run"), "save_steps": 1, "rehearsal": False})
    return tmp_path / "run"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def certify(folder, holds=True):
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents(folder).items()}
    (folder / "certificate.json").write_text(json.dumps({"method": "tensors", "holds": holds, "files": files}))


class TestThereAndBack:
    def test_every_byte_of_an_adapter(self, hub, adapter, tmp_path):
        certify(adapter)
        pushed = bonetune.push(str(adapter), "me/first", endpoint=hub.address)
        assert pushed.url == f"{hub.address}/me/first"
        pulled = bonetune.pull("me/first", str(tmp_path / "again"), endpoint=hub.address)
        again = contents(tmp_path / "again")
        card = yaml.safe_load(again.pop("README.md").decode().split("---\n")[1])
        assert again == contents(adapter)
        assert card["base_model"] == BASE
        assert card["library_name"] == "peft"
        assert (pulled.kind, pulled.holds, pulled.commit) == ("adapter", True, pushed.commit)
        assert set(pulled.certified) == {"adapter_config.json", "adapter_model.safetensors"}
        assert set(pulled.files) == set(pushed.files)

    def test_a_model_in_several_files(self, hub, tmp_path, tokenizer):
        llama().save_pretrained(tmp_path / "merged", max_shard_size="50KB")
        tokenizer.save_pretrained(tmp_path / "merged")
        assert len([*(tmp_path / "merged").glob("*.safetensors")]) > 1
        bonetune.push(str(tmp_path / "merged"), "me/merged", endpoint=hub.address)
        bonetune.pull("me/merged", str(tmp_path / "again"), endpoint=hub.address)
        ids = torch.arange(8)[None]
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        torch.testing.assert_close(again(ids).logits, llama()(ids).logits)
        assert contents(tmp_path / "merged").items() <= contents(tmp_path / "again").items()

    def test_a_gguf_file_with_its_certificate(self, hub, tmp_path):
        (tmp_path / "gguf").mkdir()
        (tmp_path / "gguf" / "maths.gguf").write_bytes(b"GGUF" + bytes(100))
        certify(tmp_path / "gguf")
        (tmp_path / "gguf" / "certificate.json").rename(tmp_path / "gguf" / "maths.gguf.certificate.json")
        (tmp_path / "gguf" / "maths.gguf.Modelfile").write_text("FROM ./maths.gguf\n")
        (tmp_path / "gguf" / "Modelfile").write_text("FROM ./maths.gguf\n")
        bonetune.push(str(tmp_path / "gguf"), "me/gguf", endpoint=hub.address)
        pulled = bonetune.pull("me/gguf", str(tmp_path / "again"), endpoint=hub.address)
        assert (pulled.kind, pulled.certified) == ("gguf", ("maths.gguf",))
        assert contents(tmp_path / "gguf").items() <= contents(tmp_path / "again").items()

    def test_what_was_converted(self, hub, adapter, model_folder, tmp_path):
        bonetune.convert(str(adapter), str(tmp_path / "lora"), to="lora", base=str(model_folder))
        bonetune.push(str(tmp_path / "lora"), "me/lora", base_model_id="someone/base", endpoint=hub.address)
        pulled = bonetune.pull("me/lora", str(tmp_path / "again"), endpoint=hub.address)
        assert pulled.holds
        assert "adapter_model.safetensors" in pulled.certified
        assert str(tmp_path) not in (tmp_path / "again" / "conversion.json").read_text()
        got, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "lora"))
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())

    def test_a_gguf_file_s_reports_do_not_tell_where_it_was_made(self, hub, adapter, model_folder, tmp_path):
        (tmp_path / "out").mkdir()
        bonetune.convert(str(adapter), str(tmp_path / "out" / "a.gguf"), to="gguf-lora", base=str(model_folder))
        assert str(adapter) in (tmp_path / "out" / "a.gguf.conversion.json").read_text()
        bonetune.push(str(tmp_path / "out"), "me/gguf", endpoint=hub.address)
        pulled = bonetune.pull("me/gguf", str(tmp_path / "again"), endpoint=hub.address)
        assert pulled.holds
        told = "".join(file.read_text() for file in (tmp_path / "again").glob("*.json"))
        assert "me/gguf" not in told
        assert str(tmp_path) not in told
        assert str(model_folder) not in told

    def test_by_the_command_line(self, hub, adapter, tmp_path, monkeypatch, capfd):
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):  # HF_ENDPOINT is read when huggingface_hub is imported
            now = getattr(huggingface_hub.constants, name).replace(huggingface_hub.constants._HF_DEFAULT_ENDPOINT, hub.address)
            monkeypatch.setattr(huggingface_hub.constants, name, now)

        def call(*arguments):
            monkeypatch.setattr(sys, "argv", ["bonetune", *map(str, arguments)])
            with pytest.raises(SystemExit) as stop:
                main()
            return stop.value.code or 0, capfd.readouterr()

        code, said = call("push", adapter, "me/first", "--private")
        assert code == 0, said.err
        assert f"{hub.address}/me/first: 3 files" in said.out
        assert hub.repositories["me/first"].private
        assert "deleted" not in said.out
        hub.repositories["me/first"].commit("main", {"adapter_model-1.safetensors": b"old"})
        code, said = call("push", adapter, "me/first")
        assert "deleted, of an earlier push: adapter_model-1.safetensors" in said.out
        code, said = call("pull", "me/first", tmp_path / "again", "--json")
        assert code == 0, said.err
        assert json.loads(said.out)["holds"] is None
        assert contents(adapter).items() <= contents(tmp_path / "again").items()
        code, said = call("pull", "me/first", tmp_path / "again")
        assert code == 2
        assert "--overwrite" in said.err


class TestPush:
    def test_a_run_leaves_at_home_what_is_private(self, hub, run, model_folder, tmp_path):
        with pytest.raises(InputError, match="--base-model-id"):
            bonetune.push(str(run), "me/run", endpoint=hub.address)
        assert not hub.repositories
        pushed = bonetune.push(str(run), "me/run", base_model_id=BASE, endpoint=hub.address)
        there = hub.repositories["me/run"].branches["main"]
        private = {"run.yaml", "prompts.jsonl", "samples.jsonl", "metrics.jsonl", "environment.json", "report.html", "loss.png"}
        assert not private & there.keys()
        assert not any("checkpoint" in name for name in there)
        assert private | {"checkpoint-1/", "checkpoint-2/"} <= set(pushed.left_out)
        assert {
            "README.md",
            "summary.json",
            "adapter_config.json",
            "adapter_model.safetensors",
            "tokenizer.json",
        } <= there.keys()
        texts = {name: content.decode() for name, content in there.items() if name.endswith((".md", ".json"))}
        for path in (tmp_path, model_folder):
            spellings = str(path), str(path).replace("_", "\\_")
            assert not [name for name, text in texts.items() for spelling in spellings if spelling in text]
        assert "rows.jsonl" in texts["README.md"]
        assert json.loads(texts["adapter_config.json"])["base_model_name_or_path"] == BASE
        assert yaml.safe_load(texts["README.md"].split("---\n")[1])["base_model"] == BASE
        assert str(model_folder) in (run / "adapter_config.json").read_text()  # its own copy is as it was

    def test_a_run_is_published_when_asked_for(self, hub, run, tmp_path):
        bonetune.push(str(run), "me/run", base_model_id=BASE, include_run=True, endpoint=hub.address)
        pulled = bonetune.pull("me/run", str(tmp_path / "again"), endpoint=hub.address)
        assert "run.yaml" in pulled.left_out
        bonetune.pull("me/run", str(tmp_path / "all"), include_run=True, endpoint=hub.address)
        for name in ("run.yaml", "prompts.jsonl", "samples.jsonl"):
            assert (tmp_path / "all" / name).read_bytes() == (run / name).read_bytes()

    def test_the_hashes_follow_what_was_rewritten(self, hub, run, tmp_path):
        certify(run)
        bonetune.push(str(run), "me/run", base_model_id=BASE, endpoint=hub.address)
        pulled = bonetune.pull("me/run", str(tmp_path / "again"), endpoint=hub.address)
        assert {"adapter_config.json", "summary.json", "README.md", "adapter_model.safetensors"} <= set(pulled.certified)

    def test_private(self, hub, adapter, tmp_path):
        bonetune.push(str(adapter), "me/first", private=True, endpoint=hub.address)
        assert hub.repositories["me/first"].private
        bonetune.push(str(adapter), "me/second", endpoint=hub.address)
        before = len(hub.repositories["me/second"].commits)
        with pytest.raises(InputError, match="exists and is public"):
            bonetune.push(str(adapter), "me/second", private=True, endpoint=hub.address)
        assert len(hub.repositories["me/second"].commits) == before

    def test_again_is_one_commit_that_updates(self, hub, tmp_path):
        llama().save_pretrained(tmp_path / "merged", max_shard_size="50KB")
        bonetune.push(str(tmp_path / "merged"), "me/merged", endpoint=hub.address)
        repository = hub.repositories["me/merged"]
        repository.commit("main", {"notes.txt": b"mine"})
        before = len(repository.commits)
        shutil.rmtree(tmp_path / "merged")
        llama(num_hidden_layers=1).save_pretrained(tmp_path / "merged")
        shards = {name for name in repository.branches["main"] if "safetensors" in name}
        pushed = bonetune.push(str(tmp_path / "merged"), "me/merged", message="one layer", endpoint=hub.address)
        assert len(repository.commits) == before + 1
        assert set(pushed.deleted) == shards
        there = repository.branches["main"]
        assert {name for name in there if "safetensors" in name} == {"model.safetensors"}
        assert there["notes.txt"] == b"mine"

    def test_weights_of_another_kind_stay(self, hub, adapter):
        theirs = {"config.json": b"{}", "model.safetensors": b"years", "model.safetensors.index.json": b"{}"}
        stale = {"adapter_model-00001-of-00002.safetensors": b"old"}
        hub.add("me/model", theirs | stale | {"model/model.safetensors": b"sub"})
        pushed = bonetune.push(str(adapter), "me/model", endpoint=hub.address)
        there = hub.repositories["me/model"].branches["main"]
        assert pushed.deleted == tuple(stale)
        assert not stale.keys() & there.keys()
        assert theirs.items() <= there.items()
        assert "model/model.safetensors" in there

    def test_to_a_branch(self, hub, adapter, tmp_path):
        pushed = bonetune.push(str(adapter), "me/first", revision="v2", endpoint=hub.address)
        assert pushed.url.endswith("me/first/tree/v2")
        assert "adapter_config.json" not in hub.repositories["me/first"].branches["main"]
        bonetune.pull("me/first", str(tmp_path / "again"), revision="v2", endpoint=hub.address)
        with pytest.raises(InputError, match="no such revision"):
            bonetune.pull("me/first", str(tmp_path / "other"), revision="v3", endpoint=hub.address)

    def test_pefts_own_card_loses_its_paths(self, hub, adapter, model_folder):
        path = str(model_folder)
        (adapter / "README.md").write_text(f"---\nbase_model: {path}\ntags:\n- base_model:adapter:{path}\n---\n\n# Mine\n")
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": path}))
        bonetune.push(str(adapter), "me/first", base_model_id=BASE, endpoint=hub.address)
        card = hub.repositories["me/first"].branches["main"]["README.md"].decode()
        assert card == f"---\nbase_model: {BASE}\ntags:\n- base_model:adapter:{BASE}\n---\n\n# Mine\n"

    def test_a_home_that_is_the_root_changes_no_other_slash(self, hub, adapter, monkeypatch):
        monkeypatch.setenv("HOME", "/")
        (adapter / "README.md").write_text(f"---\nbase_model: {BASE}\n---\n\nhttps://arxiv.org/abs/2409.15371 and/or a/b\n")
        assert bonetune.push(str(adapter), "me/first", endpoint=hub.address).rewritten == ()

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda folder: (folder / "adapter_model.safetensors").unlink(), "holds no adapter"),
            (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), "pickles are not"),
            (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"torn"), "not a whole safetensors"),
            (lambda folder: certify(folder, holds=False), "does not hold"),
            (lambda folder: (certify(folder), (folder / "adapter_config.json").write_text("{}")), "changed since"),
            (lambda folder: (folder / "adapter_config.json").write_text("{"), "not a JSON file"),
            (lambda folder: (folder / "README.md").write_text("---\n: [\n---\n"), "no YAML"),
            (lambda folder: (folder / "README.md").write_bytes(b"\xff"), "no text in UTF-8"),
            (lambda folder: shutil.rmtree(folder), "no folder"),
        ],
    )
    def test_what_is_not_whole_stays_here(self, hub, adapter, spoil, message):
        spoil(adapter)
        with pytest.raises(InputError, match=message):
            bonetune.push(str(adapter), "me/first", endpoint=hub.address)
        assert not hub.repositories


class TestPull:
    @pytest.fixture
    def safe(self, adapter):
        return contents(adapter)

    @pytest.mark.parametrize(
        "name", ["../e.json", "a/../../e.json", "/etc/e.json", "..\\e.json", "C:/e.json", "a//e.json", ".git/e.json"]
    )
    def test_names_that_lead_elsewhere(self, hub, safe, tmp_path, name):
        hub.add("evil/names", safe | {name: b"{}"})
        before = contents(tmp_path)
        with pytest.raises(InputError, match="outside its folder"):
            bonetune.pull("evil/names", str(tmp_path / "again"), endpoint=hub.address)
        assert contents(tmp_path) == before

    def test_a_commit_that_leads_elsewhere(self, hub, safe, tmp_path):
        hub.add("evil/commit", safe)
        hub.claims_sha = "../../../evil"
        with pytest.raises(InputError, match="for a commit"):
            bonetune.pull("evil/commit", str(tmp_path / "again"), endpoint=hub.address)
        assert not (tmp_path / "again").exists()

    def test_nothing_that_can_run_is_fetched(self, hub, safe, tmp_path):
        names = ("modeling_evil.py", "pytorch_model.bin", "sub/rwkv.pth", "run.sh", "run.yaml", "a.pkl", "b.so", "c.html")
        risky = dict.fromkeys(names, b"boom")
        hub.add("evil/code", safe | risky | {"sub/notes.txt": b"fine"})
        pulled = bonetune.pull("evil/code", str(tmp_path / "again"), endpoint=hub.address)
        assert set(pulled.left_out) == set(risky)
        assert contents(tmp_path / "again") == safe | {"sub/notes.txt": b"fine"}
        hub.add("evil/pickle", {"config.json": b"{}", "pytorch_model.bin": b"boom"})
        with pytest.raises(InputError, match=r"safe to load.*pytorch_model\.bin"):
            bonetune.pull("evil/pickle", str(tmp_path / "pickle"), endpoint=hub.address)
        assert not (tmp_path / "pickle").exists()

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
    @pytest.mark.parametrize("way", ["other bytes", "longer", "broken off"])
    def test_what_is_torn_leaves_nothing(self, hub, safe, tmp_path, monkeypatch, name, way):
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
        hub.add("me/torn", safe)
        if way == "broken off":
            hub.breaks_off.add(name)
        else:
            hub.sends[name] = bytes(len(safe[name]) + (way == "longer"))
        before = contents(tmp_path)
        with pytest.raises(InputError, match="Repository 'me/torn'"):
            bonetune.pull("me/torn", str(tmp_path / "again"), endpoint=hub.address)
        assert contents(tmp_path) == before
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".again")]

    def test_what_changed_after_it_was_certified(self, hub, adapter, tmp_path):
        certify(adapter)
        files = contents(adapter)
        save_file({"base_model.model.x.bone_block": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
        hub.add("evil/changed", files | {"adapter_model.safetensors": (tmp_path / "other.safetensors").read_bytes()})
        with pytest.raises(InputError, match=r"adapter_model\.safetensors changed after being certified"):
            bonetune.pull("evil/changed", str(tmp_path / "again"), endpoint=hub.address)
        assert not (tmp_path / "again").exists()

    def test_only_an_artifact_is_replaced(self, hub, safe, run, tmp_path):
        hub.add("me/first", safe)
        bonetune.pull("me/first", str(tmp_path / "again"), endpoint=hub.address)
        with pytest.raises(InputError, match="--overwrite"):
            bonetune.pull("me/first", str(tmp_path / "again"), endpoint=hub.address)
        hub.repositories["me/first"].commit("main", {"LICENSE": b"do"})
        bonetune.pull("me/first", str(tmp_path / "again"), overwrite=True, endpoint=hub.address)
        assert (tmp_path / "again" / "LICENSE").read_bytes() == b"do"
        before = contents(run)
        with pytest.raises(InputError, match="something else than an artifact"):
            bonetune.pull("me/first", str(run), overwrite=True, endpoint=hub.address)
        assert contents(run) == before

    def test_texts_of_the_users_stay(self, hub, safe, tmp_path):
        stale = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "vocab.txt": b"old"}
        hub.add("me/first", safe | stale | {"notes.txt": b"theirs"})
        bonetune.pull("me/first", str(tmp_path / "again"), endpoint=hub.address)
        mine = {"train.json": b"[1]", "thoughts.md": b"mine"}
        for name, content in (mine | {"notes.txt": b"mine", "adapter_config.json": b"{}"}).items():
            (tmp_path / "again" / name).write_bytes(content)
        hub.repositories["me/first"].commit("main", dict.fromkeys(stale))
        bonetune.pull("me/first", str(tmp_path / "again"), overwrite=True, endpoint=hub.address)
        assert contents(tmp_path / "again") == safe | mine | {"notes.txt": b"theirs"}

    def test_a_failed_pull_leaves_what_was_there(self, hub, safe, tmp_path):
        hub.add("me/first", safe)
        bonetune.pull("me/first", str(tmp_path / "again"), endpoint=hub.address)
        hub.sends["adapter_config.json"] = b"{}"
        before = contents(tmp_path / "again")
        with pytest.raises(InputError):
            bonetune.pull("me/first", str(tmp_path / "again"), overwrite=True, endpoint=hub.address)
        assert contents(tmp_path / "again") == before


class TestRefusals:
    def test_who_may_what(self, hub, adapter, tmp_path, monkeypatch):
        hub.add("you/private", contents(adapter), private=True)
        hub.add("you/gated", contents(adapter), gated=True)
        monkeypatch.setenv("HF_TOKEN", READER)
        with pytest.raises(InputError, match=r"403|may write there"):
            bonetune.push(str(adapter), "me/first", endpoint=hub.address)
        with pytest.raises(InputError, match="gated: ask for access"):
            bonetune.pull("you/gated", str(tmp_path / "again"), endpoint=hub.address)
        with pytest.raises(InputError, match="none of that name"):
            bonetune.pull("you/nothing", str(tmp_path / "again"), endpoint=hub.address)
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        with pytest.raises(InputError, match="hf auth login"):
            bonetune.pull("you/private", str(tmp_path / "again"), endpoint=hub.address)
        with pytest.raises(InputError, match="hf auth login"):
            bonetune.push(str(adapter), "me/first", endpoint=hub.address)

    @pytest.mark.parametrize(
        ("status", "message"), [(401, "hf auth login"), (403, "HF_TOKEN"), (413, "too large"), (418, "418")]
    )
    def test_what_a_hub_may_answer(self, hub, adapter, tmp_path, status, message):
        hub.refuses_with = status
        for attempt in (
            lambda: bonetune.push(str(adapter), "me/first", endpoint=hub.address),
            lambda: bonetune.pull("me/first", str(tmp_path / "again"), endpoint=hub.address),
        ):
            with pytest.raises(InputError, match=message):
                attempt()

    def test_no_connection(self, hub, adapter, tmp_path, monkeypatch):
        nobody = "http://127.0.0.1:9"
        for attempt in (
            lambda: bonetune.push(str(adapter), "me/first", endpoint=nobody),
            lambda: bonetune.pull("me/first", str(tmp_path / "again"), endpoint=nobody),
        ):
            with pytest.raises(InputError, match="cannot be reached"):
                attempt()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
            bonetune.pull("me/first", str(tmp_path / "again"), endpoint=hub.address)

    @pytest.mark.parametrize("name", ["a/b/c", "../me", "me/a b", ""])
    def test_a_name_that_is_none(self, hub, adapter, tmp_path, name):
        with pytest.raises(InputError, match="Repository"):
            bonetune.push(str(adapter), name, endpoint=hub.address)
        with pytest.raises(InputError, match="Repository"):
            bonetune.pull(name, str(tmp_path / "again"), endpoint=hub.address)

    def test_a_server_that_is_no_hub(self, hub, tmp_path, monkeypatch):
        monkeypatch.setattr("hub_stand_in.Handler.read", lambda self, path, body: self.send(200, b"<html>Welcome</html>"))
        with pytest.raises(InputError, match="Repository 'me/first'"):
            bonetune.pull("me/first", str(tmp_path / "again"), endpoint=hub.address)
