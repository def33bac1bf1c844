"""MT-Bench (arXiv 2306.05685): eighty questions with a second one to each, answered by the model and graded by another.

A row is one of the public question.jsonl (`question_id`, `category`, `turns`, perhaps `reference`) or of the hub's
HuggingFaceH4/mt_bench_prompts (`prompt_id`, `category`, `prompt`, `reference`).
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bonetune.data import RowFormat, read_rows
from bonetune.data.conversation import render
from bonetune.errors import InputError, first_line
from bonetune.evaluation.ledger import Ledger
from bonetune.evaluation.result import Record, TaskResult
from bonetune.evaluation.statistics import bootstrap
from bonetune.evaluation.task import Judge, Prepared, Request, Task, digest
from bonetune.evaluation.trained_with import QUESTION_FIELDS, question_template
from bonetune.models import Loaded, generate_batches, input_tokens

SOURCE, SPLIT = "HuggingFaceH4/mt_bench_prompts", "train"
NEW_TOKENS = 1024
# Categories whose answers are graded beside a reference.
WITH_REFERENCE = ("math", "reasoning", "coding")
# Of requests to the judge: how many at once, how often each is tried, seconds before the second try and until one is given up.
AT_ONCE, TRIES, PAUSE, TIMEOUT = 4, 6, 1.0, 300.0


@dataclass(frozen=True)
class Grading:
    """How an answer is put before the judge, under its published name."""

    name: str
    system: str
    user: str


# The wording of FastChat's fastchat/llm_judge/data/judge_prompts.jsonl (github.com/lm-sys/FastChat, Apache-2.0), which is what
# makes grades comparable; its slips too.
_ACT = (
    "Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user question"
)
_BY_QUALITY = (
    "Your evaluation should consider factors such as the helpfulness, relevance, accuracy, depth, creativity, and level of "
    "detail of the response. "
)
_BY_REFERENCE = (
    "Your evaluation should consider correctness and helpfulness. You will be given a reference answer and the assistant's "
    "answer. "
)
_EXPLAIN = "Begin your evaluation by providing a short explanation. "
_COMPARE = (
    "Begin your evaluation by comparing the assistant's answer with the reference answer. Identify and correct any mistakes. "
)
_RATE = (
    "Be as objective as possible. After providing your explanation, you must rate the response on a scale of 1 to 10 by "
    'strictly following this format: "[[rating]]", for example: "Rating: [[5]]".\n\n'
)
_ANSWER = "[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
_CONVERSATION = (
    "<|The Start of Assistant A's Conversation with User|>\n\n### User:\n{question_1}\n\n### Assistant A:\n{answer_1}\n\n"
    "### User:\n{question_2}\n\n### Assistant A:\n{answer_2}\n\n<|The End of Assistant A's Conversation with User|>"
)
_REFERENCES = (
    "<|The Start of Reference Answer|>\n\n### User:\n{question_1}\n\n### Reference answer:\n{ref_answer_1}\n\n"
    "### User:\n{question_2}\n\n### Reference answer:\n{ref_answer_2}\n\n<|The End of Reference Answer|>\n\n\n"
)
# For each turn: without a reference, and with one.
GRADINGS = (
    (
        Grading(
            "single-v1",
            "You are a helpful assistant.",
            f"[Instruction]\n{_ACT} displayed below. {_BY_QUALITY}{_EXPLAIN}{_RATE}[Question]\n{{question}}\n\n{_ANSWER}",
        ),
        Grading(
            "single-math-v1",
            "You are a helpful assistant.",
            f"[Instruction]\n{_ACT} displayed below. {_BY_REFERENCE}{_COMPARE}{_RATE}[Question]\n{{question}}\n\n"
            f"[The Start of Reference Answer]\n{{ref_answer_1}}\n[The End of Reference Answer]\n\n{_ANSWER}",
        ),
    ),
    (
        Grading(
            "single-v1-multi-turn",
            f"{_ACT} displayed below. {_BY_QUALITY}You evaluation should focus on the assistant's answer to the second user "
            f"question. {_EXPLAIN}{_RATE}",
            _CONVERSATION,
        ),
        Grading(
            "single-math-v1-multi-turn",
            f"{_ACT}. {_BY_REFERENCE}You evaluation should focus on the assistant's answer to the second question. "
            f"{_COMPARE}{_RATE}",
            _REFERENCES + _CONVERSATION,
        ),
    ),
)


@dataclass(frozen=True)
class Question:
    """A question, the one that follows it, and reference answers to both, empty where there are none."""

    number: Any
    category: str
    turns: tuple[str, str]
    references: tuple[str, str] = ("", "")


def prepare(request: Request) -> Prepared:
    """Read and check the questions.

    Args:
        request: `data` is a file of questions, or FastChat's folder data/mt_bench, whose reference_answer/ has GPT-4's answers
            to be references; in a file, a row's own `reference` is. `judge` is needed.

    Raises:
        InputError: no judge, a key that cannot be sent, or rows that are no questions.
    """
    judge = request.judge
    if judge is None:
        raise InputError("mt-bench is graded by another model: name its endpoint and the model (--judge-url, --judge-model).")
    if urllib.parse.urlsplit(judge.url).scheme not in ("http", "https"):
        raise InputError(f"The judge's URL {judge.url!r} is none of http or https: write http://localhost:8000/v1.")
    _key(judge)
    if request.prompt_template is not None:
        RowFormat("alpaca", QUESTION_FIELDS, request.prompt_template)
    questions, whose = _questions(request, judge)
    most = request.max_new_tokens or NEW_TOKENS

    def run(loaded: Loaded, ledger: Ledger) -> TaskResult:
        template = request.prompt_template or question_template(loaded)
        for turn in (0, 1):
            _answer(loaded, questions, turn, template, most, request.batch_size, ledger)
        _grade(judge, questions, ledger)
        asked = "the chat template" if template is None else "a prompt template, for the second turn behind the first"
        protocol = (
            "mt-bench: both turns answered greedily (published: temperature 0.7 for writing and roleplay, 0.1 for stem and "
            f"humanities), put by {asked}, at most {most} new tokens; graded from 1 to 10 by {judge.model} with single-v1 and "
            f"single-v1-multi-turn, in {', '.join(WITH_REFERENCE)} with single-math-v1 and single-math-v1-multi-turn, whose "
            f"references are {whose}; mean of all ratings; interval: bootstrap over questions"
        )
        return _result(judge, ledger.ordered, protocol)

    identity = {
        "rows": digest([vars(question) for question in questions]),
        "judge": judge.model,
        "prompt_template": request.prompt_template,
        "max_new_tokens": most,
        "batch_size": request.batch_size,
    }

    def greet() -> None:
        messages = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Say yes."}]
        ask(judge, messages, most=16)

    # each question is answered twice and graded: a record for each step, the last of which stays
    return Prepared(3 * len(questions), identity, run, first=greet)


def _questions(request: Request, judge: Judge) -> tuple[list[Question], str]:
    """The questions, and whose the references are."""
    folder = Path(request.data) if request.data is not None and Path(request.data).is_dir() else None
    if folder is not None:
        request = replace(request, data=str(folder / "question.jsonl"))
    rows = request.rows("mt-bench", SOURCE, SPLIT)
    questions = [_question(row, number) for number, row in enumerate(rows, 1)]
    if folder is None:
        return questions, "the rows' own answers"
    files = [folder / "reference_answer" / f"{name}.jsonl" for name in (judge.model.replace("/", "_"), "gpt-4")]
    file = next((file for file in files if file.is_file()), files[-1])
    try:
        answers: dict[Any, tuple[str, str]] = {}
        for row in read_rows(str(file)):
            first, second = row["choices"][0]["turns"]
            answers[row["question_id"]] = (first, second)
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} holds something else than FastChat's reference answers (question_id, choices).") from error
    return [replace(q, references=answers.get(q.number, ("", ""))) for q in questions], f"the answers of {file.name}"


def _question(row: Record, number: int) -> Question:
    turns: Any = row.get("turns", row.get("prompt"))
    if not _are_two_texts(turns) or not isinstance(row.get("category"), str):
        raise InputError(
            f"mt-bench: row {number} has the fields {', '.join(row) or '(none)'}: its rows have a category and two turns, a "
            "list of texts."
        )
    references: Any = [text or "" for text in row.get("reference") or ("", "")]
    if not _are_two_texts(references):
        raise InputError(
            f"mt-bench: row {number}: the reference {references!r:.60} is no list of two texts: one for each turn."
        )
    names = row.get("question_id", row.get("prompt_id", number))
    return Question(names, row["category"], (turns[0], turns[1]), (references[0], references[1]))


def _are_two_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _answer(
    loaded: Loaded,
    questions: Sequence[Question],
    turn: int,
    template: str | None,
    most: int,
    batch_size: int,
    ledger: Ledger,
) -> None:
    """Answer a turn of all questions, and keep a record of each.

    A second turn that has no room behind the first answer is left empty, and graded so.
    """
    known = {row - 1: record for row, record in ledger.records.items()}
    done = {number for number, record in known.items() if len(record["answers"]) > turn}
    said = [list(known[number]["answers"][:turn]) if turn else [] for number in range(len(questions))]
    prompts = [_prompt(loaded, question.turns[: turn + 1], said[n], template) for n, question in enumerate(questions)]
    room = getattr(loaded.model.config, "max_position_embeddings", None)
    fits = list(range(len(questions)))
    if turn and room:
        lengths = [len(input_tokens(loaded.model, loaded.tokenizer, prompt, opened=template is None)) for prompt in prompts]
        fits = [number for number in fits if lengths[number] < room]

    def kept(number: int, answer: str) -> Record:
        question = questions[number]
        record = {"row": number + 1, "question_id": question.number, "category": question.category}
        return record | {"questions": list(question.turns), "answers": [*said[number], answer]}

    empty = sorted(set(range(len(questions))) - set(fits) - done)
    if empty:
        ledger.add([kept(number, "") | {"too_long": True} for number in empty])
    batches = generate_batches(
        loaded.model,
        loaded.tokenizer,
        [prompts[number] for number in fits],
        max_new_tokens=most,
        batch_size=batch_size,
        opened=template is None,
        done=[place for place, number in enumerate(fits) if number in done],
    )
    for batch in batches:
        answers = {fits[place]: answer.text for place, answer in batch.items()}
        ledger.add([kept(number, answer) for number, answer in answers.items() if number not in done])


def _prompt(loaded: Loaded, questions: Sequence[str], answers: Sequence[str], template: str | None) -> str:
    """Questions and the answers to all but the last.

    By the chat template, where `template` is None; else each question is put into it, and stands behind what was said before
    as a second example stands behind a first.
    """
    if template is None:
        messages = [{"role": "user", "content": questions[0]}]
        for answer, question in zip(answers, questions[1:], strict=True):
            messages += [{"role": "assistant", "content": answer.strip()}, {"role": "user", "content": question}]
        return render(messages, loaded.tokenizer, add_generation_prompt=True)
    row_format = RowFormat("alpaca", QUESTION_FIELDS, template)
    rows = [{"instruction": question, "output": ""} for question in questions]
    put = [row_format.question_and_answer(row, loaded.tokenizer)[0] for row in rows]
    return "".join(f"{before}{answer.rstrip()}\n\n" for before, answer in zip(put[:-1], answers, strict=True)) + put[-1]


def _grade(judge: Judge, questions: Sequence[Question], ledger: Ledger) -> None:
    """Have every question graded that is not yet. What was graded is kept, also if a later request fails."""
    waiting = [record for record in ledger.ordered if "ratings" not in record]
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        graded = [pool.submit(_graded, judge, questions[record["row"] - 1], record) for record in waiting]
        failure: BaseException | None = None
        for future in as_completed(graded):
            if future.cancelled():
                continue
            if (error := future.exception()) is None:
                ledger.add([future.result()])
            elif failure is None:
                failure = error
                for other in graded:
                    other.cancel()
    finally:
        pool.shutdown(cancel_futures=True)
    if failure is not None:
        raise failure


def _graded(judge: Judge, question: Question, record: Record) -> Record:
    """A record with what the judge says of both answers."""
    gradings, judgments = [], []
    answers = [answer.strip() for answer in record["answers"]]
    for turn in (0, 1):
        referred = question.category in WITH_REFERENCE and bool(question.references[turn])
        grading = GRADINGS[turn][referred]
        user = grading.user.format(
            question=question.turns[0],
            answer=answers[0],
            question_1=question.turns[0],
            question_2=question.turns[1],
            answer_1=answers[0],
            answer_2=answers[1],
            ref_answer_1=question.references[0],
            ref_answer_2=question.references[1],
        )
        gradings.append(grading.name)
        judgments.append(ask(judge, [{"role": "system", "content": grading.system}, {"role": "user", "content": user}]))
    return record | {"gradings": gradings, "judgments": judgments, "ratings": [rating(text) for text in judgments]}


def rating(judgment: str) -> float | None:
    """The number that a judgment gives: the first in double brackets, else the first in single ones; None: there is none.

    A number above 10 is none; the original takes it.
    """
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", judgment) or re.search(r"\[(\d+\.?\d*)\]", judgment)
    value = float(found[1]) if found else None
    return value if value is not None and value <= 10 else None


def _result(judge: Judge, records: list[Record], protocol: str) -> TaskResult:
    given = [[value for value in record["ratings"] if value is not None] for record in records]
    if not any(given):
        said = records[0]["judgments"][0]
        raise InputError(f"The judge {judge.model} rated no answer; of the first it said {said!r:.120}: choose another model.")
    metrics: dict[str, float] = {}
    for turn in (0, 1):
        metrics |= _mean(f"turn_{turn + 1}", [record["ratings"][turn] for record in records])
    for category in dict.fromkeys(record["category"] for record in records):
        metrics |= _mean(category, [value for r in records if r["category"] == category for value in r["ratings"]])
    without = sum("math" not in name for r in records if r["category"] in WITH_REFERENCE for name in r["gradings"])
    counts = {"without_reference": without, "too_long": sum(record.get("too_long", False) for record in records)}
    metrics["unparsed"] = float(sum(value is None for record in records for value in record["ratings"]))
    metrics |= {name: float(count) for name, count in counts.items() if count}
    rated = [values for values in given if values]
    interval = bootstrap([sum(values) for values in rated], [float(len(values)) for values in rated])
    score = sum(map(sum, rated)) / sum(map(len, rated))
    return TaskResult("mt-bench", score, interval, len(records), records, metrics, protocol)


def _mean(name: str, values: Sequence[float | None]) -> dict[str, float]:
    rated = [value for value in values if value is not None]
    return {name: sum(rated) / len(rated)} if rated else {}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is for the endpoint that was named, not for another that it points to."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def ask(
    judge: Judge, messages: Sequence[dict[str, str]], wait: Callable[[float], None] = time.sleep, *, most: int = 2048
) -> str:
    """What the judge answers, at temperature 0.

    Tried again, at growing intervals or when the server says, if it is busy or broken or does not answer.

    Args:
        judge: whom to ask.
        messages: {role, content} each.
        wait: passes the time between tries.
        most: tokens of the answer.

    Raises:
        InputError: no answer after `TRIES` tries, or one that refuses the request.
    """
    key = _key(judge)
    body = {"model": judge.model, "messages": list(messages), "temperature": 0, "max_tokens": most}
    headers = {"Content-Type": "application/json", "User-Agent": "bonetune"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    url = f"{judge.url.rstrip('/')}/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310  (http or https, see prepare)
    opener, reason = urllib.request.build_opener(_NoRedirect), ""
    for attempt in range(TRIES):
        pause = PAUSE * 2**attempt
        try:
            with opener.open(request, timeout=TIMEOUT) as answer:
                content = json.loads(answer.read())["choices"][0]["message"]["content"]
            if content is None or isinstance(content, str):
                return content or ""
            reason = f"an answer whose content is no text, {content!r:.60}"
        except urllib.error.HTTPError as error:
            said = _body(error).replace(key, "***") if key else _body(error)
            reason = f"HTTP {error.code}, {' '.join(said.split())[:300] or error.reason}"
            if error.code not in (408, 409, 425, 429) and error.code < 500:
                raise InputError(
                    f"The judge {judge.model} at {url} refuses to answer ({reason}): check its name, the URL and the key in "
                    f"{judge.key_variable}{'' if key else ', which is not set'}."
                ) from None
            later = error.headers.get("Retry-After", "")
            pause = min(float(later), 60.0) if later.isdigit() else pause
        except (OSError, http.client.HTTPException) as error:
            reason = first_line(error)
        except (ValueError, LookupError, TypeError):
            reason = "an answer that is no chat completion"
        if attempt < TRIES - 1:
            wait(pause)
    raise InputError(
        f"The judge {judge.model} at {url} gave no answer in {TRIES} tries (the last: {reason}): see that it runs there. What "
        "was graded is in the output folder, if there is one: go on with --resume."
    )


def _body(error: urllib.error.HTTPError) -> str:
    """What a server says about a refusal."""
    try:
        with error:
            return error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _key(judge: Judge) -> str:
    """The judge's key; empty: none is set. Raises `InputError` if it cannot be sent."""
    key = os.environ.get(judge.key_variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"The key in {judge.key_variable} has signs that no key has: set it anew.")
    return key


TASKS = (Task("mt-bench", prepare, heeds=("prompt_template", "judge")),)
