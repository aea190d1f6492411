"""Chats with tools and reasoning under the templates of known models: what is trained on is what
the assistant wrote, after the prompt of decoding.

The templates in `templates/` are short versions, written from the documented forms.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.conversations import Skipped, Tokens, TrainOn, prompt_ids, tokenize
from data.reading.rows import Conversation, read_conversation

TEMPLATES = Path(__file__).parent / "templates"
ARGUMENTS = {"city": "Rome"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ENDS = {
    "qwen2_5": ["<|im_end|>"],
    "qwen3": ["<|im_end|>"],
    "llama3_1": ["<|eot_id|>", "<|eom_id|>"],
    "mistral": ["</s>"],
    "gpt_oss": ["<|return|>", "<|call|>"],
    "deepseek_v3_1": ["<｜end▁of▁sentence｜>"],
    "deepseek_r1": ["<｜end▁of▁sentence｜>"],
}
TAGS = re.compile(
    r"<\|[a-z_]+\|>|<｜[A-Za-z▁]+｜>|\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS)\]|</?think>"
)


def tokenizer_of(name: str) -> Any:
    """A byte-level tokenizer with the template and the special tokens in it."""
    template = (TEMPLATES / f"{name}.jinja").read_text()
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        ["It is 31 degrees. I do not know. Look it up.\n\n"] * 4,
        trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tags = sorted({*TAGS.findall(template), *ENDS[name]} - {"<think>", "</think>"})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=ENDS[name][0],
        additional_special_tokens=tags,
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


def chat(reasoning: str | None, text: bool = True, **row: Any) -> Conversation:
    """A row as data sets have it: null content, arguments as JSON text, content in parts."""
    call = {
        "id": "abcdefghi",
        "type": "function",
        "function": {
            "name": "weather",
            "arguments": json.dumps(ARGUMENTS) if text else ARGUMENTS,
        },
    }
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How warm is Rome?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"celsius": 31}', "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "It is 31 degrees."},
        {"role": "user", "content": "And Oslo?"},
        {"role": "assistant", "content": "I do not know."},
    ]
    for place, thought in ((2, "Look it up."), (4, "Easy."), (6, "No tool.")):
        if reasoning:
            turns[place][reasoning] = thought
    return read_conversation({"messages": turns, "tools": [TOOL], **row})


def runs(document: Tokens) -> list[tuple[int, int]]:
    """[start, end) of the masked runs."""
    mask = document.loss_mask.tolist()
    edges = [i for i, (a, b) in enumerate(pairwise([False, *mask, False])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def trained(name: str, conversation: Conversation, train_on: TrainOn = "all") -> list[str]:
    """The masked texts; the ids before each are checked against the prompt of decoding."""
    tokenizer = tokenizer_of(name)
    ends = tokenizer.convert_tokens_to_ids(ENDS[name])
    found = tokenize(conversation, tokenizer, 4096, ends, train_on)
    assert not found.left_out
    prompts = {
        tuple(
            prompt_ids(
                conversation.messages[:i], tokenizer, conversation.tools, conversation.template
            )
        )
        for i, turn in enumerate(conversation.messages)
        if turn["role"] == "assistant"
    }
    texts = []
    for document in found.documents:
        for start, end in runs(document):
            if train_on != "answer_without_reasoning":
                assert tuple(document.input_ids[:start].tolist()) in prompts
            texts.append(tokenizer.decode(document.input_ids[start:end]))
    return texts


JSON_CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
QWEN_CALL = f"<tool_call>\n{JSON_CALL}\n</tool_call><|im_end|>"
DEEPSEEK_CALL = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rome"}'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
)
WROTE = {
    "qwen2_5": (None, [QWEN_CALL, "It is 31 degrees.<|im_end|>", "I do not know.<|im_end|>"]),
    "qwen3": (
        "reasoning_content",
        [
            f"<think>\nLook it up.\n</think>\n\n{QWEN_CALL}",
            "<think>\nEasy.\n</think>\n\nIt is 31 degrees.<|im_end|>",
            "<think>\nNo tool.\n</think>\n\nI do not know.<|im_end|>",
        ],
    ),
    "llama3_1": (
        None,
        [
            '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>',
            "It is 31 degrees.<|eot_id|>",
            "I do not know.<|eot_id|>",
        ],
    ),
    "mistral": (
        None,
        [
            f'[TOOL_CALLS] [{JSON_CALL[:-1]}, "id": "abcdefghi"}}]</s>',
            " It is 31 degrees.</s>",
            " I do not know.</s>",
        ],
    ),
    "gpt_oss": (
        "reasoning_content",
        [
            "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant"
            ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
            "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final"
            "<|message|>It is 31 degrees.<|return|>",
            "<|channel|>analysis<|message|>No tool.<|end|><|start|>assistant<|channel|>final"
            "<|message|>I do not know.<|return|>",
        ],
    ),
    "deepseek_v3_1": (
        None,
        [
            DEEPSEEK_CALL,
            "It is 31 degrees.<｜end▁of▁sentence｜>",
            "I do not know.<｜end▁of▁sentence｜>",
        ],
    ),
}


@pytest.mark.parametrize("name", WROTE)
@pytest.mark.parametrize("text", [True, False])
def test_the_masked_tokens_are_what_the_assistant_wrote(name: str, text: bool) -> None:
    reasoning, wrote = WROTE[name]
    assert trained(name, chat(reasoning, text)) == wrote
    assert trained(name, chat(reasoning, text), "last_turn") == wrote[-1:]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_found_under_every_key(key: str) -> None:
    for name in ("qwen3", "gpt_oss"):
        assert trained(name, chat(key)) == WROTE[name][1]
    with pytest.raises(Skipped, match=f"leaves out `{key}`"):
        trained("qwen2_5", chat(key))


def test_an_answer_without_its_reasoning_is_masked_behind_it() -> None:
    """The reasoning stays in the document, before the answer."""
    for name, close in (("qwen3", "</think>"), ("gpt_oss", "<|end|>")):
        reasoning, wrote = WROTE[name]
        without = [text.partition(close)[2] for text in wrote]
        assert trained(name, chat(reasoning), "answer_without_reasoning") == without
    plain = chat(None)
    assert trained("llama3_1", plain, "answer_without_reasoning") == WROTE["llama3_1"][1]
    tokenizer = tokenizer_of("qwen3")
    kept = tokenize(chat("reasoning"), tokenizer, 4096, None, "answer_without_reasoning").documents
    assert "Easy.\n</think>" in tokenizer.decode(kept[0].input_ids)
    short = len(kept[0].prompt) - 1
    with pytest.raises(Skipped, match="nothing but reasoning within data.max_length"):
        tokenize(chat("reasoning"), tokenizer, short, None, "answer_without_reasoning")


def test_a_row_turns_thinking_on_or_off() -> None:
    asked = [{"role": "user", "content": "And Oslo?"}, {"role": "assistant", "content": "No."}]
    for name, arguments, prompt, wrote in (
        (
            "qwen3",
            {"enable_thinking": False},
            "assistant\n<think>\n\n</think>\n\n",
            "No.<|im_end|>",
        ),
        ("qwen3", {}, "assistant\n", "<think>\n\n</think>\n\nNo.<|im_end|>"),
        ("deepseek_v3_1", {"thinking": False}, "</think>", "No.<｜end▁of▁sentence｜>"),
    ):
        row = read_conversation({"messages": asked, "chat_template_kwargs": arguments})
        assert trained(name, row) == [wrote]
        tokenizer = tokenizer_of(name)
        ids = prompt_ids(asked[:1], tokenizer, template=arguments)
        assert tokenizer.decode(ids).endswith(prompt)
    thought = [asked[0], {**asked[1], "reasoning_content": "North."}]
    row = {"messages": thought, "chat_template_kwargs": json.dumps({"thinking": True, "x": None})}
    with pytest.raises(Skipped, match="chat_template_kwargs.x: the chat template reads no 'x'"):
        read = read_conversation({**row, "chat_template_kwargs": {"x": 1}})
        tokenize(read, tokenizer_of("deepseek_v3_1"), 400)
    end = "<｜end▁of▁sentence｜>"
    assert trained("deepseek_v3_1", read_conversation(row)) == [f"North.</think>No.{end}"]
    del row["chat_template_kwargs"]
    with pytest.raises(Skipped, match="leaves out `tool_calls`"):
        tokenize(chat(None, tools=None), tokenizer_of("deepseek_r1"), 4096)
    assert trained("deepseek_r1", read_conversation(row)) == [f"North.\n</think>\n\nNo.{end}"]
    off = read_conversation(
        {"messages": thought, "chat_template_kwargs": {"enable_thinking": False}}
    )
    with pytest.raises(Skipped, match="otherwise than its prompt asks"):
        tokenize(off, tokenizer_of("qwen3"), 400)


def test_turns_of_weight_0_are_read_and_not_trained_on() -> None:
    conversation = chat(None)
    conversation.messages[2]["weight"] = 0
    assert trained("qwen2_5", conversation) == WROTE["qwen2_5"][1][1:]
    for place in (4, 6):
        conversation.messages[place]["weight"] = 0
    with pytest.raises(Skipped, match="no assistant turn but those of `weight` 0"):
        trained("qwen2_5", conversation)


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_recorded_tokens_of_every_turn_are_used_as_they_are(name: str) -> None:
    """Beside reasoning and calls that a server gave apart; other texts' tokens are not."""
    tokenizer = tokenizer_of(name)
    ends = tokenizer.convert_tokens_to_ids(ENDS[name])
    _, wrote = WROTE[name]
    conversation = chat("reasoning")
    # One token per byte: other tokens than encoding the text gives.
    exact = [
        [i for part in re.split(f"({TAGS.pattern})", text) if part for i in pieces(part, tokenizer)]
        for text in wrote
    ]
    for place, ids in zip((2, 4), exact):
        conversation.messages[place]["response_ids"] = ids
    last = read_conversation(
        {
            "messages": conversation.messages,
            "tools": conversation.tools,
            "response_ids": exact[2],
            "prompt_ids": [*tokenizer("And Oslo?")["input_ids"], *ends[:1]],
        }
    )
    found = tokenize(last, tokenizer, 4096, ends).documents
    said = [
        document.input_ids[start:end].tolist()
        for document in found
        for start, end in runs(document)
    ]
    assert said == exact and found[-1].prompt == last.prompt_ids
    conversation.messages[4]["response_ids"] = exact[2]
    assert trained(name, conversation) == wrote


def pieces(text: str, tokenizer: Any) -> list[int]:
    """One token per byte of a text, or that of a tag."""
    if TAGS.fullmatch(text):
        return [tokenizer.convert_tokens_to_ids(text)]
    return [i for letter in text for i in tokenizer(letter)["input_ids"]]
