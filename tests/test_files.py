import json

import pytest

from bonetune.files import folder_written_beside, read_json_lines, write_json, write_json_lines, write_text


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "out"

    def fail_halfway():
        with folder_written_beside(target) as beside:
            (beside / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert list((tmp_path / "deep").iterdir()) == []
    with folder_written_beside(target) as beside:
        (beside / "a").write_text("whole")
        assert not target.exists()
    assert (target / "a").read_text() == "whole"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_files_move_into_a_folder_that_exists_and_others_stay(tmp_path):
    (tmp_path / "old").write_text("stays")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "stale").write_text("goes")
    with folder_written_beside(tmp_path) as beside:
        (beside / "new").write_text("n")
        (beside / "sub").mkdir()
        (beside / "sub" / "fresh").write_text("f")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["new", "old", "sub", "sub/fresh"]


def test_text_is_replaced_in_one_step(tmp_path):
    write_text(tmp_path / "sub" / "a", "one")
    write_text(tmp_path / "sub" / "a", "two")
    assert (tmp_path / "sub" / "a").read_text() == "two"
    write_json_lines(tmp_path / "sub" / "b", [{"ä": 1}, "x"])
    assert [json.loads(line) for line in (tmp_path / "sub" / "b").read_text().splitlines()] == [{"ä": 1}, "x"]
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["a", "b"]


@pytest.mark.parametrize("half", ["\ud83d", "a\udfff\ud800b", "\\\ud83d\\", '"\ud83d"'])
def test_half_a_surrogate_pair_comes_back_and_other_text_stays_readable(half, tmp_path):
    rows = [{"output": f"ä {half} \U0001f600", half: [half]}, "ö"]
    write_json_lines(tmp_path / "rows", rows)
    write_json(tmp_path / "all", rows)
    assert read_json_lines(tmp_path / "rows") == json.loads((tmp_path / "all").read_text(encoding="utf-8")) == rows
    for name in ("rows", "all"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert all(sign in text for sign in "äö\U0001f600")
