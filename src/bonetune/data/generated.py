"""Problems that are generated, not downloaded: reasoning-gym's procedural tasks, as rows with messages."""

from typing import Any

from bonetune.errors import InputError


def reasoning_problems(task: str, size: int, seed: int, *, worked: bool = False, **settings: Any) -> list[dict[str, Any]]:
    """`size` problems of reasoning-gym's `task` as rows `{"messages": [user, assistant]}`; equal seeds give equal problems.

    With `worked`, answers are the worked ones (`metadata["answer_cot"]`), which few tasks have.

    Raises `InputError` if reasoning-gym is not installed or does not know the task.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise InputError("Generated problems need reasoning-gym: pip install 'bonetune[demo]'.") from error
    try:
        problems = reasoning_gym.create_dataset(task, size=size, seed=seed, **settings)
    except (ValueError, AssertionError, TypeError) as error:
        raise InputError(f"reasoning-gym cannot make problems of {task!r} with {settings}: {error}") from error
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
