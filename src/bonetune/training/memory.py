"""How much memory a run takes at most: predicted from its settings, and measured.

The prediction runs a training step, with the model's own code, on tensors without values (`bonetune.training.live_storages`).
"""

import contextlib
import dataclasses
import gc
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bonetune.data.examples import Encoded
from bonetune.errors import InputError
from bonetune.models import load_base, packed_attention
from bonetune.models.skeleton import skeleton
from bonetune.training import baselines
from bonetune.training.config import RunConfig
from bonetune.training.ingredients import adapter_config, model_options, task_of, tokenizer_of
from bonetune.training.live_storages import LiveStorages, WithoutValues
from bonetune.training.tasks import ABOUT, task_named


@dataclass(frozen=True)
class WorstBatch:
    """The batch that takes most: examples of these lengths in tokens, all of which are supervised."""

    lengths: tuple[int, ...]
    packed: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the moment of a run when most are taken.

    Attributes:
        frozen: the base model's weights and buffers, quantized ones as codes and scales.
        adapter: everything that is trained.
        gradients: of what is trained, as far as there are any at that moment.
        optimizer: its state.
        activations: kept between forward and backward.
        transient: what lives for some operations: logits of a chunk, recomputed layers, temporaries, a CPU's scratch.
        holes: between the blocks of a CPU's heap: a typical share of them, the one part that is not counted.
        process: interpreter and libraries, on a CPU; not in `total`.
        device: cpu or cuda.
    """

    frozen: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    transient: int
    holes: int
    process: int
    device: str

    @property
    def total(self) -> int:
        """Of the run, beside the process that it runs in."""
        return sum(getattr(self, name) for name in CATEGORIES)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Measurement:
    """Bytes at the peak of real steps, beside the process, and what the process takes (0 on a GPU)."""

    total: int
    process: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# On a CPU, beside tensors: compiled kernels, the graph's nodes, the kernels' own scratch. Measured; it hardly varies.
SCRATCH = 42 << 20
# Small pieces of the graph pin holes between a heap's blocks: this share of a step's blocks at their highest, as measured for
# bone in bfloat16. It does vary: docs/guide.md.
HOLES = 0.35

CATEGORIES = ("frozen", "adapter", "gradients", "optimizer", "activations", "transient", "holes")


def worst_batch(config: RunConfig, lengths: np.ndarray | None = None) -> WorstBatch:
    """The batch of `per_device_train_batch_size` examples that takes most.

    Args:
        config: the run's settings. Where `packing` is `auto`, it is taken to be possible.
        lengths: (examples,), tokens of each example of the data; None: every example has `max_length`.
    """
    packed = bool(config.packing) and config.task_type == "CAUSAL_LM" and config.bptt_length is None
    number = config.per_device_train_batch_size
    if lengths is None:
        return WorstBatch((config.max_length,) * number, packed)
    return WorstBatch(tuple(np.sort(lengths)[::-1][:number].tolist()), packed)


def predict(config: RunConfig, batch: WorstBatch | None = None, *, device: str | None = None) -> MemoryEstimate:
    """The peak of a run's memory, without loading weights.

    Args:
        config: the run's settings.
        batch: the largest batch; None: `worst_batch`.
        device: cpu or cuda; None: cuda where there is one.

    Raises:
        InputError: the model or the optimizer cannot be run on tensors without values.
    """
    device, batch = device or _device(), batch or worst_batch(config)
    process = _resident_when_warm() if device == "cpu" else 0
    base = skeleton(config.model_name_or_path, config.dtype, **model_options(config), num_labels=config.num_labels)
    model = _adapted(config, base, without_values=True)
    storages = LiveStorages()
    try:
        with WithoutValues(), storages:
            _place(model, device)
            storages.assign((t for t in _tensors(model) if not t.requires_grad), "frozen")
            storages.assign((t for t in _tensors(model) if t.requires_grad), "adapter")
            _train_for_two_steps(model, config, batch, device, storages)
    except Exception as error:
        if isinstance(error, InputError) or "out of memory" in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{type(base).__name__} cannot be run without values ({type(error).__name__}: {reason}): measure it (--measure)."
        ) from error
    finally:
        gc.collect()
    holes = round(HOLES * storages.highest(without=("frozen", "adapter"))) if device == "cpu" else 0
    found = dict.fromkeys(CATEGORIES, 0) | storages.peak() | {"holes": holes}
    found["transient"] += SCRATCH if device == "cpu" else 0
    return MemoryEstimate(**found, process=process, device=device)


def measure(config: RunConfig, batch: WorstBatch | None = None) -> Measurement:
    """The peak of two real steps in this process, with random tokens. The model is gone afterwards.

    On a CPU, what the process's resident memory grows by: through the high-water mark that Linux keeps, set back before the
    steps where /proc allows it; else that of the whole process. On CUDA, the most bytes that tensors took.

    Raises:
        InputError: as `bonetune.models.load_base`.
    """
    device, batch = _device(), batch or worst_batch(config)
    process = _resident_when_warm() if device == "cpu" else 0
    loaded = load_base(config.model_name_or_path, config.dtype, **model_options(config), tokenizer=tokenizer_of(config))
    model = _adapted(config, loaded.model).to(device)
    _set_back_peak(device)
    _train_for_two_steps(model, config, batch, device)
    return Measurement(_peak(device) - process, process, device)


def _adapted(config: RunConfig, model: Any, *, without_values: bool = False) -> Any:
    if config.baseline is None:
        return get_peft_model(model, adapter_config(config, model), low_cpu_mem_usage=without_values)
    return baselines.as_in_training(config, model, without_values=without_values)


def _train_for_two_steps(
    model: Any, config: RunConfig, batch: WorstBatch, device: str, storages: LiveStorages | None = None
) -> None:
    """What a run does: the second step finds the optimizer's state, and gradients if it accumulates them."""
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(config, trained)
    if storages is not None:
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: storages.assign([p.grad], "gradients"))
    inputs = _inputs(config, batch, model, device)
    task = task_of(config)
    for micro_batches in (1, min(2, config.gradient_accumulation_steps)):
        optimizer.zero_grad(set_to_none=True)
        for _ in range(micro_batches):
            with _attention(model, config, batch), _autocast(config, device):
                loss = task.loss(model, **inputs)
            if storages is not None:
                storages.assign_living("activations")
            loss.backward()
            del loss
        nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        if storages is not None:
            state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
            storages.assign(state, "optimizer")


def _autocast(config: RunConfig, device: str) -> Any:
    dtype = torch.float16 if config.fp16 else torch.bfloat16
    return torch.autocast(device, dtype, enabled=config.bf16 or config.fp16)


def _optimizer(config: RunConfig, trained: list[Tensor]) -> torch.optim.Optimizer:
    arguments = TrainingArguments(
        output_dir=config.output_dir, optim=config.optim, optim_args=config.optim_args, report_to="none"
    )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(trained, **options)


def _attention(model: Any, config: RunConfig, batch: WorstBatch) -> contextlib.AbstractContextManager[object]:
    return packed_attention(model, config.attn_implementation) if batch.packed else contextlib.nullcontext()


def _inputs(config: RunConfig, batch: WorstBatch, model: Any, device: str) -> dict[str, Any]:
    words = model.get_input_embeddings().weight.shape[0]
    examples = []
    for length in batch.lengths:
        ids = [number % words for number in range(length)]
        examples.append(Encoded(ids, [0] if config.task_type == "SEQ_CLS" else ids))
    made = task_named(config.task_type).collator(0, batch.packed)(examples)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items() if name not in ABOUT}


def _place(model: nn.Module, device: str) -> None:
    """Put parameters that lie on the meta device onto `device`; tied ones stay tied."""
    placed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in placed:
                    tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    placed[id(parameter)] = nn.Parameter(tensor, parameter.requires_grad)
                module._parameters[name] = placed[id(parameter)]


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# Linux's high-water mark of a process: 5 sets it back to what is resident now.
_CLEAR, _SET_BACK = Path("/proc/self/clear_refs"), "5"


def _set_back_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_SET_BACK)


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status(
        "VmHWM", lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    )


def _status(name: str, otherwise: Callable[[], int]) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return otherwise()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _resident_when_warm() -> int:
    """Bytes of this process once a step of a toy has loaded what a step needs."""
    toy = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    )
    config = RunConfig(model_name_or_path="", dataset_name="", output_dir="", r=4, packing=False)
    _train_for_two_steps(get_peft_model(toy, adapter_config(config, toy)), config, WorstBatch((8, 8)), "cpu")
    del toy
    gc.collect()
    return _status("VmRSS", lambda: _peak("cpu"))
