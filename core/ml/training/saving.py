"""The finished adapter as files: PEFT's own layout, with the prompt contract beside it."""

import json
from pathlib import Path

from peft import PeftModel

from core.errors import GraftError
from core.ml import contract as contracts
from core.ml.catalogue import BaseModel
from core.ml.prompts import Contract
from core.ml.training.config import Spec


def save(model: PeftModel, contract: Contract, base: BaseModel, spec: Spec, folder: Path) -> None:
    """Write the adapter's folder.

    Raises:
        GraftError: `inert_adapter`, the training changed nothing.
    """
    if not any(bool(p.detach().abs().sum() > 0) for name, p in model.named_parameters() if "lora_B" in name):
        raise GraftError(
            "inert_adapter",
            "The trained adapter changes nothing: every lora_B is zero.",
            status=422,
            hint="Raise training.learning_rate or the number of steps.",
        )
    model.save_pretrained(str(folder), safe_serialization=True)
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text())
    # The name, not a path of this machine; and a set's order differs from run to run.
    config["base_model_name_or_path"] = base.name
    config["target_modules"] = sorted(config["target_modules"])
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    contracts.save(contract, folder)
    (folder / "README.md").write_text(_readme(base, spec, contract))


def _readme(base: BaseModel, spec: Spec, contract: Contract) -> str:
    if contract.rows == "text":
        prompt = "It was trained on plain texts: give it the beginning of one, without a chat template"
    else:
        prompt = "Write prompts with the tokenizer's chat template"
        if "text" in contract.styles:
            prompt += ", in which system messages or tools are text as `prompt_contract.json` says"
    return f"""# LoRA adapter for {base.name}

Trained with Graft: r {spec.lora.r}, alpha {spec.lora.alpha}, {spec.quantization.bits}-bit base, seed {spec.seed}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base.name}"), "PATH_OF_THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
```

{prompt}; `prompt_contract.json` names the tokens that end an answer.
"""
