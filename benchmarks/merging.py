"""Merging a model of more than 2 GB file by file, over reading, writing and fsyncing the same files; and its memory."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import Result, markdown
from benchmarks.timing import ratio

VARIANTS = ("bone", "bat", "bat-row")
# TinyLlama's sides: 1.1 billion parameters. If quick, so many of its layers.
SIDES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
LAYERS, QUICK_LAYERS, LAYERS_A_FILE, R = 22, 2, 4, 64
_BLOCK = 1 << 24
# Ways: how often the files' bytes are read and written is the same in all; the last two merge.
WAYS = ("copied", "merged", "merged and certified")


def run(rounds: int, quick: bool) -> Result:
    """Interleaved: each round takes each way once, in a process of its own, from a disk whose cache does not hold the model."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bonetune-merging-") as name:
        folder = Path(name)
        files = write_base(folder / "base", QUICK_LAYERS if quick else LAYERS)
        largest, total = max(files.values()), sum(files.values())
        for variant in VARIANTS:
            print(f"merging {variant}, {total / 1e9:.2f} GB in {len(files)} files", file=sys.stderr)
            write_adapter(folder, variant, QUICK_LAYERS if quick else LAYERS)
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for number in range(rounds):
                for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
                    found[way].append(_sample(folder, way, variant))
            seconds = {way: [one["seconds"] for one in samples] for way, samples in found.items()}
            for way in WAYS:
                row = {"method": variant, "way": way, "bytes": total, "largest_file": largest, "seconds": seconds[way]}
                row["median_seconds"] = statistics.median(seconds[way])
                row |= vars(ratio(seconds[way], seconds["copied"]))
                rows.append(row | {"peak_bytes": max(one["peak_bytes"] for one in found[way])})
    lines = [
        [
            f"{row['method']}, {row['way']}",
            f"{row['median_seconds']:.2f}",
            f"{row['median']:.2f} [{row['lowest']:.2f}, {row['highest']:.2f}]",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        for row in rows
    ]
    caption = (
        f"Merging {total / 1e9:.2f} GB of bfloat16 weights in {len(files)} files, the largest of {largest / 2**20:.0f} MiB, "
        f"r={R}: wall time, over that of reading, writing and fsyncing the files, median [lowest, highest]; and the most "
        "memory that the process held, libraries included."
    )
    return Result(rows, f"{caption}\n\n{markdown(['', 's', 'over copied', 'MiB'], lines)}")


def write_base(folder: Path, layers: int) -> dict[str, int]:
    """A Llama of random weights in several files; the size of each."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir()
    sides: dict[str, Any] = SIDES
    config = LlamaConfig(**sides, num_hidden_layers=layers, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    hidden, vocabulary = SIDES["hidden_size"], SIDES["vocab_size"]
    groups: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocabulary, hidden)}]
    for first in range(0, layers, LAYERS_A_FILE):
        groups.append({})
        for number in range(first, min(first + LAYERS_A_FILE, layers)):
            groups[-1] |= {f"model.layers.{number}.{name}.weight": sides for name, sides in _linear().items()}
            groups[-1] |= {f"model.layers.{number}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    groups.append({"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)})
    torch.manual_seed(0)
    weight_map, sizes = {}, {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in group.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
        sizes[file] = (folder / file).stat().st_size
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sizes


def write_adapter(folder: Path, variant: str, layers: int) -> None:
    """An adapter of random values on all Linear layers but the head."""
    from bonetune import BoneConfig
    from bonetune.formats import bone
    from bonetune.formats.state import AdapterState, Source
    from bonetune.spec import ShardSpec, parse_variant

    targets = {name.rpartition(".")[2] for name in _linear()}
    config = BoneConfig(variant=parse_variant(variant), r=R, target_modules=targets, task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(folder / "base")
    spec = ShardSpec(parse_variant(variant), R)
    torch.manual_seed(1)
    tensors: dict[str, Tensor] = {
        f"model.layers.{number}.{name}": torch.randn(spec.shape(*sides)) * 0.005
        for number in range(layers)
        for name, sides in _linear().items()
    }
    bone.write(AdapterState(config, tensors, {}, Source(bone.NAME, "")), folder / variant)


def _linear() -> dict[str, tuple[int, int]]:
    hidden, inner = SIDES["hidden_size"], SIDES["intermediate_size"]
    narrow = hidden // SIDES["num_attention_heads"] * SIDES["num_key_value_heads"]
    attention = {"q": hidden, "k": narrow, "v": narrow, "o": hidden}
    found = {f"self_attn.{name}_proj": (out, hidden) for name, out in attention.items()}
    return found | {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}


def _sample(folder: Path, way: str, variant: str) -> dict[str, float]:
    out = folder / "out"
    _forget(folder / "base")
    command = [sys.executable, "-m", "benchmarks.merging", way, str(folder / "base"), str(folder / variant), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    shutil.rmtree(out)
    return json.loads(done.stdout.splitlines()[-1])


def _forget(folder: Path) -> None:
    """Have the system drop the files from its cache."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def _copy(base: Path, out: Path) -> None:
    out.mkdir()
    for path in sorted(base.iterdir()):
        with path.open("rb", buffering=0) as source, (out / path.name).open("wb", buffering=0) as target:
            while block := source.read(_BLOCK):
                target.write(block)
            os.fsync(target.fileno())


def _once(way: str, base: Path, adapter: Path, out: Path) -> None:
    """One way, in this process, whose libraries are imported before the clock runs."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    from bonetune.merging import merge
    from bonetune.merging.plan import make_plan, read_states
    from bonetune.merging.staging import Staging
    from bonetune.merging.streamed import stream

    began = time.perf_counter()
    if way == "copied":
        _copy(base, out)
    elif way == "merged":
        plan = make_plan(read_states([str(adapter)]), str(base), [1.0], None)
        staging = Staging(out, plan.identity)
        stream(plan, staging)
        staging.publish()
    else:
        merge(str(adapter), str(out), certify="layers")
    print(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": _peak_bytes()}))


def _peak_bytes() -> int:
    """The most that was resident since this program began; getrusage tells of the process that started it, too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    _once(sys.argv[1], *map(Path, sys.argv[2:]))
