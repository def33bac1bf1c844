import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import rwkv_models
from conftest import llama

import bonetune
from bonetune.data import PAPER_PROMPT
from bonetune.errors import InputError
from bonetune.evaluation import mt_bench
from bonetune.evaluation.ledger import Ledger
from bonetune.evaluation.task import Judge, Request
from bonetune.models import Loaded, generate, generate_batches
from bonetune.rwkv import WorldTokenizer

KEY = "sk-very-secret"
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["the quick brown fox", "the lazy dog"]},
    {"question_id": 111, "category": "math", "turns": ["what is one plus two?", "and three?"], "reference": ["3", "6"]},
    {"question_id": 103, "category": "reasoning", "turns": ["user", "system {x}"], "reference": ["because", ""]},
    {"question_id": 95, "category": "roleplay", "turns": ["a", "assistant jumps"], "reference": ["never shown", "nor this"]},
]


class StandIn:
    """An endpoint that notes what it is asked and answers what `script` says: (status, body, headers) by turns, else a text."""

    def __init__(self, rate=lambda content: "Fine. Rating: [[7]]"):
        self.requests, self.headers, self.script, self.rate, self.delay = [], [], [], rate, 0.0
        stand_in, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    stand_in.requests.append((self.path, body))
                    stand_in.headers.append(dict(self.headers))
                    said = stand_in.script.pop(0) if stand_in.script else None
                time.sleep(stand_in.delay)
                content = stand_in.rate(body["messages"][1]["content"])
                status, text, headers = said or (200, json.dumps({"choices": [{"message": {"content": content}}]}), {})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                with contextlib.suppress(OSError):  # whoever asked may have gone
                    self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.judge = Judge(f"http://127.0.0.1:{self.server.server_port}/v1", "grader", "A_KEY")
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def endpoint(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("A_KEY", KEY)
    monkeypatch.setattr(mt_bench, "PAUSE", 0.001)
    made = StandIn()
    yield made
    made.close()


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return str(path)


def run(model, tokenizer, judge, data, file=None, adapter=None, **request):
    prepared = mt_bench.prepare(Request(**({"data": data, "judge": judge, "batch_size": 2, "max_new_tokens": 5} | request)))
    told = []
    ledger = Ledger(prepared.items, lambda done, total: told.append((done, total)), file)
    result = prepared.run(Loaded(model, tokenizer, "base", adapter), ledger)
    assert told[-1] == (prepared.items, prepared.items)
    return result


def test_the_published_wording():
    """Digests of system prompt and template in FastChat's judge_prompts.jsonl."""
    found = {
        grading.name: hashlib.sha256(f"{grading.system}\0{grading.user}".encode()).hexdigest()
        for of_turn in mt_bench.GRADINGS
        for grading in of_turn
    }
    assert found == {
        "single-v1": "7d276fe1d4b3f18f09cee44c27895d39be8ee425fdb364476fa66171dc5c5180",
        "single-math-v1": "226191a3df0fe7a9bc4c09ff94caefec3a8dc2ee418df85210c1080932bb0122",
        "single-v1-multi-turn": "a91a5b4266b4e3774f6408c1b0b05de1202843b72b58925710a9efa56b3fa636",
        "single-math-v1-multi-turn": "572e5843611206971e4b74650e66420ea57fef99e1f59d180c5e64e8442eb9b3",
    }


def test_answers_and_what_the_judge_is_asked(endpoint, tokenizer, data):
    model = llama()
    result = run(model, tokenizer, endpoint.judge, data)
    turns = [row["turns"] for row in QUESTIONS]

    def asked(messages):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    settings = {"max_new_tokens": 5, "batch_size": 2, "opened": True}
    users = [[{"role": "user", "content": first}] for first, _ in turns]
    firsts = generate(model, tokenizer, [asked(messages) for messages in users], **settings)
    second = [
        [*messages, {"role": "assistant", "content": answer.strip()}, {"role": "user", "content": question}]
        for messages, answer, (_, question) in zip(users, firsts, turns, strict=True)
    ]
    seconds = generate(model, tokenizer, [asked(messages) for messages in second], **settings)
    answers = list(zip(firsts, seconds, strict=True))
    assert [tuple(record["answers"]) for record in result.records] == answers
    assert any(answer.strip() for answer in firsts)

    assert {path for path, _ in endpoint.requests} == {"/v1/chat/completions"}
    assert {headers["Authorization"] for headers in endpoint.headers} == {f"Bearer {KEY}"}
    assert KEY not in json.dumps([result.summary(), result.records])
    bodies = [body for _, body in endpoint.requests]
    assert all(
        {name: body[name] for name in body if name != "messages"} == {"model": "grader", "temperature": 0, "max_tokens": 2048}
        for body in bodies
    )
    assert all([message["role"] for message in body["messages"]] == ["system", "user"] for body in bodies)
    contents = [body["messages"][1]["content"] for body in bodies]
    assert len(contents) == 2 * len(QUESTIONS)
    for row, given, record in zip(QUESTIONS, answers, result.records, strict=True):
        one, two = (answer.strip() for answer in given)
        of_row = [content for content in contents if f"\n{row['turns'][0]}\n" in content]
        (first,) = (content for content in of_row if content.startswith("[Instruction]"))
        (both,) = (content for content in of_row if not content.startswith("[Instruction]"))
        assert f"[The Start of Assistant's Answer]\n{one}\n[The End" in first
        assert f"### Assistant A:\n{one}\n\n### User:\n{row['turns'][1]}\n\n### Assistant A:\n{two}\n\n<|The End" in both
        referred = {"math": (True, True), "reasoning": (True, False)}.get(row["category"], (False, False))
        assert ("Reference Answer" in first, "Reference Answer" in both) == referred
        if referred[0]:
            assert f"[The Start of Reference Answer]\n{row['reference'][0]}\n[The End" in first
        names = [f"single-{'math-' if by else ''}v1{'-multi-turn' if turn else ''}" for turn, by in enumerate(referred)]
        assert record["gradings"] == names
    assert result.score == 7
    assert result.metrics["without_reference"] == 1
    assert "graded from 1 to 10 by grader" in result.protocol


def test_scores(endpoint, tokenizer, data):
    """The judge writes its ratings in several ways, and one not at all."""
    said = {
        ("the quick brown fox", 1): "Rating: [[9]]", ("the quick brown fox", 2): "I give it [8.5] of 10.",
        ("what is one plus two?", 1): "[[10]] and not [[3]]", ("what is one plus two?", 2): "[1] said, yet [[2.]]",
        ("user", 1): "Rating: 7", ("user", 2): "see [2023]", ("a", 1): "[[0.5]]", ("a", 2): "[[4]]",
    }  # fmt: skip

    def rate(content):
        turn = 1 if content.startswith("[Instruction]") else 2
        return next(text for (question, of_turn), text in said.items() if of_turn == turn and f"\n{question}\n" in content)

    endpoint.rate = rate
    result = run(llama(), tokenizer, endpoint.judge, data)
    ratings = [record["ratings"] for record in result.records]
    assert ratings == [[9, 8.5], [10, 2], [None, None], [0.5, 4]]
    assert result.records[2]["judgments"] == ["Rating: 7", "see [2023]"]
    assert result.score == pytest.approx((9 + 8.5 + 10 + 2 + 0.5 + 4) / 6)
    assert result.items == 4
    means = {"turn_1": 19.5 / 3, "turn_2": 14.5 / 3, "writing": 8.75, "math": 6, "roleplay": 2.25}
    assert result.metrics == pytest.approx(means | {"unparsed": 2, "without_reference": 1})
    assert result.interval[0] <= result.score <= result.interval[1]
    endpoint.rate = lambda content: "no number"
    with pytest.raises(InputError, match="The judge grader rated no answer; of the first it said 'no number'"):
        run(llama(), tokenizer, endpoint.judge, data)


@pytest.mark.parametrize(
    ("text", "value"),
    [("[[5]]", 5), ("[[5.5]] [[6]]", 5.5), ("[3] [[4]]", 4), ("[3]", 3), ("[[11]]", None), ("[[rating]]", None), ("", None)],
)
def test_ratings(text, value):
    assert mt_bench.rating(text) == value


def test_without_a_chat_template_the_second_turn_stands_behind_the_first(endpoint, tokenizer, data):
    model, tokenizer.chat_template = llama(max_position_embeddings=1024), None
    result = run(model, tokenizer, endpoint.judge, data)
    for row, record in zip(QUESTIONS, result.records, strict=True):
        first, second = (PAPER_PROMPT.replace("{instruction}", question) for question in row["turns"])
        (answer,) = generate(model, tokenizer, [first], max_new_tokens=5)
        assert record["answers"][0] == answer
        (answer,) = generate(model, tokenizer, [f"{first}{answer.rstrip()}\n\n{second}"], max_new_tokens=5)
        assert record["answers"][1] == answer
    given = run(model, tokenizer, endpoint.judge, data, prompt_template="{instruction}!")
    (answer,) = generate(model, tokenizer, [f"{QUESTIONS[0]['turns'][0]}!"], max_new_tokens=5)
    assert given.records[0]["answers"][0] == answer


def test_rwkv(endpoint, data):
    model, tokenizer = rwkv_models.model("x070", vocab_size=65536), WorldTokenizer()
    result = run(model, tokenizer, endpoint.judge, data)
    one, two = result.records[0]["answers"]
    first, second = QUESTIONS[0]["turns"]
    assert one == generate(model, tokenizer, [f"User: {first}\n\nAssistant:"], max_new_tokens=5)[0]
    prompt = f"User: {first}\n\nAssistant: {one.strip()}\n\nUser: {second}\n\nAssistant:"
    assert two == generate(model, tokenizer, [prompt], max_new_tokens=5)[0]


def test_a_second_turn_without_room_is_empty_and_graded(endpoint, tokenizer, tmp_path):
    long = "the quick brown fox jumps over the lazy dog " * 7
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps(QUESTIONS[0] | {"turns": ["a", long]}) + "\n" + json.dumps(QUESTIONS[1]) + "\n")
    result = run(llama(max_position_embeddings=80), tokenizer, endpoint.judge, str(path))
    assert result.records[0]["answers"][1] == ""
    assert result.metrics["too_long"] == 1
    assert len(endpoint.requests) == 4


@pytest.mark.parametrize("steps", range(1, 8))
def test_resuming_asks_only_for_what_is_missing(endpoint, tokenizer, data, tmp_path, monkeypatch, steps):
    """Two batches of first answers, two of second ones, then one step for each question that is graded."""
    whole, model = run(llama(), tokenizer, endpoint.judge, data), llama()
    file, add, taken = tmp_path / "mt-bench.jsonl", Ledger.add, []

    def add_or_be_killed(self, records):
        add(self, records)
        taken.append(records)
        if len(taken) == steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Ledger, "add", add_or_be_killed)
        with pytest.raises(KeyboardInterrupt):
            run(model, tokenizer, endpoint.judge, data, file)
    lines = file.read_text().splitlines()
    assert len(lines) == 2 * min(steps, 4) + max(steps - 4, 0)
    with file.open("a") as torn:
        torn.write('{"row": 4, "rat')
    endpoint.requests.clear()
    batches = []
    monkeypatch.setattr(mt_bench, "generate_batches", lambda *a, **k: map(noted(batches), generate_batches(*a, **k)))
    again = run(model, tokenizer, endpoint.judge, data, file)
    assert again == whole
    assert len(batches) == 4 - min(steps, 4)
    assert len(endpoint.requests) == 2 * (4 - max(steps - 4, 0))


def noted(values):
    return lambda value: values.append(value) or value


def chat(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}), {}


MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def test_the_judge_is_asked_again(endpoint):
    waited = []
    endpoint.script = [
        (429, "slow down", {"Retry-After": "7"}),
        (500, "", {}),
        (200, "{garbage", {}),
        (200, json.dumps({"choices": []}), {}),
        (200, json.dumps({"choices": [{"message": {"content": ["text"]}}]}), {}),
        chat("[[5]]"),
    ]
    assert mt_bench.ask(endpoint.judge, MESSAGES, waited.append) == "[[5]]"
    assert waited == [7.0, 0.002, 0.004, 0.008, 0.016]
    endpoint.script = [chat(None)]
    assert mt_bench.ask(endpoint.judge, MESSAGES) == ""


def test_an_endpoint_that_fails_always(endpoint, tokenizer, data, tmp_path):
    endpoint.script = [(500, f"broken, {KEY}", {})] * 100
    url = re.escape(f"{endpoint.judge.url}/chat/completions")
    with pytest.raises(
        InputError, match=rf"The judge grader at {url} gave no answer in 6 tries \(the last: HTTP 500, broken, \*\*\*\)"
    ):
        mt_bench.ask(endpoint.judge, MESSAGES)
    assert len(endpoint.requests) == 6
    endpoint.script = [(200, "<html>", {})] * 6
    with pytest.raises(InputError, match="the last: an answer that is no chat completion"):
        mt_bench.ask(endpoint.judge, MESSAGES)
    file = tmp_path / "kept.jsonl"
    endpoint.script = [(500, "", {})] * 100
    with pytest.raises(InputError, match="go on with --resume"):
        run(llama(), tokenizer, endpoint.judge, data, file)
    assert len(file.read_text().splitlines()) == 8  # both answers to each


def test_an_endpoint_that_is_slow(endpoint, monkeypatch):
    monkeypatch.setattr(mt_bench, "TIMEOUT", 0.05)
    monkeypatch.setattr(mt_bench, "TRIES", 2)
    endpoint.delay = 0.3
    with pytest.raises(InputError, match=r"gave no answer in 2 tries \(the last: .*timed out"):
        mt_bench.ask(endpoint.judge, MESSAGES)


def test_no_endpoint(endpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        InputError, match=rf"http://127.0.0.1:{port}/v1/chat/completions gave no answer in 6 .*see that it runs"
    ):
        mt_bench.ask(Judge(f"http://127.0.0.1:{port}/v1/", "grader"), MESSAGES)


def test_an_endpoint_that_refuses(endpoint, monkeypatch):
    endpoint.script = [(401, f'{{"error": "Incorrect key {KEY}"}}', {})]
    with pytest.raises(InputError, match=r"refuses to answer .*HTTP 401, .*key \*\*\*.*the key in A_KEY") as caught:
        mt_bench.ask(endpoint.judge, MESSAGES)
    assert KEY not in str(caught.value)
    elsewhere = StandIn()
    endpoint.script = [(307, "", {"Location": f"{elsewhere.judge.url}/chat/completions"})]
    with pytest.raises(InputError, match="HTTP 307"):
        mt_bench.ask(endpoint.judge, MESSAGES)
    assert not elsewhere.requests
    elsewhere.close()
    assert len(endpoint.requests) == 2
    monkeypatch.delenv("A_KEY")
    endpoint.script = [(404, "no such model", {})]
    with pytest.raises(InputError, match="the key in A_KEY, which is not set"):
        mt_bench.ask(endpoint.judge, MESSAGES)
    assert "Authorization" not in endpoint.headers[-1]


def test_the_hubs_fields_and_fastchats_folder(endpoint, tokenizer, tmp_path):
    folder = tmp_path / "mt_bench"
    (folder / "reference_answer").mkdir(parents=True)
    rows = [{name: value for name, value in row.items() if name != "reference"} for row in QUESTIONS]
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"question_id": row["question_id"], "choices": [{"turns": ["ref one", "ref two"]}]} for row in QUESTIONS[1:3]]
    file = folder / "reference_answer" / "gpt-4.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in answers))
    result = run(llama(), tokenizer, endpoint.judge, str(folder))
    assert "without_reference" not in result.metrics
    assert "whose references are the answers of gpt-4.jsonl" in result.protocol
    assert sum("ref two" in body["messages"][1]["content"] for _, body in endpoint.requests) == 2
    file.write_text('{"question": 1}\n')
    with pytest.raises(InputError, match="holds something else than FastChat's reference answers"):
        run(llama(), tokenizer, endpoint.judge, str(folder))
    hub = tmp_path / "hub.jsonl"
    hub.write_text(json.dumps({"prompt_id": 5, "category": "math", "prompt": ["a", "b"], "reference": []}) + "\n")
    assert run(llama(), tokenizer, endpoint.judge, str(hub)).records[0]["question_id"] == 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "row 1 has the fields question: its rows have a category and two turns"),
        ({"category": "math", "turns": ["a"]}, "row 1 has the fields category, turns"),
        ({"category": "math", "turns": ["a", "b"], "reference": ["c"]}, "the reference .* is no list of two texts"),
    ],
)
def test_rows_that_are_no_questions(endpoint, tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        mt_bench.prepare(Request(data=str(path), judge=endpoint.judge))


def test_what_is_needed_before_a_model_is_loaded(endpoint, data, monkeypatch):
    with pytest.raises(InputError, match="is graded by another model: name its endpoint"):
        mt_bench.prepare(Request(data=data))
    with pytest.raises(InputError, match="The judge's URL 'localhost:8000' is none of http or https"):
        mt_bench.prepare(Request(data=data, judge=Judge("localhost:8000", "grader")))
    with pytest.raises(InputError, match=r"lacks \{instruction\}"):
        mt_bench.prepare(Request(data=data, judge=endpoint.judge, prompt_template="Q:"))
    monkeypatch.setenv("A_KEY", "two\nlines")
    with pytest.raises(InputError, match="The key in A_KEY has signs that no key has") as caught:
        mt_bench.prepare(Request(data=data, judge=endpoint.judge))
    assert "two" not in str(caught.value)
    monkeypatch.setenv("A_KEY", KEY)
    prepared = mt_bench.prepare(Request(data=data, judge=endpoint.judge, limit=2))
    assert prepared.items == 6
    assert KEY not in json.dumps(prepared.identity)


def test_a_judge_that_is_not_there_is_told_of_before_the_model_is_asked(endpoint, tokenizer, data, monkeypatch, tmp_path):
    endpoint.script = [(404, "no such model", {})]
    told = {"data": data, "judge": endpoint.judge, "output_dir": str(tmp_path / "out"), "max_new_tokens": 5, "resume": True}
    with monkeypatch.context() as unasked:
        unasked.setattr(mt_bench, "generate_batches", None)
        with pytest.raises(InputError, match=r"refuses to answer .*HTTP 404"):
            bonetune.evaluate(Loaded(llama(), tokenizer, "m"), ["mt-bench"], **told)
    assert [body["max_tokens"] for _, body in endpoint.requests] == [16]
    first = bonetune.evaluate(Loaded(llama(), tokenizer, "m"), ["mt-bench"], **told)
    asked = len(endpoint.requests)
    assert bonetune.evaluate(Loaded(llama(), tokenizer, "m"), ["mt-bench"], **told) == first
    assert len(endpoint.requests) == asked  # what is finished needs no judge
