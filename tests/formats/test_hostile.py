"""Bad and hostile files: each is refused by one clear error, nothing in it runs, and nothing is made as large as it claims.

`test_anything_else` draws such files at random; BONETUNE_FUZZ_SECONDS sets for how long, BONETUNE_FUZZ_SEED where it begins.
"""

import json
import os
import pickle
import resource
import struct
import zipfile

import pytest
import torch
from conftest import llama
from formats import fuzz
from formats.fuzz import PREFIX, adapter_folder, read_base, rwkv_adapter, sharded_base
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bonetune import BonetuneError, InputError
from bonetune.formats import bone, miss, rwkv
from bonetune.formats.checkpoint import INDEX_FILE, Checkpoint
from bonetune.formats.tensors import ADAPTER_CONFIG, ADAPTER_FILES, read_tensors
from bonetune.models import load_model

TENSORS, PICKLE = ADAPTER_FILES
SHARD = "model-00001-of-00002.safetensors"
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def safetensors_of(path, header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Payload:
    """What a pickle can do: anything."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


# --- files of tensors ---

HEADERS = {
    "longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "as long as can be": struct.pack("<Q", 2**64 - 1) + b"{}",
    "nothing": b"",
    "half a length": b"\1\0\0",
    "no header": struct.pack("<Q", 0),
    "no text": struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
    "no JSON": struct.pack("<Q", 4) + b"{a:1",
    "no object": struct.pack("<Q", 2) + b"[]",
    "nested": struct.pack("<Q", 200_000) + b"[" * 200_000,
}
TENSOR_LISTS = {
    "a name twice": b'{"a": %b, "a": %b}' % (json.dumps(ENTRY).encode(), json.dumps(ENTRY).encode()),
    "two in one place": {"a": ENTRY, "b": ENTRY},
    "overlapping": {"a": ENTRY | {"shape": [2], "data_offsets": [0, 8]}, "b": ENTRY | {"data_offsets": [4, 8]}},
    "a gap": {"a": ENTRY, "b": ENTRY | {"data_offsets": [8, 12]}},
    "beyond the file": {"a": ENTRY | {"data_offsets": [2**40, 2**40 + 4]}},
    "bytes left over": {"a": ENTRY},
    "backwards": {"a": ENTRY | {"data_offsets": [4, 0]}},
    "of another size": {"a": ENTRY | {"shape": [3]}},
    "huge": {"a": ENTRY | {"shape": [2**31, 2**31]}},
    "too large to count": {"a": ENTRY | {"shape": [2**62, 2**62, 2**62]}},
    "a negative side": {"a": ENTRY | {"shape": [-1, -1]}},
    "a side that is true": {"a": ENTRY | {"shape": [True]}},
    "a fraction of a side": {"a": ENTRY | {"shape": [1.0]}},
    "a dtype of no kind": {"a": ENTRY | {"dtype": "F33"}},
    "a dtype that is a list": {"a": ENTRY | {"dtype": ["F32"]}},
    "no dtype": {"a": {"shape": [1], "data_offsets": [0, 4]}},
    "no entry": {"a": 5},
    "metadata of numbers": {"__metadata__": {"format": 1}, "a": ENTRY},
}


@pytest.mark.parametrize("kind", [*HEADERS, *TENSOR_LISTS])
@pytest.mark.parametrize("where", ["adapter", "base"])
def test_headers(tmp_path, where, kind):
    (adapter_folder if where == "adapter" else sharded_base)(tmp_path)
    file = tmp_path / (TENSORS if where == "adapter" else SHARD)
    if kind in HEADERS:
        file.write_bytes(HEADERS[kind])
    else:
        room = 4 if kind in ("a name twice", "no dtype", "a side that is true", "metadata of numbers") else 12
        safetensors_of(file, TENSOR_LISTS[kind], bytes(room))
    with pytest.raises(InputError, match=str(file)):
        (bone.read if where == "adapter" else read_base)(tmp_path)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_torn_files(tmp_path, place):
    adapter_folder(tmp_path / "safe")
    adapter_folder(tmp_path / "pickled", file=PICKLE)
    rwkv_adapter(tmp_path / "rwkv")
    sharded_base(tmp_path / "base")
    for path, read in (
        (tmp_path / "safe" / TENSORS, lambda: bone.read(tmp_path / "safe")),
        (tmp_path / "pickled" / PICKLE, lambda: bone.read(tmp_path / "pickled")),
        (tmp_path / "rwkv" / "rwkv-0.pth", lambda: rwkv.read(tmp_path / "rwkv" / "rwkv-0.pth")),
        (tmp_path / "base" / SHARD, lambda: read_base(tmp_path / "base")),
    ):
        content = path.read_bytes()
        path.write_bytes(content[: int(place * len(content))])
        with pytest.raises(InputError, match=str(path)):
            read()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["adapter_model.bin", "rwkv-0.pth"])
def test_code_in_a_pickle_does_not_run(tmp_path, name, zipped):
    (adapter_folder if name == PICKLE else rwkv_adapter)(tmp_path)
    (tmp_path / TENSORS).unlink(missing_ok=True)
    content = {f"{PREFIX}q_proj.bone_block": torch.zeros(8, 32), "blocks.0.att.key.disha": torch.zeros(8, 16)}
    content["x"] = Payload(tmp_path / "ran")
    if zipped:
        torch.save(content, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"cannot be opened safely|Older pickles are not opened"):
        bone.read(tmp_path) if name == PICKLE else rwkv.read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "tensors by name and nothing else"),
        ({"a": torch.zeros(2), "b": 3}, "tensors by name and nothing else"),
        ({1: torch.zeros(2)}, "tensors by name and nothing else"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "a that is sparse_coo float32 on cpu"),
        ({"a": torch.empty(2, device="meta")}, "a that is strided float32 on meta"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "a that is strided complex64"),
        ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "a that is strided float8_e4m3fn"),
        ({"a": torch.zeros(1).expand(2**40)}, "would take 4398046511104 bytes"),
        ({f"a{i}": torch.zeros(4000)[i:] for i in range(3)}, None),
    ],
)
def test_pickles_of_other_things(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    if message is None:
        assert len(read_tensors(tmp_path / "x.pth")) == 3
        return
    with pytest.raises(InputError, match=message):
        read_tensors(tmp_path / "x.pth")


def test_many_views_of_one_storage_are_not_multiplied(tmp_path):
    storage = torch.zeros(100_000)
    torch.save({f"a{i}": storage[i:] for i in range(100)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="forged"):
        read_tensors(tmp_path / "x.pth")


def repickled(path, old, new, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, record in records.items():
            if name.endswith("data.pkl"):
                assert old in record
                record = record.replace(old, new)
            archive.writestr(name, record)


def test_a_storage_that_claims_more_than_its_record(tmp_path):
    torch.save({"a": torch.zeros(100)}, tmp_path / "x.pth")
    repickled(tmp_path / "x.pth", b"Kd", b"M\xff\xff")  # 100 elements, then 65535
    with pytest.raises(InputError, match="cannot be opened safely"):
        read_tensors(tmp_path / "x.pth")


def test_a_compressed_archive_is_not_inflated(tmp_path):
    torch.save({"a": torch.zeros(50_000_000, dtype=torch.uint8)}, tmp_path / "x.pth")
    repickled(tmp_path / "x.pth", b"a", b"a", zipfile.ZIP_DEFLATED)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="cannot be opened safely"):
        read_tensors(tmp_path / "x.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 20_000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("file", ADAPTER_FILES)
def test_values_that_are_not_finite(tmp_path, file, value):
    adapter_folder(tmp_path, file=file)
    tensors = read_tensors(tmp_path / file)
    tensors[f"{PREFIX}k_proj.bone_block"][3, 5] = value
    save_file(tensors, tmp_path / file) if file == TENSORS else torch.save(tensors, tmp_path / file)
    with pytest.raises(InputError, match="k_proj has values that are not finite"):
        bone.read(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(8, 32, dtype=torch.int64), "q_proj holds torch.int64"),
        (torch.zeros(8, 32, dtype=torch.float8_e4m3fn), "q_proj.bone_block that is strided float8_e4m3fn"),
        (torch.zeros(0, 32), r"q_proj has shape \(0, 32\)"),
        (torch.zeros(()), r"q_proj has shape \(\)"),
        (torch.zeros(7, 32), r"q_proj has shape \(7, 32\)"),
        (torch.zeros(1, 1, 8, 32), r"q_proj has shape \(1, 1, 8, 32\)"),
    ],
)
def test_tensors_that_no_adapter_has(tmp_path, tensor, message):
    adapter_folder(tmp_path)
    save_file(load_file(tmp_path / TENSORS) | {f"{PREFIX}q_proj.bone_block": tensor}, tmp_path / TENSORS)
    with pytest.raises(InputError, match=message):
        bone.read(tmp_path)


# --- configurations ---

WRONG_SETTINGS = [
    ({"r": "x"}, "r"),
    ({"r": -1}, "r"),
    ({"r": 0}, "r"),
    ({"r": True}, "r"),
    ({"r": 1e308}, "r"),
    ({"r": None}, "r"),
    ({"r": 2**70}, "r"),
    ({"target_modules": {}}, "target_modules"),
    ({"target_modules": 5}, "target_modules"),
    ({"target_modules": [["q_proj"]]}, "target_modules"),
    ({"target_modules": "("}, "target_modules"),
    ({"target_modules": "a{99999999999}"}, "target_modules"),
    ({"init_weights": ["bat"]}, "init_weights"),
    ({"init_weights": "bat\0"}, "bat"),
    ({"bias": {}}, "bias"),
    ({"modules_to_save": 3}, "modules_to_save"),
    ({"layers_to_transform": "0"}, "layers_to_transform"),
    ({"task_type": []}, "task_type"),
    ({"task_type": "DANCE"}, "DANCE|task"),
    ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG_SETTINGS)
@pytest.mark.parametrize("method", ["BONE", "MISS"])
def test_settings_that_cannot_be_one(tmp_path, method, settings, message):
    suffix, read = ("bone_block", bone.read) if method == "BONE" else ("miss_block", miss.read)
    adapter_folder(tmp_path, method, suffix, **settings)
    with pytest.raises(InputError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": 5}, "Unknown variant 5"),
        ({"variant": "bat-row", "init_weights": "bat"}, "two variants"),
        ({"mini_r": "1"}, "mini_r"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": "x"}}, "`r` should be a positive integer"),
        ({"rank_pattern": {"(": 4}}, "regular expression"),
        ({"bone_dropout": "much"}, "bone_dropout"),
        ({"bone_dropout": float("nan")}, "bone_dropout"),
        ({"target_parameters": {"a": 1}}, "target_parameters"),
        ({"trainable_token_indices": {"emb": ["x"]}}, "trainable_token_indices"),
        ({"exact_update": "yes"}, "exact_update"),
    ],
)
def test_settings_of_ours_that_cannot_be_one(tmp_path, settings, message):
    adapter_folder(tmp_path, **settings)
    with pytest.raises(InputError, match=message):
        bone.read(tmp_path)


def test_biases_that_peft_trained_and_did_not_save(tmp_path):
    adapter_folder(tmp_path, bias="bone_only")
    assert any("holds no biases" in note for note in bone.read(tmp_path).notes)
    tensors = load_file(tmp_path / TENSORS)
    save_file(tensors | {f"{PREFIX}q_proj.base_layer.bias": torch.zeros(32)}, tmp_path / TENSORS)
    assert not bone.read(tmp_path).notes


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"null", b"{", b'"x"', b"\xff\xfe", b"[" * 200_000, b'{"a":' * 200_000, b"1" * 5000]
)
@pytest.mark.parametrize("file", [ADAPTER_CONFIG, INDEX_FILE, "summary.json", "rwkv-0.json"])
def test_json_that_is_none(tmp_path, file, text):
    make, read = {
        INDEX_FILE: (sharded_base, read_base),
        "rwkv-0.json": (rwkv_adapter, lambda folder: rwkv.read(folder / "rwkv-0.pth")),
    }.get(file, (adapter_folder, bone.read))
    make(tmp_path)
    (tmp_path / file).write_bytes(text)
    with pytest.raises(InputError, match=file):
        read(tmp_path)


@pytest.mark.parametrize("peft_type", [None, [], {}, "LORA", "bone", 5])
def test_another_method(tmp_path, peft_type):
    adapter_folder(tmp_path, peft_type)
    with pytest.raises(InputError, match="peft_type"):
        bone.read(tmp_path)


# --- names and places ---


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "a/b.safetensors", "..", "", "x.bin", "\0.safetensors"]
)
def test_an_index_that_leads_out_of_its_folder(tmp_path, name):
    sharded_base(tmp_path / "base")
    outside = tmp_path / "outside.safetensors"
    save_file({"layer.0.weight": torch.ones(3, 4)}, outside)
    index = json.loads((tmp_path / "base" / INDEX_FILE).read_text())
    index["weight_map"]["layer.0.weight"] = str(outside) if name.startswith("/") else name
    (tmp_path / "base" / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"outside its folder, or no safetensors|lacks 1 of its"):
        read_base(tmp_path / "base")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, {"a": ["x"]}, "x", {"a": "y" * 5000 + ".safetensors"}])
def test_an_index_without_a_map(tmp_path, weight_map):
    sharded_base(tmp_path)
    edited(tmp_path / INDEX_FILE, weight_map=weight_map)
    with pytest.raises(InputError, match=r"weight_map|lacks 1 of its"):
        read_base(tmp_path)


def test_an_index_that_its_shards_contradict(tmp_path):
    sharded_base(tmp_path)
    index = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    first, second = sorted(set(index.values()))
    edited(tmp_path / INDEX_FILE, weight_map=index | {"layer.0.weight": first, "layer.0.bias": second})
    with pytest.raises(InputError, match="not in the file of the index"):
        read_base(tmp_path)
    edited(tmp_path / INDEX_FILE, weight_map=index | {"ghost": first})
    with pytest.raises(InputError, match="ghost"):
        read_base(tmp_path)
    edited(tmp_path / INDEX_FILE, weight_map=index)
    tensors = load_file(tmp_path / first)
    save_file(tensors | load_file(tmp_path / second), tmp_path / first)
    with pytest.raises(InputError, match="in two files"):
        read_base(tmp_path)


@pytest.mark.parametrize("how", ["missing", "folder", "loop", "dangling"])
def test_shards_that_are_not_there(tmp_path, how):
    sharded_base(tmp_path)
    (tmp_path / SHARD).unlink()
    if how == "folder":
        (tmp_path / SHARD).mkdir()
    elif how != "missing":
        (tmp_path / SHARD).symlink_to(tmp_path / (SHARD if how == "loop" else "nowhere"))
    with pytest.raises(InputError, match=f"lacks 1 of its 2 files: {SHARD}"):
        read_base(tmp_path)


def test_links_are_read_and_never_written_through(tmp_path):
    """The hub's cache keeps files as links; a link at the destination gives way and its target stays."""
    adapter_folder(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for name in (ADAPTER_CONFIG, TENSORS):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "real" / name)
    assert bone.read(tmp_path / "linked").tensors.keys() == bone.read(tmp_path / "real").tensors.keys()
    rwkv_adapter(tmp_path / "rwkv")
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "out.pth").symlink_to(tmp_path / "precious")
    rwkv.write(rwkv.read(tmp_path / "rwkv" / "rwkv-0.pth"), tmp_path / "out.pth")
    assert (tmp_path / "precious").read_text() == "kept"
    assert not (tmp_path / "out.pth").is_symlink()


@pytest.mark.parametrize("file", [ADAPTER_CONFIG, TENSORS])
@pytest.mark.parametrize("how", ["missing", "folder", "loop"])
def test_adapter_files_that_are_not_there(tmp_path, file, how):
    adapter_folder(tmp_path)
    (tmp_path / file).unlink()
    if how == "folder":
        (tmp_path / file).mkdir()
    elif how == "loop":
        (tmp_path / file).symlink_to(tmp_path / file)
    with pytest.raises(InputError, match=r"no adapter folder|no weights"):
        bone.read(tmp_path)


# --- the same through PEFT ---


def test_the_whole_adapter_loads(tmp_path, model_folder):
    adapter_folder(tmp_path)
    assert load_model(str(tmp_path), base=str(model_folder)).adapter == str(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        *(settings for settings, _ in WRONG_SETTINGS if list(settings) not in (["task_type"], ["base_model_name_or_path"])),
        {"peft_type": []},
        {"peft_type": "LORA"},
        {"peft_type": "MISS", "init_weights": {}},
        {"peft_type": "MISS", "r": "x"},
        {"rank_pattern": [1]},
        {"target_modules": ["nothing"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_load_model_refuses(tmp_path, model_folder, settings):
    adapter_folder(tmp_path)
    edited(tmp_path / ADAPTER_CONFIG, **settings)
    with pytest.raises(BonetuneError):
        load_model(str(tmp_path), base=str(model_folder))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (ADAPTER_CONFIG, b"[]"),
        (ADAPTER_CONFIG, b"[" * 200_000),
        (ADAPTER_CONFIG, b"\xff"),
        ("summary.json", b"[]"),
        ("summary.json", b'{"classes": {"a": 1}}'),
        ("run.yaml", b"- a\n"),
        ("run.yaml", b"{a: ["),
        ("run.yaml", b"!!python/object/apply:os.system [true]"),
        ("run.yaml", b"\xff\xfe\x00"),
        ("run.yaml", b"{quantization: [x]}"),
        ("run.yaml", b"{quantization: nf4, dtype: [x]}"),
        (TENSORS, b""),
        (TENSORS, HEADERS["nested"]),
        (PICKLE, b"cos\nsystem\n(S'true'\ntR."),
        (PICKLE, pickle.dumps({"a": 1})),
        (PICKLE, b"PK\3\4"),
    ],
)
def test_load_model_refuses_files(tmp_path, model_folder, file, content):
    adapter_folder(tmp_path)
    if file == PICKLE:
        (tmp_path / TENSORS).unlink()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(BonetuneError):
        load_model(str(tmp_path), base=str(model_folder))


# --- anything else ---


def test_anything_else(tmp_path, model_folder):
    fuzz_for("3", tmp_path, model_folder, 0)


@pytest.mark.slow
def test_anything_else_for_ten_minutes(tmp_path, model_folder):
    fuzz_for("600", tmp_path, model_folder, 1_000_000)


def fuzz_for(seconds, folder, base, seed):
    seconds = float(os.environ.get("BONETUNE_FUZZ_SECONDS", seconds))
    seed = int(os.environ.get("BONETUNE_FUZZ_SEED", seed))
    kinds = fuzz.kinds(str(base))
    assert fuzz.fuzz(folder, kinds, seconds, seed) >= len(kinds)


def test_a_single_file_counts_before_an_index_as_in_transformers(tmp_path):
    llama().save_pretrained(tmp_path)
    expected = Checkpoint(tmp_path).tensor("lm_head.weight")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, expected)
    (tmp_path / "other.safetensors").write_bytes(b"torn")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "other.safetensors"}}')
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, expected)
    assert Checkpoint(tmp_path).files == ["model.safetensors"]
