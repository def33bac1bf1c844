"""`bonetune demo`: the whole job on a real model and generated problems, in a few minutes on a CPU."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bonetune.certificates import Certificate, LayersCertificate
from bonetune.data import reasoning_problems
from bonetune.errors import InputError
from bonetune.evaluation import Proportion, TaskResult, evaluate, most_frequent, sign_test
from bonetune.files import usable_folder, write_json, write_json_lines
from bonetune.merging import merge
from bonetune.models import Loaded, load_base, smollm2
from bonetune.spec import parse_variant
from bonetune.training import make_config, train
from bonetune.training.report import Progress

# Chosen by experiment (docs/guide.md): the untrained model answers none of these, no constant answer helps, and the task is
# learned in minutes. Generated problem i comes from seed + i, hence the wide spacing.
TASK = "word_sequence_reversal"
SETTINGS: dict[str, Any] = {"min_words": 3, "max_words": 6}
SEED_SPACING, TEST_OFFSET = 1_000_000, 500_000
TEST_SIZE, BATCH_SIZE, MAX_NEW_TOKENS = 160, 8, 32


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured."""

    variant: str
    steps: int
    untrained: Proportion
    most_frequent: Proportion
    trained: Proportion
    p_value: float
    certificate: Certificate | LayersCertificate
    seconds: dict[str, float]
    output_dir: str

    @property
    def gained(self) -> bool:
        """Whether the trained model's interval lies above those of both baselines."""
        return self.trained.interval[0] > max(self.untrained.interval[1], self.most_frequent.interval[1])

    def to_dict(self) -> dict[str, Any]:
        """As demo.json holds it."""
        return asdict(self) | {"certificate": self.certificate.to_dict()}


def demo(
    variant: str = "bone",
    *,
    r: int = 64,
    steps: int = 40,
    seed: int = 0,
    learning_rate: float | None = None,
    output_dir: str = "bonetune-demo",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[Progress], None] | None = None,
    on_items: Callable[[str, int, int], None] | None = None,
) -> DemoResult:
    """Fine-tune SmolLM2-135M-Instruct on generated problems; measure before and after; reload; merge; prove the merge.

    Args:
        variant: member of the family.
        r: shard size.
        steps: optimizer steps, of 8 problems each.
        seed: of problems and training. Two runs with one seed give the same numbers.
        learning_rate: None takes the default of `bonetune.training`.
        output_dir: where everything is written: problems, adapter, metrics, loss.png, merged model, certificate, demo.json.
        overwrite: replace an earlier demonstration there.
        say: called with a sentence at each stage.
        on_progress: called at each training step.
        on_items: called while answers are generated.

    Raises:
        InputError: unknown variant, steps below 1, or something to install.
    """
    parse_variant(variant)
    if steps < 1 or seed < 0:
        raise InputError(f"steps should be at least 1 and seed at least 0, got {steps} and {seed}.")
    folder, clock = Path(output_dir), _Clock()
    config = make_config(_settings(variant, r, steps, seed, learning_rate, folder, smollm2()))
    say(f"Problems: {steps * BATCH_SIZE} to learn from and {TEST_SIZE} to be examined on, of the kind {TASK}.")
    training, test = _problems(steps * BATCH_SIZE, seed)
    usable_folder(folder, "output_dir")
    if any((folder / name).exists() for name in ("adapter", "merged")) and not overwrite:
        raise InputError(f"{folder} already holds a demonstration: pass --overwrite, or another --output-dir.")
    write_json_lines(folder / "train.jsonl", training)
    write_json_lines(folder / "test.jsonl", test)

    def examine(model: Loaded, name: str) -> TaskResult:
        test_file, records = str(folder / "test.jsonl"), str(folder / name)
        (result,) = evaluate(
            model, ["exact-match"], data=test_file, output_dir=records, max_new_tokens=MAX_NEW_TOKENS, on_items=on_items
        )
        return result

    say(f"Examining the untrained model, {config.model_name_or_path}.")
    before = examine(load_base(config.model_name_or_path), "untrained")
    clock.lap("untrained")
    say(f"Training {variant} with r={r}.")
    result = train(config, overwrite=overwrite, on_progress=on_progress)
    clock.lap("training")
    say("Examining the adapter, loaded again with plain PEFT calls.")
    after = examine(_reloaded(config.model_name_or_path, config.output_dir), "trained")
    clock.lap("trained")
    say("Merging, loading the merged model, comparing it with the adapter.")
    certificate = merge(config.output_dir, str(folder / "merged"), overwrite=overwrite).certificate
    clock.lap("merging")

    _, commonest = most_frequent([row["messages"][-1]["content"] for row in test])
    outcomes = [[record["correct"] for record in run.records] for run in (before, after)]
    shown = DemoResult(
        variant=variant,
        steps=result.steps,
        untrained=Proportion.of(outcomes[0]),
        most_frequent=commonest,
        trained=Proportion.of(outcomes[1]),
        p_value=sign_test(*outcomes),
        certificate=certificate,
        seconds=clock.laps,
        output_dir=output_dir,
    )
    write_json(folder / "demo.json", shown.to_dict())
    return shown


def _settings(
    variant: str, r: int, steps: int, seed: int, learning_rate: float | None, folder: Path, model: str
) -> dict[str, Any]:
    return {
        "model_name_or_path": model,
        "dataset_name": str(folder / "train.jsonl"),
        "output_dir": str(folder / "adapter"),
        "variant": variant,
        "r": r,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "per_device_train_batch_size": BATCH_SIZE,
        "max_steps": steps,
        "seed": seed,
    }


def _problems(size: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test problems from disjoint seeds; a test problem that training happens to contain is left out."""
    training = reasoning_problems(TASK, size, seed * SEED_SPACING, **SETTINGS)
    test = reasoning_problems(TASK, TEST_SIZE, seed * SEED_SPACING + TEST_OFFSET, **SETTINGS)
    seen = {row["messages"][0]["content"] for row in training}
    return training, [row for row in test if row["messages"][0]["content"] not in seen]


def _reloaded(base: str, adapter: str) -> Loaded:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return Loaded(model.eval(), AutoTokenizer.from_pretrained(adapter), base, adapter)


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._began, 1)
        self._began = now
