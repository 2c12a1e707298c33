"""Is the process alive, and is everything it needs there? The only calls without a key."""

import asyncio
import logging
from collections.abc import Callable

from fastapi import APIRouter, Response
from starlette.concurrency import run_in_threadpool

from api.deps import Services, ServicesDep
from core.control import db
from core.control.running import workers

router = APIRouter(prefix="/health", tags=["health"])
logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 3.0


@router.get("/live")
def live() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/ready")
async def ready(services: ServicesDep, response: Response) -> dict[str, object]:
    """200 when every part answers, else 503 with the parts that do not; `engine`: what it says of itself."""
    names = ["database", "broker", "storage", "workers", "engine"]
    *states, (engine_works, engine) = await asyncio.gather(
        _answers(lambda s: db.check(s.sessions), services),
        _answers(lambda s: s.sender.check(), services),
        _answers(lambda s: s.storage.check(), services),
        _answers(_workers, services),
        services.engine.state(),
    )
    works = dict(zip(names, [*states, engine_works], strict=True))
    parts = {name: "ok" if state else "down" for name, state in works.items()}
    up = all(works.values())
    response.status_code = 200 if up else 503
    return {"status": "ok" if up else "starting or broken", "parts": parts, "engine": engine}


async def _answers(check: Callable[[Services], None], services: Services) -> bool:
    """Whether a part works; one that does not say so in time does not."""
    try:
        return await asyncio.wait_for(run_in_threadpool(_works, check, services), _PATIENCE_SECONDS)
    except TimeoutError:
        return False


def _works(check: Callable[[Services], None], services: Services) -> bool:
    try:
        check(services)
    except Exception as error:  # noqa: BLE001 - whatever it is, the part does not work
        logger.info("health check failed", extra={"error": str(error)})
        return False
    return True


def _workers(services: Services) -> None:
    with db.reading(services.sessions) as session:
        if not workers.alive(session):
            raise LookupError("no worker has been heard of lately")
