"""Where a merge puts its result: killed midway, beside what is another's, on links, mounts and full disks."""

import errno
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import processes
import pytest
from adapted_models import config
from conftest import llama
from merges import MERGE, assert_same_bits, merge_in_memory, save_adapter, stored
from peft import LoraConfig

import bonetune
from bonetune.errors import InputError, RunError
from bonetune.merging import staging
from bonetune.merging.staging import Staging

LAYERS = {"certify": "layers"}
REJECTED = LAYERS | {"tolerance": 1e-30}


@pytest.fixture
def adapters(tmp_path, tokenizer):
    llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("first", "second")):
        save_adapter(tmp_path / "base", tmp_path / name, config("bone"), seed)
    return str(tmp_path / "first"), str(tmp_path / "second")


class Killed(BaseException):
    pass


@contextmanager
def kill_at_rename(monkeypatch, number):
    """Within it, a merge dies just before the rename of that number, counted from 1, of whole folders."""
    rename, done = Path.rename, []

    def renamed(self, target):
        done.append(target)
        if len(done) == number:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", renamed)
        yield


def names(folder):
    return {path.name for path in folder.iterdir()} - {"base", "first", "second"}


class TestKilledBetweenTheTwoRenames:
    @pytest.fixture
    def killed(self, adapters, tmp_path, monkeypatch):
        first, second = adapters
        bonetune.merge(first, str(tmp_path / "out"), **LAYERS)
        before = stored(tmp_path / "out")
        with kill_at_rename(monkeypatch, 2), pytest.raises(Killed):
            bonetune.merge(second, str(tmp_path / "out"), overwrite=True, **LAYERS)
        assert not (tmp_path / "out").exists()
        return second, before

    @pytest.mark.parametrize("empty", [False, True])
    def test_a_rejected_rerun_brings_the_old_model_back(self, killed, tmp_path, empty):
        if empty:
            (tmp_path / "out").mkdir()
        with pytest.raises(RunError, match="is not the adapted one"):
            bonetune.merge(killed[0], str(tmp_path / "out"), overwrite=True, **REJECTED)
        assert names(tmp_path) == {"out", "out.rejected"}
        assert all((tensor == killed[1][name]).all() for name, tensor in stored(tmp_path / "out").items())

    def test_it_is_not_replaced_unasked(self, killed, tmp_path):
        with pytest.raises(InputError, match=r"already exists \(as .*\.out\.merging-old.*--overwrite"):
            bonetune.merge(killed[0], str(tmp_path / "out"), **LAYERS)

    def test_the_rerun_goes_on_and_finishes(self, killed, tmp_path, monkeypatch):
        monkeypatch.setattr("bonetune.merging.streamed._Writer", None)  # nothing is written again
        assert bonetune.merge(killed[0], str(tmp_path / "out"), overwrite=True, **LAYERS).certificate.holds
        assert names(tmp_path) == {"out"}
        assert not (tmp_path / "out" / "merging.json").exists()


def test_killed_before_the_only_rename_nothing_is_done_again(adapters, tmp_path, monkeypatch):
    with kill_at_rename(monkeypatch, 1), pytest.raises(Killed):
        bonetune.merge(adapters[0], str(tmp_path / "out"), **LAYERS)
    monkeypatch.setattr("bonetune.merging.streamed._Writer", None)
    assert bonetune.merge(adapters[0], str(tmp_path / "out"), **LAYERS).certificate.holds


class TestRejected:
    def test_what_another_put_there_stays(self, adapters, tmp_path):
        (tmp_path / "out.rejected").mkdir()
        (tmp_path / "out.rejected" / "thesis.txt").write_text("x")
        for _ in range(2):  # an older rejected one gives way
            with pytest.raises(RunError, match=r"kept as .*out\.rejected-2\."):
                bonetune.merge(adapters[0], str(tmp_path / "out"), **REJECTED)
        assert names(tmp_path) == {"out.rejected", "out.rejected-2"}
        assert (tmp_path / "out.rejected" / "thesis.txt").read_text() == "x"

    def test_neither_an_adapter_nor_a_base_model_gives_way(self, adapters, tmp_path):
        with pytest.raises(RunError):
            bonetune.merge(adapters[0], str(tmp_path / "out"), **REJECTED)
        base = str(tmp_path / "out.rejected")
        shutil.copytree(adapters[1], tmp_path / "out.rejected-2")
        (tmp_path / "out.rejected-2" / "certificate.json").write_text('{"holds": false}')
        with pytest.raises(RunError, match=r"kept as .*out\.rejected-3\."):
            bonetune.merge(adapters[1], str(tmp_path / "out"), base=base, **REJECTED)
        assert stored(tmp_path / "out.rejected")
        assert (tmp_path / "out.rejected-2" / "adapter_config.json").is_file()

    @pytest.mark.parametrize("certificate", ['{"holds": true}', "{"])
    def test_nor_a_merged_model_that_holds_or_is_unclear(self, adapters, tmp_path, certificate):
        (tmp_path / "out.rejected").mkdir()
        (tmp_path / "out.rejected" / "certificate.json").write_text(certificate)
        with pytest.raises(RunError, match=r"out\.rejected-2\."):
            bonetune.merge(adapters[0], str(tmp_path / "out"), **REJECTED)
        assert (tmp_path / "out.rejected" / "certificate.json").read_text() == certificate


def test_a_mount_point_is_refused_before_anything_is_merged(adapters, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(InputError, match=r"is a mount point, .*: choose a folder inside it"):
        bonetune.merge(adapters[0], str(tmp_path / "out"), **LAYERS)
    assert bonetune.merge(adapters[0], str(tmp_path / "out" / "inside"), **LAYERS).certificate.holds


def test_a_link_stays_and_what_it_leads_to_is_replaced(adapters, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big")
    bonetune.merge(adapters[1], str(tmp_path / "whole"), **LAYERS)
    for adapter, overwrite in ((adapters[0], False), (adapters[1], True)):
        bonetune.merge(adapter, str(tmp_path / "out"), overwrite=overwrite, **LAYERS)
        assert (tmp_path / "out").is_symlink()
        assert names(tmp_path) == {"big", "out", "whole"}
    assert_same_bits(tmp_path / "big", tmp_path / "whole")


class TestAnotherProcessPublishes:
    """Just when its folder is about to be locked."""

    @pytest.fixture(autouse=True)
    def race(self, tmp_path, monkeypatch):
        opened, done = os.open, []

        def slow(path, *arguments, **options):
            descriptor = opened(path, *arguments, **options)
            if str(path).endswith(".out.merging") and not done:
                done.append(path)
                (tmp_path / ".out.merging" / "file").write_text("theirs")
                os.rename(path, tmp_path / "out")
            return descriptor

        monkeypatch.setattr(os, "open", slow)

    def test_its_model_is_not_replaced_unasked(self, tmp_path):
        with pytest.raises(InputError, match=r"out was written meanwhile: pass --overwrite"):
            Staging(tmp_path / "out", {})
        assert {path.name for path in tmp_path.iterdir()} == {"out"}

    def test_its_folder_is_left_alone(self, tmp_path):
        ours = Staging(tmp_path / "out", {}, overwrite=True)
        assert ours.folder.is_dir()
        assert (tmp_path / "out" / "file").read_text() == "theirs"


class TestFullDisk:
    def test_in_memory_too_little_space_is_told(self, adapters, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(InputError, match=r"out needs [\d.]+ MiB, and its disk has 0.0 MiB free"):
            merge_in_memory(monkeypatch, adapters[0], str(tmp_path / "out"))
        assert names(tmp_path) == set()

    def test_in_memory_what_a_library_says_of_it_is_understood(self, adapters, tmp_path):
        save_adapter(tmp_path / "base", tmp_path / "lora", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        process = processes.start(processes.merge_when_the_disk_is_full, str(tmp_path / "lora"), str(tmp_path / "out"))
        process.join(120)
        assert process.exitcode == 1
        assert names(tmp_path) == {"lora"}

    def test_the_certificate(self, adapters, tmp_path, monkeypatch):
        write_json = staging.write_json

        def full(path, content):
            if path.name == "certificate.json":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_json(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(MERGE, "write_json", full)
            with pytest.raises(RunError, match=r"No space left .* were needed"):
                bonetune.merge(adapters[0], str(tmp_path / "out"), **LAYERS)
        assert bonetune.merge(adapters[0], str(tmp_path / "out"), **LAYERS).certificate.holds

    def test_other_errors_stay_what_they_are(self, tmp_path):
        ours = Staging(tmp_path / "out", {})
        for error in (ValueError("no space"), OSError(errno.EIO, "broken"), Exception("os error 5")):
            with pytest.raises(type(error), match=str(error).replace("[", r"\[")), ours.saying_what_is_full():
                raise error
