"""Data sets: upload, look, delete, and the preview of what would be trained."""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request, Response, UploadFile
from starlette.datastructures import FormData

from api.deps import CallerDep, PageDep, Services, ServicesDep
from api.files import respond
from api.requests import StrictRoute, parse
from api.schemas.common import Deleted, Listing
from api.schemas.datasets import DatasetOut, Preview, PreviewRow, Token
from core.control import datasets, db
from core.control.db import DatabaseUnavailable
from core.control.tables import Dataset
from core.errors import BadRequest, GraftError, StorageFull, is_disk_full, nearest
from core.ml import catalogue, prompts
from core.ml.formats import validate
from core.ml.prompts import Contract, LossOn, Message

router = APIRouter(prefix="/datasets", tags=["data sets"], route_class=StrictRoute)

# A preview is for eyes: longer rows are shown to here, and no further rows after them.
_SHOWN_TOKENS = 20_000
_FIELDS = ("file", "name", "format", "mapping")


@router.post("", status_code=201)
def create(
    file: UploadFile,
    services: ServicesDep,
    caller: CallerDep,
    request: Request,
    name: Annotated[str | None, Form(max_length=128, pattern=r"^[^\x00-\x1f]*$")] = None,
    format: Annotated[str, Form(max_length=40)] = "auto",  # noqa: A002 - the field's name in the contract
    mapping: Annotated[str | None, Form(max_length=100_000)] = None,
) -> DatasetOut:
    """Keep a data set, if every row of it can be trained."""
    _refuse_unknown(request)
    with tempfile.TemporaryDirectory(dir=services.settings.uploads) as folder:
        path = Path(folder) / "data"
        size, sha256 = _receive(file, path)
        report = validate.inspect(
            path,
            kind=format,
            mapping=_mapping(mapping),
            line_max_bytes=services.settings.line_max_bytes,
        )
        if report.error_count:
            raise validate.refuse(report)
        dataset_id = datasets.fresh_id()
        key = f"datasets/{dataset_id}/data"
        services.storage.put(path, key)
    filename = _clean(file.filename)
    try:
        with services.sessions.begin() as session:
            row = datasets.create(
                session,
                caller.project_id,
                id=dataset_id,
                name=name or filename,
                filename=filename,
                file_type=report.file_type,
                format=report.format,
                mapping=_mapping(mapping),
                columns=report.columns,
                rows=report.rows,
                bytes=size,
                sha256=sha256,
                report=report.summary(),
            )
    except DatabaseUnavailable:
        raise  # nobody knows whether the row is there
    except Exception:
        services.storage.delete(key)
        raise
    return DatasetOut.of(row)


@router.get("")
def list_(services: ServicesDep, caller: CallerDep, page: PageDep) -> Listing[DatasetOut]:
    with db.reading(services.sessions) as session:
        rows = datasets.page(session, caller.project_id, limit=page.limit, after=page.after)
        return Listing.of([DatasetOut.of(row) for row in rows], page.limit)


@router.get("/{dataset_id}")
def get(dataset_id: str, services: ServicesDep, caller: CallerDep) -> DatasetOut:
    return DatasetOut.of(_get(services, caller.project_id, dataset_id))


@router.delete("/{dataset_id}")
def delete(dataset_id: str, services: ServicesDep, caller: CallerDep) -> Deleted:
    with services.sessions.begin() as session:
        row = datasets.delete(session, caller.project_id, dataset_id)
    services.storage.delete(f"datasets/{row.id}")
    return Deleted(id=row.id)


@router.head("/{dataset_id}/content", include_in_schema=False)
@router.get("/{dataset_id}/content")
def content(dataset_id: str, request: Request, services: ServicesDep, caller: CallerDep) -> Response:
    """The file as it was uploaded."""
    row = _get(services, caller.project_id, dataset_id)
    media_type = "text/csv" if row.file_type == "csv" else "application/x-ndjson"
    return respond(
        services,
        request,
        row.key,
        filename=row.filename,
        etag=row.sha256,
        media_type=media_type,
        modified=row.created_at,
    )


@router.get("/{dataset_id}/preview")
def preview(
    dataset_id: str,
    services: ServicesDep,
    caller: CallerDep,
    model: Annotated[str | None, Query(max_length=200)] = None,
    n: Annotated[int, Query(ge=1, le=100)] = 3,
    loss_on: LossOn = "assistant",
    max_length: Annotated[int | None, Query(ge=8)] = None,
) -> Preview:
    """The first rows token by token, through the same function that feeds the trainer."""
    row = _get(services, caller.project_id, dataset_id)
    base = catalogue.find(services.catalogue, model or services.settings.default_model)
    if not base.ready:
        raise GraftError(
            "model_not_ready",
            f"The files of base model {base.name} are not here yet.",
            status=503,
            hint="A worker brings them when it starts or when the first job needs them.",
        )
    contract = prompts.load_cached(base.path)
    rows = []
    with services.storage.open(row.key) as file:
        for line, messages in validate.conversations(
            file, datasets.reading(row, services.settings.line_max_bytes)
        ):
            rows.append(_preview_row(contract, line, messages, loss_on, max_length))
            if len(rows) == n or sum(shown.n_tokens for shown in rows) > _SHOWN_TOKENS:
                break
    return Preview(
        dataset_id=row.id,
        model=base.name,
        loss_on=loss_on,
        max_length=max_length,
        template_sha256=contract.template_sha256,
        stop_token_ids=list(contract.stop_token_ids),
        rows=rows,
        totals={
            "rows": len(rows),
            "tokens": sum(r.n_tokens for r in rows),
            "trained": sum(r.n_trained for r in rows),
        },
    )


def _refuse_unknown(request: Request) -> None:
    """A misspelt form field must not be passed over: FastAPI would."""
    form = getattr(request, "_form", None) or FormData()
    if len(form.getlist("file")) > 1:
        raise BadRequest("invalid_request", "The request has more than one file.", param="file")
    for field in form:
        if field not in _FIELDS:
            near = nearest(field, _FIELDS)
            hint = f'Did you mean "{near}"?' if near else None
            raise BadRequest(
                "invalid_request", f'There is no field "{field[:60]}".', param=field[:60], hint=hint
            )


def _preview_row(
    contract: Contract, line: int, messages: Sequence[Message], loss_on: LossOn, max_length: int | None
) -> PreviewRow:
    encoded = prompts.encode(contract, messages, loss_on=loss_on)
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
        n_trained=sum(encoded.trained),
        truncated=False,
        too_long=max_length is not None and len(encoded.ids) > max_length,
    )


def _get(services: Services, project_id: str, dataset_id: str) -> Dataset:
    with db.reading(services.sessions) as session:
        return datasets.get(session, project_id, dataset_id)


def _receive(file: UploadFile, path: Path) -> tuple[int, str]:
    """Copy an upload to `path`; its size and sha256."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("wb") as target:
            while chunk := file.file.read(1024 * 1024):
                digest.update(chunk)
                size += len(chunk)
                target.write(chunk)
    except OSError as error:
        if is_disk_full(error):
            raise StorageFull("the upload") from error
        raise
    return size, digest.hexdigest()


def _mapping(text: str | None) -> dict[str, Any] | None:
    if not text:
        return None
    try:
        value = parse(text.encode("utf-8", "surrogatepass"))
    except BadRequest as error:
        raise BadRequest(
            "invalid_mapping", f"The mapping is not JSON: {error.message}", param="mapping"
        ) from error
    if not isinstance(value, dict):
        raise BadRequest("invalid_mapping", 'A mapping is a JSON object {"messages": […]}.', param="mapping")
    return value


def _clean(filename: str | None) -> str:
    """A client's file name, fit to be shown; it is never a path here."""
    last = (filename or "").replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(char for char in last if char.isprintable())[:128] or "data"
