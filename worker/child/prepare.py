"""`python -m worker.child.prepare`: bring the default base model's files to this machine, quantised too."""

from core import settings
from core.ml import base_model, catalogue
from core.ml.catalogue import Catalogue
from core.ml.quantization import Quantization


def main() -> None:
    config = settings.load()
    model = catalogue.find(
        Catalogue(config.models_folder, config.models, config.allow_hub), config.default_model
    )
    base_model.load(model, base_model.settle(Quantization()))


if __name__ == "__main__":
    main()
