"""Reading merged files back, a few rows at a time."""

import sys

import pytest
from adapted_models import config
from conftest import llama
from merges import save_adapter

import bonetune
from bonetune import VARIANTS

CHECKED = sys.modules["bonetune.merging.checked"]
ELEMENTS = 1 << 9


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*")
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_weight_is_held_whole(tmp_path, tokenizer, monkeypatch, variant):
    llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "down_proj", "embed_tokens"]
    save_adapter(tmp_path / "base", tmp_path / "adapter", config(variant, target_modules=targets))
    read = []

    def noting(function):
        def noted(*arguments):
            rows = function(*arguments)
            read.append(rows.numel())
            return rows

        return noted

    monkeypatch.setattr(CHECKED, "_PIECE_ELEMENTS", ELEMENTS)
    monkeypatch.setattr(CHECKED, "_LOOKED_UP", 40)
    for name in ("read_rows", "frozen_rows"):
        monkeypatch.setattr(CHECKED, name, noting(getattr(CHECKED, name)))
    result = bonetune.merge(str(tmp_path / "adapter"), str(tmp_path / "out"), certify="layers")
    assert len(result.certificate.checks) == 5
    assert 0 < max(read) <= ELEMENTS
