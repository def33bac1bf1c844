"""What two models are asked, to compare their answers."""

from pathlib import Path

from bonetune.errors import InputError
from bonetune.files import PROMPTS_FILE, read_json_lines

# For adapters that come without prompts of their own.
_PROMPTS = (
    "The capital of France is",
    "Question: What is 12 plus 30?\nAnswer:",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "The three primary colours are",
    "Water boils at",
)


def prompts_of(adapter: Path) -> list[str]:
    """Some of the prompts that an adapter was trained on, from the prompts.jsonl beside it; else general ones.

    Raises:
        InputError: the file does not hold a text on each line.
    """
    file = adapter / PROMPTS_FILE
    if not file.is_file():
        return list(_PROMPTS)
    try:
        prompts = read_json_lines(file)
    except ValueError as error:
        raise InputError(f"{file} does not hold a text in quotes on each line: {error}.") from error
    return [prompt for prompt in prompts if isinstance(prompt, str) and prompt.strip()] or list(_PROMPTS)
