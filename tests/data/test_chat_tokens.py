"""Documents of chats: prompts as decoding sends them, whatever the tokenizer and the template
do.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.chat_tokens import answer_spans, encode, render
from data.conversations import Skipped, Tokens, prompt_ids, tokenize, tokenize_all, tokenize_answer
from data.datamodule import hold_out
from data.generation.answering import placed
from data.labelled.labelled import LabelledAnswer, tokenize_labelled, tokenize_labelled_rows
from data.preferences import tokenize_pairs
from data.reading.files import Place, Row, Tally, read_jsonl
from data.reading.rows import Conversation, load_conversations
from data.regenerate import Generation, regenerate
from tests.fakes import tiny_target, tiny_tokenizer

TEXTS = [
    "Why is it so? Because of light.",
    "And then? The same again.",
    "<user>\n",
    "Be there or be square",
    "because cause",
    "Light. Q: So? A: Like light.",
]
TURNS = [
    {"role": role, "content": text}
    for role, text in [
        ("user", "Why?"),
        ("assistant", "Because of light."),
        ("user", "And then?"),
        ("assistant", "The same."),
        ("user", "So?"),
        ("assistant", "Light."),
    ]
]
CLOSE = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} A:{% else %} {{ m.content "
    "}}{{ eos_token }}{% endif %}{% endfor %}"
)
ENDS_WITH_SPACE = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nA: {% else %}{{ m.content "
    "}}{{ eos_token }}{% endif %}{% endfor %}"
)
THOUGHTS_LEFT_OUT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' and loop.last "
    "%}(){% endif %}{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt "
    "%}<|assistant|>{% endif %}"
)
THOUGHTS_OPENED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content.split('</think>')[-1] + '<|end|>' "
    "}}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
CALLS = (
    "{% if tools %}{{ '<|system|>' ~ tools ~ '<|end|>' }}{% endif %}{% for m in messages %}{{ '<|' "
    "+ m.role + '|>' }}{% if m.reasoning_content and loop.last %}({{ m.reasoning_content }}){% "
    "endif %}{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ "
    "call.function.arguments.city }}{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt "
    "%}<|assistant|>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOL_CHAT = [
    {"role": "user", "content": "how warm?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "user", "content": "sunny"},
    {"role": "assistant", "content": "nice"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def sentencepiece_like(scheme: str) -> Any:
    """A tokenizer that writes a space before texts: always, before the first, never, or by its
    normalizer.
    """
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.train_from_iterator(
        TEXTS * 8,
        trainers.BpeTrainer(
            vocab_size=160, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
        ),
    )
    if scheme == "prepend":
        core.pre_tokenizer = None
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level() -> Any:
    """A byte-level BPE in which two line breaks are one token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator(
        [*TEXTS, "\n\n\n"] * 8,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


@pytest.fixture()
def tokenizer() -> Any:
    """One token per character; decoding gives the text back exactly."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def chat(*contents: str, first: str = "user") -> list[dict[str, Any]]:
    """Turns that alternate."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def rows_of(*rows: dict[str, Any]) -> list[Row]:
    """Rows as they are read."""
    return [Row(Place("rows", "row", number), row) for number, row in enumerate(rows, 1)]


def answers(document: Tokens) -> list[list[int]]:
    """The runs of masked tokens."""
    bounds = [
        0,
        *(i for i, (a, b) in enumerate(pairwise(document.loss_mask.tolist()), 1) if a != b),
        len(document),
    ]
    return [document.input_ids[a:b].tolist() for a, b in pairwise(bounds) if document.loss_mask[a]]


def said(document: Tokens, tokenizer: Any) -> list[str]:
    """The answers as text."""
    return [tokenizer.decode(answer) for answer in answers(document)]


# -- tokenizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["always", "first", "never", "prepend"])
@pytest.mark.parametrize(("template", "space"), [(CLOSE, ""), (SPACED, "▁")])
def test_a_dummy_prefix_stands_only_where_the_whole_text_has_one(
    scheme: str, template: str, space: str
) -> None:
    tokenizer = sentencepiece_like(scheme)
    tokenizer.chat_template = template
    (document,) = tokenize(Conversation(TURNS), tokenizer, 512).documents
    whole = encode(render(TURNS, tokenizer), tokenizer)
    assert document.input_ids.tolist() == whole[: len(document)]
    assert ["".join(tokenizer.convert_ids_to_tokens(answer)) for answer in answers(document)] == [
        f"{space}Because▁of▁light.</s>",
        f"{space}The▁same.</s>",
        f"{space}Light.</s>",
    ]
    for turn in (1, 3, 5):
        asked = prompt_ids(TURNS[:turn], tokenizer)
        assert document.input_ids[: len(asked)].tolist() == asked
        assert bool(document.loss_mask[len(asked)]) and not bool(document.loss_mask[len(asked) - 1])


@pytest.mark.parametrize("scheme", ["always", "first", "never", "prepend"])
def test_an_answer_that_would_merge_with_the_prompt_keeps_the_prompt_of_decoding(
    scheme: str,
) -> None:
    tokenizer = sentencepiece_like(scheme)
    tokenizer.chat_template = ENDS_WITH_SPACE
    found = tokenize(Conversation(TURNS), tokenizer, 512)
    ends = [document for document in found.documents for _ in answers(document)]
    assert len(ends) == 3 and not found.left_out
    for turn, document in zip((1, 3, 5), ends, strict=True):
        asked, content = (
            prompt_ids(TURNS[:turn], tokenizer),
            TURNS[turn]["content"].replace(" ", "▁"),
        )
        assert document.input_ids[: len(asked)].tolist() == asked and asked[
            -1
        ] == tokenizer.convert_tokens_to_ids("▁")
        pieces = tokenizer.convert_ids_to_tokens(document.input_ids[len(asked) :].tolist())
        assert "".join(pieces).startswith(f"{content}</s>")


def test_line_breaks_on_both_sides_of_the_boundary_do_not_merge() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = CLOSE
    turns = chat("Why?", "\n\nBecause.")
    tokenizer.chat_template = CLOSE.replace("{{ eos_token }}\n", "{{ eos_token }}")
    asked = prompt_ids(turns[:1], tokenizer)
    assert encode(render(turns, tokenizer), tokenizer)[: len(asked)] != asked, (
        "the case that is meant"
    )
    (document,) = tokenize(Conversation(turns), tokenizer, 512).documents
    assert document.prompt == asked
    assert answers(document) == [[*encode("\n\nBecause.", tokenizer), tokenizer.eos_token_id]]


@pytest.mark.parametrize("scheme", ["always", "prepend"])
@pytest.mark.parametrize("template", [CLOSE, SPACED, ENDS_WITH_SPACE])
def test_characters_of_an_answer_are_found_in_its_tokens(scheme: str, template: str) -> None:
    tokenizer = sentencepiece_like(scheme)
    tokenizer.chat_template = template
    text = "Because of light."
    ids, spans = answer_spans([*TURNS[:3], {"role": "assistant", "content": text}], tokenizer)
    document = tokenize_answer(
        Conversation([*TURNS[:3], {"role": "assistant", "content": text}]), tokenizer, 512
    )
    assert [*ids, tokenizer.eos_token_id] == answers(document)[0]
    assert "".join(text[max(0, start) : end] for start, end in spans) == text
    wrong = text.index("light")
    marked = LabelledAnswer(TURNS[:3], text, ((0, wrong, 1), (wrong, len(text), 0)))
    labelled = tokenize_labelled(marked, tokenizer, 512)
    assert labelled.input_ids.tolist() == document.input_ids.tolist()[:-1]
    kept = labelled.input_ids[labelled.labels & labelled.loss_mask].tolist()
    assert tokenizer.decode(kept).strip() == "Because of"
    row = {"prompt": TURNS[:3], "chosen": "The same.", "rejected": text}
    (pair,) = tokenize_pairs(rows_of(row), "rows", tokenizer, 512)
    assert pair.rejected.key == document.key


# -- templates -------------------------------------------------------------------------------------


def test_an_answer_with_nothing_before_it_is_left_out_and_the_later_ones_are_kept(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    turns = chat("hello", "why?", "so", first="assistant")
    found = tokenize(Conversation(turns), tokenizer, 100)
    assert said(found.documents[0], tokenizer) == ["so<|end|>"] and len(found.documents) == 1
    assert found.documents[0].prompt == prompt_ids(turns[:2], tokenizer)
    with caplog.at_level(logging.WARNING):
        tokenize_all([Conversation(turns), Conversation(turns[:1])], tokenizer, 100)
    assert caplog.messages == [
        "skipped 1 conversation: there is nothing before the answer",
        "1 answer left out: there is nothing before the answer",
    ]


def test_answers_that_are_cut_off_are_counted(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As answers, not as conversations; nothing is said of one that ends at the last position."""
    whole = chat("a", "one")
    length = len(tokenize(Conversation(whole), tokenizer, 100).documents[0])
    rows = [chat("a", "one", "b", "t" * 50), chat("c", "u" * 50), whole]
    tally, place = Tally("conversation"), Place("a.jsonl", "line", 1)
    with caplog.at_level(logging.WARNING):
        tokenize_all([Conversation(row, place=place) for row in rows], tokenizer, 40, tally=tally)
        tokenize_all([Conversation(whole)], tokenizer, length)
    assert caplog.messages == [
        "2 answers cut off at data.max_length (40 tokens) (first: 'a.jsonl' line 1)"
    ]
    reason = "answers cut off at data.max_length (40 tokens)"
    assert tally.as_dict() == {reason: {"count": 2, "first": "a.jsonl line 1"}}
    pairs = Tally("pair")
    pair = {"prompt": "a", "chosen": "v" * 50, "rejected": "no"}
    tokenize_pairs([Row(place, pair), Row(place, pair)], "a", tokenizer, 40, tally=pairs)
    assert pairs.as_dict()[reason]["count"] == 1
    labels = Tally("answer")
    labelled = {"prompt": "a", "response": "w" * 50, "spans": [[0, 3, 1]]}
    tokenize_labelled_rows([Row(place, labelled)], "a", tokenizer, 40, tally=labels)
    assert labels.as_dict()[reason]["count"] == 1


def test_answers_behind_a_rewritten_history_are_documents_of_their_own(tokenizer: Any) -> None:
    tokenizer.chat_template = THOUGHTS_LEFT_OUT
    turns = chat("a", "one", "b", "two", "c", "three")
    found = tokenize(Conversation(turns), tokenizer, 100)
    assert [said(document, tokenizer) for document in found.documents] == [
        ["()one<|end|>"],
        ["()two<|end|>"],
        ["()three<|end|>"],
    ] and not found.left_out
    for turn, document in zip((1, 3, 5), found.documents, strict=True):
        assert document.prompt == prompt_ids(turns[:turn], tokenizer)


def test_all_documents_of_a_conversation_are_held_out_or_none(tokenizer: Any) -> None:
    tokenizer.chat_template = THOUGHTS_LEFT_OUT
    chats = [
        Conversation(chat(f"question {letter}", "one", "b", "two")) for letter in "abcdefghijkl"
    ]
    kept, held = hold_out(tokenize_all(chats, tokenizer, 100), 0.3)
    assert len(kept) + len(held) == 24 and held
    openings = [
        {tokenizer.decode(document.input_ids)[:30] for document in side} for side in (kept, held)
    ]
    assert not openings[0] & openings[1]


def test_answers_behind_the_context_are_counted(tokenizer: Any) -> None:
    found = tokenize(Conversation(chat("a", "one", "b" * 50, "two", "c", "three")), tokenizer, 30)
    assert [said(document, tokenizer) for document in found.documents] == [["one<|end|>"]]
    assert found.left_out == {"prompt longer than the context (30 tokens)": 2}


@pytest.mark.parametrize(
    "content", ["hm</think>yes", "<think>\nhm</think>yes", "<think>hm</think>yes"]
)
def test_a_prompt_that_opens_the_thoughts_is_followed_by_the_answers_text(
    tokenizer: Any, content: str
) -> None:
    tokenizer.chat_template = THOUGHTS_OPENED
    turns = [
        *chat("a", content),
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "so</think>no"},
    ]
    found = tokenize(Conversation(turns), tokenizer, 200)
    assert [said(document, tokenizer) for document in found.documents] == [
        ["hm</think>yes<|end|>"],
        ["so</think>no<|end|>"],
    ] and not found.left_out
    assert [document.prompt for document in found.documents] == [
        prompt_ids(turns[:turn], tokenizer) for turn in (1, 3)
    ]
    (cut,) = tokenize(Conversation(turns[:2], finished=False), tokenizer, 200).documents
    assert said(cut, tokenizer) == ["hm</think>yes"]


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize(("thought", "content"), [("hm", "yes"), ("hm\n", "\n\nyes")])
def test_reasoning_that_a_server_gave_apart_stands_where_the_prompt_opens_it(
    tokenizer: Any, written: bool, thought: str, content: str
) -> None:
    tokenizer.chat_template = (
        THOUGHTS_OPENED
        if not written
        else THOUGHTS_OPENED.replace(
            "m.content.split('</think>')[-1]",
            "('<think>\n' + m.reasoning_content | trim + '\n</think>\n\n' + "
            "m.content | trim if m.reasoning_content else m.content)",
        )
    )
    turns = [*chat("a"), {"role": "assistant", "reasoning_content": thought, "content": content}]
    (document,) = tokenize(Conversation(turns), tokenizer, 200).documents
    assert said(document, tokenizer) == ["hm\n</think>\n\nyes<|end|>"]


def test_recorded_ids_follow_the_prompt_whatever_the_template_would_write(tokenizer: Any) -> None:
    tokenizer.chat_template = THOUGHTS_OPENED.replace("m.content.split('</think>')[-1]", "'-'")
    ids = [*encode("hm</think>yes", tokenizer), tokenizer.eos_token_id]
    turns = chat("a", tokenizer.decode(ids, skip_special_tokens=True))
    for given in (ids, ids[:-1]):
        (document,) = tokenize(Conversation(turns, given), tokenizer, 100).documents
        assert document.input_ids.tolist() == prompt_ids(turns[:1], tokenizer) + given
        assert answers(document) == [given]


def test_what_a_target_answers_behind_opened_thoughts_is_trained_on_as_it_is(
    tmp_path: Path,
) -> None:
    target = tiny_target()
    target.tokenizer.chat_template = THOUGHTS_OPENED
    output = regenerate(
        target,
        placed([{"messages": chat("hi")}, {"prompt": "say a"}]),
        tmp_path / "answers.jsonl",
        Generation(max_new_tokens=6, temperatures=(0.0,)),
        progress=False,
    )
    for row, conversation in zip(read_jsonl(output), load_conversations(str(output)), strict=True):
        (document,) = tokenize(conversation, target.tokenizer, 100, target.eos_ids).documents
        asked = prompt_ids(conversation.messages[:-1], target.tokenizer)
        assert (document.prompt, answers(document)) == (asked, [row["response_ids"]])


def test_an_answer_that_the_template_shortens_is_kept_whole(tokenizer: Any) -> None:
    tokenizer.chat_template = THOUGHTS_OPENED.replace("<think>\n", "")
    (document,) = tokenize(Conversation(chat("a", "hm</think>yes")), tokenizer, 100).documents
    assert said(document, tokenizer) == ["hm</think>yes<|end|>"]


def test_an_empty_answer_is_skipped_by_that_name(tokenizer: Any) -> None:
    with pytest.raises(Skipped, match="^empty answer$"):
        tokenize(Conversation(chat("a", "")), tokenizer, 100)


# -- tool calls and reasoning ----------------------------------------------------------------------


def test_tool_calls_reasoning_and_tools_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = CALLS
    thinking = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "reasoning": "hm", "content": "yes"},
    ]
    (document,) = tokenize(Conversation(TOOL_CHAT, tools=TOOLS), tokenizer, 400).documents
    assert said(document, tokenizer) == ["weatherRome<|end|>", "nice<|end|>"]
    assert (
        document.prompt
        == prompt_ids(TOOL_CHAT[:1], tokenizer, TOOLS)
        != prompt_ids(TOOL_CHAT[:1], tokenizer)
    )
    assert document.input_ids[: len(document.prompt)].tolist() == document.prompt
    (document,) = tokenize(Conversation(thinking), tokenizer, 100).documents
    assert said(document, tokenizer) == ["(hm)yes<|end|>"]


@pytest.mark.parametrize(
    ("turns", "tools", "reason"),
    [
        (TOOL_CHAT, None, "tool_calls"),
        (chat("a", "one"), TOOLS, "tools"),
        (
            [*chat("a"), {"role": "assistant", "content": "e", "reasoning_content": "e"}],
            None,
            "reasoning_content",
        ),
    ],
)
def test_what_a_template_leaves_out_is_counted_and_never_trained_on_emptied(
    tokenizer: Any, turns: list[dict[str, Any]], tools: Any, reason: str
) -> None:
    with pytest.raises(Skipped, match=f"the chat template leaves out `{reason}`"):
        tokenize(Conversation(turns, tools=tools), tokenizer, 400)
    found = (
        tokenize(Conversation([*chat("a", "one"), *turns], tools=tools), tokenizer, 400)
        if not tools
        else None
    )
    assert found is None or (
        said(found.documents[0], tokenizer) == ["one<|end|>"]
        and found.left_out
        == {f"the chat template leaves out `{reason}`": 2 if turns is TOOL_CHAT else 1}
    )


@pytest.mark.parametrize(
    "template", ["{{ messages[5].content }}", "{{ 'a' + 5 }}", "{{ raise_exception('no') }}"]
)
def test_a_template_that_fails_on_a_chat_skips_it(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(Skipped, match="refused by the chat template"):
        tokenize(Conversation(chat("a", "one")), tokenizer, 100)


# -- preferences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [THOUGHTS_LEFT_OUT, THOUGHTS_OPENED])
@pytest.mark.parametrize("asked", [chat("a", "one", "b"), chat("hello", "b", first="assistant")])
def test_pairs_need_the_last_turn_alone(
    tokenizer: Any, template: str, asked: list[dict[str, Any]]
) -> None:
    tokenizer.chat_template = template
    row = {"prompt": asked, "chosen": "good", "rejected": "bad"}
    (pair,) = tokenize_pairs(rows_of(row), "rows", tokenizer, 100)
    assert pair.prompt == pair.rejected.prompt == prompt_ids(asked, tokenizer)
    assert (
        said(pair.chosen, tokenizer)[0].endswith("good<|end|>") and len(answers(pair.chosen)) == 1
    )


def test_answers_of_pairs_keep_their_tool_calls_and_tools(tokenizer: Any) -> None:
    tokenizer.chat_template = CALLS
    row = {
        "prompt": TOOL_CHAT[:1],
        "tools": TOOLS,
        "chosen": [TOOL_CHAT[1]],
        "rejected": [{"role": "assistant", "content": "no", "reasoning_content": "hm"}],
    }
    (pair,) = tokenize_pairs(rows_of(row), "rows", tokenizer, 400)
    assert pair.prompt == prompt_ids(TOOL_CHAT[:1], tokenizer, TOOLS)
    assert said(pair.chosen, tokenizer) == ["weatherRome<|end|>"]
    assert said(pair.rejected, tokenizer) == ["(hm)no<|end|>"]
    tokenizer.chat_template = tiny_tokenizer().chat_template
    with pytest.raises(ValueError, match="1 × the chat template leaves out `tool"):
        tokenize_pairs(rows_of(row), "rows", tokenizer, 400)


def test_pairs_that_are_too_long_say_so(tokenizer: Any) -> None:
    row = {"prompt": "a" * 50, "chosen": "good", "rejected": "bad"}
    with pytest.raises(ValueError, match=r"1 × prompt longer than the context \(30 tokens\)"):
        tokenize_pairs(rows_of(row), "rows", tokenizer, 30)
