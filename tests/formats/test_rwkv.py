"""Adapter files of RWKV-PEFT, of each age, read and written."""

import json
import re
from dataclasses import replace

import pytest
import torch
from formats import rwkv_files

from bonetune import AdapterFileError, BoneConfig, InputError
from bonetune.formats import rwkv
from bonetune.formats.state import AdapterState, Source
from bonetune.ops.reference import Update, merge

ATTENTION = ("att.receptance", "att.key")


def saved(path, content):
    torch.save(content, path / "rwkv-0.pth")
    return path / "rwkv-0.pth"


def assert_merges_as_rwkv_peft(state, kind, content, end):
    weights = rwkv_files.base()
    for layer, tensor in state.tensors.items():
        weight = weights[f"{layer}.weight"]
        got = merge(weight.double(), [Update(tensor.double(), state.spec(layer))])
        torch.testing.assert_close(got, rwkv_files.merged(weight, content[f"{layer}.{end}"], kind))


@pytest.mark.parametrize(
    ("kind", "end", "r", "variant"),
    [
        ("bone", "disha", 8, "bone"),
        ("bone", "disha", 6, "bone"),
        ("bat-row", "disha", 8, "bat-row"),
        ("bone", "bone", 8, "bone"),
        ("bone", "bone", 6, "bone"),
        ("bat-row", "bone", 8, "bat-row"),
        ("bat", "bone", 8, "bat"),
        ("old", "bone", 8, "bat"),
    ],
)
def test_files_of_every_age_mean_what_rwkv_peft_computed(tmp_path, kind, end, r, variant):
    content = rwkv_files.adapter(kind, r, end=end)
    state = rwkv.read(saved(tmp_path, content))
    assert (state.config.variant, state.config.r) == (variant, r)
    assert state.config.target_modules == set(state.tensors) == {n.removesuffix(f".{end}") for n in content if n.endswith(end)}
    assert set(state.whole) == {"blocks.0.ln1.weight", "blocks.1.ln1.weight"}
    assert variant in state.notes[0]
    assert_merges_as_rwkv_peft(state, kind, content, end)


@pytest.mark.parametrize("layers", [("ffn.key", "ffn.value"), ("ffn.key", "att.key"), ("ffn.value", "att.key")])
@pytest.mark.parametrize(("kind", "variant"), [("bat-row", "bat-row"), ("bat", "bat"), ("old", "bat"), ("bone", "bone")])
def test_one_layer_that_is_not_square_proves_the_orientation(tmp_path, kind, variant, layers):
    if kind == "old" and layers == ("ffn.value", "att.key"):
        pytest.skip("both are C wide: (C, r) twice")
    state = rwkv.read(saved(tmp_path, rwkv_files.adapter(kind, 8, layers, "bone", whole=False)))
    assert state.config.variant == variant
    wrong = "bat" if variant == "bat-row" else "bat-row"
    with pytest.raises(AdapterFileError, match=f"holds {variant} .*and the call says {wrong}"):
        rwkv.read(tmp_path / "rwkv-0.pth", variant=wrong)


@pytest.mark.parametrize(("kind", "variant"), [("bat-row", "bat-row"), ("bat", "bat")])
def test_norms_that_were_trained_prove_it_for_ffn_key(tmp_path, kind, variant):
    state = rwkv.read(saved(tmp_path, rwkv_files.adapter(kind, 8, ("ffn.key",), "bone")))
    assert state.config.variant == variant


@pytest.mark.parametrize("kind", ["bat", "bat-row"])
@pytest.mark.parametrize("layers", [ATTENTION, ("ffn.key",), ("ffn.value",)])
def test_blocks_of_which_no_layer_proves_the_side_need_a_word(tmp_path, kind, layers):
    content = rwkv_files.adapter(kind, 8, layers, "bone", whole=False)
    path = saved(tmp_path, content)
    with pytest.raises(AdapterFileError, match=r"no layer tells .*: pass --variant bat-row .*or bat"):
        rwkv.read(path)
    assert_merges_as_rwkv_peft(rwkv.read(path, variant=kind), kind, content, "bone")
    if kind == "bat-row":
        assert rwkv.read(path, config={"mode": "bat", "r": 8}).config.variant == "bat-row"


@pytest.mark.parametrize("r", [8, rwkv_files.C])
def test_old_files_of_square_layers_need_a_word(tmp_path, r):
    content = rwkv_files.adapter("old", r, ATTENTION, "bone")
    path = saved(tmp_path, content)
    with pytest.raises(AdapterFileError, match=r"do not tell .*: pass --variant bone"):
        rwkv.read(path)
    assert_merges_as_rwkv_peft(rwkv.read(path, variant="bat"), "old", content, "bone")


def test_settings_say_what_a_file_of_r_equal_to_its_width_is(tmp_path):
    content = rwkv_files.adapter("bone", rwkv_files.C, ATTENTION, "bone")
    path = saved(tmp_path, content)
    state = rwkv.read(path, config={"bone_mode": "bone", "bone_load": "", "bone_r": rwkv_files.C})
    assert_merges_as_rwkv_peft(state, "bone", content, "bone")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "bat", "load": "", "r": 8}, r"holds bone .*rwkv-0\.json says bat-row"),
        ({"bone_mode": "bone", "bone_load": "", "bone_r": 64}, "tensors of r=8, and .* says r=64"),
        ({"mode": "lora"}, "none of RWKV-PEFT's: bone, bat"),
        ({"mode": ["bone"]}, "none of RWKV-PEFT's: bone, bat"),
        ({"mode": "bone", "r": "8"}, "says r='8'"),
    ],
)
def test_settings_that_contradict_the_file(tmp_path, settings, message):
    path = saved(tmp_path, rwkv_files.adapter("bone", 8))
    path.with_suffix(".json").write_text(json.dumps(settings))
    with pytest.raises(AdapterFileError, match=message):
        rwkv.read(path)


def test_settings_that_agree(tmp_path):
    path = saved(tmp_path, rwkv_files.adapter("bat-row", 8))
    (tmp_path / "disha_config.json").write_text(json.dumps({"mode": "bat", "load": "", "r": 8}))
    assert rwkv.read(path).config.variant == "bat-row"
    assert rwkv.read(path, config=tmp_path / "disha_config.json", variant="bat-row").config.r == 8
    with pytest.raises(AdapterFileError, match="the call says bat"):
        rwkv.read(path, variant="bat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update({"blocks.0.att.value.bone": c["blocks.0.att.key.disha"]}), "put together from two files"),
        (lambda c: [c.pop(k) for k in list(c) if k.endswith("disha")], "none of its 2 tensors"),
        (
            lambda c: c.update({"blocks.0.att.key.lora_A": torch.zeros(2, 2)}),
            "place for: blocks.0.att.key.lora_A",
        ),
        (lambda c: c.update({"model.layers.0.q_proj.disha": torch.zeros(8, 16)}), "a place for: model.layers.0.q_proj"),
        (lambda c: c.update({"blocks.0.att.key.disha": torch.zeros(4, 16)}), r"r=\[4, 8\]"),
        (lambda c: c.update({"blocks.0.att.key.disha": torch.zeros(2, 8, 8)}), r"\[2, 3\] dimensions"),
        (lambda c: c["blocks.1.ffn.key.disha"].fill_(float("nan")), "blocks.1.ffn.key has values that are not finite"),
        (lambda c: c["blocks.1.ln1.weight"].fill_(float("inf")), "blocks.1.ln1.weight has values that are not finite"),
    ],
)
def test_files_that_are_none(tmp_path, change, message):
    content = rwkv_files.adapter("bone", 8)
    change(content)
    with pytest.raises(AdapterFileError, match=message):
        rwkv.read(saved(tmp_path, content))


def test_lora_is_named(tmp_path):
    content = {"blocks.0.att.key.lora_A": torch.zeros(2, 16), "blocks.0.att.key.lora_B": torch.zeros(16, 2)}
    with pytest.raises(AdapterFileError, match="holds LoRA or PiSSA"):
        rwkv.read(saved(tmp_path, content))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "r"), [("bone", 8), ("bone", 6), ("bat-row", 8)])
def test_round_trips(tmp_path, kind, r, dtype):
    state = rwkv.read(saved(tmp_path, rwkv_files.adapter(kind, r, dtype=dtype)))
    spread = {name: tensor.mT.contiguous().mT for name, tensor in state.tensors.items()}
    rwkv.write(replace(state, tensors=spread), tmp_path / "out" / "rwkv-1.pth")
    written = torch.load(tmp_path / "out" / "rwkv-1.pth", weights_only=True)
    assert list(written) == [f"{name}.disha" for name in state.tensors] + list(state.whole)
    assert all(tensor.is_contiguous() and tensor.dtype == dtype for tensor in written.values())
    again = rwkv.read(tmp_path / "out" / "rwkv-1.pth")
    assert again.config.to_dict() == state.config.to_dict()
    for left, right in ((again.tensors, state.tensors), (again.whole, state.whole)):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rwkv-1.pth"]


def state_of(variant, layer="blocks.0.att.key", **settings):
    tensors = {"bone": (8, 16), "mini": (8, 1), "bat-free": (1, 8, 8)}.get(variant, (2, 8, 8))
    config = BoneConfig(r=8, variant=variant, target_modules=[layer], **settings)
    return AdapterState(config, {layer: torch.zeros(tensors)}, {}, Source("bonetune", "here"))


@pytest.mark.parametrize("variant", ["mini", "bat", "bat-free", "bat-left"])
def test_variants_that_rwkv_peft_lacks(tmp_path, variant):
    with pytest.raises(InputError, match=f"no variant {variant}: it knows bone and bat-row. Write "):
        rwkv.write(state_of(variant), tmp_path / "rwkv-0.pth")
    assert not (tmp_path / "rwkv-0.pth").exists()


def test_what_an_rwkv_has_no_place_for(tmp_path):
    with pytest.raises(InputError, match=re.escape("model.layers.0.self_attn.q_proj is none")):
        rwkv.write(state_of("bone", "model.layers.0.self_attn.q_proj"), tmp_path / "rwkv-0.pth")
    state = state_of("bone")
    with pytest.raises(InputError, match=re.escape("no parameter score.weight")):
        rwkv.write(replace(state, whole={"score.weight": torch.zeros(2, 16)}), tmp_path / "rwkv-0.pth")
    several = state_of("bone", rank_pattern={"att.key": 4})
    other = {"blocks.0.att.key": torch.zeros(4, 16), "blocks.0.att.value": torch.zeros(8, 16)}
    with pytest.raises(InputError, match=re.escape("has [4, 8]")):
        rwkv.write(replace(several, tensors=other), tmp_path / "rwkv-0.pth")
