import json

import pytest

from bonetune.errors import InputError
from bonetune.evaluation.ledger import Ledger, Shelf
from bonetune.evaluation.result import TaskResult


def test_records_come_back_in_order_and_a_torn_line_is_made_again(tmp_path):
    file, told = tmp_path / "task.jsonl", []
    Ledger(3, file=file).add([{"row": 3, "correct": True}, {"row": 1, "correct": False}])
    with file.open("a") as torn:
        torn.write('{"row": 2, "cor')
    again = Ledger(3, lambda done, total: told.append((done, total)), file)
    assert set(again.records) == {1, 3}
    again.add([{"row": 2, "correct": True}])
    assert [record["row"] for record in again.ordered] == [1, 2, 3]
    assert told == [(2, 3), (3, 3)]
    assert [json.loads(line)["row"] for line in file.read_text().splitlines()] == [3, 1, 2]


def shelf(folder, **identity):
    return Shelf(folder, "gsm8k:strict", {"model": "m", "prompts": ("a", "b")} | identity)


def test_a_result_is_read_back_as_it_was(tmp_path):
    place = shelf(tmp_path)
    place.claim(resume=False, overwrite=False)
    place.open()
    assert place.result is None
    result = TaskResult("gsm8k:strict", 0.5, (0.1, 0.9), 2, [{"row": 1, "correct": True}], {"x": 1.0}, "in words", False)
    place.close(result)
    assert shelf(tmp_path).result == result
    assert (tmp_path / "gsm8k-strict.jsonl").is_file()


def test_half_a_surrogate_pair_in_an_answer_is_kept(tmp_path):
    """A model's or a judge's text may hold one, which UTF-8 cannot."""
    record, place = {"row": 1, "output": "ä \ud83d", "correct": False}, shelf(tmp_path, judge="\udc80")
    place.open()
    Ledger(1, file=place.records).add([record])
    assert Ledger(1, file=place.records).ordered == [record]
    result = TaskResult("gsm8k:strict", 0.0, (0.0, 0.9), 1, [record], {}, "in \ud83d words")
    place.close(result)
    assert shelf(tmp_path, judge="\udc80").result == result
    shelf(tmp_path, judge="\udc80").claim(resume=True, overwrite=False)


def test_what_is_there_is_not_lost_by_mistake(tmp_path):
    place = shelf(tmp_path)
    place.open()
    Ledger(2, file=place.records).add([{"row": 1}])
    with pytest.raises(InputError, match="holds records already: pass --resume or --overwrite"):
        shelf(tmp_path).claim(resume=False, overwrite=False)
    with pytest.raises(InputError, match=r"made with other settings \(model \('m', now 'other'\)\): pass --overwrite"):
        shelf(tmp_path, model="other").claim(resume=True, overwrite=False)
    shelf(tmp_path).claim(resume=True, overwrite=False)
    assert place.records.is_file()
    shelf(tmp_path, model="other").claim(resume=False, overwrite=True)
    assert not place.records.exists()


def test_what_is_made_twice_is_kept_and_counted_once(tmp_path):
    """A batch of four of which three were written: all of it is made again."""
    file, told = tmp_path / "task.jsonl", []
    batch = [{"row": row, "output": str(row)} for row in range(1, 5)]
    file.write_text("".join(json.dumps(record) + "\n" for record in [*batch[:3], batch[0]]) + '{"row": 4, "out')
    again = Ledger(4, lambda done, total: told.append((done, total)), file)
    again.add(batch)
    assert told == [(3, 4), (4, 4)]
    assert [json.loads(line) for line in file.read_text().splitlines()] == batch == again.ordered
