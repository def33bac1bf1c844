"""Merges that were killed, or ran out of space, and are called again."""

import json
import os
import random
import shutil

import processes
import pytest
from adapted_models import config
from conftest import llama
from merges import assert_same_bits, save_adapter

import bonetune
from bonetune.errors import InputError
from bonetune.merging.plan import make_plan, read_states
from bonetune.merging.staging import Staging

LAYERS = {"certify": "layers"}


@pytest.fixture
def adapter(tmp_path, tokenizer):
    llama(num_hidden_layers=3).save_pretrained(tmp_path / "base", max_shard_size="30KB")
    tokenizer.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter", config("bat"))
    return str(tmp_path / "adapter")


def killed(adapter, output, writes, **options):
    """Let a merge be killed; its staging folder, and what identifies each file that it had finished."""
    process = processes.start(processes.merge_until_killed, adapter, str(output), writes, LAYERS | options)
    process.join(120)
    assert process.exitcode == -9
    assert not output.exists()
    staging = output.with_name(f".{output.name}.merging")
    found = {path.name: path.stat() for path in staging.glob("*.safetensors") if not path.name.startswith(".")}
    return staging, {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def identities(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("writes", [1, 6, 12, 17, 21])
def test_killed_anywhere_it_goes_on(adapter, tmp_path, writes):
    bonetune.merge(adapter, str(tmp_path / "whole"), **LAYERS)
    staging, finished = killed(adapter, tmp_path / "out", writes)
    assert finished or writes < 10
    result = bonetune.merge(adapter, str(tmp_path / "out"), **LAYERS)
    assert result.certificate.holds
    assert_same_bits(tmp_path / "out", tmp_path / "whole")
    assert not staging.exists()
    # the last one that was written may not have been noted yet
    kept = finished.items() & identities(tmp_path / "out").items()
    assert len(kept) >= len(finished) - 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_with_other_arguments_it_starts_afresh(adapter, tmp_path):
    bonetune.merge(adapter, str(tmp_path / "whole"), scale=0.5, **LAYERS)
    _, finished = killed(adapter, tmp_path / "out", random.Random(0).randrange(12, 21))
    bonetune.merge(adapter, str(tmp_path / "out"), scale=0.5, **LAYERS)
    assert_same_bits(tmp_path / "out", tmp_path / "whole")
    assert not finished.items() & identities(tmp_path / "out").items()


def test_a_finished_file_that_was_changed_is_made_again(adapter, tmp_path):
    bonetune.merge(adapter, str(tmp_path / "whole"), **LAYERS)
    staging, finished = killed(adapter, tmp_path / "out", 21)
    for name in finished:
        content = bytearray((staging / name).read_bytes())
        content[-3] ^= 1
        (staging / name).write_bytes(content)
    bonetune.merge(adapter, str(tmp_path / "out"), **LAYERS)
    assert_same_bits(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("journal", ["{", "[]", '{"identity": 1}', None])
def test_a_journal_that_cannot_be_read_is_no_journal(adapter, tmp_path, journal):
    staging, _ = killed(adapter, tmp_path / "out", 12)
    if journal is None:
        (staging / "merging.json").unlink()
        (staging / "folder").mkdir()
    else:
        (staging / "merging.json").write_text(journal)
    assert bonetune.merge(adapter, str(tmp_path / "out"), **LAYERS).certificate.holds
    assert not (tmp_path / "out" / "folder").exists()


def test_two_at_a_time_are_refused(adapter, tmp_path):
    first = Staging(tmp_path / "out", {})
    with pytest.raises(InputError, match=r"Another process is merging into .*out"):
        bonetune.merge(adapter, str(tmp_path / "out"), **LAYERS)
    first.close()
    assert bonetune.merge(adapter, str(tmp_path / "out"), **LAYERS).certificate.holds


def test_a_link_in_the_place_of_the_staging_folder_is_not_followed(adapter, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("")
    (tmp_path / ".out.merging").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match=r"\.out\.merging is where .*out would be made"):
        bonetune.merge(adapter, str(tmp_path / "out"), **LAYERS)
    assert (tmp_path / "precious" / "file").exists()


def test_a_disk_that_is_full_is_told_and_the_next_try_goes_on(adapter, tmp_path):
    process = processes.start(processes.merge_until_the_disk_is_full, adapter, str(tmp_path / "out"))
    process.join(120)
    assert process.exitcode == 1
    assert not (tmp_path / "out").exists()
    finished = identities(tmp_path / ".out.merging")
    assert finished
    assert bonetune.merge(adapter, str(tmp_path / "out"), **LAYERS).certificate.holds
    assert finished.items() & identities(tmp_path / "out").items()


def test_too_little_space_is_told_before_anything_is_written(adapter, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"out needs [\d.]+ MiB, and its disk has 0.0 MiB free"):
        bonetune.merge(adapter, str(tmp_path / "out"), **LAYERS)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_the_base_models_files_are_known_by_their_time_too(adapter, tmp_path):
    """So that files of two states of a base model never meet in one merge."""

    def identity():
        return make_plan(read_states([adapter]), str(tmp_path / "base"), [1.0], None).identity

    before = identity()
    assert before == identity() == json.loads(json.dumps(before))
    file = next((tmp_path / "base").glob("*.safetensors"))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert identity() != before
