"""Which variant learns: the family, LoRA, PiSSA and MiSS on one generated task at matched trainable parameters.

`python -m benchmarks.learning [--output DIR] [--methods a,b]` trains SmolLM2-135M-Instruct (bfloat16 base, float32
adapters) to write lists of words in reverse order. Each method's learning rate is chosen on the validation loss of seed 0,
from a grid of powers of two that grows until its best value lies inside; the runs that count then use seeds 1, 2, 3, whose
problems no choice has seen. One file a run, written when the run is done: what is there is not run again, so the script goes
on where it was stopped. `--step-times FILE` measures instead how long each method's step takes, on the same batches, as
`benchmarks.timing` measures. `python -m benchmarks.learning_report` turns the files into tables and curves.
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, MissConfig, PeftConfig, TaskType, get_peft_model
from transformers import set_seed

from benchmarks import machine
from benchmarks.timing import interleaved
from bonetune import BoneConfig
from bonetune.data import Encoded, RowFormat, encode_rows, reasoning_problems
from bonetune.data.batches import padded
from bonetune.files import write_json
from bonetune.losses import completion_loss
from bonetune.models import generate, load_base, smollm2

TASK, MIN_WORDS, MAX_WORDS = "word_sequence_reversal", 5, 9
PROMPT = "Reverse: {}\nAnswer:"
STEPS, BATCH_SIZE, WARMUP_STEPS = 48, 8, 5
VALIDATION_SIZE, TEST_SIZE = 128, 160
SWEEP_SEED, SEEDS = 0, (1, 2, 3)
# reasoning-gym's problem i comes from seed + i: training, validation and test of all seeds lie this far apart
SEED_SPACING, VALIDATION_OFFSET, TEST_OFFSET = 1_000_000, 250_000, 500_000


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    Args:
        config: makes the PEFT configuration.
        rates: the first grid of learning rates, ascending by factors of two.
        same_function_as: a method that computes the same function but for rounding, whose learning rate is taken over instead
            of a sweep.
    """

    config: Callable[[], PeftConfig]
    rates: tuple[float, ...] = ()
    same_function_as: str | None = None


def _bone(variant: str, r: int = 64, **more: Any) -> Callable[[], PeftConfig]:
    return lambda: BoneConfig(r=r, variant=variant, **more, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)


def _lora(init: bool | str) -> Callable[[], PeftConfig]:
    # 33 * (out + in) over all layers is what 64 * out is; alpha = r leaves the scale to the learning rate
    return lambda: LoraConfig(
        r=33,
        lora_alpha=33,
        init_lora_weights=init,  # pyright: ignore[reportArgumentType]  (a closed list of texts)
        target_modules="all-linear",
        task_type=TaskType.CAUSAL_LM,
    )


METHODS: dict[str, Method] = {
    "bone": Method(_bone("bone"), (2e-4, 4e-4, 8e-4)),
    "bat": Method(_bone("bat"), (1e-4, 2e-4, 4e-4)),
    "bat-row": Method(_bone("bat-row"), (1e-4, 2e-4, 4e-4)),
    "bat-left": Method(_bone("bat-left"), (2e-4, 4e-4, 8e-4)),
    # B is (r, r) for any layer; 192, the largest r that divides every side, comes nearest to the others' parameters
    "bat-free": Method(_bone("bat-free", 192), (1e-4, 2e-4, 4e-4)),
    "lora": Method(_lora(True), (1e-3, 2e-3, 4e-3)),
    "pissa": Method(_lora("pissa_niter_16"), (2.5e-4, 5e-4, 1e-3)),
    "bat-exact": Method(_bone("bat", exact_update=True), same_function_as="bat"),
    "bat-row-exact": Method(_bone("bat-row", exact_update=True), same_function_as="bat-row"),
    "miss": Method(
        lambda: MissConfig(r=64, target_modules="all-linear", task_type=TaskType.CAUSAL_LM),
        same_function_as="bone",
    ),
}


@dataclass(frozen=True)
class Run:
    """One training run, and the name of its file."""

    method: str
    learning_rate: float
    seed: int

    @property
    def file(self) -> str:
        return f"{self.method}-lr{self.learning_rate:g}-seed{self.seed}.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/learning"), help="one file a run is written here")
    parser.add_argument("--methods", default=",".join(METHODS), help="a part of the methods, separated by commas")
    parser.add_argument("--step-times", type=Path, help="train nothing; write the CPU seconds of a step by method here")
    arguments = parser.parse_args()
    names = arguments.methods.split(",")
    if arguments.step_times:
        write_json(arguments.step_times, step_times(names))
        return
    best = {name: sweep(name, arguments.output) for name in names if METHODS[name].rates}
    for seed in SEEDS:
        for name in names:
            origin = METHODS[name].same_function_as or name
            rate = best[origin] if origin in best else sweep(origin, arguments.output)
            completed(Run(name, rate, seed), arguments.output)


def sweep(name: str, folder: Path) -> float:
    """The learning rate with the lowest validation loss of seed 0, the grid extended while that lies at its edge."""
    rates = list(METHODS[name].rates)
    while True:
        losses = {rate: completed(Run(name, rate, SWEEP_SEED), folder)["validation_loss"] for rate in rates}
        best = min(rates, key=lambda rate: losses[rate])
        if best == min(rates):
            rates.insert(0, best / 2)
        elif best == max(rates):
            rates.append(best * 2)
        else:
            return best


def completed(run: Run, folder: Path) -> dict[str, Any]:
    """The record of a run: read if it is there, else trained and written."""
    file = folder / run.file
    if file.exists():
        return json.loads(file.read_text())
    record = asdict(run) | train_and_examine(run)
    write_json(file, record)
    print(
        f"{run.file:34} validation {record['validation_loss']:.4f}  test {_shown(record, 'test_loss')}  "
        f"exact {_shown(record, 'exact_match')}  {record['seconds']:.0f} s",
        flush=True,
    )
    return record


def train_and_examine(run: Run) -> dict[str, Any]:
    """Train once. Runs that count (not the sweep's) are examined on their test problems: loss and exact match by item."""
    began = time.perf_counter()
    training = _Training(run)
    losses: list[float] = []
    for step in range(STEPS):
        losses.append(training.step(step))
        if not math.isfinite(losses[-1]):
            break
    model, tokenizer, seen = training.model.eval(), training.tokenizer, training.seen
    record: dict[str, Any] = {
        "parameters": sum(p.numel() for p in training.trainable),
        "training_losses": losses,
        "validation_loss": _mean_loss(
            _item_losses(model, tokenizer, _unseen(VALIDATION_SIZE, VALIDATION_OFFSET, run.seed, seen))
        ),
        "commit": machine.commit(),
        "torch": torch.__version__,
    }
    if run.seed != SWEEP_SEED:
        test = _unseen(TEST_SIZE, TEST_OFFSET, run.seed, seen)
        items = _item_losses(model, tokenizer, test)
        answers = generate(model, tokenizer, [row["prompt"] for row in test], max_new_tokens=48, batch_size=TEST_SIZE)
        correct = [answer.strip() == row["completion"].strip() for answer, row in zip(answers, test, strict=True)]
        record |= {"test_loss": _mean_loss(items), "exact_match": sum(correct) / len(correct)}
        record["test_items"] = [item | {"correct": right} for item, right in zip(items, correct, strict=True)]
    return record | {"seconds": time.perf_counter() - began}


def step_times(names: Sequence[str], rounds: int = 9) -> dict[str, float]:
    """Median CPU seconds of a training step of each method, all methods' steps on the same batches, in turn."""
    trainings = {name: _Training(Run(name, 0.0, SWEEP_SEED)) for name in names}
    seconds = interleaved({name: partial(training.step, 0) for name, training in trainings.items()}, rounds, shortest=0)
    return {name: statistics.median(samples) for name, samples in seconds.items()}


class _Training:
    """The model of a run with its adapter, its data and its optimizer."""

    def __init__(self, run: Run) -> None:
        self.run = run
        loaded = load_base(smollm2(), "bfloat16")
        self.tokenizer = loaded.tokenizer
        set_seed(run.seed)
        self.model: Any = get_peft_model(loaded.model, METHODS[run.method].config()).train()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        rows = _rows(STEPS * BATCH_SIZE, run.seed * SEED_SPACING)
        self.seen = {row["prompt"] for row in rows}
        self.encoded = _encoded(rows, self.tokenizer)
        random.Random(run.seed).shuffle(self.encoded)
        self.optimizer = torch.optim.AdamW(self.trainable, weight_decay=0.0)
        self.batch_of = padded(self.tokenizer.pad_token_id)

    def step(self, step: int) -> float:
        """Optimizer step number `step` (from 0); returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.learning_rate * min((step + 1) / WARMUP_STEPS, (STEPS - step) / (STEPS - WARMUP_STEPS + 1))
        batch = self.batch_of(self.encoded[step * BATCH_SIZE : (step + 1) * BATCH_SIZE])
        loss = completion_loss(self.model, **batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def _rows(size: int, seed: int) -> list[dict[str, str]]:
    problems = reasoning_problems(TASK, size, seed, min_words=MIN_WORDS, max_words=MAX_WORDS)
    pairs = [[message["content"].strip() for message in problem["messages"]] for problem in problems]
    return [{"prompt": PROMPT.format(question.rpartition(": ")[2]), "completion": f" {answer}"} for question, answer in pairs]


def _unseen(size: int, offset: int, seed: int, seen: set[str]) -> list[dict[str, str]]:
    return [row for row in _rows(size, seed * SEED_SPACING + offset) if row["prompt"] not in seen]


def _encoded(rows: list[dict[str, str]], tokenizer: Any) -> list[Encoded]:
    return list(encode_rows(rows, RowFormat.detect(rows[0]), tokenizer, max_length=256)[0])


@torch.no_grad()
def _item_losses(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Summed loss and number of supervised tokens of each row."""
    items: list[dict[str, Any]] = [{}] * len(rows)
    encoded = _encoded(rows, tokenizer)
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i].input_ids))
    batch_of = padded(tokenizer.pad_token_id)
    for start in range(0, len(order), 16):
        indices = order[start : start + 16]
        batch = batch_of([encoded[i] for i in indices])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        targets = batch["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().mT, targets, reduction="none").sum(1)
        for i, loss in zip(indices, losses.tolist(), strict=True):
            items[i] = {"loss": loss, "tokens": encoded[i].supervised}
    return items


def _mean_loss(items: list[dict[str, Any]]) -> float:
    return sum(item["loss"] for item in items) / sum(item["tokens"] for item in items)


def _shown(record: dict[str, Any], key: str) -> str:
    return f"{record[key]:.4f}" if key in record else "-"


if __name__ == "__main__":
    main()
