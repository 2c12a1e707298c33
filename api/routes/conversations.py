"""A data set as it would be trained, in the one form that other tools read."""

import itertools
from collections.abc import Iterator
from pathlib import PurePath
from typing import IO, Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from api.deps import CallerDep, ServicesDep, ready_model
from api.requests import StrictRoute
from core import strict_json
from core.control import datasets, db
from core.errors import BadRequest
from core.ml import contract as contracts
from core.ml import rendering
from core.ml.formats import validate
from core.ml.formats.chat import plain, weights
from core.ml.formats.chat.example import Conversation, Example
from core.ml.formats.validate import Reading
from core.ml.prompts import LossOn
from core.ml.rendering import Styles
from core.storage import Storage

router = APIRouter(prefix="/datasets", tags=["data sets"], route_class=StrictRoute)

_CHUNK = 2**18


class _JsonLines(StreamingResponse):
    media_type = "application/x-ndjson"


@router.get("/{dataset_id}/conversations", response_class=_JsonLines)
def conversations(
    dataset_id: str,
    services: ServicesDep,
    caller: CallerDep,
    loss_on: LossOn = "auto",
    model: Annotated[str | None, Query(max_length=200)] = None,
) -> StreamingResponse:
    """Every row as one line of JSON: `{"messages": […], "tools": […]}` in OpenAI's form, or `{"text": …}`.

    Answers that are not trained, by their row or by `loss_on`, have `"weight": 0`. With `model`, system messages and
    tools that the chat template of this base model does not write stand as text in the messages, as they are trained.
    """
    with db.reading(services.sessions) as session:
        row = datasets.get(session, caller.project_id, dataset_id)
    styles = Styles()
    if model is not None:
        styles = contracts.load_cached(ready_model(services, model).path).styles
    reading = datasets.reading(row, datasets.limits(services.settings))
    if loss_on == "completion":
        # It refuses single rows: that has to show before the answer begins.
        with services.storage.open(row.key) as file:
            for _ in _trained(file, reading, loss_on):
                pass
    lines = _lines(services.storage, row.key, reading, loss_on, styles)
    # What is wrong with all rows shows at the first.
    first = list(itertools.islice(lines, 1))
    name = f"{PurePath(row.filename).stem or row.id}.conversations.jsonl"
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(name)}"}
    return _JsonLines(itertools.chain(first, lines), headers=headers)


def _lines(storage: Storage, key: str, reading: Reading, loss_on: LossOn, styles: Styles) -> Iterator[bytes]:
    """Many at a time, for each takes a turn of the server."""
    with storage.open(key) as file:
        made, size = [], 0
        for example in _trained(file, reading, loss_on):
            told = rendering.written(example, styles) if isinstance(example, Conversation) else example
            made.append(strict_json.dumps(plain.row_of(told)).encode() + b"\n")
            size += len(made[-1])
            if size >= _CHUNK:
                yield b"".join(made)
                made, size = [], 0
        yield b"".join(made)


def _trained(file: IO[bytes], reading: Reading, loss_on: LossOn) -> Iterator[Example]:
    """Every row with its weights as `loss_on` has them.

    Raises:
        BadRequest: `nothing_trained`, only under `completion`; `no_turns`, of all rows.
    """
    for number, example in validate.conversations(file, reading):
        try:
            yield weights.weighted(example, loss_on)
        except BadRequest as error:
            told = error.within(f"Line {number}")
            told.param = "loss_on"
            raise told from error
