"""Small chat templates in the shapes that large ones have: how the generation prompt and an answer meet."""

from __future__ import annotations

USER = "{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% elif m.role == 'system' %}{{ m.content }}{% endif %}"
R1 = (
    "{{ bos_token }}{% for m in messages %}" + USER + "{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
"""Opens a thought, and drops the thoughts of all answers."""
TURN = "'<|im_start|>' + m.role + '\n' + "
EMPTY_THOUGHT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content %}"
    "{% if '<think>' not in c and '</think>' not in c %}{% set c = '<think></think>' + c %}{% endif %}"
    "{% if not loop.last and '</think>' in c %}{% set c = '<think></think>' + c.split('</think>')[-1] %}{% endif %}"
    "{{ " + TURN + "c + '<|im_end|>\n' }}{% else %}{{ " + TURN + "m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""Opens a thought, and writes an empty one in other white space (Nemotron)."""
CLOSING_TAG = (
    "{% for m in messages %}" + USER + "{% if m.role == 'assistant' %}{% set c = m.content %}{{ '<|assistant|>' }}"
    "{% if loop.last and '</think>' in c %}"
    "{{ '<think>' + c.split('</think>')[0].split('<think>')[-1].strip() }}{% endif %}"
    "{{ '</think>' + c.split('</think>')[-1].strip() }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)
"""Opens a thought, and writes the closing tag alone before an answer without one (GLM-4.7)."""
TWO_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""Closes the opened thought at once, and writes that of the content behind it (Qwen3.8)."""
DROPS = R1.replace("<think>\n", "")
"""Opens no thought, and drops those of all answers, the last one's too (the first R1 distillates)."""
CLOSED_THOUGHT = (
    "{% for m in messages %}{% set c = m.content %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in c %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% if m.role == 'assistant' and not loop.last %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
"""Closes a thought in the generation prompt (Qwen3.5 without thinking)."""
ALWAYS_CLOSED = CLOSED_THOUGHT.replace(" and loop.last and '</think>' not in c", "")
"""Closes a thought in the generation prompt and in every answer (SmolLM3 with `/no_think`)."""
OTHER_WORDS = (
    "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
"""Begins an answer with a space where the generation prompt has a line break."""
LINE_BREAKS = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n\n' + m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n\n' }}{% endif %}"
)
"""Ends a prompt with what GPT-2's rule splits in another way once an answer follows; the first has no control token."""
NO_PROMPT = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
"""Has no generation prompt, so that a model writes the mark of its turn itself."""
DATED = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% endif %}{{ '<|im_start|>system\nToday Date: ' + date_string + '<|im_end|>\n' }}"
    + NO_PROMPT
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Writes the date (Llama 3.2)."""
SHAPES = {
    "r1": R1,
    "empty thought": EMPTY_THOUGHT,
    "closing tag": CLOSING_TAG,
    "two thoughts": TWO_THOUGHTS,
    "drops thoughts": DROPS,
    "closed thought": CLOSED_THOUGHT,
    "always closed": ALWAYS_CLOSED,
    "other words": OTHER_WORDS,
    "line breaks": LINE_BREAKS,
    "no generation prompt": NO_PROMPT,
    "dated": DATED,
}
REFUSED = {
    "a thought that the answer never had": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ('\nHm. ' if m.role == 'assistant' else '\n') }}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    ).replace("'\nHm. '", "'\n<think>Hm.'"),
    "another conversation than the prompt's": (
        "{{ 'Talk: ' if not add_generation_prompt else 'Ask: ' }}{% for m in messages %}{{ m.content + eos_token }}"
        "{% endfor %}"
    ),
    "images": "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
}
TRL_IMAGE_TEMPLATES = ("idefics3", "llava_next", "smolvlm")
"""TRL's templates that take lists of parts alone, and are refused."""
