"""Rows that tests start from, made through core.control."""

import time
from typing import Any

from core.control import datasets, jobs, projects
from core.control.db import Sessions
from core.control.running import attempts
from core.control.tables import Adapter, Dataset, Export, Job, new_id, utcnow

SPEC: dict[str, Any] = {"seed": 42, "evaluation": {}, "validation": None}


def project(sessions: Sessions, name: str = "ours") -> str:
    with sessions.begin() as session:
        return projects.create_project(session, name).id


def dataset(sessions: Sessions, project_id: str, **fields: Any) -> Dataset:
    defaults: dict[str, Any] = {
        "id": datasets.fresh_id(),
        "name": "pairs",
        "filename": "pairs.jsonl",
        "file_type": "jsonl",
        "format": "prompt_completion",
        "mapping": None,
        "columns": ["prompt", "completion"],
        "rows": 1,
        "bytes": 10,
        "sha256": "0" * 64,
        "report": {},
    }
    _later()
    with sessions.begin() as session:
        return datasets.create(session, project_id, **(defaults | fields))


def job(sessions: Sessions, project_id: str, **fields: Any) -> Job:
    defaults: dict[str, Any] = {
        "name": "job",
        "model": "tests/tiny",
        "dataset_id": "ds_none",
        "spec": SPEC,
        "labels": {},
    }
    _later()
    with sessions.begin() as session:
        return jobs.create(session, project_id, **(defaults | fields))


def claimed(sessions: Sessions, job_id: str, *, owner: str = "w1", lease: float = 60) -> Job:
    with sessions.begin() as session:
        taken = attempts.claim(session, job_id, owner, lease)
    assert taken is not None
    return taken


def adapter(project_id: str, job_id: str | None = None, **fields: Any) -> Adapter:
    defaults: dict[str, Any] = {
        "id": new_id("ad"),
        "project_id": project_id,
        "job_id": job_id,
        "name": "adapter",
        "base_model": "tests/tiny",
        "size": 10,
        "sha256": "a" * 64,
        "files": [],
        "metrics": {},
        "created_at": utcnow(),
    }
    return Adapter(**(defaults | fields))


def export(sessions: Sessions, adapter_id: str) -> Export:
    fields: dict[str, Any] = {"job_id": "job_1", "format": "gguf", "size": 10, "sha256": "e" * 64}
    row = Export(id=new_id("exp"), adapter_id=adapter_id, files=[], report={}, **fields)
    with sessions.begin() as session:
        session.add(row)
    return row


def read(sessions: Sessions, job_id: str) -> Job:
    with sessions() as session:
        return session.get_one(Job, job_id)


def _later() -> None:
    # Ids sort by the millisecond they were made in.
    time.sleep(0.002)
