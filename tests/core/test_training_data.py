"""Rows to token ids and labels."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import BadRequest
from core.hashes import sha256
from core.ml import contract as contracts
from core.ml import prompts
from core.ml.catalogue import BaseModel
from core.ml.formats.chat.example import Conversation, Turn
from core.ml.formats.validate import Reading
from core.ml.prompts import Contract
from core.ml.training import data, plan
from core.ml.training import split as split_of
from core.ml.training.config import Spec, Training
from core.ml.training.data import LabelledIds, Tokenised
from core.ml.training.run import Run, Source, Trained


@pytest.fixture(scope="module")
def contract(tiny_model: Path) -> Contract:
    return contracts.load(tiny_model)


def source(folder: Path, pairs: list[tuple[str, str]]) -> Source:
    file = folder / "data"
    # A blank line before each row: line numbers are those of the file.
    file.write_text("".join(f"\n{json.dumps({'prompt': a, 'completion': b})}\n" for a, b in pairs))
    return Source(file, Reading("jsonl", False, "prompt_completion", None))


def run_of(rows: Source, valid: Source | None = None, fraction: float | None = None, **training: Any) -> Run:
    spec = Spec(training=Training(**training))
    model = BaseModel("m", "folder", rows.path.parent, rows.path.parent, "")
    return Run(model, spec, rows, valid, fraction, rows.path.parent)


def tokenise(rows: Source, contract: Contract, *, context: int = 512, **training: Any) -> Tokenised:
    return data.checked_rows(run_of(rows, **training), contract, context=context).data


def split(
    rows: Source, contract: Contract, fraction: float, seed: int, **training: Any
) -> tuple[list[LabelledIds], list[LabelledIds]]:
    run = run_of(rows, None, fraction, **training)
    run = replace(run, spec=run.spec.model_copy(update={"seed": seed}))
    made = data.checked_rows(run, contract, context=512)
    return made.train_examples, made.valid_examples


def test_labels_are_the_trained_tokens_alone(contract: Contract, tmp_path: Path) -> None:
    made = tokenise(source(tmp_path, [("Hi", "Hello")]), contract)
    turns = [Turn(role="user", content="Hi"), Turn(role="assistant", content="Hello")]
    encoded = prompts.encode(contract, Conversation(turns))
    (example,) = made.examples
    assert example["input_ids"] == encoded.ids
    assert [label != -100 for label in example["labels"]] == encoded.trained
    kept = [label for label in example["labels"] if label != -100]
    assert prompts.text_of(contract, kept) == "Hello<|im_end|>\n"
    assert (made.longest, made.trained_tokens, made.dropped) == (len(encoded.ids), len(kept), [])


def test_too_long_rows_are_an_error_with_their_lines(contract: Contract, tmp_path: Path) -> None:
    rows = source(tmp_path, [("a", "b"), ("x" * 500, "b"), ("a", "c"), ("y" * 500, "b")])
    with pytest.raises(BadRequest) as caught:
        tokenise(rows, contract, max_length=64)
    assert (caught.value.code, caught.value.param) == ("row_too_long", "training.max_length")
    assert caught.value.message == "2 rows are longer than 64 tokens (lines 4, 8)."


def test_too_long_rows_are_dropped_on_request_and_named(contract: Contract, tmp_path: Path) -> None:
    rows = source(tmp_path, [("a", "b"), ("x" * 500, "b"), ("a", "c"), ("y" * 500, "b")])
    made = tokenise(rows, contract, max_length=64, overlength="drop")
    assert (made.dropped, len(made.examples)) == ([4, 8], 2)
    assert made.longest <= 64


def test_a_row_as_long_as_the_limit_is_kept_whole(contract: Contract, tmp_path: Path) -> None:
    rows = source(tmp_path, [("some words", "b")])
    length = tokenise(rows, contract).longest
    assert tokenise(rows, contract, max_length=length).longest == length
    with pytest.raises(BadRequest, match="1 row is longer"):
        tokenise(rows, contract, max_length=length - 1)


def test_without_a_limit_the_models_context_is_it(contract: Contract, tmp_path: Path) -> None:
    rows = source(tmp_path, [("x" * 200, "b")])
    assert tokenise(rows, contract, context=512).longest > 100
    with pytest.raises(BadRequest) as caught:
        tokenise(rows, contract, context=100)
    assert caught.value.code == "row_too_long"


def test_a_limit_beyond_the_context_is_refused(contract: Contract, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        tokenise(source(tmp_path, [("a", "b")]), contract, context=512, max_length=513)
    assert caught.value.code == "max_length_too_long"


def test_a_data_set_of_which_nothing_is_left_is_refused(contract: Contract, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        tokenise(source(tmp_path, [("x" * 200, "b")]), contract, max_length=20, overlength="drop")
    assert caught.value.code == "no_trained_tokens"


def test_too_long_rows_are_cut_from_the_left_of_their_prompt_on_request(
    contract: Contract, tmp_path: Path
) -> None:
    rows = source(tmp_path, [("a", "b"), ("x" * 500, "b c"), ("a", "y" * 500)])
    with pytest.raises(BadRequest) as caught:
        tokenise(rows, contract, max_length=64, overlength="truncate")
    assert caught.value.message == "1 row is longer than 64 tokens even without their prompt (lines 6)."
    made = tokenise(
        source(tmp_path, [("a", "b"), ("x" * 500, "b c")]), contract, max_length=64, overlength="truncate"
    )
    assert (made.truncated, made.dropped, list(made.lines)) == ([4], [], [2, 4])
    cut = made.examples[1]
    assert len(cut["input_ids"]) == len(cut["labels"]) == 64
    assert prompts.text_of(contract, [label for label in cut["labels"] if label != -100]) == "b c<|im_end|>\n"


def test_a_row_that_cannot_be_encoded_is_named_by_its_line(contract: Contract, tmp_path: Path) -> None:
    file = tmp_path / "data"
    rows = ["Say", "hello"]
    file.write_text("".join(f"\n{json.dumps({'text': row})}\n" for row in rows))
    texts = Source(file, Reading("jsonl", False, "text", {"text": "{text}"}))
    made = tokenise(texts, contract)
    assert made.texts
    assert [prompts.text_of(contract, e["labels"]) for e in made.examples] == [
        "Say<|im_end|>",
        "hello<|im_end|>",
    ]
    with pytest.raises(BadRequest, match="Line 2: ") as caught:
        tokenise(texts, contract, loss_on="assistant")
    assert caught.value.code == "no_turns"


def test_rows_that_do_not_train_an_end_are_refused(contract: Contract, tmp_path: Path) -> None:
    bare = Contract(contract.tokenizer, (0,))
    with pytest.raises(BadRequest) as caught:
        tokenise(source(tmp_path, [("a", "b")]), bare)
    assert caught.value.code == "eos_not_trained"


def test_rows_in_both_files_are_named(contract: Contract, tmp_path: Path) -> None:
    (tmp_path / "valid").mkdir()
    train = source(tmp_path, [("a", "b"), ("c", "d")])
    valid = source(tmp_path / "valid", [("a", "c"), ("c", "d")])
    assert data.checked_rows(run_of(train, valid), contract, context=512).in_both == [4]


def texts(folder: Path) -> Source:
    folder.mkdir()
    file = folder / "data"
    file.write_text('{"body": "one text"}\n{"body": "another"}\n')
    return Source(file, Reading("jsonl", False, "text", {"text": "{body}"}))


@pytest.mark.parametrize("texts_are_trained", [True, False])
def test_validation_rows_of_another_kind_are_refused_where_other_tokens_would_count(
    contract: Contract, tmp_path: Path, texts_are_trained: bool
) -> None:
    pair = [texts(tmp_path / "texts"), source(tmp_path, [("a", "b"), ("c", "d")])]
    train, valid = pair if texts_are_trained else pair[::-1]
    with pytest.raises(BadRequest) as caught:
        data.rows_of(run_of(train, valid), contract, context=512)
    assert (caught.value.code, caught.value.param) == ("validation_of_other_kind", "validation.dataset_id")
    rows = data.rows_of(run_of(train, valid, loss_on="all"), contract, context=512)
    assert (len(rows.train), rows.valid_count) == (2, 2)


def test_rows_that_the_adapter_to_continue_from_was_trained_on_prove_nothing(
    contract: Contract, tmp_path: Path
) -> None:
    (tmp_path / "valid").mkdir()
    train = source(tmp_path, [("a", "b"), ("c", "d")])
    valid = source(tmp_path / "valid", [("e", "f"), ("g", "h")])
    run = run_of(train, valid)

    def both(*earlier: Trained) -> list[int]:
        return data.rows_of(replace(run, earlier=earlier), contract, context=512).in_both

    assert both(Trained(sha256(valid.path), None)) == [2, 4]
    assert both(Trained(sha256(train.path), None)) == []


@pytest.mark.parametrize("held_back", ["the same", "others", None])
def test_rows_that_were_held_back_from_that_adapter_too_prove_something(
    contract: Contract, tmp_path: Path, held_back: str | None
) -> None:
    train = source(tmp_path, [(f"row {n}", "b") for n in range(20)])
    run = run_of(train, None, 0.5)
    rows = data.rows_of(run, contract, context=512)
    keys = [rows.data.prompt_keys[place] for place in rows.held_back]
    assert len(keys) > 1
    kept_apart = {
        "the same": split_of.fingerprint(keys[::-1]),
        "others": split_of.fingerprint(keys[1:]),
        None: None,
    }[held_back]
    earlier = (Trained(sha256(train.path), kept_apart), Trained("0" * 64, None))
    rows = data.rows_of(replace(run, earlier=earlier), contract, context=512)
    unseen = held_back == "the same"
    assert rows.in_both == ([] if unseen else [rows.data.lines[place] for place in rows.held_back])


def test_without_keeping_them_rows_are_only_counted(contract: Contract, tmp_path: Path) -> None:
    run = run_of(source(tmp_path, [("a", "b"), ("c", "d")]), fraction=0.5)
    kept = data.rows_of(run, contract, context=512)
    counted = data.rows_of(run, contract, context=512, count_until=time.monotonic() + 60)
    assert counted.data.examples == []
    assert len(kept.data.examples) == 2
    assert (counted.data.lengths, counted.train) == (kept.data.lengths, kept.train)
    with pytest.raises(TimeoutError):
        data.rows_of(run, contract, context=512, count_until=time.monotonic())


@pytest.mark.parametrize(("policy", "dropped", "truncated"), [("drop", [400], []), ("truncate", [], [400])])
def test_the_longest_of_many_rows_do_not_set_the_length_where_they_may_be_left_out(
    contract: Contract, tmp_path: Path, policy: str, dropped: list[int], truncated: list[int]
) -> None:
    rows = source(tmp_path, [*((f"question {n}", "yes") for n in range(199)), ("x" * 400, "yes")])
    made = tokenise(rows, contract, overlength=policy)
    assert (made.limit, made.dropped, made.truncated) == (64, dropped, truncated)
    assert tokenise(rows, contract, overlength="error").longest > 200


def test_every_problem_is_listed(contract: Contract, tmp_path: Path) -> None:
    (tmp_path / "valid").mkdir()
    run = run_of(
        source(tmp_path, [("x" * 500, "b")]), source(tmp_path / "valid", [("x" * 500, "b")]), max_length=64
    )
    found = data.problems(data.rows_of(run, contract, context=512), run)
    assert [problem.code for problem in found] == ["row_too_long", "no_trained_tokens"] * 2
    assert found[2].message == "In the validation data set: 1 row is longer than 64 tokens (lines 2)."


def test_rows_stay_the_same_when_they_are_read_again_with_what_was_settled(
    contract: Contract, tmp_path: Path
) -> None:
    """As an attempt does that goes on: here the validation rows are longer than those that are trained."""
    (tmp_path / "valid").mkdir()
    train = source(tmp_path, [("a", "b"), ("c", "d")])
    valid = source(tmp_path / "valid", [("x" * 200, "y")])
    run = run_of(train, valid)
    rows = data.checked_rows(run, contract, context=512)
    settled = plan.resolved(run.spec, rows)
    again = data.checked_rows(replace(run, spec=settled), contract, context=512)
    assert settled.training.max_length == rows.valid.longest > rows.data.longest  # type: ignore[union-attr]
    assert (again.train_examples, again.valid_examples) == (rows.train_examples, rows.valid_examples)


# ---- Split


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """Forty prompts with three answers each."""
    return [(f"question {i}", f"answer {j}") for j in range(3) for i in range(40)]


def questions(contract: Contract, examples: list[dict[str, list[int]]]) -> set[str]:
    texts = [prompts.text_of(contract, example["input_ids"]) for example in examples]
    return {text.split("<|im_end|>")[0] for text in texts}


def test_equal_prompts_stay_on_one_side(
    contract: Contract, tmp_path: Path, pairs: list[tuple[str, str]]
) -> None:
    train, held_back = split(source(tmp_path, pairs), contract, 0.25, seed=1)
    assert len(train) + len(held_back) == 120
    assert questions(contract, train).isdisjoint(questions(contract, held_back))
    assert len(train) == 3 * len(questions(contract, train))
    assert 3 * 4 <= len(held_back) <= 3 * 18


def test_a_prompt_that_is_cut_for_answers_of_any_length_stays_on_one_side(
    contract: Contract, tmp_path: Path
) -> None:
    pairs = [(f"question {i} " + "x " * 90, "b " * j) for i in range(12) for j in range(1, 5)]
    run = run_of(source(tmp_path, pairs), None, 0.5, max_length=64, overlength="truncate")
    rows = data.rows_of(run, contract, context=512)
    assert len(rows.data.truncated) == 48
    sides = [
        {(rows.data.lines[place] // 2 - 1) // 4 for place in side} for side in (rows.train, rows.held_back)
    ]
    assert sides[0].isdisjoint(sides[1])
    assert sides[0] | sides[1] == set(range(12))


def test_the_same_seed_splits_the_same_and_another_seed_does_not(
    contract: Contract, tmp_path: Path, pairs: list[tuple[str, str]]
) -> None:
    rows = source(tmp_path, pairs)
    first, again, other = (split(rows, contract, 0.25, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_row_more_does_not_move_the_others(
    contract: Contract, tmp_path: Path, pairs: list[tuple[str, str]]
) -> None:
    _, before = split(source(tmp_path, pairs), contract, 0.25, seed=1)
    _, after = split(source(tmp_path, [("first", "x"), *pairs]), contract, 0.25, seed=1)
    assert [example for example in after if example in before] == before


def test_a_split_works_with_the_loss_on_every_token(
    contract: Contract, tmp_path: Path, pairs: list[tuple[str, str]]
) -> None:
    train, held_back = split(source(tmp_path, pairs), contract, 0.25, seed=1, loss_on="all")
    assert len(train) + len(held_back) == 120
    assert questions(contract, train).isdisjoint(questions(contract, held_back))


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_two_prompts_are_enough_for_a_split(contract: Contract, tmp_path: Path, fraction: float) -> None:
    for seed in range(5):
        train, held_back = split(source(tmp_path, [("a", "b"), ("c", "d")]), contract, fraction, seed=seed)
        assert (len(train), len(held_back)) == (1, 1)


def test_a_split_that_leaves_one_side_empty_is_refused(contract: Contract, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        split(source(tmp_path, [("only", "one")]), contract, 0.5, seed=1)
    assert (caught.value.code, caught.value.param) == ("validation_empty", "validation.fraction")
