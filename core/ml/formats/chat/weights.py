"""Which answers of a row are trained, by their weights and by a job's `loss_on`."""

from core.errors import BadRequest
from core.ml.formats.chat.example import Conversation, Example


def counted(answers: list[int], untrained: frozenset[int], loss_on: str | None) -> list[int]:
    """The turns whose tokens are trained by their place. Raises BadRequest `nothing_trained`."""
    if loss_on in (None, "all"):
        return []
    asked = answers[-1:] if loss_on == "completion" else answers
    trained = [turn for turn in asked if turn not in untrained]
    if asked and not trained:
        message = "The last answer has weight 0, and loss_on completion trains no other."
        raise BadRequest("nothing_trained", message, hint='Use loss_on "assistant", or leave the row out.')
    return trained


def check_text(loss_on: str) -> None:
    """Raises BadRequest `no_turns` where a plain text cannot be trained so."""
    if loss_on not in ("auto", "all"):
        raise BadRequest(
            "no_turns",
            "The rows are plain texts without turns, so there is no answer to train alone.",
            param="training.loss_on",
            hint='Use loss_on "all" or "auto", or a mapping that says which part is the answer.',
        )


def weighted(example: Example, loss_on: str) -> Example:
    """The row with its weights alone saying what `loss_on` trains of it. Raises as the other two."""
    if not isinstance(example, Conversation):
        check_text(loss_on)
        return example
    if loss_on == "all":
        return example._replace(untrained=frozenset())
    answers = [i for i, turn in enumerate(example.turns) if turn["role"] == "assistant"]
    trained = counted(answers, example.untrained, loss_on)
    return example._replace(untrained=frozenset(answers).difference(trained))
