"""What tells one base model from another."""

import os

import torch
from safetensors.torch import save_file

from bonetune.formats.checkpoint import Checkpoint


def saved(folder, **changes):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    tensors = {f"layers.{n}": torch.randn(512, 512) for n in range(8)}
    save_file(tensors | changes, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint(folder)


def test_models_that_differ_in_the_middle_have_different_fingerprints(tmp_path):
    one = saved(tmp_path / "one")
    tensors = {name: one.tensor(name) for name in one.stored}
    seen = {one.fingerprint}
    for name, tensor in tensors.items():
        seen.add(saved(tmp_path / "other", **{name: tensor * 1.3}).fingerprint)
    assert len(seen) == 1 + len(tensors)
    assert saved(tmp_path / "again").fingerprint == one.fingerprint


def test_small_and_empty_tensors_count(tmp_path):
    def of(tensor):
        return saved(tmp_path / "model", small=tensor).fingerprint

    assert len({of(torch.tensor(1.0)), of(torch.tensor(2.0)), of(torch.empty(0)), of(torch.arange(600.0))}) == 4


def test_same_values(tmp_path):
    tensor = torch.arange(3_000_000.0)
    other = tensor.clone()
    other[-1] = 0
    model = saved(tmp_path / "model", a=tensor, b=tensor.clone(), c=other, d=other[None].clone())
    assert model.same_values("a", "b")
    assert not model.same_values("a", "c")
    assert not model.same_values("a", "d")
    assert os.path.getsize(tmp_path / "model" / "model.safetensors") > 4 * tensor.nbytes
