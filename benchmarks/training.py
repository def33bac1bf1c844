"""`bonetune train` beside transformers' Trainer with PEFT's LoRA: the same examples in the same number of steps.

Both train SmolLM2-135M (bfloat16, float32 adapters of equal size) in one process, turn by turn, on parts of the data that are
new to both; `bonetune train` as it comes, the Trainer as PEFT's own examples set it up: padding to the longest example of the
batch, the model's own loss. Both have the allocator's settings that this process was started with.
"""

import concurrent.futures
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.methods import R, linear_shapes, lora_rank
from benchmarks.results import Result, markdown
from benchmarks.timing import ratio
from bonetune.data import EncodedSet, reasoning_problems
from bonetune.data.batches import BatchPlan
from bonetune.diagnostics import peak_memory
from bonetune.models import load_base, smollm2
from bonetune.training.plan import Plan, plan
from bonetune.training.signals import Termination
from bonetune.training.trainer import make_trainer

Side = Callable[[EncodedSet], float]

BATCH_SIZE, STEPS_A_ROUND = 8, 4
GENERATED_TASK = "gsm_symbolic"


def run(rounds: int, quick: bool, data: Path | None = None) -> Result:
    """CPU time of a round's steps, ours and the Trainer's, in this process; most memory held, each in a process of its own.

    Args:
        rounds: turns of each, after one that does not count.
        quick: two steps a round.
        data: rows with question and answer to train on; None takes generated problems with worked answers.
    """
    steps = 2 if quick else STEPS_A_ROUND
    memory = {name: _in_its_own_process(_most_memory, name, data, steps) for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        planned = _planned(Path(folder), data, (rounds + 1) * steps * BATCH_SIZE)
        sides = {name: side(planned, Path(folder)) for name, side in SIDES.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        tokens = []
        order = np.random.default_rng(0).permutation(len(planned.train))
        for turn in range(rounds + 1):
            part = order[turn * steps * BATCH_SIZE : (turn + 1) * steps * BATCH_SIZE]
            examples = EncodedSet(planned.train[int(i)] for i in part)
            names = list(sides)[:: 1 if turn % 2 else -1]
            for name in names:
                spent = sides[name](examples)
                if turn:
                    seconds[name].append(spent)
            tokens.append(int(examples.lengths.sum()))
    return _result(seconds, memory, tokens[1:], data)


def _in_its_own_process(function: Callable[..., int], *arguments: Any) -> int:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _most_memory(name: str, data: Path | None, steps: int) -> int:
    """Bytes resident at the peak of two rounds, the libraries' included."""
    with tempfile.TemporaryDirectory() as folder:
        planned = _planned(Path(folder), data, 2 * steps * BATCH_SIZE)
        examples = planned.train
        side = SIDES[name](planned, Path(folder))
        del planned  # with its model, which the other side does not need
        for turn in range(2):
            side(examples[turn * steps * BATCH_SIZE : (turn + 1) * steps * BATCH_SIZE])
    return peak_memory()


def _planned(folder: Path, data: Path | None, examples: int) -> Plan:
    if data is None:
        rows = reasoning_problems(GENERATED_TASK, examples, seed=0, worked=True)
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        fields = None
    else:
        fields = ["question", "answer"]
    return plan(
        {
            "model_name_or_path": smollm2(),
            "dtype": "bfloat16",
            "dataset_name": str(data),
            "dataset_field": fields,
            "output_dir": str(folder / "run"),
            "max_length": 1024,
            "truncation": "drop",
            "r": R,
            "per_device_train_batch_size": BATCH_SIZE,
            "rehearsal": False,
            "save_steps": 1_000_000,
        }
    )


def _lora_model() -> Any:
    model = load_base(smollm2(), "bfloat16").model
    rank = lora_rank(linear_shapes(model))
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM"))


def _ours(planned: Plan, folder: Path) -> Side:
    """`bonetune train`, with the model that the plan loaded."""
    return lambda examples: _our_steps(planned, examples)


def _theirs(planned: Plan, folder: Path) -> Side:
    """The Trainer, with a model of its own."""
    model, tokenizer = _lora_model(), planned.loaded.tokenizer
    return lambda examples: _their_steps(model, tokenizer, examples, folder)


def _our_steps(planned: Plan, examples: EncodedSet) -> float:
    part = replace(
        planned,
        train=examples,
        batches=BatchPlan(examples.lengths, BATCH_SIZE, 0, planned.batches.group_by_length),
        supervised=planned.task.supervised(examples),
    )
    Path(planned.config.output_dir).mkdir(exist_ok=True)
    with planned.attention():
        return _timed(make_trainer(part, None, Termination()))


def _their_steps(model: Any, tokenizer: Any, examples: EncodedSet, folder: Path) -> float:
    arguments = TrainingArguments(
        output_dir=str(folder / "baseline"),
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=1,
        learning_rate=1e-4,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": e.input_ids, "attention_mask": [1] * len(e.input_ids), "labels": e.labels} for e in examples]
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,  # pyright: ignore[reportArgumentType]  (a list is a map-style data set)
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    trainer.remove_callback(PrinterCallback)
    return _timed(trainer)


def _timed(trainer: Trainer) -> float:
    clock = _Clock()
    trainer.add_callback(clock)
    with redirect_stdout(StringIO()):
        trainer.train()
    return clock.spent


class _Clock(TrainerCallback):
    """CPU seconds from the first step's beginning to the last one's end."""

    began = spent = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.began or time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spent = time.process_time() - self.began


SIDES: dict[str, Callable[[Plan, Path], Side]] = {"bonetune train": _ours, "Trainer, LoRA": _theirs}


def _result(seconds: dict[str, list[float]], memory: dict[str, int], tokens: list[int], data: Path | None) -> Result:
    theirs = seconds["Trainer, LoRA"]
    rows, lines = [], []
    for name, mine in seconds.items():
        faster = ratio(theirs, mine)
        held = memory[name]
        rows.append({"side": name, "useful_tokens": tokens, "seconds": mine, **vars(faster), "peak_bytes": held})
        rate = np.median([count / spent for count, spent in zip(tokens, mine, strict=True)])
        less = held / memory["Trainer, LoRA"]
        lines.append([name, f"{rate:.0f}", str(faster), f"{held / 2**30:.2f} GiB", f"{less:.2f}"])
    problems = data.name if data else f"generated problems ({GENERATED_TASK})"
    caption = (
        f"Training SmolLM2-135M, batches of {BATCH_SIZE}, on {problems}: "
        "useful tokens a CPU second, and how many times the Trainer's with LoRA of equal size, median [lowest, highest]; most "
        "memory resident, libraries included, in a process of its own."
    )
    return Result(
        rows, f"{caption}\n\n{markdown(['', 'tokens a CPU second', 'times the Trainer', 'memory', 'of the Trainer'], lines)}"
    )
