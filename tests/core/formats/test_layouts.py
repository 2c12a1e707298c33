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
        ("llama2", "[INST] Hi [/INST]"),
        ("alpaca", "### Input:\nx\n### Response:\ny"),
        ("alpaca", "### Instruction:\nHi\n### Response:\n"),
        ("guanaco", "### Human: Hi"),
        ("chatml", "<|im_start|>user\nHi<|im_end|>"),
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
    ],
)
def test_no_text_takes_more_than_linear_time(text: str) -> None:
    began = time.process_time()
    layouts.found(text)
    for layout in layouts.LAYOUTS:
        with contextlib.suppress(RowError):
            layouts.conversation(text, layout, "text")
    assert time.process_time() - began < 5
