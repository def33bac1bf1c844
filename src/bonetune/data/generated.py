"""Problems that are generated, not downloaded: reasoning-gym's procedural tasks."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

import yaml

from bonetune.data.slices import Slice
from bonetune.errors import InputError

PREFIX = "reasoning-gym:"
# Each split counts its seeds from here on, one a problem: no two splits share one.
FIRST_SEEDS = {"train": 0, "validation": 1_000_000_000, "test": 2_000_000_000}


def is_generated(source: str) -> bool:
    """Whether a data set's name is that of generated problems."""
    return source.startswith(PREFIX)


def generated_rows(source: str, split: str) -> Iterator[dict[str, str]]:
    """Problems as rows {"instruction", "output"}, with the worked answer where the task has one; the same ones each time.

    Args:
        source: `reasoning-gym:TASK`, with settings of the task behind a question mark:
            reasoning-gym:word_sequence_reversal?min_words=5&max_words=9.
        split: train, validation or test, with the numbers of the problems: train[:2000]. No two splits share a seed; equal
            problems of a task with few of them may still come up in both.

    Raises:
        InputError: reasoning-gym is not installed, or knows no such task or setting; a split without an end.
    """
    task, _, query = source.removeprefix(PREFIX).partition("?")
    settings = {name: yaml.safe_load(value) for name, value in parse_qsl(query, keep_blank_values=True)}
    part = Slice.parse(split)
    if part.name not in FIRST_SEEDS:
        raise InputError(f"Data set {source} has no split {part.name!r}: choose from {', '.join(FIRST_SEEDS)}.")
    if part.needs_count or part.stop is None:
        raise InputError(f"Data set {source} has no end: say how many problems of {split!r} are meant, {part.name}[:1000].")
    problems = _problems(task, part.stop, FIRST_SEEDS[part.name], settings)  # each is made when it is asked for
    for number in range(part.start or 0, part.stop):
        problem = problems[number]
        worked = problem["metadata"].get("answer_cot")
        yield {"instruction": problem["question"], "output": worked if worked is not None else str(problem["answer"])}


def reasoning_problems(task: str, size: int, seed: int, *, worked: bool = False, **settings: Any) -> list[dict[str, Any]]:
    """`size` problems of reasoning-gym's `task` as rows `{"messages": [user, assistant]}`; equal seeds give equal problems.

    With `worked`, answers are the worked ones (`metadata["answer_cot"]`), which few tasks have.

    Raises `InputError` if reasoning-gym is not installed or does not know the task.
    """
    problems = _problems(task, size, seed, settings)
    return [
        {
            "messages": [
                {"role": "user", "content": problem["question"]},
                {"role": "assistant", "content": _answer(problem, worked)},
            ]
        }
        for problem in problems
    ]


def _answer(problem: Any, worked: bool) -> str:
    if not worked:
        return str(problem["answer"])
    if "answer_cot" not in problem["metadata"]:
        raise InputError("reasoning-gym gives no worked answers to these problems: leave out worked.")
    return problem["metadata"]["answer_cot"]


def _problems(task: str, size: int, seed: int, settings: dict[str, Any]) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise InputError("Generated problems need reasoning-gym: pip install 'bonetune[demo]'.") from error
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **settings)
    except (ValueError, AssertionError, TypeError) as error:
        raise InputError(f"reasoning-gym cannot make problems of {task!r} with {settings}: {error}") from error
