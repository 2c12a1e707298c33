"""The model card of an adapter: README.md in Markdown, written from its certificate. No torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from core.ml.prompts import Contract

CARD_FILE = "README.md"


def written(certificate: Mapping[str, Any], data: Mapping[str, Mapping[str, Any]], contract: Contract) -> str:
    """`data` describes `dataset` and, where there is one, `validation`: {name, rows, sha256, held_back?}."""
    base, evaluation = certificate["base_model"], certificate["evaluation"]
    parts = [
        _header(base),
        f"# LoRA adapter for {base}",
        f"Trained with Graft {certificate['versions']['graft']}, seed {certificate['seed']}. "
        "`certificate.json` holds every figure of this page, the hashes of all files and the versions of all "
        "libraries.",
        f"## What it is worth\n\n{evaluation['verdict']['words']}",
        _scores(evaluation),
        f"## How it was made\n\n{_data(data)}",
        _spec(certificate["spec"], certificate["step"]),
        _use(base),
        f"## Prompts\n\n{_prompts(contract)}",
        f"## Checks of the saved files\n\n{_checks(certificate)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(base: str) -> str:
    return f"---\nbase_model: {base}\nlibrary_name: peft\ntags:\n- lora\n- graft\n---"


def _scores(evaluation: Mapping[str, Any]) -> str:
    if evaluation["loss"] is None:
        return ""
    rows = [
        (name, _number(score["base"]), _number(score["adapter"]), _interval(score), str(score["rows"]))
        for name, score in {**evaluation["scores"], "loss (mean of rows)": evaluation["loss"]}.items()
    ]
    for name in ("loss", "perplexity"):
        base, adapter = evaluation["base"][name], evaluation["adapter"][name]
        label = "loss (mean of tokens)" if name == "loss" else name
        rows.append((label, _number(base), _number(adapter), "", str(evaluation["rows"])))
    return _table(("", "base", "adapter", "difference (95 % interval)", "rows"), rows)


def _interval(score: Mapping[str, Any]) -> str:
    low, high = score["interval"]
    return f"{score['difference']:+.3f} ({low:+.3f} to {high:+.3f})"


def _data(data: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, facts in data.items():
        title = "training" if name == "dataset" else name
        count = str(facts["rows"])
        if facts.get("held_back"):
            count += f", and {facts['held_back']} held back for validation"
        rows.append((title, _cell(facts["name"] or ""), count, f"`{facts['sha256']}`"))
    return _table(("data", "name", "rows", "sha256 of the file"), rows)


def _spec(spec: Mapping[str, Any], step: int | None) -> str:
    lora, training, base = spec["lora"], spec["training"], spec["quantization"]
    kind = "DoRA" if lora["use_dora"] else "rsLoRA" if lora["use_rslora"] else "LoRA"
    modules = lora["target_modules"]
    length = (
        f"{training['max_steps']} steps"
        if training["max_steps"]
        else f"{training['epochs']:g} epochs in steps"
    )
    held = {4: f"4-bit {base['type']}", 8: "8-bit", 16: "16-bit"}[base["bits"]]
    rows = [
        ("adapter", f"{kind}, r {lora['r']}, alpha {lora['alpha']}, dropout {lora['dropout']}"),
        ("modules", modules if isinstance(modules, str) else ", ".join(modules)),
        ("base weights", f"{held}, arithmetic in {base['compute_dtype']}"),
        (
            "length",
            f"{length} of {training['effective_batch_size']} rows" + (f"; kept: step {step}" if step else ""),
        ),
        ("learning rate", f"{training['learning_rate']:g}, {training['scheduler']}"),
        ("optimizer", f"{training['optimizer']}, weight decay {training['weight_decay']:g}"),
        ("longest row", f"{training['max_length']} tokens"),
        ("loss on", training["loss_on"]),
    ]
    return _table(("setting", "value"), rows)


def _use(base: str) -> str:
    return f"""## How to use it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "PATH_OF_THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
```

With Graft, `POST /generate` with the adapter's id writes the prompt and stops where it should by itself."""


def _prompts(contract: Contract) -> str:
    if contract.rows == "text":
        return "It was trained on plain texts: give it the beginning of one, without a chat template."
    text = "Write prompts with the tokenizer's chat template"
    if "text" in contract.styles:
        text += ", in which system messages or tools are text as `prompt_contract.json` says"
    ends = ", ".join(
        f"`{token}`" for token in contract.tokenizer.convert_ids_to_tokens(list(contract.stop_token_ids))
    )
    return f"{text}. An answer ends with {ends}: `prompt_contract.json` names the tokens."


def _checks(certificate: Mapping[str, Any]) -> str:
    rows = [
        (check["name"], "holds" if check["ok"] else "**does not hold**", check["detail"])
        for check in certificate["checks"]
    ]
    return _table(("check", "", "found"), rows)


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.3g}"


def _cell(text: str) -> str:
    """A text that people gave, as the content of one cell."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
