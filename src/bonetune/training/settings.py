"""The settings of a run, section by section, under the names that users of transformers, PEFT and TRL know.

A section is a pydantic model; `bonetune.training.config.RunConfig` is all of them together. The descriptions here are what
docs/settings.md and the JSON schema show.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt

from bonetune.data import PAPER_PROMPT
from bonetune.data.encoding import Truncation
from bonetune.data.formats import Kind
from bonetune.ops.backend import Backend
from bonetune.rwkv.parts import Part
from bonetune.spec import Variant

TaskName = Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"]
Quantization = Literal["nf4", "fp4", "int8", "torchao-int8", "torchao-int4"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Baseline = Literal["full", "lora", "rslora", "lora+", "dora", "pissa", "olora", "lora-ga", "milora", "miss", "miss-bat"]


class ModelSettings(BaseModel, frozen=True):
    """What is trained."""

    model_name_or_path: str = Field(
        description="a folder written by save_pretrained, an id on the hub, or an RWKV-6 or RWKV-7 .pth"
    )
    tokenizer_name_or_path: str | None = Field(
        default=None, description="another tokenizer than the one beside the model: a folder or an id on the hub"
    )
    eos_token: str | None = Field(
        default=None, description="the token that ends an answer, where it is not the tokenizer's own"
    )
    task_type: TaskName = Field(
        default="CAUSAL_LM",
        description="what the model is for: writing on, judging a text (SEQ_CLS), or rewriting it (SEQ_2_SEQ_LM)",
    )
    dtype: Dtype = Field(
        default="auto", description="of the frozen weights; auto is the checkpoint's own. Adapters are float32"
    )
    quantization: Quantization | None = Field(
        default=None, description="keep the frozen weights quantized: nf4, fp4, int8 (bitsandbytes), torchao-int8, torchao-int4"
    )
    bnb_4bit_use_double_quant: bool = Field(default=False, description="quantize nf4's and fp4's scales too")
    attn_implementation: str = Field(
        default="auto",
        description="eager, sdpa, flash_attention_2, ...; auto is transformers' choice, per sequence when packing",
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")
    num_labels: PositiveInt | None = Field(
        default=None, description="SEQ_CLS: number of classes; 1 is regression. None: from the data"
    )


class DataSettings(BaseModel, frozen=True):
    """On what, and how rows become examples."""

    dataset_name: str | tuple[str, ...] = Field(
        description=".jsonl, .json, .csv or .parquet file, token files (.bin with .idx), or an id on the hub; or several"
    )
    dataset_split: str = Field(
        default="train", description="split of a hub data set, or a slice of any: train[:5000], train[10%:]"
    )
    dataset_weights: tuple[PositiveFloat, ...] | None = Field(
        default=None, description="of several data sets: their shares of an epoch. None: each as large as it is"
    )
    dataset_format: Kind | Literal["auto"] = Field(
        default="auto", description="how rows are read; auto tells from their fields"
    )
    dataset_field: tuple[str, ...] | None = Field(
        default=None, description="names of the fields: question and answer; text or token ids; or text(s) and label"
    )
    prompt_template: str = Field(
        default=PAPER_PROMPT,
        description="with {instruction} in it, for formats with an instruction; alpaca rows fill {input}, too",
    )
    completion_only_loss: bool = Field(default=True, description="learn the answers only; false: the prompts too")
    eval_dataset_name: str | None = Field(default=None, description="held-out rows")
    eval_dataset_split: str = Field(default="test", description="their split, or a slice of it")
    eval_size: float | None = Field(
        default=None, gt=0, description="hold out this much of dataset_name instead: a share below 1, or a number of rows"
    )
    max_length: PositiveInt = Field(default=1024, description="longest example, in tokens")
    truncation: Truncation = Field(
        default="error",
        description="what becomes of longer ones: error (with their count), drop, left, right, split (plain text, token ids)",
    )
    streaming: bool = Field(default=False, description="read rows as they are needed; needs max_steps")
    shuffle_buffer_size: PositiveInt = Field(default=4096, description="streaming: examples among which is shuffled")
    cache_tokens: bool = Field(default=True, description="keep tokenized data, by content, under the user's cache folder")


class AdapterSettings(BaseModel, frozen=True):
    """The adapter.

    The fields of `bonetune.BoneConfig`. A baseline has r (LoRA's rank), target_modules, exclude_modules, rank_pattern, bias,
    layers_to_transform, layers_pattern and modules_to_save of them; `full` has none.
    """

    variant: Variant = Field(default="bone", description="bone, mini, bat, bat-row, bat-free or bat-left")
    r: PositiveInt = Field(default=64, description="shard size")
    mini_r: PositiveInt = Field(default=1, description="mini: columns of its tensor")
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear", description="all-linear, ends of names, or a regular expression"
    )
    exclude_modules: str | tuple[str, ...] | None = Field(default=None, description="the same, left out")
    target_parameters: tuple[str, ...] | None = Field(
        default=None, description="parameters that no Linear holds, such as experts"
    )
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict, description="an r of their own for some layers, by name")
    bone_dropout: float = Field(default=0.0, ge=0, lt=1, description="on what enters the update")
    exact_update: bool = Field(default=False, description="keep BAT updates of 1e-4 and less over a bfloat16 base")
    bias: Literal["none", "all", "bone_only"] = Field(default="none", description="which biases are trained")
    layers_to_transform: tuple[int, ...] | None = Field(default=None, description="numbers of the layers to adapt")
    layers_pattern: str | tuple[str, ...] | None = Field(default=None, description="name of the list of layers they count in")
    modules_to_save: tuple[str, ...] | None = Field(
        default=None, description="modules trained whole and saved with the adapter"
    )
    trainable_parameters: str | tuple[str, ...] | None = Field(
        default=None, description="parameters trained whole and saved with the adapter: ends of names, or a regular expression"
    )
    trainable_token_indices: tuple[NonNegativeInt, ...] | dict[str, tuple[NonNegativeInt, ...]] | None = Field(
        default=None, description="rows of the embedding trained whole"
    )
    ensure_weight_tying: bool = Field(default=False, description="adapt tied embeddings by one tensor")


class BaselineSettings(BaseModel, frozen=True):
    """Another method in the adapter's place, for comparisons in the same loop, by PEFT's own code."""

    baseline: Baseline | None = Field(
        default=None,
        description="train by this method instead of an adapter of the family, for comparisons; full: all parameters, in "
        "float32. It needs a learning_rate",
    )
    baseline_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="what its PEFT configuration takes besides: lora_alpha (r where nothing is said: the scale is left to the "
        "learning rate), lora_dropout, init_lora_weights (pissa_niter_16), ...; loraplus_lr_ratio (16) of lora+; "
        "gradient_batches (8) of lora-ga, direction, scale, stable_gamma",
    )


class RWKVSettings(BaseModel, frozen=True):
    """What RWKV models have besides."""

    train_parts: tuple[Part, ...] = Field(
        default=(),
        description="trained whole beside the adapter: time (token shifts, decays and all else of the mixing that is no "
        "projection), ln, emb, head, state (states to begin with: state tuning)",
    )
    bptt_length: PositiveInt | None = Field(
        default=None,
        description="go through long examples in segments of so many tokens, each on the state that the one before it left: "
        "memory stops growing with the length, and gradients reach back to their segment's beginning",
    )
    l2_wrap: float = Field(
        default=0.0,
        ge=0,
        description="pull each position's largest logit towards 0, by this factor (1e-4 in RWKV's own training); in the "
        "gradients alone",
    )


class OptimizationSettings(BaseModel, frozen=True):
    """How it is trained."""

    learning_rate: float | None = Field(
        default=None, gt=0, description="peak; None: by variant and r (docs/guide.md). Baselines need one"
    )
    head_learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="peak of modules trained whole (a classifier's head, modules_to_save), which may want more than an adapter "
        "bears; None: learning_rate",
    )
    lr_scheduler_type: str = Field(default="cosine", description="any of transformers' schedules")
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict, description="what the schedule takes besides")
    warmup_steps: float = Field(default=0.03, ge=0, description="optimizer steps of warm-up; below 1, a share of all steps")
    per_device_train_batch_size: PositiveInt = Field(
        default=8, description="examples of a device in one forward, packed or not"
    )
    per_device_eval_batch_size: PositiveInt | None = Field(default=None, description="None: as in training")
    gradient_accumulation_steps: PositiveInt = Field(default=1, description="forwards in one optimizer step")
    num_train_epochs: float = Field(default=1.0, gt=0, description="times the data is gone through")
    max_steps: int | None = Field(default=None, gt=0, description="optimizer steps, instead of num_train_epochs")
    packing: bool | Literal["auto"] = Field(
        default="auto",
        description="lay a batch's examples end to end, unpadded; they do not see each other. auto: where the model can",
    )
    group_by_length: bool = Field(default=True, description="without packing: batches of like lengths, in shuffled windows")
    optim: str = Field(default="adamw_torch", description="any of transformers' optimizers, 8-bit ones included")
    optim_args: str | None = Field(default=None, description="what the optimizer takes besides")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="of AdamW")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="of AdamW")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="of AdamW")
    max_grad_norm: float = Field(default=1.0, ge=0, description="longer gradients are shortened to this; 0: never")
    bf16: bool = Field(default=False, description="autocast to bfloat16")
    fp16: bool = Field(default=False, description="autocast to float16 with loss scaling (GPUs)")
    gradient_checkpointing: bool = Field(
        default=False, description="compute activations again in backward: less memory, a third more time"
    )
    backend: Backend = Field(
        default="auto", description="torch, triton, or auto: Triton's kernels on NVIDIA GPUs, else PyTorch (docs/benchmarks.md)"
    )
    torch_compile: bool = Field(
        default=False, description="compile the decoder's layers: a minute at the start, some percent after"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of data order, dropout and initialization")


class OutputSettings(BaseModel, frozen=True):
    """What is kept, and where."""

    output_dir: str = Field(description="folder of the run")
    logging_steps: PositiveInt = Field(default=1, description="optimizer steps of one line of metrics.jsonl")
    eval_steps: PositiveInt | None = Field(default=None, description="evaluate each so many steps. None: after each epoch")
    save_steps: PositiveInt = Field(default=500, description="write a checkpoint each so many steps")
    save_total_limit: PositiveInt = Field(default=2, description="checkpoints kept")
    rehearsal: bool = Field(default=True, description="before the first step: the largest batch, an evaluation, a checkpoint")
    sample_prompts: NonNegativeInt = Field(default=3, description="prompts answered before and after training, for the report")
    sample_tokens: PositiveInt = Field(default=64, description="longest such answer")
    report_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = Field(
        default=(), description="other places for the metrics"
    )
    run_name: str | None = Field(default=None, description="the run's name there")


class DistributedSettings(BaseModel, frozen=True):
    """Several devices, under `torchrun` or `accelerate launch`; DDP needs none of these."""

    fsdp: bool = Field(default=False, description="share the weights out over the devices (FSDP2)")
    fsdp_config: dict[str, Any] | None = Field(default=None, description="as in transformers")
    deepspeed: str | dict[str, Any] | None = Field(default=None, description="DeepSpeed's configuration, or its file")
