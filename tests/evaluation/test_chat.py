import json
import threading

import pytest
import torch
import yaml
from conftest import llama
from peft import get_peft_model

from bonetune import BoneConfig, Chat
from bonetune.data import PAPER_PROMPT, prompt_tokens
from bonetune.errors import InputError
from bonetune.models import Loaded, greedy


def render(tokenizer, *messages):
    roles = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(roles, tokenize=False, add_generation_prompt=True)


def answered(loaded, prompt, tokens=12):
    """The greedy answer to a prompt, decoded at once."""
    ids = torch.tensor([prompt_tokens(loaded.tokenizer, prompt)])
    out = greedy(loaded.model, loaded.tokenizer, ids, torch.ones_like(ids), tokens)
    return loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture
def loaded(tokenizer):
    return Loaded(llama(max_position_embeddings=512), tokenizer, "tiny")


@pytest.fixture
def adapted(tokenizer):
    model = get_peft_model(llama(max_position_embeddings=512), BoneConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "bone_block" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return Loaded(model.eval(), tokenizer, "tiny", adapter="nowhere")


def test_the_pieces_are_the_greedy_answer(loaded):
    for question in ("what is one plus two?", "the lazy dog", "fox", "ä"):
        chat = Chat(loaded, max_new_tokens=40)
        pieces = list(chat.ask(question))
        assert len(pieces) > 1
        assert "".join(pieces) == answered(loaded, render(loaded.tokenizer, ("user", question)), 40)


def test_the_conversation_goes_on_until_it_is_reset(loaded):
    chat = Chat(loaded, system="be brief", max_new_tokens=12)
    first = "".join(chat.ask("one"))
    second = "".join(chat.ask("two"))
    so_far = [("system", "be brief"), ("user", "one"), ("assistant", first.strip()), ("user", "two")]
    assert second == answered(loaded, render(loaded.tokenizer, *so_far))
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    assert "".join(chat.ask("one")) == first


def test_without_the_adapter_the_base_model_answers(adapted, loaded):
    both = [Chat(adapted, adapter=adapter, max_new_tokens=12) for adapter in (True, False)]
    answers = ["".join(chat.ask("the quick brown fox")) for chat in both]
    assert answers[1] == "".join(Chat(loaded, max_new_tokens=12).ask("the quick brown fox"))
    assert answers[0] == answered(adapted, render(adapted.tokenizer, ("user", "the quick brown fox")))
    assert answers[0] != answers[1]


@pytest.mark.parametrize("taken", [1, 2])
def test_an_answer_that_is_stopped_stays_as_far_as_it_was_shown(loaded, taken):
    chat = Chat(loaded, max_new_tokens=200)
    before = threading.active_count()
    pieces = chat.ask("one plus two")
    shown = "".join(next(pieces) for _ in range(taken))
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": shown.strip()}
    assert threading.active_count() == before
    assert list(chat.ask("and then?"))


def test_an_interruption_stops_the_model(loaded, monkeypatch):
    """What Ctrl-C does: KeyboardInterrupt is raised while the next piece is waited for."""
    chat = Chat(loaded, max_new_tokens=400)
    steps = []
    hook = loaded.model.register_forward_hook(lambda *_: steps.append(1))
    pieces = chat.ask("one plus two")
    first = next(pieces)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)
    hook.remove()
    assert len(steps) < 400
    assert chat.messages[-1]["content"] == first.strip()


def test_an_error_while_answering_is_raised_and_leaves_the_conversation(loaded, monkeypatch):
    chat = Chat(loaded)
    monkeypatch.setattr(loaded.model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(chat.ask("one"))
    assert chat.messages == []


def test_a_temperature_draws_and_a_small_one_does_not(loaded):
    def answers(temperature):
        found = set()
        for seed in range(4):
            torch.manual_seed(seed)
            found.add("".join(Chat(loaded, max_new_tokens=8, temperature=temperature).ask("one")))
        return found

    assert answers(1e-4) == answers(0.0)
    assert len(answers(0.0)) == 1
    assert len(answers(1.5)) == 4
    torch.manual_seed(0)
    again = "".join(Chat(loaded, max_new_tokens=8, temperature=1.5).ask("one"))
    assert again in answers(1.5)


def test_without_a_chat_template_questions_stand_for_themselves(loaded):
    loaded.tokenizer.chat_template = None
    chat = Chat(loaded, max_new_tokens=12)
    list(chat.ask("one"))
    assert "".join(chat.ask("two")) == answered(loaded, PAPER_PROMPT.replace("{instruction}", "two"))
    assert "".join(Chat(loaded, prompt_template="Q {instruction} A", max_new_tokens=12).ask("two")) == answered(
        loaded, "Q two A"
    )
    with pytest.raises(InputError, match="system message needs the tokenizer's chat template"):
        Chat(loaded, system="be brief")


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"dataset_field": ["q", "a"], "prompt_template": "Q {instruction} A"}, "Q {instruction} A"),
        ({"dataset_format": "alpaca", "prompt_template": "Q {instruction} A"}, "Q {instruction} A"),
        ({"dataset_field": None, "prompt_template": "Q {instruction} A"}, None),
    ],
)
def test_an_adapter_is_asked_as_it_was_trained(adapted, tmp_path, run, expected):
    adapted.model.save_pretrained(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    loaded = Loaded(adapted.model, adapted.tokenizer, "tiny", adapter=str(tmp_path))
    assert Chat(loaded).prompt_template == expected
    loaded.tokenizer.chat_template = None
    assert Chat(loaded).prompt_template == run["prompt_template"]


@pytest.mark.parametrize(
    ("row_format", "expected"),
    [
        ({"kind": "instruction", "fields": ["q", "a"]}, "Q {instruction} A"),
        ({"kind": "alpaca", "fields": ["instruction", "input", "output"]}, "Q {instruction} A"),
        ({"kind": "prompt-completion", "fields": ["prompt", "completion"]}, "{instruction}"),
        ({"kind": "prompt-completion", "fields": ["prompt", "completion"], "conversational": True}, None),
        ({"kind": "messages", "fields": ["messages"]}, None),
        ({"kind": "sharegpt", "fields": ["conversations"]}, None),
    ],
)
def test_what_auto_found_is_read_from_the_summary(adapted, tmp_path, row_format, expected):
    run = {"dataset_format": "auto", "dataset_field": None, "prompt_template": "Q {instruction} A"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "summary.json").write_text(json.dumps({"row_format": row_format}))
    chat = Chat(Loaded(adapted.model, adapted.tokenizer, "tiny", adapter=str(tmp_path)), max_new_tokens=4)
    assert chat.prompt_template == expected
    if row_format["kind"] == "prompt-completion" and expected:
        assert "".join(chat.ask("one plus two")) == answered(adapted, "one plus two", 4)


def test_a_model_s_room_is_not_exceeded(tokenizer):
    small = Loaded(llama(max_position_embeddings=24), tokenizer, "tiny")
    chat = Chat(small, prompt_template="{instruction}")
    prompt = prompt_tokens(tokenizer, "one plus two")
    steps = []
    hook = small.model.register_forward_hook(lambda *_: steps.append(1))
    list(chat.ask("one plus two"))
    hook.remove()
    assert len(prompt) + len(steps) == 24  # it does not end by itself before
    with pytest.raises(InputError, match=r"is of \d+ tokens, and tiny takes 24: begin a new one"):
        list(chat.ask("fox " * 40))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens should be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature should be 0 .* got -1.0"),
        ({"temperature": float("nan")}, "temperature should be 0"),
        ({"adapter": False}, "tiny is a model without an adapter"),
        ({"prompt_template": "no place"}, "lacks {instruction}"),
    ],
)
def test_wrong_settings_are_one_clear_error(loaded, settings, message):
    with pytest.raises(InputError, match=message):
        Chat(loaded, **settings)


def test_a_classifier_has_nothing_to_say(loaded):
    with pytest.raises(InputError, match="tiny is of the task SEQ_CLS"):
        Chat(Loaded(loaded.model, loaded.tokenizer, "tiny", task_type="SEQ_CLS"))


def test_wrong_questions_are_one_clear_error(loaded):
    chat = Chat(loaded)
    with pytest.raises(InputError, match="An empty question"):
        list(chat.ask(" \n"))
    loaded.tokenizer.chat_template = "{{ raise_exception('not so') }}"
    with pytest.raises(InputError, match=r"refuses a conversation of user.*not so"):
        list(chat.ask("one"))
    assert chat.messages == []


def test_a_folder_s_name_is_enough(model_folder):
    assert list(Chat(str(model_folder), max_new_tokens=4).ask("one"))
    assert json.dumps(Chat(str(model_folder)).messages) == "[]"
