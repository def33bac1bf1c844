"""Chat templates as models of several families have them, written anew, and conversations to render."""

USER, ASSISTANT = "{% if m.role == 'user' %}", "{% elif m.role == 'assistant' %}"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
CHATML_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ALTERNATE = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
WITHOUT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML + CHATML_END,
    "chatml, default system prompt": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        + CHATML
        + CHATML_END
    ),
    "llama 3": (
        "{% for m in messages %}{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim "
        "+ '<|eot_id|>' %}{{ (bos_token if loop.first else '') + text }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "llama 3.1, constant in every system message": (
        "{{ bos_token }}"
        + WITHOUT_SYSTEM
        + "{{ '<|start_header_id|>system<|end_header_id|>\n\nKnowledge until: 2023\n\n' + (system or '') + '<|eot_id|>' }}"
        "{% for m in rest %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
        "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
    "llama 2": (
        WITHOUT_SYSTEM
        + "{% for m in rest %}"
        + ALTERNATE
        + "{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content if loop.first and system else m.content %}"
        + USER
        + "{{ bos_token + '[INST] ' + text + ' [/INST]' }}{% else %}{{ ' ' + text + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral, no system messages": (
        "{{ bos_token }}{% for m in messages %}"
        + ALTERNATE
        + USER
        + "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token + ' ' }}{% endif %}{% endfor %}"
    ),
    "mistral, system prompt in the last message": (
        WITHOUT_SYSTEM
        + "{{ bos_token }}{% for m in rest %}"
        + USER
        + "{{ '[INST] ' + (system + '\n\n' if loop.last and system else '') + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "gemma, no system messages": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
        "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "gemma 3, system prompt in the first message": (
        "{{ bos_token }}"
        + WITHOUT_SYSTEM
        + "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
        "+ (system + '\n\n' if loop.first and system else '') + m.content + '<end_of_turn>\n' }}{% endfor %}"
        "{{ '<start_of_turn>model\n' }}"
    ),
    "phi 3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "vicuna, default system prompt": (
        WITHOUT_SYSTEM
        + "{{ (system or 'A curious user talks with an assistant.') + ' ' }}{% for m in rest %}"
        + USER
        + "{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
        "ASSISTANT:"
    ),
}
WITH_DEFAULT = {
    "chatml, default system prompt": "You are a helpful assistant.",
    "vicuna, default system prompt": "A curious user talks with an assistant.",
}
OTHERS = {
    "upper case": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "numbered": "{% for m in messages %}{{ loop.index ~ m.role ~ m.content }}{% endfor %}",
    "the last alone": "{{ messages[-1].content }}",
    "longer after the fifth": "{% for m in messages %}{{ m.role ~ m.content ~ ('!' if loop.index > 4 else '') }}{% endfor %}",
    "braces of Go": "{% for m in messages %}{{ '{' ~ '{' ~ m.role ~ '}' ~ '}' ~ m.content }}{% endfor %}",
}


def conversations():
    """Lists of messages that end with a user's, with and without a system prompt. Their texts are hard on templates."""
    texts = ["hello", "0", "a\n\nb <|x|> [INST]", 'quotes " and {{ braces }}', "日本語 🚀", "x", "yes"]
    for turns in (1, 3, 5, 7):
        messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": texts[i]} for i in range(turns)]
        yield messages
        yield [{"role": "system", "content": "Be brief.\n- and kind"}, *messages]
