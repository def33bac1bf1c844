import json
import shutil

import pytest

from bonetune.errors import RunError
from bonetune.training import checkpoints


@pytest.fixture
def written(tmp_path):
    """A function that publishes a checkpoint of some step."""

    def write(step):
        staged = checkpoints.staging(tmp_path) / f"checkpoint-{step}"
        (staged / "deeper").mkdir(parents=True)
        (staged / "weights.bin").write_bytes(bytes(range(256)) * 10)
        (staged / "deeper" / "state.json").write_text(json.dumps({"step": step}))
        return checkpoints.publish(staged, tmp_path)

    return write


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "lacks weights.bin": lambda c: (c / "weights.bin").unlink(),
    "has 2,559 bytes of 2,560 in weights.bin": lambda c: truncated(c / "weights.bin"),
    "has other bytes in weights.bin": lambda c: flipped(c / "weights.bin"),
    "lacks deeper/state.json": lambda c: shutil.rmtree(c / "deeper"),
    "has no checksums.json": lambda c: (c / "checksums.json").unlink(),
    "has an unreadable checksums.json": lambda c: truncated(c / "checksums.json") or truncated(c / "checksums.json"),
}


def test_what_is_published_is_whole(tmp_path, written):
    place = written(3)
    assert place == tmp_path / "checkpoint-3"
    assert checkpoints.damage(place) is None
    assert checkpoints.last_good(tmp_path) == (place, [])


@pytest.mark.parametrize("words", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, written, words):
    older, newer = written(9), written(10)
    DAMAGES[words](newer)
    found, said = checkpoints.last_good(tmp_path)
    assert found == older
    assert len(said) == 1
    assert words in said[0]
    assert "checkpoint-10" in said[0]


def test_no_good_checkpoint(tmp_path, written):
    truncated(written(1) / "weights.bin")
    found, said = checkpoints.last_good(tmp_path)
    assert found is None
    assert len(said) == 1


def test_the_newest_are_kept_by_number_not_by_name(tmp_path, written):
    for step in (2, 10, 9, 100):
        written(step)
    (tmp_path / "checkpoint-best").mkdir()
    checkpoints.rotate(tmp_path, 2)
    assert [c.name for c in checkpoints.checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    assert (tmp_path / "checkpoint-best").is_dir()


def test_publishing_again_replaces(tmp_path, written):
    flipped(written(4) / "weights.bin")
    assert checkpoints.damage(written(4)) is None


def test_what_a_killed_process_left_is_swept_up(tmp_path, written):
    written(1)
    (checkpoints.staging(tmp_path) / "checkpoint-2").mkdir(parents=True)
    (tmp_path / ".old-checkpoint-0").mkdir()
    checkpoints.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_too_small_a_disk_is_one_sentence(tmp_path):
    checkpoints.check_space(tmp_path, 1, "a byte")
    with pytest.raises(RunError, match=r"GB free and its checkpoints needs .* lower\s+save_total_limit"):
        checkpoints.check_space(tmp_path, 1 << 62, "its checkpoints")
