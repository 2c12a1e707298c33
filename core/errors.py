"""Every error Graft raises on purpose.

GraftError(code, message, status)       any of them; one renderer makes the one JSON body
  BadRequest      400/422  the request or the data is wrong
  NotFound        404      no such thing, or it belongs to another project
  Conflict        409      the state does not allow it
  StorageFull     507      no room left on the disk or in the bucket
  OutOfMemory     -        the device is too small for a run
  Fenced          -        a worker lost its lease and may not write any more

A failed job stores the same codes (`GraftError.as_dict`).
"""

import difflib
import errno
from collections.abc import Iterable
from typing import Any


class GraftError(Exception):
    """An error with a code for programs and a message for people: what, where, what to do."""

    status = 500

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int | None = None,
        param: str | None = None,
        hint: str | None = None,
        errors: list[dict[str, Any]] | None = None,
        error_count: int | None = None,
        retry_after: int | None = None,
    ) -> None:
        """`retry_after`: seconds, where they are known."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status or type(self).status
        self.param = param
        self.hint = hint
        self.errors = errors
        self.error_count = error_count
        self.retry_after = retry_after

    def within(self, where: str) -> "GraftError":
        """The same error, its message beginning with where it was met."""
        return type(self)(
            self.code, f"{where}: {self.message}", status=self.status, param=self.param, hint=self.hint
        )

    def as_dict(self) -> dict[str, Any]:
        """What a failed job keeps: code, message and hint."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class BadRequest(GraftError):
    status = 422


class NotFound(GraftError):
    status = 404


class Conflict(GraftError):
    status = 409


class StorageFull(GraftError):
    status = 507

    def __init__(self, where: str) -> None:
        super().__init__(
            "storage_full",
            f"No space left while writing {where}.",
            hint="Free disk space (old jobs, adapters and data sets can be deleted), then try again. "
            "POST /jobs/{id}/retry lets a failed job go on.",
        )


class OutOfMemory(GraftError):
    def __init__(self, message: str = "The device has too little memory for this job.") -> None:
        super().__init__(
            "out_of_memory",
            message,
            hint="Use a smaller training.batch_size, training.max_length or lora.r, or a smaller base model.",
        )


class Fenced(Exception):
    """Another claim of the job is newer; this holder must stop and write nothing."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, if one is near enough to be meant."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or any error it comes from, says that the disk is full.

    Rust libraries (tokenizers, safetensors) raise plain exceptions that only name the number.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(seen)
        if "os error 28" in text or "No space left on device" in text:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
