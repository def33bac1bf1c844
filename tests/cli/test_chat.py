"""`bonetune chat` from outside: a terminal is played by a stream that says it is one."""

import io
import json
import sys

import pytest
import torch
from conftest import llama
from peft import get_peft_model

from bonetune import BoneConfig
from bonetune_cli.main import main


@pytest.fixture
def adapter(tmp_path, model_folder):
    base = llama()
    base.name_or_path = base.config._name_or_path = str(model_folder)
    model = get_peft_model(base, BoneConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "bone_block" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def run(monkeypatch, capsys):
    """Call `bonetune chat` with what is typed: (standard output, standard error), after checking the exit code."""

    def call(*arguments, typed="", code=0):
        monkeypatch.setattr(sys, "argv", ["bonetune", "chat", *map(str, arguments), "--max-new-tokens", "6"])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed) if isinstance(typed, str) else typed)
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert (stop.value.code or 0) == code, captured
        return captured

    return call


class Terminal(io.StringIO):
    def isatty(self):
        return True


def answers(text):
    return [json.loads(line) for line in text.splitlines()]


def test_lines_are_questions_of_one_conversation(adapter, run):
    typed = "one plus two\n\n  the fox \n/reset\none plus two\n/quit\nnever\n"
    first, second, again = answers(run(adapter, "--json", typed=typed).out)
    assert [first["prompt"], second["prompt"]] == ["one plus two", "the fox"]
    assert again == first
    (fresh,) = answers(run(adapter, "--json", "--prompt", "the fox").out)
    assert fresh["answer"] != second["answer"]


def test_comparing_shows_both(adapter, run, model_folder):
    (both,) = answers(run(adapter, "--json", "--compare", "--prompt", "one plus two").out)
    (alone,) = answers(run(model_folder, "--json", "--prompt", "one plus two").out)
    assert both["answer_without_adapter"] == alone["answer"]
    assert both["answer"] != alone["answer"]
    shown = run(adapter, "--compare", "--prompt", "one plus two").out
    assert shown.index("with the adapter:") < shown.index("without it:")


def test_a_terminal_is_greeted_and_errors_do_not_end_it(adapter, run, monkeypatch):
    typed = iter(["/help", "fox " * 200, "one plus two"])

    def type_one(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_one)
    shown = run(adapter, typed=Terminal())
    assert "questions are put by the chat template" in shown.err
    assert shown.err.count("/reset begins a new conversation") == 2
    assert "bonetune: The conversation is of" in shown.err
    assert len(shown.out.splitlines()) >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--compare"], "is a model without an adapter"),
        (["{model}", "--prompt", " "], "An empty question"),
        (["{model}", "--prompt", "one", "--prompt-template", "none"], "lacks {instruction}"),
        (["./nowhere", "--prompt", "one"], "does not exist"),
        (["{model}", "--base", "{model}"], "so it takes no base model"),
        (["{model}", "--dtype", "int3"], "Unknown dtype 'int3'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(model_folder, run, arguments, message):
    done = run(*(argument.replace("{model}", str(model_folder)) for argument in arguments), code=2)
    assert message in done.err
    assert len([line for line in done.err.splitlines() if line.startswith("bonetune: ")]) == 1
    assert done.out == ""


def test_control_characters_of_an_answer_do_not_reach_the_terminal(model_folder, run, monkeypatch):
    monkeypatch.setattr("bonetune.evaluation.chat.Chat.ask", lambda self, question: (piece for piece in ("a\x1b[2J", "b\n\tc")))
    assert run(model_folder, "--prompt", "one").out == "a�[2Jb\n\tc\n"


def test_an_interruption_ends_the_answer_alone(adapter, run, monkeypatch):
    def ask(self, question):
        yield "begun"
        raise KeyboardInterrupt

    monkeypatch.setattr("bonetune.evaluation.chat.Chat.ask", ask)
    assert run(adapter, typed="one\ntwo\n").out == "begun [stopped]\nbegun [stopped]\n"
