"""Texts in a published layout, back to conversations."""

import contextlib
import json
import time

import pytest

from core.ml.formats.chat import layouts
from core.ml.formats.chat.example import RowError
from core.ml.formats.chat.layouts import Layout

LLAMA2 = "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] More? [/INST] Yes.\n</s>"
PREAMBLE = "Below is an instruction that describes a task."
ALPACA = f"{PREAMBLE}\n\n### Instruction:\nTranslate\n\n### Input:\nchat\n\n### Response:\ncat</s>"
GUANACO = "### Human: Hi### Assistant: Hello\nthere### Human: More?### Assistant: Yes."
CHATML = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n"
)


def read(text: str, layout: Layout) -> list[tuple[str, str]]:
    turns = layouts.conversation(text, layout, "text").turns
    return [(turn["role"], turn["content"]) for turn in turns]


@pytest.mark.parametrize(
    ("layout", "text", "turns"),
    [
        ("llama2", LLAMA2, ["system:Be kind.", "user:Hi", "assistant:Hello", "user:More?", "assistant:Yes."]),
        ("llama2", "[INST] Hi [/INST] Hello", ["user:Hi", "assistant:Hello"]),
        ("llama2", "[INST]a[/INST]b[INST]c[/INST]d<s>", ["user:a", "assistant:b", "user:c", "assistant:d"]),
        ("llama2", "[INST]a[/INST]b[INST]c[/INST]", ["user:a", "assistant:b", "user:c"]),
        ("llama2", "[INST]a[/INST][INST]c[/INST]d", ["user:a", "assistant:", "user:c", "assistant:d"]),
        ("llama2", "[INST] <<SYS>> not closed [/INST] b", ["user:<<SYS>> not closed", "assistant:b"]),
        ("alpaca", ALPACA, [f"system:{PREAMBLE}", "user:Translate\n\nchat", "assistant:cat"]),
        ("alpaca", "### Instruction: Hi\n### Response: Hello\n### End", ["user:Hi", "assistant:Hello"]),
        (
            "alpaca",
            "### Instruction:\na\n### Response:\n\n### Instruction:\nc\n### Response:\nd",
            ["user:a", "assistant:", "user:c", "assistant:d"],
        ),
        ("alpaca", "###Instruction:\nHi\n### Input:\n\n###Response:\nHello", ["user:Hi", "assistant:Hello"]),
        (
            "alpaca",
            "### System:\nBe kind.\n### Instruction:\nHi\n### Response:\nA line with ### Input: in it",
            ["system:Be kind.", "user:Hi", "assistant:A line with ### Input: in it"],
        ),
        ("guanaco", GUANACO, ["user:Hi", "assistant:Hello\nthere", "user:More?", "assistant:Yes."]),
        ("chatml", CHATML, ["system:Be kind.", "user:Hi", "assistant:Hello"]),
        ("chatml", f"<s>{CHATML}<|im_start|>assistant\n", ["system:Be kind.", "user:Hi", "assistant:Hello"]),
        ("chatml", CHATML.removesuffix("<|im_end|>\n"), ["system:Be kind.", "user:Hi", "assistant:Hello"]),
    ],
)
def test_a_text_in_a_layout_becomes_its_conversation(layout: Layout, text: str, turns: list[str]) -> None:
    assert [f"{role}:{content}" for role, content in read(text, layout)] == turns


def test_white_space_inside_of_answers_stays() -> None:
    answer = "def f():\n    return 1\n\n\n# end"
    assert read(f"[INST] Hi [/INST] {answer} </s>", "llama2")[1] == ("assistant", answer)
    chatml = f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n  {answer}\n<|im_end|>"
    assert read(chatml, "chatml")[1] == ("assistant", f"  {answer}\n")


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ("llama2", "no marks at all"),
        ("llama2", "Before [INST] Hi [/INST] Hello"),
        ("llama2", "[INST] Hi [/INST] Hello [/INST]"),
        ("llama2", "[INST] Hi [INST] there [/INST] Hello"),
        ("alpaca", "### Input:\nx\n### Response:\ny"),
        ("alpaca", "### Instruction:\nHi\n### Input:\na\n### Input:\nb\n### Response:\ny"),
        ("alpaca", "### Instruction:\nHi\n### Response:\nhere:\n### Response: is a heading"),
        ("alpaca", "### Instruction:\nHi\n### Response:\n### Response:\nx"),
        ("guanaco", '### Human: what does "### Assistant:" mean?### Assistant: a mark'),
        ("guanaco", '### Human: what does "### Human:" mean?### Assistant: a mark'),
        ("chatml", f"{CHATML}<|im_start|>assistant\nAgain<|im_end|>"),
        ("chatml", "<|im_start|>robot\nHi<|im_end|><|im_start|>assistant\nHello<|im_end|>"),
        ("chatml", "<|im_start|>user\nHi<|im_start|>assistant\nHello<|im_end|>"),
        ("chatml", f"{CHATML} and more"),
    ],
)
def test_a_text_that_is_not_wholly_in_the_layout_is_refused(layout: Layout, text: str) -> None:
    with pytest.raises(RowError) as caught:
        read(text, layout)
    assert (caught.value.field, caught.value.code) == ("text", "layout_mismatch")
    assert caught.value.hint is not None
    assert json.loads(caught.value.hint.partition("mapping=")[2].rstrip(".")) == {"text": "{text}"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (LLAMA2, ["llama2"]),
        (ALPACA, ["alpaca"]),
        (GUANACO, ["guanaco"]),
        (CHATML, ["chatml"]),
        (LLAMA2 + CHATML, ["llama2", "chatml"]),
        ("[/INST] [INST]", []),
        ("Words about ### Response: and [INST].", []),
    ],
)
def test_layouts_are_found_by_their_marks(text: str, names: list[str]) -> None:
    assert layouts.found(text) == names


@pytest.mark.parametrize(
    "text",
    [
        "[INST]" * 300_000,
        "[INST] a [/INST] b" + " " * 1_000_000 + "x",
        "[INST] <<SYS>>" + " \n" * 500_000 + "[/INST] b",
        "### Human: a### Assistant: b" + "\n" * 1_000_000 + "x",
        "### Human:" * 100_000,
        "### Instruction:\n" * 100_000,
        "<|im_start|>user\n" * 100_000,
        "<|im_start|>assistant" + " " * 1_000_000 + "x",
        "[INST] a [/INST]" + " \n" * 500_000 + "b",
        "[INST] a [/INST]" + " " * 1_000_000 + "b",
        "### Question" + " " * 1_000_000 + "x",
        "Q:\n" * 300_000,
        "#" * 1_000_000,
    ],
)
def test_no_text_takes_more_than_linear_time(text: str) -> None:
    began = time.process_time()
    layouts.found(text)
    layouts.looks_like_turns(text)
    for layout in layouts.LAYOUTS:
        with contextlib.suppress(RowError):
            layouts.conversation(text, layout, "text")
    assert time.process_time() - began < 5


CODE = "    def f():\n        return 1"


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ("llama2", f"[INST] Hi [/INST] {CODE}\n </s>"),
        ("llama2", f"[INST] Hi [/INST]\r\n{CODE}</s>"),
        ("alpaca", f"### Instruction:\nHi\n\n### Response:\n{CODE}\n"),
        ("alpaca", f"### Instruction:\nHi\n\n### Response: \n\n{CODE}"),
        ("alpaca", f"### Instruction:\nHi\n\n### Response: {CODE}"),
        ("guanaco", f"### Human: Hi### Assistant: {CODE}"),
        ("guanaco", f"### Human:\nHi\n### Assistant:\n{CODE}"),
    ],
)
def test_an_answer_keeps_its_indentation(layout: Layout, text: str) -> None:
    assert read(text, layout) == [("user", "Hi"), ("assistant", CODE)]


def test_a_question_keeps_its_indentation_too() -> None:
    assert read(f"[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n{CODE} [/INST] Hi", "llama2")[:2] == [
        ("system", "Be kind."),
        ("user", CODE),
    ]


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ("llama2", "[INST] Hi [/INST]"),
        ("llama2", "<s>[INST] Hi [/INST] </s>"),
        ("alpaca", "### Instruction:\nHi\n### Response:\n"),
        ("guanaco", "### Human: Hi### Assistant: "),
        ("chatml", "<|im_start|>user\nHi<|im_end|>"),
    ],
)
def test_a_text_in_the_layout_without_an_answer_is_told_so(layout: Layout, text: str) -> None:
    with pytest.raises(RowError, match="has no answer") as caught:
        read(text, layout)
    assert (caught.value.field, caught.value.code) == ("text", "no_answer")


def test_two_turns_of_one_role_say_where() -> None:
    with pytest.raises(RowError, match='two turns of the assistant in a row, the second from "is a heading"'):
        read("### Instruction:\nHi\n### Response:\nhere:\n### Response: is a heading", "alpaca")


NEAR_MISSES = [
    "### Question: Hi\n### Answer: Hello",
    "### User:\nHi\n### Assistant:\nHello",
    "### User: Hi### Assistant: Hello",
    "### Instruction\nHi\n\n### Response\nHello",
    "### instruction:\nHi\n\n### response:\nHello",
    "  ### Instruction:\nHi\n\n  ### Response:\nHello",
    "## Instruction:\nHi\n\n## Response:\nHello",
    "### Input:\nHi\n\n### Output:\nHello",
    "\n\nHuman: Hi\n\nAssistant: Hello",
    "[inst] Hi [/inst] Hello",
    "Q: Hi\nA: Hello",
    "**User:** Hi\n**Assistant:** Hello",
    "<|user|>\nHi\n<|assistant|>\nHello",
    "A chat. USER: Hi ASSISTANT: Hello</s>",
]


@pytest.mark.parametrize("text", NEAR_MISSES)
def test_what_looks_like_turns_is_seen(text: str) -> None:
    assert layouts.found(text) == []
    assert layouts.looks_like_turns(text)


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time, a user asked: who? The answer: nobody.",
        "A: first\nB: second\nQ: third",
        "# Question of the day\n\nText.\n\n# Answer\n",
        "Input: 1 2\nOutput: 3",
        "### Human: a question alone",
        "",
    ],
)
def test_other_texts_do_not_look_like_turns(text: str) -> None:
    assert not layouts.looks_like_turns(text)
