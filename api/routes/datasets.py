"""Data sets: upload, check, look, delete."""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple
from urllib.parse import quote

from fastapi import APIRouter, Form, Request, Response, UploadFile
from fastapi.responses import StreamingResponse
from starlette.datastructures import FormData

from api.deps import CallerDep, PageDep, Services, ServicesDep
from api.files import respond
from api.requests import StrictRoute, refuse_repeated
from api.schemas.common import Deleted, Listing
from api.schemas.datasets import DatasetOut, ValidationOut
from core import strict_json
from core.control import datasets, db
from core.control.db import DatabaseUnavailable
from core.control.tables import Dataset
from core.errors import BadRequest, StorageFull, is_disk_full, nearest
from core.ml.formats import repair, validate
from core.ml.formats.findings import Findings
from core.ml.formats.repair import Examination
from core.strict_json import JsonError

router = APIRouter(prefix="/datasets", tags=["data sets"], route_class=StrictRoute)

_MEDIA_TYPES = {
    "jsonl": "application/x-ndjson",
    "json": "application/json",
    "csv": "text/csv",
    "parquet": "application/vnd.apache.parquet",
}
_FIELDS = ("file", "name", "format", "mapping", "compare_with")
_CHUNK = 1024**2


class _Upload(NamedTuple):
    path: Path
    size: int
    sha256: str


@router.post("", status_code=201)
def create(
    file: UploadFile,
    services: ServicesDep,
    caller: CallerDep,
    request: Request,
    name: Annotated[str | None, Form(max_length=128, pattern=r"^[^\x00-\x1f]*$")] = None,
    format: Annotated[str, Form(max_length=40)] = "auto",
    mapping: Annotated[str | None, Form(max_length=100_000)] = None,
    compare_with: Annotated[str | None, Form(max_length=60)] = None,
) -> DatasetOut:
    """Keep a data set, if every row of it can be trained.

    `compare_with` names a data set that must not share rows with this one, as a validation file must
    not with its training file: shared rows are a warning.
    """
    _refuse_unknown(request, _FIELDS)
    other = _other(services, caller.project_id, compare_with)
    filename = _clean(file.filename)
    by = _mapping(mapping)
    with _received(services, file) as upload:
        with upload.path.open("rb") as data:
            report = validate.inspect(
                data,
                kind=format,
                mapping=by,
                filename=filename,
                limits=datasets.limits(services.settings),
                other=other,
            )
        if report.error_count or report.detection is None:
            raise validate.refuse(report)
        dataset_id = datasets.fresh_id()
        key = f"datasets/{dataset_id}/data"
        services.storage.put(upload.path, key)
    try:
        with services.sessions.begin() as session:
            row = datasets.create(
                session,
                caller.project_id,
                id=dataset_id,
                name=name or filename,
                filename=filename,
                file_type=datasets.kept_type(report.file_type, report.packed),
                format=report.detection.format,
                mapping=report.detection.mapping,
                columns=report.columns,
                rows=report.rows,
                bytes=upload.size,
                sha256=upload.sha256,
                report=report.summary(),
            )
    except DatabaseUnavailable:
        raise  # nobody knows whether the row is there
    except Exception:
        services.storage.delete(key)
        raise
    return DatasetOut.of(row)


@router.post("/validate", response_model=ValidationOut)
def validate_(
    file: UploadFile,
    services: ServicesDep,
    caller: CallerDep,
    request: Request,
    format: Annotated[str, Form(max_length=40)] = "auto",
    mapping: Annotated[str | None, Form(max_length=100_000)] = None,
    compare_with: Annotated[str | None, Form(max_length=60)] = None,
    repaired: Annotated[bool, Form()] = False,
) -> ValidationOut | Response:
    """What an upload would say, with the repair where there is one; nothing is kept.

    With `repaired` the answer is the repaired file itself, as JSON Lines.
    """
    _refuse_unknown(request, (*_FIELDS, "repaired"))
    other = _other(services, caller.project_id, compare_with)
    limits = datasets.limits(services.settings)
    filename = _clean(file.filename)
    by = _mapping(mapping)
    # Not closed here: it may still be on its way to the client when this function has returned.
    target = tempfile.TemporaryFile(dir=services.settings.uploads)  # noqa: SIM115
    with _received(services, file) as upload, upload.path.open("rb") as data:
        checked = repair.examine(
            data, target, kind=format, mapping=by, filename=filename, limits=limits, other=other
        )
    if repaired:
        return _repaired_file(checked, target, filename)
    return ValidationOut.of(checked, filename=filename, bytes=upload.size, sha256=upload.sha256)


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
    return respond(
        services,
        request,
        row.key,
        filename=row.filename,
        etag=row.sha256,
        media_type=_MEDIA_TYPES.get(row.file_type, "application/gzip"),
        modified=row.created_at,
    )


def _other(services: Services, project_id: str, dataset_id: str | None) -> Findings | None:
    if dataset_id is None:
        return None
    with db.reading(services.sessions) as session:
        row = datasets.get(session, project_id, dataset_id, param="compare_with")
    with services.storage.open(row.key) as file:
        return validate.findings_of(file, datasets.reading(row, datasets.limits(services.settings)))


def _repaired_file(checked: Examination, target: IO[bytes], filename: str) -> Response:
    if checked.repair is None:
        raise BadRequest(
            "not_repairable",
            "The file is right as it is." if checked.valid else "No row of the file can be repaired.",
            param="repaired",
        )
    target.seek(0)
    name = filename.split(".")[0] + ".repaired.jsonl"
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(name)}"}
    chunks = iter(lambda: target.read(_CHUNK), b"")
    return StreamingResponse(chunks, media_type="application/x-ndjson", headers=headers)


def _refuse_unknown(request: Request, fields: Sequence[str]) -> None:
    """A misspelt form field must not be passed over: FastAPI would."""
    form = getattr(request, "_form", None) or FormData()
    refuse_repeated(form)
    for field in form:
        if field not in fields:
            near = nearest(field, fields)
            hint = f'Did you mean "{near}"?' if near else None
            raise BadRequest(
                "invalid_request", f'There is no field "{field[:60]}".', param=field[:60], hint=hint
            )


def _get(services: Services, project_id: str, dataset_id: str) -> Dataset:
    with db.reading(services.sessions) as session:
        return datasets.get(session, project_id, dataset_id)


@contextmanager
def _received(services: Services, file: UploadFile) -> Iterator[_Upload]:
    """An upload as a file of its own, gone again afterwards. A disk that gets full meanwhile is said."""
    digest, size = hashlib.sha256(), 0
    try:
        with tempfile.TemporaryDirectory(dir=services.settings.uploads) as folder:
            path = Path(folder) / "data"
            with path.open("wb") as target:
                while chunk := file.file.read(_CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    target.write(chunk)
            yield _Upload(path, size, digest.hexdigest())
    except OSError as error:
        if is_disk_full(error):
            raise StorageFull("the upload") from error
        raise


def _mapping(text: str | None) -> dict[str, Any] | None:
    if not text:
        return None
    try:
        value = strict_json.loads(text, depth=strict_json.DEPTH)
    except JsonError as error:
        raise BadRequest(
            "invalid_mapping",
            f"The mapping cannot be read. {error.message}",
            param="mapping",
            hint=error.hint,
        ) from error
    if not isinstance(value, dict):
        raise BadRequest("invalid_mapping", 'A mapping is a JSON object {"messages": […]}.', param="mapping")
    return value


def _clean(filename: str | None) -> str:
    """A client's file name, fit to be shown; it is never a path here."""
    last = (filename or "").replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(char for char in last if char.isprintable())[:128] or "data"
