"""The Celery app, its settings and its messages: the id of a job, or of a probe.

The settings are those measured in production failures of others; each has its reason beside it.
"""

import logging
from concurrent.futures import ThreadPoolExecutor

from celery import Celery
from kombu.exceptions import OperationalError

from core.settings import Settings

TRAIN = "graft.train"
PROBE = "graft.probe"
QUEUE = "train"

logger = logging.getLogger(__name__)


def create(settings: Settings) -> Celery:
    """A Celery app on the broker of the settings; nothing is connected yet."""
    app = Celery("graft", broker=settings.broker)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        result_backend=None,
        task_ignore_result=True,
        task_default_queue=QUEUE,
        # Threads only supervise: training happens in child processes.
        worker_pool="threads",
        worker_concurrency=settings.worker_slots,
        worker_prefetch_multiplier=1,
        # With early acknowledgement a busy worker hoards one more message. A second delivery is harmless:
        # the claim finds the row taken.
        task_acks_late=True,
        task_reject_on_worker_lost=False,
        # Publishing is tried once; what was missed, the sweep sends.
        task_publish_retry=False,
        # True from Celery 6 on, where it would end a training on a short outage of the broker.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_disable_prefetch=True,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=4,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_transport_options={
            "visibility_timeout": 3600,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 25,
            "global_keyprefix": "graft:",
        },
    )
    return app


def send(app: Celery, row_id: str, task: str = TRAIN) -> bool:
    """Put an id into the queue; False when the broker does not answer (this can take seconds)."""
    try:
        app.send_task(task, args=[row_id], queue=QUEUE, retry=False)
    except (OperationalError, OSError) as error:
        logger.warning(
            "broker does not take messages; the sweep will send a job again",
            extra={"row_id": row_id, "error": str(error)},
        )
        return False
    return True


class Sender:
    """Sends from a thread of its own, so that no request waits for a broker that is down."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sender")

    def send(self, row_id: str, task: str = TRAIN) -> None:
        self._thread.submit(send, self._app, row_id, task)

    def check(self) -> None:
        """Raise OSError or OperationalError when the broker does not answer within two seconds."""
        options = {"socket_connect_timeout": 2, "socket_timeout": 2}
        options = self._app.conf.broker_transport_options | options
        with self._app.connection_for_write(transport_options=options) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=2)
            connection.default_channel.client.ping()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
