"""Small chat templates that write tools in the style of each family, and tokenizers with them."""

from typing import Any

from agentrl.policy.tokens import fit_tokenizer

_REPLY = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Hermes and Qwen: declarations in the system message, results in the user's.
HERMES = (
    "{% if tools %}<|im_start|>system\nTools:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Call one within <tool_call></tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% elif m.tool_calls %}<|im_start|>assistant{% for c in m.tool_calls %}{{ '\n' }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + _REPLY
)
# Llama 3: declarations before the first observation, bare JSON with "parameters", results as JSON strings.
LLAMA = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>ipython\n{{ m.content | tojson }}<|im_end|>"
    "{% elif m.tool_calls %}<|im_start|>assistant\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|im_end|>'
    "{% else %}<|im_start|>{{ m.role }}\n{% if loop.first and tools %}Reply with JSON for a call.\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}" + _REPLY
)
_MISTRAL = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('wanted an id of 9 characters') }}{% endif %}"
    '[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% elif m.tool_calls %}{% set c = m.tool_calls[0] %}CALL<|im_end|>"
    "{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>"
    "{% else %}{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]{% endif %}{% endfor %}"
)
# Mistral: a list of calls with ids after a token, in the second form the name before the arguments.
MISTRAL = _MISTRAL.replace(
    "CALL",
    '[TOOL_CALLS] [{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}]',
)
MISTRAL_ARGS = _MISTRAL.replace(
    "CALL", "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
)
CHATML = (  # knows no tools
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + _REPLY
)
FAMILIES = {
    "hermes": HERMES,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mistral-args": MISTRAL_ARGS,
    "none": CHATML,
}
_MARKUP = ("<|im_start|>", "<|im_end|>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[INST]", "[/INST]")
_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_TEXTS = ["take mug 1 from desk 1", "You see a mug 1 and a desk 1.", '{"name": "act", "arguments": {}}']


def chat_tokenizer(template: str, *, tokens: bool = True) -> Any:
    """Return a tokenizer with a template; with `tokens`, the tags of calls are tokens of their own."""
    tokenizer: Any = fit_tokenizer(_TEXTS * 4, 400)
    tokenizer.add_tokens(list(_MARKUP if tokens else _MARKUP[:2]), special_tokens=True)
    if tokens:
        tokenizer.add_tokens(list(_TAGS))
    tokenizer.chat_template = template
    return tokenizer
