"""RWKV's files: what is read is what is written, dtypes and names included; everything else is one clear line."""

import pickle
import zipfile

import pytest
import rwkv_models
import torch
from safetensors.torch import load_file

from bonetune.errors import InputError
from bonetune.rwkv import from_pth, parameters_of, save_pth

VERSIONS = rwkv_models.VERSIONS


def tensors(version, **changes):
    return {name: tensor.clone() for name, tensor in rwkv_models.model(version, **changes).state_dict().items()}


def save(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_state_dict_is_the_file(tmp_path, version, dtype):
    content = {name: tensor.to(dtype) for name, tensor in tensors(version).items()}
    path = save(tmp_path / "model.pth", content)
    model = from_pth(path, "auto")
    assert model.config.dtype == dtype
    for suffix in ("again.pth", "again.safetensors"):
        save_pth(model, tmp_path / suffix)
        read = load_file if suffix.endswith("safetensors") else lambda file: torch.load(file, weights_only=True)
        again = read(tmp_path / suffix)
        assert again.keys() == content.keys()
        for name, tensor in content.items():
            assert again[name].dtype == dtype
            assert torch.equal(again[name], tensor), name
        loaded = from_pth(tmp_path / suffix, "auto").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in content.items())


def test_each_tensor_keeps_its_dtype_or_takes_the_one_asked_for(tmp_path):
    content = {name: tensor.bfloat16() for name, tensor in tensors("x060").items()}
    content["blocks.0.att.time_decay"] = content["blocks.0.att.time_decay"].float()
    path = save(tmp_path / "model.pth", content)
    kept = from_pth(path, "auto")
    assert {name: tensor.dtype for name, tensor in kept.state_dict().items()} == {n: t.dtype for n, t in content.items()}
    assert kept(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert {p.dtype for p in from_pth(path).parameters()} == {torch.float32}


def test_the_model_owns_what_it_loaded(tmp_path):
    path = rwkv_models.file(tmp_path / "model.pth", "x070")
    model = from_pth(path)
    before = path.read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert path.read_bytes() == before


def test_the_first_block_of_x070_may_lack_what_nothing_reads(tmp_path):
    content = tensors("x070")
    for number in range(3):
        del content[f"blocks.0.att.v{number}"]
    model = from_pth(save(tmp_path / "model.pth", content))
    assert model.state_dict().keys() == content.keys()
    full = from_pth(rwkv_models.file(tmp_path / "full.pth", "x070"))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, full(ids).logits)


@pytest.mark.parametrize("version", VERSIONS)
def test_sizes_come_from_the_tensors(tmp_path, version):
    sizes = {"hidden_size": 48, "head_size": 16, "num_hidden_layers": 2, "intermediate_size": 80, "vocab_size": 31}
    config = from_pth(rwkv_models.file(tmp_path / "model.pth", version, **sizes)).config
    assert {name: getattr(config, name) for name in sizes} == sizes
    assert config.ranks == rwkv_models.RANKS[version]
    assert config.version == version


def _changed(change):
    def make(path):
        content = tensors("x070")
        change(content)
        save(path, content)

    return make


def _hostile(path):
    class Code:
        def __reduce__(self):
            return (exec, (f"open({str(path) + '.ran'!r}, 'w')",))

    torch.save({"emb.weight": Code()}, path)


def _bare_pickle(path):
    path.write_bytes(pickle.dumps({"emb.weight": 1}))


def _torn(path):
    rwkv_models.file(path, "x070")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path):
    path.write_bytes(b"")


def _other_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


def _two_versions(content):
    content |= {name.replace("blocks.0", "blocks.1"): t for name, t in tensors("x060").items() if "blocks.0.att.time" in name}


def _deep_embed(content):
    content["blocks.0.ffn.s_emb.weight"] = torch.zeros(97, 1024)


def _older(content):
    for name in [name for name in content if ".att." in name]:
        del content[name]
    content["blocks.0.att.time_mix_k"] = torch.zeros(1, 1, 32)


def _without_a_block(content):
    for name in [name for name in content if name.startswith("blocks.1.")]:
        del content[name]


def _another_head_size(content):
    content["blocks.0.att.r_k"] = torch.zeros(3, 8)


def _another_head_size_later(content):
    content["blocks.1.att.r_k"] = torch.zeros(2, 16)


def _another_width(content):
    content["blocks.1.att.key.weight"] = torch.zeros(32, 48)


def _too_many(content):
    content["blocks.0.att.w3"] = torch.zeros(3)


def _a_block_far_away(content):
    content["blocks.200000.att.key.weight"] = torch.zeros(32, 32)


def _a_block_without_end(content):
    content[f"blocks.{'9' * 5000}.att.key.weight"] = torch.zeros(32, 32)


def _codes(content):
    content["blocks.0.att.key.weight"] = torch.zeros(32, 32, dtype=torch.uint8)


def _no_matrix(content):
    content["emb.weight"] = torch.zeros(97)


def _nothing_known(content):
    content.clear()
    content["model.embed_tokens.weight"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_hostile, "cannot be opened safely"),
        (_bare_pickle, "neither safetensors nor a file that torch has written"),
        (_torn, "cannot be opened safely"),
        (_empty, "neither safetensors nor"),
        (_other_archive, "cannot be opened safely"),
        (_changed(_two_versions), "of x060 and of x070"),
        (_changed(_deep_embed), "RWKV-7a"),
        (_changed(_older), r"RWKV-4 \(x040\)"),
        (_changed(_without_a_block), "has blocks up to 2, and blocks.1 is missing"),
        (_changed(_another_head_size), "3 heads of 8 features, which do not make its 32"),
        (_changed(_another_head_size_later), r"blocks.1.att.r_k has shape \(2, 16\), not \(4, 8\)"),
        (_changed(_another_width), r"blocks.1.att.key.weight has shape \(32, 48\), not \(32, 32\)"),
        (_changed(_too_many), "blocks.0.att.w3 is not expected"),
        (_changed(_codes), "quantized files are not read"),
        (_changed(_no_matrix), "it should be a matrix"),
        (_changed(_a_block_far_away), "has blocks up to 200000, and blocks.3 is missing"),
        (_changed(_a_block_without_end), "not expected"),
        (_changed(_nothing_known), "no RWKV-6 or RWKV-7 model: its tensors are model.embed_tokens.weight"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, make, message):
    path = tmp_path / "model.pth"
    make(path)
    with pytest.raises(InputError, match=message) as caught:
        from_pth(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not path.with_name("model.pth.ran").exists()


def test_a_torn_safetensors_file_is_one_line(tmp_path):
    save_pth(rwkv_models.model("x070"), tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:1000])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        from_pth(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="no file"):
        from_pth(tmp_path / "other.pth")


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = rwkv_models.file(tmp_path / "model.pth", "x070")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bonetune.rwkv.weights.write_one_by_one", full)
    with pytest.raises(OSError, match="No space"):
        save_pth(rwkv_models.model("x070", seed=1), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("version", VERSIONS)
def test_parts_divide_everything_but_the_projections(version):
    model = rwkv_models.model(version, initial_state=True)
    parts = {part: parameters_of(model, [part]) for part in ("time", "ln", "emb", "head", "state")}
    together = [name for names in parts.values() for name in names]
    assert len(together) == len(set(together))
    rest = {name for name, _ in model.named_parameters()} - set(together)
    unread = {f"blocks.0.att.v{number}" for number in range(3)} if version == "x070" else set()
    assert unread <= rest
    ends = ("receptance.weight", "key.weight", "value.weight", "gate.weight", "output.weight")
    assert all(name.endswith(ends) for name in rest - unread)
    assert parts["state"] == [f"blocks.{number}.att.time_state" for number in range(3)]
    assert "blocks.0.ln0.weight" in parts["ln"]
    assert "blocks.1.att.ln_x.bias" in parts["ln"]
    if version == "x060":  # what RWKV-PEFT's substring found
        assert parts["time"] == sorted(n for n in dict(model.named_parameters()) if "time" in n and "time_state" not in n)
    else:
        assert {"blocks.2.att.x_r", "blocks.2.att.w0", "blocks.2.att.w2", "blocks.0.ffn.x_k", "blocks.1.att.v1"} <= {
            *parts["time"]
        }
    with pytest.raises(InputError, match="'tmie'"):
        parameters_of(model, ["tmie"])
    with pytest.raises(InputError, match="has no such parameters"):
        parameters_of(rwkv_models.model(version), ["state"])
    assert parameters_of(model, ["ln", "emb"]) == sorted(parts["ln"] + parts["emb"])


def test_dtypes_may_be_named(tmp_path):
    path = rwkv_models.file(tmp_path / "model.pth", "x070")
    assert from_pth(path, dtype="bfloat16").dtype == torch.bfloat16
    for wrong in ("nonsense", "int8", torch.int8):
        with pytest.raises(InputError, match="Unknown dtype"):
            from_pth(path, dtype=wrong)


def test_only_a_plain_model_becomes_a_file(tmp_path):
    model = rwkv_models.model("x070")
    with pytest.raises(InputError, match="no RWKV model without adapters"):
        save_pth(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    model.blocks[0].att.key.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="is quantized"):
        save_pth(model, tmp_path / "model.pth")
    assert not (tmp_path / "model.pth").exists()
