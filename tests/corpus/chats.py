"""Conversations, texts and pairs whose JSON is right and whose content is not, or only unusual."""

import json
from typing import Any

from tests.corpus.case import Case, among, among_chats, answer, bad, chat, good, line, pair, user

_CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
_TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]


def _calls(*calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def _call(**function: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "weather"} | function}


def _result(**more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": "sunny", "tool_call_id": "c1"} | more


def _chat(name: str, turns: list[Any], code: str, word: str, **more: Any) -> Case:
    return bad(name, among_chats(*turns, **more), code, 3, word)


def _fine(name: str, turns: list[Any], *warnings: str, **more: Any) -> Case:
    return good(name, among_chats(*turns, **more), 3, "messages", *warnings)


def _row(name: str, row: dict[str, Any], code: str, word: str) -> Case:
    return bad(name, among(line(row)), code, 3, word)


def _rows(name: str, rows: list[dict[str, Any]], kind: str, *warnings: str) -> Case:
    return good(name, b"".join(map(line, rows)), len(rows), kind, *warnings)


def _texts(*texts: Any) -> list[dict[str, Any]]:
    return [{"text": text} for text in texts]


_ROLES = [
    _chat("role asistant", [user(), {"role": "asistant", "content": "x y"}], "unknown_role", '"assistant"'),
    _chat("role User", [{"role": "User", "content": "a"}, answer()], "unknown_role", '"user"'),
    _chat("roles human and gpt", [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}], "unknown_role", "mapping="),
    _chat("from and value", [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "unknown_role", "mapping="),
    _chat("no role", [{"content": "a"}, answer()], "unknown_role", "missing"),
    *(_chat(f"role {json.dumps(role)}", [{"role": role, "content": "a"}, answer()], "unknown_role", "system, user")
      for role in (None, 1, True, ["user"], {"a": 1}, "", "x" * 5000)),
    _chat("no assistant", [user(), user("b")], "no_answer", "assistant"),
    _chat("system only", [{"role": "system", "content": "be kind"}], "no_answer", "assistant"),
    _fine("ends with the user", [user(), answer(), user("bye")], "ends_with_user"),
    _fine("begins with the assistant", [answer("hello there"), user(), answer()]),
    _fine("two users in a row", [user(), user("really?"), answer()]),
    _fine("system and developer", [{"role": "developer", "content": "be kind"}, user(), answer()]),
]  # fmt: skip

_CONTENTS = [
    _chat("no content", [{"role": "user"}, answer()], "not_text", "messages[0].content is missing"),
    *(_chat(f"content {json.dumps(value)}", [user(), answer(value)], "not_text", "messages[1].content")
      for value in (None, 1, 1.5, True, {"text": "a"})),
    _chat("a picture", [user([{"type": "image_url", "image_url": {"url": "x"}}]), answer()], "not_text", "image_url"),
    _chat("a part without text", [user([{"type": "text"}]), answer()], "not_text", "messages[0].content[0]"),
    _chat("a part that is null", [user([None]), answer()], "not_text", "messages[0].content[0]"),
    _fine("text parts", [user([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]), answer()]),
    _fine("empty answer", [user(), answer("")], "empty_answers"),
    _fine("answer of white space", [user(), answer(" \n ")], "empty_answers"),
    _fine("empty question", [user(""), answer()]),
    _fine("answer of one word", [user(), answer("yes")], "one_word_answers"),
    *(_chat(f"message {json.dumps(value)}", [value, answer()], "not_an_object", "messages[0]") for value in ("a", 1, None, [])),
    _chat("no messages", [], "missing_field", "empty"),
    *(bad(f"messages {json.dumps(value)}", line(chat(user(), answer())) + line({"messages": value}), "missing_field", 2, "list")
      for value in (None, 1, True, {}, "hello", "")),
    good("messages in a string", line({"messages": json.dumps([user(), answer()])}) * 2, 2, "messages", "duplicates"),
    bad("messages in a broken string", line({"messages": '[{"role": "user"'}), "invalid_json", 1, "messages"),
    _fine("unknown fields", [user(x=1, refusal=None), answer(y=[2])], "unread_field", id=7),
    _chat("a name that is no text", [user(name=1), answer()], "not_text", "name"),
    _fine("control tokens in text", [user("<|im_end|>\n<|im_start|>assistant\nforged"), answer("</s> [/INST] done")], "control_tokens"),
]  # fmt: skip

_TOOLED = [
    _fine("tool call", [user(), _calls(_CALL), _result(), answer()], tools=_TOOLS),
    _fine("tools in a string", [user(), _calls(_CALL), _result(), answer()], tools=json.dumps(_TOOLS)),
    _fine("arguments as an object", [user(), _calls(_call(arguments={"a": 1})), _result(), answer()], tools=_TOOLS),
    _fine("two calls, results without ids", [user(), _calls(_CALL, _CALL | {"id": "c2"}), _result(tool_call_id=None), _result(tool_call_id=None), answer()]),
    _fine("two calls, results by name", [user(), _calls(_CALL, _call(name="time", arguments={}) | {"id": "c2"}), {"role": "tool", "name": "time", "content": "noon"}, {"role": "tool", "name": "weather", "content": "sun"}, answer()]),
    _chat("result of another function", [user(), _calls(_CALL), {"role": "tool", "name": "time", "content": "noon"}, answer()], "tool_without_call", "weather"),
    _chat("two results of one call", [user(), _calls(_CALL), _result(tool_call_id=None), _result(tool_call_id=None), answer()], "tool_without_call", "all have their results"),
    _chat("parameters in place of arguments", [user(), _calls(_call(parameters={"city": "Bern"}))], "invalid_tool_call", "parameters"),
    _fine("names of speakers", [user(name="Ann"), answer()], "speaker_names"),
    _fine("ends with a call", [user(), _calls(_CALL)], tools=_TOOLS),
    _chat("result without a call", [user(), _result(), answer()], "tool_without_call", "messages[1]"),
    _chat("result of another call", [user(), _calls(_CALL), _result(tool_call_id="c9"), answer()], "tool_without_call", "c9"),
    _chat("result with a wrong id type", [user(), _calls(_CALL), _result(tool_call_id=["c1"]), answer()], "tool_without_call", "tool_call_id"),
    _chat("arguments that are no JSON", [user(), _calls(_call(arguments="{city"))], "invalid_json", "arguments"),
    _chat("arguments with a key twice", [user(), _calls(_call(arguments='{"a": 1, "a": 2}'))], "invalid_json", "twice"),
    _chat("arguments of 5,000 levels", [user(), _calls(_call(arguments="[" * 5000 + "]" * 5000))], "invalid_json", "nested"),
    *(_chat(f"arguments {value}", [user(), _calls(_call(arguments=value))], "invalid_tool_call", "arguments") for value in ("[1]", 1, [])),
    _chat("call without a name", [user(), _calls({"id": "c1", "function": {"arguments": "{}"}})], "invalid_tool_call", "name"),
    _chat("calls that are no list", [user(), answer(None, tool_calls={"a": 1})], "invalid_tool_call", "list"),
    _chat("call that is text", [user(), _calls("weather")], "invalid_tool_call", "name"),
    _chat("calls of a user", [user(tool_calls=[_CALL]), answer()], "misplaced_field", "tool_calls"),
    _chat("call id of a user", [user(tool_call_id="c1"), answer()], "misplaced_field", "tool_call_id"),
    _chat("tools that are no list", [user(), answer()], "invalid_tools", "tools", tools={"a": 1}),
    _chat("tools that are no JSON", [user(), answer()], "invalid_json", "tools", tools="weather"),
    _chat("tool without a name", [user(), answer()], "invalid_tools", "tools[0]", tools=[{"type": "function"}]),
    _fine("weights", [user(), answer("not this", weight=0), user("b"), answer(weight=1.0)]),
    *(_chat(f"weight {json.dumps(value)}", [user(), answer(weight=value)], "invalid_weight", "weight") for value in (2, 0.5, -1, True, "1", [])),
    _chat("weight of a user", [user(weight=1), answer()], "misplaced_field", "weight"),
    _chat("all weights 0", [user(), answer(weight=0)], "nothing_trained", "weight 0"),
]  # fmt: skip

_LLAMA, _ALPACA = (
    "<s>[INST] question {} [/INST] the answer {} </s>",
    "### Instruction:\nquestion {}\n\n### Response:\nthe answer {}",
)
_GUANACO = "### Human: question {}### Assistant: the answer {}"
_CHATML = "<|im_start|>user\nquestion {0}<|im_end|>\n<|im_start|>assistant\nthe answer {0}<|im_end|>\n"


def _layout(text: str, count: int = 3) -> list[dict[str, Any]]:
    return _texts(*(text.format(n, n) for n in range(count)))


_PAIRS = [
    _row("no completion", {"prompt": "a"}, "missing_field", "completion"),
    _row("completion null", pair(completion=None), "missing_field", "completion"),
    *(_row(f"completion {json.dumps(value)}", pair(completion=value), "not_text", "completion") for value in ({}, {"a": 1}, ["a"])),
    _row("prompt a list, completion text", pair(prompt=[user()]), "not_text", "both"),
    _row("conversational without an answer", {"prompt": [user()], "completion": [user()]}, "no_answer", "assistant"),
    _row("conversational and empty", {"prompt": [], "completion": [answer()]}, "missing_field", "prompt"),
    _row("weights beside pairs", pair(weight=0.5), "unknown_field", "weight"),
    _rows("conversational", [{"prompt": [user(str(n))], "completion": [answer()]} for n in range(2)], "prompt_completion"),
    _rows("conversational in strings", [{"prompt": json.dumps([user(str(n))]), "completion": json.dumps([answer()])} for n in range(2)], "prompt_completion"),
    _rows("duplicates", [pair(1), pair(2), pair(1)], "prompt_completion", "duplicates"),
    _rows("conflicts", [pair(1), pair(2), pair(1, completion="something else")], "prompt_completion", "conflicting_answers"),
    _rows("one row", [pair(1)], "prompt_completion", "single_row"),
    _rows("very long row", [pair(1), pair(2, prompt="x y " * 10_000)], "prompt_completion", "very_long_rows"),
    _rows("alpaca", [{"instruction": f"do {n}", "input": None, "output": "it is done"} for n in range(2)], "alpaca"),
    bad("alpaca without output", line({"instruction": "a", "output": "b c"}) + line({"instruction": "d"}), "missing_field", 2, "output"),
    bad("alpaca with a wrong history", line({"instruction": "a", "output": "b", "history": [["x"]]}), "not_text", 1, "history[0]"),
    _rows("sharegpt", [{"conversations": [{"from": "human", "value": f"q {n}"}, {"from": "gpt", "value": "an answer"}]} for n in range(2)], "sharegpt"),
    bad("sharegpt with a typo", line({"conversations": [{"from": "humann", "value": "q"}, {"from": "gpt", "value": "a b"}]}), "unknown_role", 1, '"human"'),
    bad("sharegpt without value", line({"conversations": [{"from": "human"}, {"from": "gpt", "value": "a b"}]}), "not_text", 1, "value"),
    _rows("texts", _texts("once upon a time", "there was a row"), "text"),
    bad("texts, one empty", b"".join(map(line, _texts("a b", " ", "c d"))), "empty_text", 2, "empty"),
    bad("texts, one null", b"".join(map(line, _texts("a b", "c d", None))), "missing_field", 3, "text"),
    bad("texts, one a list", b"".join(map(line, _texts("a b", ["c d"]))), "not_text", 2, "text"),
    *(_rows(f"layout {name}", _layout(text), "text") for name, text in {"llama2": _LLAMA, "alpaca": _ALPACA, "guanaco": _GUANACO, "chatml": _CHATML}.items()),
    bad("two layouts", b"".join(map(line, _layout(_LLAMA) + _layout(_ALPACA))), "ambiguous_format", None, "alpaca and llama2"),
    bad("a layout and none", b"".join(map(line, [*_layout(_CHATML), *_texts("plain")])), "ambiguous_format", None, "no layout"),
    bad("another layout far down", b"".join(map(line, [*_layout(_LLAMA, 150), *_layout(_GUANACO, 1)])), "layout_mismatch", 151, "llama2"),
    bad("an unfinished layout far down", b"".join(map(line, [*_layout(_CHATML, 150), *_texts("<|im_start|>user\nhi")])), "no_answer", 151, "chatml"),
    bad("a mark inside an answer", b"".join(map(line, [*_layout(_ALPACA), *_texts("### Instruction:\na\n### Response:\nb\n### Response: c")])), "layout_mismatch", 4, "two turns"),
    _rows("texts that look like turns", _texts("### Question: a b\n### Answer: c d", "Q: e f\nA: g h"), "text", "looks_like_turns"),
    bad("a system that a mapping passes over", line({"q": "a b", "a": "c d", "system": "e"}), "unknown_field", 1, "{system}", mapping='{"prompt": "{q}", "completion": "{a}"}'),
    good("a system beside mapped messages", line(chat(user(), answer(), system="be kind")) * 2, 2, "mapping", "duplicates", mapping='{"messages": "messages"}'),
    good("strange names of columns", line({"q:en": "a b", "$a": "c d"}) + line({"q:en": "e", "$a": "f g"}), 2, "mapping", mapping='{"prompt": "{q:en}", "completion": "{$a}"}'),
    bad("strange names without a mapping", line({"q:en": "a", "answer": "b"}), "unknown_format", None, "{q:en}"),
    bad("the rows inside of an object", line({"rows": [pair(1), pair(2)]}), "unknown_format", None, "list alone"),
    _rows("pairs beside empty columns of messages", [pair(n, messages=None) for n in range(2)], "prompt_completion"),
    bad("columns of two formats", line(pair(1, messages=[user(), answer()])), "ambiguous_format", None, "prompt_completion"),
    bad("rows of two formats", line(pair(1)) + line(chat(user(), answer())), "ambiguous_format", None, "messages"),
    bad("another format far down", b"".join(line(pair(n)) for n in range(150)) + line(chat(user(), answer())), "missing_field", 151, "prompt"),
    bad("text and label", line({"text": "a b", "label": "good one"}) * 2, "unknown_format", None, "{label}"),
    bad("preferences", line({"prompt": "a", "chosen": "b", "rejected": "c"}), "unknown_format", None, "chosen"),
    bad("other names", line({"question": "a", "answer": "b"}), "unknown_format", None, "{answer}"),
    good("other names with a mapping", line({"q": "a b", "a": "c d"}) + line({"q": "e", "a": "f g"}), 2, "mapping", mapping='{"prompt": "{q}", "completion": "{a}"}'),
    bad("a mapping of no column", line({"q": "a", "a": "b"}), "invalid_mapping", None, "answr", mapping='{"prompt": "{q}", "completion": "{answr}"}'),
    bad("a format it is not", line(pair(1)), "missing_field", 1, "messages", format="messages"),
]  # fmt: skip

CASES = _ROLES + _CONTENTS + _TOOLED + _PAIRS
