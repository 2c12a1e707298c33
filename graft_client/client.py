"""A small typed client of the HTTP API."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

# How long `watch` bears a service that does not answer.
PATIENCE_SECONDS = 60.0
FINISHED = ("succeeded", "failed", "cancelled")
Json = dict[str, Any]


class ApiError(Exception):
    """The service refused: `message` says why, `hint` what to do."""

    def __init__(self, status: int, error: Json) -> None:
        super().__init__(str(error.get("message")))
        self.status = status
        self.code = error.get("code")
        self.message = str(error.get("message"))
        self.hint = error.get("hint")
        self.errors: list[Json] = error.get("errors") or []


class UnreachableError(Exception):
    """There is no service at this address."""


class Client:
    def __init__(self, url: str, key: str, *, timeout: float = 600) -> None:
        headers = {b"authorization": f"Bearer {key}".encode("utf-8", "replace")}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(timeout, connect=5))

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ready(self) -> bool:
        try:
            return self._http.get("/health/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def upload(
        self,
        file: Path,
        *,
        name: str | None = None,
        mapping: Json | None = None,
        format: str = "auto",
    ) -> Json:
        form = _form(format, mapping) | ({"name": name} if name else {})
        with file.open("rb") as stream:
            return self._call("POST", "/datasets", data=form, files={"file": (_name(file), stream)})

    def validate(
        self,
        file: Path,
        *,
        format: str = "auto",
        mapping: Json | None = None,
        compare_with: str | None = None,
    ) -> Json:
        """What an upload would say; nothing is kept. `compare_with` names a data set to share no rows with."""
        form = _form(format, mapping) | ({"compare_with": compare_with} if compare_with else {})
        with file.open("rb") as stream:
            return self._call("POST", "/datasets/validate", data=form, files={"file": (_name(file), stream)})

    def repaired(
        self, file: Path, target: Path, *, format: str = "auto", mapping: Json | None = None
    ) -> None:
        """Write the repaired file to `target`. Raises ApiError `not_repairable`."""
        form = _form(format, mapping) | {"repaired": "true"}
        with (
            file.open("rb") as stream,
            self._stream(
                "POST", "/datasets/validate", data=form, files={"file": (_name(file), stream)}
            ) as response,
        ):
            _write(response, target)

    def dataset(self, dataset_id: str) -> Json:
        return self._call("GET", f"/datasets/{dataset_id}")

    def delete_dataset(self, dataset_id: str) -> Json:
        return self._call("DELETE", f"/datasets/{dataset_id}")

    def preview(self, dataset_id: str, **query: Any) -> Json:
        return self._call("GET", f"/datasets/{dataset_id}/preview", params=query)

    def conversations(self, dataset_id: str, target: Path, **query: Any) -> None:
        """Write the data set to `target` as it would be trained, a conversation or a text a line."""
        with self._stream("GET", f"/datasets/{dataset_id}/conversations", params=query) as response:
            _write(response, target)

    def create_job(self, body: Json, *, idempotency_key: str | None = None) -> Json:
        headers = {"idempotency-key": idempotency_key} if idempotency_key else {}
        return self._call("POST", "/jobs", json=body, headers=headers)

    def preflight(self, body: Json) -> Json:
        """What a job with this body would do; can take two minutes where a worker measures it."""
        return self._call("POST", "/jobs/preflight", json=body)

    def job(self, job_id: str) -> Json:
        return self._call("GET", f"/jobs/{job_id}")

    def jobs(self, limit: int = 20) -> list[Json]:
        return self._listed("/jobs", limit=limit)

    def pause(self, job_id: str) -> Json:
        return self._call("POST", f"/jobs/{job_id}/pause")

    def resume(self, job_id: str) -> Json:
        return self._call("POST", f"/jobs/{job_id}/resume")

    def cancel(self, job_id: str) -> Json:
        return self._call("POST", f"/jobs/{job_id}/cancel")

    def retry(self, job_id: str, changes: Json | None = None) -> Json:
        """A new attempt of a failed or cancelled job; `changes` are fields of its spec."""
        return self._call("POST", f"/jobs/{job_id}/retry", json=changes or {})

    def delete_job(self, job_id: str, *, with_adapter: bool = False) -> Json:
        return self._call("DELETE", f"/jobs/{job_id}", params={"adapter": with_adapter})

    def checkpoints(self, job_id: str) -> list[Json]:
        return list(self._pages(f"/jobs/{job_id}/checkpoints", after="step"))

    def metrics(self, job_id: str) -> list[Json]:
        return self._listed(f"/jobs/{job_id}/metrics")

    def events(self, job_id: str, page_size: int = 100) -> Iterator[Json]:
        """All of them, newest first, asked for in pages as they are read."""
        return self._pages(f"/jobs/{job_id}/events", page_size)

    def logs(self, job_id: str) -> Iterator[str]:
        """The lines that worker and trainer wrote about the job."""
        with self._stream("GET", f"/jobs/{job_id}/logs") as response:
            yield from response.iter_lines()

    def watch(self, job_id: str, every: float = 0.5) -> Iterator[Json]:
        """The job again and again, until it has ended; the last one is the finished job."""
        patient_until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                job = self.job(job_id)
            except (UnreachableError, ApiError) as error:
                # The service may be starting again; the job goes on.
                if time.monotonic() > patient_until or (isinstance(error, ApiError) and error.status < 500):
                    raise
                time.sleep(1)
                continue
            patient_until = time.monotonic() + PATIENCE_SECONDS
            yield job
            if job["status"] in FINISHED:
                return
            time.sleep(every)

    def models(self) -> list[Json]:
        return self._listed("/models")

    def presets(self) -> list[Json]:
        return list(self._pages("/presets"))

    def adapters(self, limit: int = 20) -> list[Json]:
        return self._listed("/adapters", limit=limit)

    def adapter(self, adapter_id: str) -> Json:
        return self._call("GET", f"/adapters/{adapter_id}")

    def download(self, adapter_id: str, target: Path) -> None:
        """Write the adapter's zip to `target`; a broken download leaves no file there."""
        with self._stream("GET", f"/adapters/{adapter_id}/download") as response:
            _write(response, target)

    def export(self, adapter_id: str, format: str) -> Json:
        """The job that writes an adapter as `merged` or `gguf`."""
        return self._call("POST", f"/adapters/{adapter_id}/export", json={"format": format})

    def exports(self, adapter_id: str, limit: int = 20) -> list[Json]:
        return self._listed(f"/adapters/{adapter_id}/exports", limit=limit)

    def made_export(self, adapter_id: str, export_id: str) -> Json:
        return self._call("GET", f"/adapters/{adapter_id}/exports/{export_id}")

    def download_export(self, adapter_id: str, export_id: str, target: Path) -> None:
        """Write the export's zip to `target`; a broken download leaves no file there."""
        with self._stream("GET", f"/adapters/{adapter_id}/exports/{export_id}/download") as response:
            _write(response, target)

    def script(self, job_id: str, tool: str) -> str:
        """The job's training for another tool: `trl`, `axolotl` or `llamafactory`."""
        with self._stream("GET", f"/jobs/{job_id}/script", params={"as": tool}) as response:
            return response.read().decode()

    def generate(self, **body: Any) -> Json:
        return self._call("POST", "/generate", json=body)

    def compare(self, **body: Any) -> Json:
        """One prompt answered by several `targets`: `base`, adapter ids, `job_…@step`."""
        return self._call("POST", "/compare", json=body)

    def stream(self, **body: Any) -> Iterator[tuple[str, Json]]:
        """(event, data) of a streamed generation: `token` with text, then `done`."""
        with self._stream("POST", "/generate", json={**body, "stream": True}) as response:
            event = ""
            for line in response.iter_lines():
                if line.startswith("event: "):
                    event = line[7:]
                elif line.startswith("data: "):
                    data = json.loads(line[6:])
                    if event == "error":
                        raise ApiError(502, data["error"])
                    yield event, data

    def _listed(self, path: str, **query: Any) -> list[Json]:
        return list(self._call("GET", path, params=query)["data"])

    def _pages(self, path: str, page_size: int = 100, *, after: str = "id") -> Iterator[Json]:
        """`after` is the field of the last one that the next page is asked for with."""
        query: Json = {"limit": page_size}
        while query:
            page = self._call("GET", path, params=query)
            yield from page["data"]
            query = query | {"after": page["data"][-1][after]} if page["has_more"] else {}

    def _call(self, method: str, path: str, **options: Any) -> Json:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise UnreachableError(f"No Graft service answers at {self._http.base_url}.") from error
        _raise_for(response)
        try:
            body: Json = response.json()
        except ValueError as error:
            raise UnreachableError(f"What answers at {self._http.base_url} is no Graft service.") from error
        return body

    def _stream(self, method: str, path: str, **options: Any) -> "_Streamed":
        return _Streamed(self._http, self._http.build_request(method, path, **options))


class _Streamed:
    """An open response whose errors are raised before anything is read from it."""

    def __init__(self, http: httpx.Client, request: httpx.Request) -> None:
        self._http, self._request = http, request

    def __enter__(self) -> httpx.Response:
        try:
            self._response = self._http.send(self._request, stream=True)
        except httpx.TransportError as error:
            raise UnreachableError(f"No Graft service answers at {self._http.base_url}.") from error
        if self._response.status_code >= 400:
            self._response.read()
        _raise_for(self._response)
        return self._response

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._response.close()
        if isinstance(error, httpx.TransportError):
            raise UnreachableError(f"The connection to {self._http.base_url} broke.") from error


def _name(file: Path) -> str:
    """The file's name as text, whatever bytes it is made of."""
    return os.fsencode(file.name).decode("utf-8", "replace")


def _form(format: str, mapping: Json | None) -> dict[str, str]:
    return {"format": format} | ({"mapping": json.dumps(mapping)} if mapping is not None else {})


def _write(response: httpx.Response, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    try:
        with part.open("wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _raise_for(response: httpx.Response) -> None:
    if response.status_code < 400:
        return
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        error = {"message": f"The service answered {response.status_code}."}
    raise ApiError(response.status_code, error)
