"""The preview of a data set: its first rows token by token, as they would be trained."""

import itertools
from typing import Annotated

from fastapi import APIRouter, Query

from api.deps import CallerDep, ServicesDep, ready_model
from api.requests import StrictRoute
from api.schemas.datasets import Preview, PreviewRow, Token
from core.control import datasets, db
from core.errors import BadRequest
from core.ml import catalogue, prompts
from core.ml import contract as contracts
from core.ml.formats import validate
from core.ml.formats.chat.example import Example
from core.ml.prompts import Contract, LossOn
from core.ml.training.data import AUTO_LENGTH

router = APIRouter(prefix="/datasets", tags=["data sets"], route_class=StrictRoute)

# A preview is for eyes: longer rows are shown to here, and no further rows after them.
_SHOWN_TOKENS = 20_000


@router.get("/{dataset_id}/preview")
def preview(
    dataset_id: str,
    services: ServicesDep,
    caller: CallerDep,
    model: Annotated[str | None, Query(max_length=200)] = None,
    n: Annotated[int, Query(ge=1, le=100)] = 3,
    loss_on: LossOn = "auto",
    max_length: Annotated[int | None, Query(ge=8)] = None,
) -> Preview:
    """The first rows token by token, through the same function that feeds the trainer.

    With `max_length`, longer rows are shown as `training.overlength` "truncate" would train them. Without it
    they are shown whole, and those that a job with default settings would refuse are called too long.
    """
    with db.reading(services.sessions) as session:
        row = datasets.get(session, caller.project_id, dataset_id)
    base = ready_model(services, model)
    contract = contracts.load_cached(base.path)
    rows: list[PreviewRow] = []
    texts = stopped = False
    limit = max_length or min(AUTO_LENGTH, catalogue.context(base))
    with services.storage.open(row.key) as file:
        reading = datasets.reading(row, datasets.limits(services.settings))
        for line, example in itertools.islice(validate.conversations(file, reading), n):
            texts = isinstance(example, str)
            if sum(shown.n_shown for shown in rows) >= _SHOWN_TOKENS:
                stopped = True
                break
            rows.append(_preview_row(contract, line, example, loss_on, limit, cut=max_length is not None))
    return Preview(
        dataset_id=row.id,
        model=base.name,
        loss_on=loss_on if loss_on != "auto" else "all" if texts else "assistant",
        max_length=max_length,
        limit=limit,
        stopped=stopped,
        template=contract.template,
        template_sha256=contract.template_sha256,
        stop_token_ids=list(contract.stop_token_ids),
        rows=rows,
        totals={
            "rows": len(rows),
            "tokens": sum(r.n_tokens for r in rows),
            "trained": sum(r.n_trained for r in rows),
            "too_long": sum(r.too_long for r in rows),
            "truncated": sum(r.truncated for r in rows),
        },
    )


def _preview_row(
    contract: Contract, line: int, example: Example, loss_on: LossOn, limit: int, *, cut: bool
) -> PreviewRow:
    try:
        whole = prompts.encode(contract, example, loss_on=loss_on)
    except BadRequest as error:
        told = error.within(f"Line {line}")
        told.param = error.param.removeprefix("training.") if error.param else None
        raise told from error
    encoded = (prompts.truncated(contract, whole, limit) if cut else None) or whole
    ids = encoded.ids[:_SHOWN_TOKENS]
    tokens = [
        Token(id=token, text=text, trained=trained)
        for token, text, trained in zip(ids, prompts.pieces(contract, ids), encoded.trained, strict=False)
    ]
    return PreviewRow(
        line=line,
        text=prompts.text_of(contract, ids),
        tokens=tokens,
        n_tokens=len(encoded.ids),
        n_shown=len(ids),
        n_trained=sum(encoded.trained),
        truncated=len(encoded.ids) < len(whole.ids),
        too_long=len(whole.ids) > limit,
        ends_trained=prompts.ends_trained(contract, encoded),
    )
