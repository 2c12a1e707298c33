"""Exports themselves: merged weights, GGUF files, the Modelfile's template, and the script for TRL."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from trl import SFTTrainer

from core import strict_json
from core.errors import GraftError
from core.ml import base_model, contract, prompts, rendering
from core.ml.catalogue import BaseModel
from core.ml.export import files, merge, parity
from core.ml.export.gguf import convert, ollama, vocabulary
from core.ml.export.run import Export
from core.ml.export.scripts import written as scripts
from core.ml.export.scripts.recipe import Data
from core.ml.formats.chat import plain, weights
from core.ml.formats.chat.example import Conversation
from core.ml.formats.validate import Reading
from core.ml.prompts import LossOn
from core.ml.quantization import Quantization
from core.ml.training.run import Source
from tests import tiny
from tests.corpus import read
from tests.corpus.case import answer, chat, user
from tests.templates import FAMILIES, tokenizer

# Files of the corpus whose rows the script for TRL is compared on: one of each form.
TRAINED = (
    *("begins with the assistant", "text parts", "messages in a string", "tool call", "tools in a string"),
    *("weights", "conversational", "alpaca", "sharegpt", "layout guanaco", "semicolon", "parquet"),
    *("a system beside mapped messages", "other names with a mapping"),
)
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def base_of(folder: Path, name: str = tiny.NAME) -> BaseModel:
    return BaseModel(name, "folder", folder, folder.parent / "cache", str(folder))


def make_base(folder: Path, kind: str = "llama", **changes: Any) -> BaseModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | changes))
    made = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for parameter in made.parameters():  # larger than fresh ones, so that an answer means something
        parameter.data *= 4 if parameter.ndim > 1 else 1
    made.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return base_of(folder)


def make_adapter(base: BaseModel, folder: Path, scale: float = 0.05, **lora: Any) -> Path:
    torch.manual_seed(1)
    model = get_peft_model(
        base_model.load_plain(base.path),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **lora),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, scale)
    model.save_pretrained(folder)
    contract.save(contract.load(base.path), folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return make_base(tmp_path / "base", tie_word_embeddings=True)


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., tuple[files.Result, list[tuple[str, dict[str, Any]]]]]:
    def run(
        kind: str, base: BaseModel, adapter: Path, **changes: Any
    ) -> tuple[files.Result, list[tuple[str, dict[str, Any]]]]:
        work = tmp_path / f"work-{kind}"
        work.mkdir()
        asked = Export("sql", base, adapter, kind, Quantization(bits=16), None, work)  # type: ignore[arg-type]
        reports: list[tuple[str, dict[str, Any]]] = []
        result = files.export(
            replace(asked, **changes),
            lambda name, /, **data: reports.append((name, data)),
            lambda: False,
        )
        return result, reports

    return run


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_merged_weights_are_base_and_adapter_rounded_once(
    base: BaseModel, tmp_path: Path, lora: dict[str, Any]
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", **lora)
    exact = merge.with_adapter(base, adapter, base_model.load_plain(base.path).float()).merge_and_unload()
    merged = merge.merged(merge.with_adapter(base, adapter))
    assert merged.dtype == torch.bfloat16
    plain = base_model.load_plain(base.path).state_dict()
    expected = exact.state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expected[name].bfloat16()), name
        assert torch.equal(tensor, plain[name]) == ("_proj" not in name)


def test_a_merged_export_is_loaded_by_transformers_alone_and_stops_where_it_learned_to(
    base: BaseModel, tmp_path: Path, export: Callable[..., Any]
) -> None:
    result, reports = export("merged", base, make_adapter(base, tmp_path / "adapter"))
    made = AutoModelForCausalLM.from_pretrained(result.folder, dtype="auto")
    assert made.dtype == torch.bfloat16
    assert not hasattr(made, "peft_config")
    stops = list(contract.load(result.folder).stop_token_ids)
    assert GenerationConfig.from_pretrained(result.folder).eos_token_id == stops
    assert AutoTokenizer.from_pretrained(result.folder).chat_template == tiny.TEMPLATE
    assert (result.folder / "prompt_contract.json").is_file()
    report = result.report
    assert report["merged"]["mean_kl"] < files.MAX_MEAN_KL
    assert report["merged"]["top1_agreement"] >= files.MIN_TOP1
    assert report["merged"]["samples"] == parity.SAMPLES
    assert report["loaded_again"]["largest_difference"] == 0
    assert (report["degraded"], report["reasons"]) == (False, [])
    assert [data["phase"] for kind, data in reports if kind == "phase"] == [
        "preparing",
        "loading_model",
        "merging",
        "saving",
        "evaluating",
    ]


def test_a_merge_that_loses_the_adapter_is_said(
    base: BaseModel, tmp_path: Path, export: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", scale=0.5)
    monkeypatch.setattr(merge, "merged", lambda model: model.unload())
    result, reports = export("merged", base, adapter)
    assert result.report["degraded"] is True
    note = next(data for kind, data in reports if kind == "note")
    assert (note["type"], note["level"]) == ("export_degraded", "warning")
    assert "mean KL" in note["message"]


def test_the_comparison_is_made_on_the_rows_of_the_data_and_with_the_base_as_it_was_trained(
    base: BaseModel, tmp_path: Path, export: Callable[..., Any]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"q {i}", "completion": f"a {i}"}) + "\n" for i in range(3))
    )
    source = Source(rows, Reading("jsonl", False, "prompt_completion", None))
    adapter = make_adapter(base, tmp_path / "adapter")
    result, _ = export("merged", base, adapter, rows=source, quantization=Quantization())
    assert (result.report["rows"], result.report["merged"]["samples"]) == ("data set", 3)
    assert result.report["quantized"]["precision"].startswith("nf4-dq-")
    assert result.report["quantized"]["mean_kl"] > result.report["merged"]["mean_kl"]


def test_an_adapter_of_another_base_is_refused(base: BaseModel, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", hidden_size=32)
    with pytest.raises(GraftError, match="does not fit") as raised:
        merge.with_adapter(base, make_adapter(other, tmp_path / "adapter"))
    assert raised.value.code == "adapter_mismatch"


def test_too_little_room_is_said_before_anything_is_loaded(
    base: BaseModel, tmp_path: Path, export: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 1000}))
    with pytest.raises(GraftError, match="GB of free disk space") as raised:
        export("merged", base, adapter)
    assert raised.value.code == "storage_full"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
        ("mistral", {"sliding_window": 256}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 128}),
    ],
)
def test_a_gguf_file_holds_the_merged_model(
    tmp_path: Path, export: Callable[..., Any], kind: str, changes: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base", kind, **changes)
    result, _ = export("gguf", base, make_adapter(base, tmp_path / "adapter"))
    (file,) = result.folder.glob("*.gguf")
    assert result.report["loaded_again"] == {"tokens_equal": True, "largest_difference": 0.0}
    reader = GGUFReader(file)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {types[name] for name in types if "norm" in name or "bias" in name} == {"F32"}
    assert {types[name] for name in types if "_norm" not in name and "bias" not in name} == {"BF16"}
    assert ("output.weight" in types) != bool(changes.get("tie_word_embeddings"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.chat_template"] == tiny.TEMPLATE
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    architecture = fields["general.architecture"]
    assert fields[f"{architecture}.context_length"] == (256 if kind == "mistral" else 512)
    text = (result.folder / "Modelfile").read_text()
    assert text.startswith(f"FROM ./{file.name}\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert result.report["modelfile"] == {"template": True, "samples": 5, "tokens_equal": 5}


def test_rows_of_queries_that_do_not_change_places_are_found_out(
    base: BaseModel, tmp_path: Path, export: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the written file is one that can fail."""
    adapter = make_adapter(base, tmp_path / "adapter")
    right = convert._content
    monkeypatch.setattr(convert, "_content", lambda name, *rest: right(name.replace("attn_q", "x"), *rest))
    with pytest.raises(GraftError, match="are not the merged model") as raised:
        export("gguf", base, adapter)
    assert raised.value.code == "export_broken"


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gpt_neox", {}, "architecture is GPTNeoXForCausalLM"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"mlp_bias": True}, "bias"),
    ],
)
def test_what_cannot_be_written_as_gguf_is_refused_with_the_reason(
    kind: str, changes: dict[str, Any], reason: str
) -> None:
    config = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | changes))).config
    config.architectures = config.architectures or [
        {"gpt_neox": "GPTNeoXForCausalLM", "llama": "LlamaForCausalLM"}[kind]
    ]
    with pytest.raises(GraftError, match=reason) as raised:
        convert.check(config)
    assert raised.value.code == "gguf_not_supported"


def pieces_tokenizer(metaspace: str | None = None, *, whole: bool = True) -> PreTrainedTokenizerFast:
    """SentencePiece's kind of BPE: each piece is made by every pair of known pieces that gives it."""
    words = ["he", "ll", "hell", "llo", "hello", "\u2581hello", "\u2581s", "\u2581sa", "say", "ay"]
    letters = sorted(set("".join(words)))
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    known, merges = set(letters + words), []
    for word in words:
        found = [(word[:i], word[i:]) for i in range(1, len(word)) if {word[:i], word[i:]} <= known]
        merges += found if whole else found[:1]
    raw = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    if metaspace:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    else:
        raw.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = FAMILIES["zephyr"].template
    return made


def contract_of(made: PreTrainedTokenizerFast, folder: Path) -> prompts.Contract:
    made.save_pretrained(folder)
    return contract.load(folder)


def test_pieces_get_the_scores_that_their_merges_mean(tmp_path: Path, export: Callable[..., Any]) -> None:
    made = pieces_tokenizer()
    base = make_base(tmp_path / "base", "mistral", vocab_size=len(made))
    (base.path / "chat_template.jinja").unlink()
    made.save_pretrained(base.path)
    result, _ = export("gguf", base, make_adapter(base, tmp_path / "adapter"))
    assert result.report["loaded_again"] == {"tokens_equal": True, "largest_difference": 0.0}
    reader = GGUFReader(next(result.folder.glob("*.gguf")))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert scores["he"] > scores["ll"] > scores["hell"] > scores["\u2581hello"]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (pieces_tokenizer("first"), "space before every text"),
        (pieces_tokenizer("always"), "space before every text"),
        (pieces_tokenizer(whole=False), "do not follow from scores"),
        (tokenizer(FAMILIES["phi3"]), "white space around"),
    ],
)
def test_a_tokenizer_that_would_read_otherwise_there_is_refused(
    tmp_path: Path, made: PreTrainedTokenizerFast, reason: str
) -> None:
    writer = GGUFWriter(tmp_path / "v.gguf", "llama")
    with pytest.raises(GraftError, match=reason):
        vocabulary.write(writer, contract_of(made, tmp_path), len(made))


@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3", "mistral", "gemma", "qwen", "zephyr"])
def test_ollamas_template_writes_what_the_chat_template_writes(tmp_path: Path, name: str) -> None:
    made = contract_of(tokenizer(FAMILIES[name]), tmp_path)
    starts = vocabulary.adds_start(made)
    text, facts = ollama.modelfile(made, "m.gguf", adds_start=starts)
    assert facts["template"] is True
    assert 'TEMPLATE """' in text
    template = ollama.template_of(made, adds_start=starts)
    assert template is not None
    for sample in ollama.SAMPLES:
        start = made.tokenizer.bos_token if starts else ""
        assert start + ollama.render(template, sample) == ollama._text(made, sample)
    # These two tokenizers join line breaks, or put a space first, where the prompt contract does not.
    assert facts["tokens_equal"] == {"llama3": 2, "mistral": 0}.get(name, 5)
    assert ("note" in facts) == FAMILIES[name].trims


def test_a_chat_template_without_a_rule_gets_no_template(tmp_path: Path) -> None:
    counting = (
        "{% for m in messages %}<|im_start|>{{ loop.index }}{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{{ messages | length + 1 }}assistant\n{% endif %}"
    )
    made = contract_of(tiny.tokenizer(counting), tmp_path)
    text, facts = ollama.modelfile(made, "m.gguf", adds_start=False)
    assert "TEMPLATE" not in text
    assert facts["template"] is False


@pytest.mark.parametrize(
    "template",
    [
        "{{ .Tools }}",
        "{{ if .System }}x",
        "{{ end }}",
        "{{ .System -}} x",
        "{{ len .Messages }}",
        "{{ .System",
    ],
)
def test_go_that_is_not_known_is_an_error(template: str) -> None:
    with pytest.raises(ValueError, match=r"known|end|alone|trims"):
        ollama.render(template, [{"role": "user", "content": "a"}])


def script_of(folder: Path, loss_on: str, **spec: Any) -> Path:
    training = {"max_steps": 2, "batch_size": 2, "effective_batch_size": 4, "max_length": 512}
    kept = {
        "quantization": {"bits": 16, "compute_dtype": "float32"},
        "training": training | {"loss_on": loss_on},
    }
    script = folder / "train.py"
    script.write_text(
        scripts.write("trl", "job_1", tiny.NAME, kept | spec, Data("ds_1", "rows.jsonl", False))
    )
    return script


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_the_script_for_trl_trains(base: BaseModel, tmp_path: Path, loss_on: str) -> None:
    rows = tmp_path / "data.jsonl"
    talks = (chat(user(f"q {i}"), answer(f"a {i}")) for i in range(8))
    rows.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    script = script_of(tmp_path, loss_on, validation={"fraction": 0.25})
    ran = subprocess.run(
        [sys.executable, script, "--data", rows, "--model", base.path, "--output", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert any(
        tensor.abs().sum() > 0
        for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items()
        if "lora_B" in name
    )


@pytest.mark.parametrize("loss_on", ["auto", "completion", "all"])
def test_the_script_for_trl_trains_one_example_a_row_with_the_tokens_of_the_preview(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_on: LossOn
) -> None:
    base_contract = contract.load(base.path)
    examples: list[Conversation] = []
    for name, some in read.first_examples():
        if name in TRAINED:
            examples += [example for example in some if isinstance(example, Conversation)]
    rows = tmp_path / "data.jsonl"
    written = (
        plain.row_of(rendering.written(weights.weighted(example, loss_on), base_contract.styles))  # type: ignore[arg-type]
        for example in examples
    )
    rows.write_text("".join(strict_json.dumps(row) + "\n" for row in written))
    script = runpy.run_path(str(script_of(tmp_path, loss_on)))
    prepared = []

    class Watched(SFTTrainer):  # type: ignore[misc]
        def train(self) -> None:
            prepared.extend(self.train_dataset.to_list())

    script["main"].__globals__["SFTTrainer"] = Watched
    words = ["--data", rows, "--model", base.path, "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    script["main"]()
    expected = [prompts.encode(base_contract, example, loss_on=loss_on) for example in examples]
    assert len(expected) > 10
    assert [row["input_ids"] for row in prepared] == [row.ids for row in expected]
    assert [row["labels"] for row in prepared] == [
        [token if trained else -100 for token, trained in zip(row.ids, row.trained, strict=True)]
        for row in expected
    ]
