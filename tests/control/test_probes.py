"""Questions to a worker and their answers."""

from core.control.db import Sessions
from core.control.running import attempts, events, probes, workers
from core.control.tables import Probe
from core.ml.training import config
from core.ml.training.config import Spec
from tests.control import rows


def question(sessions: Sessions) -> str:
    with sessions.begin() as session:
        return probes.ask(session, model="m", dataset_id="ds", spec={"seed": 1})


def test_a_question_is_open_until_it_is_answered(sessions: Sessions) -> None:
    asked = question(sessions)
    with sessions.begin() as session:
        found = probes.open_question(session, asked)
        assert found is not None
        assert (found[0].model, found[0].spec) == ("m", {"seed": 1})
        assert 0 < found[1] <= probes.PATIENCE_SECONDS
        assert probes.answered(session, asked) is None
        probes.answer(session, asked, {"measured": {}})
    with sessions.begin() as session:
        assert probes.open_question(session, asked) is None
        assert probes.answered(session, asked) == {"measured": {}}
        probes.forget(session, asked)
    with sessions.begin() as session:
        assert session.get(Probe, asked) is None
        probes.answer(session, asked, {})  # whoever asked has gone: nothing happens


def test_an_old_question_is_nobodys_and_is_forgotten(sessions: Sessions) -> None:
    old = question(sessions)
    with sessions.begin() as session:
        session.get_one(Probe, old).asked -= probes.PATIENCE_SECONDS + 1
    with sessions.begin() as session:
        assert probes.open_question(session, old) is None
    question(sessions)
    with sessions.begin() as session:
        assert session.get(Probe, old) is None


def test_one_question_at_a_time_is_put_to_a_worker(sessions: Sessions) -> None:
    def free() -> bool:
        with sessions.begin() as session:
            return probes.device_is_free(session)

    assert not free()
    with sessions.begin() as session:
        workers.register(session, 1)
    assert free()
    asked = question(sessions)
    assert not free()
    with sessions.begin() as session:
        probes.answer(session, asked, {})
    assert free()
    rows.job(sessions, rows.project(sessions))
    assert not free()


def test_a_job_of_an_earlier_version_is_not_alike(sessions: Sessions) -> None:
    spec = config.settle(Spec()).model_dump()
    old = {name: dict(spec[name]) for name in ("lora", "training", "quantization")}
    del old["lora"]["use_dora"], old["training"]["packing"], old["training"]["optimizer"]
    project_id = rows.project(sessions)
    for kept in (spec, old):
        job = rows.job(sessions, project_id, spec=kept)
        fence = rows.claimed(sessions, job.id).fence
        with sessions.begin() as session:
            speed = 50.0 if kept is spec else 1.0
            values = {"tokens_per_second": speed, "eval_seconds": 2.0, "eval_tokens": 300}
            events.measure(session, job.id, 1, values)
            metrics = {"tokens": 200, "train_seconds": 9}
            attempts.renew(session, job.id, fence, 60, step=2, metrics=metrics)
            attempts.succeed(session, job.id, fence, rows.adapter(project_id, job.id))
    with sessions() as session:
        # 4 s of steps, 2 of the evaluation: 3 s are left for what came with it.
        assert probes.experience(session, job.model, spec, 90.0) == (50.0, 150.0, 3.0)
        assert probes.experience(session, job.model, spec, 150.0) is None
