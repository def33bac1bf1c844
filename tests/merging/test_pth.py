"""Merging into RWKV's `.pth`, compared with block loops in float64 and with the file that it has to resemble."""

import re
import zipfile
from dataclasses import replace

import pytest
import torch
from formats import rwkv_files

from bonetune import AdapterFileError, InputError
from bonetune.errors import RunError
from bonetune.formats import rwkv
from bonetune.merging import pth
from bonetune.merging.pth import merge_pth

KINDS = [("bone", 8), ("bone", 6), ("bat-row", 8), ("bat", 8)]


def files(folder, kind, r, dtype=torch.float32, adapter_dtype=torch.float32):
    weights = rwkv_files.base(dtype)
    torch.save(weights, folder / "base.pth")
    end = "bone" if kind == "bat" else "disha"
    content = rwkv_files.adapter(kind, r, end=end, dtype=adapter_dtype)
    torch.save(content, folder / "rwkv-0.pth")
    return weights, content, rwkv.read(folder / "rwkv-0.pth")


def expected_of(weights, content, kind, scale=1.0):
    """By name, in float64."""
    expected = {name: weight.double() for name, weight in weights.items()}
    for name, tensor in content.items():
        layer, _, end = name.rpartition(".")
        if end in ("disha", "bone"):
            weight = weights[f"{layer}.weight"]
            change = rwkv_files.merged(weight, tensor, kind) - weight.double()
            expected[f"{layer}.weight"] = weight.double() + scale * change
        else:
            expected[name] = tensor.double()
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "r"), KINDS)
def test_each_weight_is_rounded_once(tmp_path, kind, r, dtype):
    weights, content, state = files(tmp_path, kind, r, dtype)
    certificate = merge_pth(state, tmp_path / "base.pth", tmp_path / "out.pth", scale=0.7)
    merged = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(merged) == list(weights)
    for name, expected in expected_of(weights, content, kind, 0.7).items():
        got = merged[name]
        assert (got.dtype, got.shape, got.is_contiguous()) == (dtype, weights[name].shape, True)
        # half of the last digit, and what float32 itself loses
        bound = torch.finfo(dtype).eps / 2 * expected.abs() * 1.01 + 2e-6
        assert ((got.double() - expected).abs() <= bound).all(), name
    assert certificate.holds
    assert len(certificate.checks) == len(state.tensors)
    assert certificate.unchanged == len(weights) - len(state.tensors)
    assert certificate.update_kept == pytest.approx(1, abs=0.02)


def test_the_file_is_whole_to_programs_that_read_checksums(tmp_path):
    weights, _, state = files(tmp_path, "bone", 8, torch.bfloat16)
    merge_pth(state, tmp_path / "base.pth", tmp_path / "out.pth")
    with zipfile.ZipFile(tmp_path / "out.pth") as archive:
        assert archive.testzip() is None
        assert sum("/data/" in name for name in archive.namelist()) == len(weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.pth", "out.pth", "rwkv-0.pth"]


def test_several_adapters_are_all_of_the_frozen_weight(tmp_path):
    weights, bone, first = files(tmp_path, "bone", 8)
    _, row, second = files(tmp_path, "bat-row", 8)
    second = replace(second, whole={})
    for order, scales in (((first, second), (0.5, -2)), ((second, first), (-2, 0.5))):
        merge_pth(order, tmp_path / "base.pth", tmp_path / "out.pth", scale=scales, overwrite=True)
        merged = torch.load(tmp_path / "out.pth", weights_only=True)
        for layer in first.tensors:
            W = weights[f"{layer}.weight"]
            expected = W.double()
            for content, kind, scale in ((bone, "bone", 0.5), (row, "bat-row", -2)):
                expected = expected + scale * (rwkv_files.merged(W, content[f"{layer}.disha"], kind) - W.double())
            torch.testing.assert_close(merged[f"{layer}.weight"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stored", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_another_dtype_is_rounded_to_once(tmp_path, stored, asked):
    weights, content, state = files(tmp_path, "bone", 8, getattr(torch, stored), torch.bfloat16)
    merge_pth(state, tmp_path / "base.pth", tmp_path / "out.pth", dtype=asked)
    merged = torch.load(tmp_path / "out.pth", weights_only=True)
    for name, expected in expected_of(weights, content, "bone").items():
        assert merged[name].dtype == getattr(torch, asked)
        bound = torch.finfo(merged[name].dtype).eps / 2 * expected.abs() * 1.01 + 2e-6
        assert ((merged[name].double() - expected).abs() <= bound).all(), name


def test_everything_that_does_not_fit_is_named_at_once(tmp_path):
    weights, _, state = files(tmp_path, "bone", 8)
    del weights["blocks.1.att.key.weight"]
    weights["blocks.0.ffn.key.weight"] = torch.zeros(48, 64)
    weights["blocks.0.ln1.weight"] = torch.zeros(1, 1, 64)
    weights["blocks.0.att.receptance.weight"] = torch.zeros(64, 4)
    torch.save(weights, tmp_path / "base.pth")
    state = replace(state, whole=state.whole | {"blocks.0.att.time_state": torch.zeros(1)})
    with pytest.raises(AdapterFileError) as caught:
        merge_pth(state, tmp_path / "base.pth", tmp_path / "out.pth")
    for part in (
        "there is no blocks.1.att.key.weight",
        "blocks.0.ffn.key.weight (48, 64) needs bone of shape (8, 48), not (8, 224)",
        "blocks.0.ln1.weight has shape (1, 1, 64), and was trained as (64,)",
        "`r` (8) must be less than or equal to in_features (4) of blocks.0.att.receptance",
        "there is no blocks.0.att.time_state, which was trained whole",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "out.pth").exists()


def test_what_two_adapters_replace(tmp_path):
    _, _, state = files(tmp_path, "bone", 8)
    with pytest.raises(AdapterFileError, match=r"blocks\.0\.ln1\.weight was trained whole by several"):
        merge_pth([state, state], tmp_path / "base.pth", tmp_path / "out.pth")


def test_outputs_that_are_refused(tmp_path):
    _, _, state = files(tmp_path, "bone", 8)
    base = tmp_path / "base.pth"
    (tmp_path / "link.pth").symlink_to(base)
    (tmp_path / "there.pth").write_bytes(b"precious")
    for output, message in (
        (base, "is what is merged"),
        (tmp_path / "link.pth", "is what is merged"),
        (tmp_path / "rwkv-0.pth", "is what is merged"),
        (tmp_path, "is a folder"),
        (tmp_path / "there.pth", "pass --overwrite"),
    ):
        with pytest.raises(InputError, match=message):
            merge_pth(state, base, output, overwrite=message != "pass --overwrite")
    merge_pth(state, base, tmp_path / "there.pth", overwrite=True)
    assert (tmp_path / "there.pth").read_bytes() != b"precious"


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), [1.0, 2.0], []])
def test_scales_that_are_none(tmp_path, scale):
    _, _, state = files(tmp_path, "bone", 8)
    with pytest.raises(InputError, match="finite scale"):
        merge_pth(state, tmp_path / "base.pth", tmp_path / "out.pth", scale=scale)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"cos\nsystem\n(S'true'\ntR.", None])
def test_bases_that_are_none(tmp_path, content):
    _, _, state = files(tmp_path, "bone", 8)
    whole = (tmp_path / "base.pth").read_bytes()
    (tmp_path / "base.pth").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "base.pth"))):
        merge_pth(state, tmp_path / "base.pth", tmp_path / "out.pth")
    with pytest.raises(InputError, match="There is no base model"):
        merge_pth(state, tmp_path / "nowhere.pth", tmp_path / "out.pth")


def test_values_that_a_dtype_does_not_reach(tmp_path):
    weights, _, state = files(tmp_path, "bone", 8)
    weights["emb.weight"][0, 0] = 1e30
    torch.save(weights, tmp_path / "base.pth")
    with pytest.raises(RunError, match=r"emb\.weight has values that float16 does not reach"):
        merge_pth(state, tmp_path / "base.pth", tmp_path / "out.pth", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.pth", "rwkv-0.pth"]


def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path, monkeypatch):
    _, _, state = files(tmp_path, "bone", 8)
    (tmp_path / "out.pth").write_bytes(b"precious")
    before = {path.name for path in tmp_path.iterdir()}

    def full(file, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bonetune.torch_files._fill", full)
    with pytest.raises(RunError, match="No space left"):
        merge_pth(state, tmp_path / "base.pth", tmp_path / "out.pth", overwrite=True)
    assert (tmp_path / "out.pth").read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("fault", ["no update", "the wrong way", "another tensor"])
def test_a_wrong_merge_is_kept_aside(tmp_path, monkeypatch, fault):
    _, _, state = files(tmp_path, "bat-row", 8)
    right = pth.merge

    def wrong(weight, updates):
        if fault == "another tensor":
            return right(weight, updates)
        if fault == "no update":
            return weight.clone()
        return right(weight.mT, updates).mT if weight.shape == (64, 64) else right(weight, updates)

    monkeypatch.setattr(pth, "merge", wrong)
    if fault == "another tensor":
        write = pth.write_one_by_one
        broken = lambda path, layouts, value: write(path, layouts, lambda n: value(n) * (2 if n == "emb.weight" else 1))  # noqa: E731
        monkeypatch.setattr(pth, "write_one_by_one", broken)
    (tmp_path / "out.pth").write_bytes(b"precious")
    with pytest.raises(RunError, match=r"kept aside as .*out\.pth\.rejected. It is NOT equal"):
        merge_pth(state, tmp_path / "base.pth", tmp_path / "out.pth", overwrite=True)
    assert (tmp_path / "out.pth").read_bytes() == b"precious"
    assert (tmp_path / "out.pth.rejected").is_file()
