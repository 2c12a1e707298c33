"""Changes to the spec of a job, on the wire: any field of it with its own bounds, none of them needed."""

from typing import Any

from pydantic import create_model

from api.schemas.common import Request
from core.ml.quantization import Part, Quantization
from core.ml.training.config import Checkpoints, Evaluation, Limits, Lora, Spec, Training

# What a retry may change: the model, the data and where it began stay those of the job.
_PARTS: dict[str, type[Part]] = {
    "quantization": Quantization,
    "lora": Lora,
    "training": Training,
    "evaluation": Evaluation,
    "checkpoints": Checkpoints,
    "limits": Limits,
}


def _fields_of(part: type[Part]) -> Any:
    """The fields without the checks between them: those hold for the whole spec, once it is merged."""
    fields: dict[str, Any] = {name: (field.annotation, field) for name, field in part.model_fields.items()}
    return create_model(f"{part.__name__}Changes", __base__=Part, **fields)


_SEED = Spec.model_fields["seed"]
_FIELDS: dict[str, Any] = {"seed": (_SEED.annotation, _SEED)} | {
    name: (model := _fields_of(part), model()) for name, part in _PARTS.items()
}
_BODY: Any = create_model("Changes", __base__=Request, **_FIELDS)


class JobRetry(_BODY):
    """All of it may be missing."""

    def given(self) -> dict[str, Any]:
        """What the client sent, and nothing else."""
        sent: dict[str, Any] = self.model_dump(exclude_unset=True)
        return sent
