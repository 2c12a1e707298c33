"""A data set as it would be trained, in the one form that other tools read."""

import tempfile
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
from core.errors import BadRequest, StorageFull, is_disk_full
from core.ml import contract as contracts
from core.ml import rendering
from core.ml.formats import validate
from core.ml.formats.chat import plain, weights
from core.ml.formats.chat.example import Conversation
from core.ml.formats.validate import Reading
from core.ml.prompts import LossOn
from core.ml.rendering import Styles

router = APIRouter(prefix="/datasets", tags=["data sets"], route_class=StrictRoute)

_CHUNK = 1024**2


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
    # Written whole before the answer begins, so that a row that is refused is an answer of its own. Not closed here:
    # it is on its way to the client when this function has returned.
    target = tempfile.TemporaryFile(dir=services.settings.uploads)  # noqa: SIM115
    try:
        with services.storage.open(row.key) as file:
            for line in _lines(file, reading, loss_on, styles):
                target.write(line)
        size = target.tell()
        target.seek(0)
    except OSError as error:
        if is_disk_full(error):
            raise StorageFull("the conversations") from error
        raise
    name = f"{PurePath(row.filename).stem or row.id}.conversations.jsonl"
    headers = {
        "content-length": str(size),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(name)}",
    }
    return _JsonLines(iter(lambda: target.read(_CHUNK), b""), headers=headers)


def _lines(file: IO[bytes], reading: Reading, loss_on: LossOn, styles: Styles) -> Iterator[bytes]:
    for number, example in validate.conversations(file, reading):
        try:
            trained = weights.weighted(example, loss_on)
        except BadRequest as error:
            told = error.within(f"Line {number}")
            told.param = "loss_on"
            raise told from error
        if isinstance(trained, Conversation):
            trained = rendering.written(trained, styles)
        yield strict_json.dumps(plain.row_of(trained)).encode() + b"\n"
