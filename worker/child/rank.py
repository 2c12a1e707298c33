"""One of the processes that train together: `accelerate launch` starts it, and `worker.child.launch` tells it what to do."""

import faulthandler
import os
import signal
import threading
from multiprocessing.connection import Client, Connection
from typing import Any

from worker.child import launch, trainer
from worker.child.parent import end_with_parent


def main() -> None:
    end_with_parent(signal.SIGKILL)
    address, key = os.environ.pop(launch.ADDRESS), bytes.fromhex(os.environ.pop(launch.KEY))
    index = int(os.environ["RANK"])
    faulthandler.enable(launch.fault_file(address, index).open("w"))
    line = Client(address, "AF_UNIX", authkey=key)
    run, job_id = line.recv()
    stopping = threading.Event()
    listener = threading.Thread(target=_listen, args=(line, stopping), daemon=True)
    listener.start()
    lock = threading.Lock()

    def report(kind: str, /, **data: Any) -> None:
        if index == 0 or kind in launch.ENDS:
            with lock:
                line.send((index, kind, data))

    trainer.train_here(run, job_id, report, stopping.is_set)
    listener.join()  # whoever left now would look like one that broke


def _listen(line: Connection, stopping: threading.Event) -> None:
    try:
        while line.recv() == "stop":
            stopping.set()
    except (EOFError, OSError):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
