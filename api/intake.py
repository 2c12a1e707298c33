"""What the request of a job comes to, once the adapter it continues from and its preset are looked up."""

from typing import Any

from api.deps import Services
from api.schemas.jobs import JobCreate
from core import strict_json
from core.control import adapters, db
from core.control.tables import Dataset
from core.errors import BadRequest
from core.ml import catalogue
from core.ml.quantization import Quantization
from core.ml.training import config
from core.ml.training.config import Spec
from core.ml.training.spec import presets, support

# No adapter_config.json is larger.
_CONFIG_BYTES = 1024 * 1024


def model_and_spec(services: Services, project_id: str, body: JobCreate) -> tuple[str, Spec]:
    """The base model's name, and the spec as it was asked for, with the LoRA settings of an adapter to continue from, and
    its quantization where none is given.

    Raises:
        NotFound: `adapter_not_found`.
        BadRequest: what `support.check` refuses; `continue_from_other_model`; `adapter_not_trainable`, it is of a kind that is not trained here.
    """
    spec = body.spec()
    support.check(spec)  # before anything is looked up
    if spec.continue_from is None:
        own = presets.find(body.preset).preset.model if body.preset else None
        model = body.model or own or services.settings.default_model
        check_modules(services, model, spec.lora.target_modules)
        return model, spec
    with db.reading(services.sessions) as session:
        adapter = adapters.get(session, project_id, spec.continue_from, param="continue_from")
    if body.model not in (None, adapter.base_model):
        raise BadRequest(
            "continue_from_other_model",
            f"Adapter {adapter.id} belongs to the base model {adapter.base_model}, "
            f"so a job on {body.model} cannot continue from it.",
            param="continue_from",
            hint="Leave model out, or name an adapter of that model.",
        )
    with services.storage.open(f"{adapter.key}/files/adapter_config.json") as file:
        content = file.read(_CONFIG_BYTES)
    try:
        lora = config.lora_of(strict_json.loads(content.decode(), depth=strict_json.DEPTH))
    except ValueError as error:  # of its text, its JSON or its settings
        raise BadRequest(
            "adapter_not_trainable",
            f"Adapter {adapter.id} cannot be trained further: {error}.",
            param="continue_from",
        ) from error
    spec = spec.model_copy(update={"lora": lora})
    trained = (adapter.certificate or {}).get("spec", {}).get("quantization")
    if trained and "quantization" not in body.model_fields_set and body.preset is None:
        # On a base held otherwise it would begin as another adapter.
        held = Quantization.model_validate(trained | {"compute_dtype": "auto"})
        spec = spec.model_copy(update={"quantization": held})
    support.check(spec)
    check_modules(services, adapter.base_model, spec.lora.target_modules)
    return adapter.base_model, spec


def check_modules(services: Services, name: str, target_modules: str | list[str]) -> None:
    """Where the base model's files are here; otherwise the trainer finds out.

    Raises:
        BadRequest: `unknown_target_modules`.
    """
    model = catalogue.find(services.catalogue, name)
    if model.ready and (there := catalogue.matrices(model)):
        support.check_modules(target_modules, there)


def preset_of(body: JobCreate, model: str, spec: Spec, dataset: Dataset) -> dict[str, Any] | None:
    """What the job keeps of its preset, if it has one."""
    if body.preset is None:
        return None
    chosen = presets.find(body.preset)
    return presets.record(
        chosen,
        model=model,
        spec=spec,
        validation=body.validation.model_dump() if body.validation else None,
        same_data=presets.is_its_data(
            chosen.preset, names=[dataset.name, dataset.filename], rows=dataset.rows
        ),
    )
