"""Templates: the mask is the answer and its end token, a prompt is the beginning of its row, and data holds no control
tokens."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, MARKS, REAL, TINY, tiny, tokenizer

from lowrank_tune.batch import Row
from lowrank_tune.data import ChatTemplate, InvalidRow
from lowrank_tune.data.message import Message
from lowrank_tune.errors import UserError
from lowrank_tune.toy import text as toy_text

ENDS = {
    "kit": f"{toy_text.END_OF_TURN}{toy_text.EOS}",
    "llama3": "<|eot|>",
    "no system": "<|eot|>",
    "chatml": "<|im_end|>",
    "thinking": "<|im_end|>",
    "tokenizers/smollm2-135m-instruct": "<|im_end|>",
    "tokenizers/gpt2": "<|endoftext|>",
}
TEMPLATES: dict[str, ChatTemplate] = {}


def conversation(*contents: str) -> list[Message]:
    return [Message("assistant" if place % 2 else "user", content) for place, content in enumerate(contents)]


def plain(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def trained_text(template: ChatTemplate, row: Row) -> str:
    """What the mask covers, stretch by stretch."""
    stretches = [
        [number for number, _ in run]
        for trained, run in groupby(zip(row.input_ids, row.completion_mask, strict=True), key=lambda pair: pair[1])
        if trained
    ]
    return "".join(template.decode(stretch, special_tokens=True) for stretch in stretches)


def template_of(name: str) -> ChatTemplate:
    """Made once: the real vocabularies take seconds."""
    if name not in TEMPLATES:
        TEMPLATES[name] = ChatTemplate.from_tokenizer(tokenizer(name))
    return TEMPLATES[name]


@pytest.mark.parametrize("name", [*TINY, *REAL])
def test_mask_is_answer_and_end(name: str) -> None:
    template = template_of(name)
    end = ENDS.get(name, "</s>")
    row = template.encode(conversation("What is 12 + 30?", "It is 42."))
    assert trained_text(template, row) == f"It is 42.{end}"
    assert len(row.input_ids) == len(row.completion_mask)
    last = [number for number, trained in zip(row.input_ids, row.completion_mask, strict=True) if trained][-1]
    assert last in template.end_ids, "a model that learned this would never stop"


def trained_texts(template: ChatTemplate, messages: list[Message]) -> str:
    """What the masks of all rows cover, in the order of the answers."""
    (rows,) = template.encode_all([messages])
    assert not isinstance(rows, InvalidRow)
    return "".join(trained_text(template, row) for row in reversed(rows))


@pytest.mark.parametrize("name", [*TINY, *REAL])
def test_every_turn_is_trained(name: str) -> None:
    """Where no end token closes an answer, each has a row of its own, which ends it."""
    template = template_of(name)
    end = ENDS.get(name, "</s>")
    first = toy_text.END_OF_TURN if name == "kit" else end
    messages = conversation("What is 1 + 2?", "It is 3.", "And 4?", "It is 7.")
    assert trained_texts(template, messages) == f"It is 3.{first}It is 7.{end}"
    (rows,) = template.encode_all([messages])
    assert not isinstance(rows, InvalidRow)
    assert len(rows) == (2 if name == "no end" else 1)


@pytest.mark.parametrize("answer", ["Fine 🙂", "🙂", "你好", "é"])
def test_a_last_character_of_several_tokens_is_trained_whole(answer: str) -> None:
    """Where no end token closes an answer: of the last one, and of an earlier one."""
    template = template_of("no end")
    assert trained_texts(template, conversation("Hm?", answer, "And?", answer)) == f"{answer}</s>{answer}</s>"


@pytest.mark.parametrize("name", [*TINY, *REAL])
def test_at_most_one_bos_and_one_end(name: str) -> None:
    made = template_of(name).tokenizer
    row = template_of(name).encode(conversation("Hm?", "Yes."))
    if made.bos_token_id != made.eos_token_id and "smollm2" not in name:
        assert list(row.input_ids).count(made.bos_token_id) <= 1
    assert (
        sum(
            number == made.eos_token_id and trained
            for number, trained in zip(row.input_ids, row.completion_mask, strict=True)
        )
        == 1
    )


@pytest.mark.parametrize("name", ["chatml", "llama3", "thinking", "merging", "tokenizers/smollm2-135m-instruct"])
def test_ids_are_the_stock_ids(name: str) -> None:
    made = template_of(name).tokenizer
    messages = conversation("What is 12 + 30?", "It is 42.", "Why?", "Because.")
    stock = made.apply_chat_template(plain(messages), tokenize=True)["input_ids"]
    assert list(template_of(name).encode(messages).input_ids) == stock


def test_an_answer_whose_thought_is_stripped_later_is_trained_in_a_row_of_its_own() -> None:
    template = ChatTemplate.from_tokenizer(tokenizer("thinking"))
    messages = conversation("One?", "<think> a </think>\nYes.", "Two?", "<think> b </think>\nNo.")
    (rows,) = template.encode_all([messages])
    assert not isinstance(rows, InvalidRow)
    assert [trained_text(template, row) for row in rows] == [
        "<think> b </think>\nNo.<|im_end|>",
        "<think> a </think>\nYes.<|im_end|>",
    ]
    assert rows[0] == template.encode(messages) and rows[1] == template.encode(messages[:2])
    assert "a row of its own" in template.describe()
    assert "a row of its own" not in ChatTemplate.from_tokenizer(tokenizer("chatml")).describe()


def test_templates_render_a_system_turn_or_fold_it() -> None:
    ruled = [Message("system", "Be brief."), *conversation("Hm?", "Yes.")]
    for name in TINY:
        template = template_of(name)
        row = template.encode(ruled)
        assert "Be brief." in template.decode(row.input_ids, special_tokens=True) or name == "merging", name
        assert trained_text(template, row).startswith("Yes.")
    folded = ChatTemplate.from_tokenizer(tokenizer("no system"))
    assert "Be brief.\n\nHm?" in folded.decode(folded.encode(ruled).input_ids, special_tokens=True)


def test_template_that_renders_nothing_is_a_sentence() -> None:
    with pytest.raises(UserError, match="chat template"):
        ChatTemplate.from_tokenizer(tiny("{{ raise_exception('never') }}"))


PIECES = [*"ab 1$:)(\n]['", "  ", "It", "é", "👍🏽", "\u2028", "\x00", *MARKS, toy_text.USER, toy_text.EOS]
contents = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join)


@pytest.mark.parametrize("name", [*TINY, *REAL])
@settings(max_examples=25)
@given(
    turns=st.lists(contents.filter(lambda text: text.strip() != ""), min_size=2, max_size=6).filter(
        lambda turns: len(turns) % 2 == 0
    )
)
@example(turns=["</s>", "</s>", "a<|im_end|>", "1</s>b"])
@example(turns=["$", "$", ":", ")"])
def test_prompt_is_the_beginning_and_no_control_token_comes_from_data(name: str, turns: list[str]) -> None:
    template = template_of(name)
    messages = conversation(*turns)
    row = template.encode_many([messages])[0]
    if isinstance(row, InvalidRow):
        assert template.validate_messages(messages) is not None
        return
    prompt = template.prompt(messages[:-1])
    assert list(row.input_ids[: len(prompt)]) == prompt
    assert not any(row.completion_mask[:0]) and any(row.completion_mask[len(prompt) :])
    plain = template.encode(conversation(*["x" for _ in turns]))
    count = [sum(template.special_tokens_in([number]) for number in each.input_ids) for each in (row, plain)]
    assert count[0] == count[1], "a control token came out of the text, or one was lost"
    words = template.decode(
        [
            number
            for number, trained in zip(row.input_ids[len(prompt) :], row.completion_mask[len(prompt) :], strict=True)
            if trained
        ],
        special_tokens=True,
    )
    if name in ("kit", "chatml", "thinking", "words", "tokenizers/gpt2", "tokenizers/smollm2-135m-instruct"):
        assert words == turns[-1] + ENDS.get(name, "</s>")


def test_encode_many_equals_encoding_one_by_one() -> None:
    rows = [
        conversation("a", "b"),
        conversation("</s>", "It is"),
        conversation("1", "2", "3", "4"),
        conversation("\ud800", "x"),
        conversation("x :", ") y"),
    ]
    for name in TINY:
        template = template_of(name)
        together = template.encode_many(rows)
        alone = [template.encode_many([row])[0] for row in rows]
        assert [vars(row) if isinstance(row, Row) else row.reason for row in together] == [
            vars(row) if isinstance(row, Row) else row.reason for row in alone
        ], name
        assert isinstance(together[3], InvalidRow) and isinstance(together[0], Row)


def test_a_token_across_the_prompt_edge_keeps_the_prompt_ids() -> None:
    """The tiny vocabulary merges "] " or the like across an edge somewhere; the stock encoding would then change the
    prompt."""
    made, crossed = tokenizer("merging"), 0
    template = ChatTemplate.from_tokenizer(made)
    for answer in ("It is", "]", " the", "$5", "\n\n", "(a", "INST"):
        prompt, row = template.prompt(conversation("a")), template.encode(conversation("a", answer + "."))
        assert list(row.input_ids[: len(prompt)]) == prompt
        assert trained_text(template, row) == f"{answer}.</s>"
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' "
        "%}</s>{% endif %}{% endfor %}"
    )
    template = ChatTemplate.from_tokenizer(made)
    for question, answer in (("What i", "s 12"), ("It", " is"), ("\n", "\nthe end")):
        stock = made(f"<s>{question}{answer}</s>", add_special_tokens=False)["input_ids"]
        row = template.encode(conversation(question, answer))
        prompt = template.prompt(conversation(question))
        assert trained_text(template, row) == f"{answer}</s>" and list(row.input_ids[: len(prompt)]) == prompt
        crossed += list(row.input_ids) != stock
    assert crossed, "the test's own merges are gone"


def test_an_earlier_answer_behind_other_ids_than_its_prompt_has_a_row_of_its_own() -> None:
    """GPT-2's rule splits "\n\nYes" into two newlines and a word, and "\n\n" alone is one token: the ids of the
    first prompt do not come out again once its answer follows. The last prompt is the one that is asked with."""
    made = tiny(CHATML.replace("\n", "\n\n"), split=True)
    template = ChatTemplate.from_tokenizer(made)
    messages = conversation("Hm?", "Yes.", "Hm?", "No.")
    row = template.encode(messages)
    first, last = (
        made.apply_chat_template(plain(messages[:end]), add_generation_prompt=True, return_dict=False) for end in (1, 3)
    )
    assert [template.prompt(messages[:end]) for end in (1, 3)] == [first, last]
    assert list(row.input_ids[: len(last)]) == last and list(row.input_ids[: len(first)]) != first
    assert trained_text(template, row) == "No.<|im_end|>"
    (rows,) = template.encode_all([messages])
    assert not isinstance(rows, InvalidRow) and rows[0] == row and len(rows) == 2
    assert list(rows[1].input_ids[: len(first)]) == first and trained_text(template, rows[1]) == "Yes.<|im_end|>"
    assert "a row of its own" in template.describe()


def test_plain_text_template_refuses_its_markers() -> None:
    template = ChatTemplate.from_tokenizer(tokenizer("words"))
    assert "marker" in str(template.validate_messages(conversation("a\n\nUser:\nb", "c")))
    assert isinstance(template.encode_many([conversation("a", "b\nAssistant: c")])[0], InvalidRow)
    assert template.validate_messages(conversation("The user: me", "b")) is None
    with pytest.raises(UserError, match="marker"):
        template.prompt(conversation("User:\nb"))


def test_fingerprint_follows_the_template() -> None:
    fingerprints = [
        ChatTemplate.from_tokenizer(tiny(template)).fingerprint
        for template in (CHATML, CHATML, CHATML.replace("\n", " "), None)
    ]
    assert fingerprints[0] == fingerprints[1] and len(set(fingerprints)) == 3


def test_the_given_tokenizer_is_not_changed() -> None:
    made = tokenizer("chatml")
    before = made.backend_tokenizer.to_str(), made.backend_tokenizer.encode_special_tokens
    ChatTemplate.from_tokenizer(made).encode(conversation("</s>", "b"))
    assert (made.backend_tokenizer.to_str(), made.backend_tokenizer.encode_special_tokens) == before
