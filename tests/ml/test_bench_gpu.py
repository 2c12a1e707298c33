"""The bench of a GPU's memory and speed, with a tiny model on whatever there is: it must not fail where one is."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import gpu, graft_run, plain_trl, random_model


def test_the_shards_are_a_whole_model_of_random_weights(tmp_path: Path) -> None:
    folder = random_model.write(tmp_path / "tiny", "tiny")
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    layers = [layer.mlp.up_proj.weight for layer in model.model.layers]
    assert layers[0].dtype == torch.bfloat16
    assert layers[0].float().std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(*layers)
    # A folder that is whole is used again, one without its last file is not.
    changed = (folder / "config.json").stat().st_mtime_ns
    random_model.write(folder, "tiny")
    assert (folder / "config.json").stat().st_mtime_ns == changed
    rows = random_model.write_rows(tmp_path / "rows.jsonl", 3, 512)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    assert [len(ids) for ids in tokenizer(texts)["input_ids"]] == [511] * 3  # the trainers add the end


def test_seven_billion_weights_have_the_names_and_sizes_of_llama(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without writing 13 GB."""
    written: dict[str, Any] = {}
    monkeypatch.setattr(random_model, "_random", lambda shape, *_: shape)
    monkeypatch.setattr(random_model, "save_file", lambda weights, *_: written.update(weights))
    folder = random_model.write(tmp_path / "llama-7b", "llama-7b")
    assert sum(shape.numel() for shape in written.values()) == 6_738_415_616
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == written.keys()
    assert written["model.layers.31.mlp.down_proj.weight"] == (4096, 11008)


def test_graft_and_the_plain_script_do_the_same_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: dict[str, Any] = {}

    def in_this_process(peer: str, asked: dict[str, Any], _seconds: int) -> dict[str, Any]:
        """A second for the libraries instead of ten a process."""
        Path(asked["output"]).mkdir()
        if peer == "graft":
            found[peer] = graft_run.run(asked)
        else:
            with monkeypatch.context() as patch:
                said: list[str] = []
                patch.setattr(plain_trl, "print", said.append, raising=False)
                patch.setattr(sys, "argv", ["plain_trl", json.dumps(asked)])
                plain_trl.main()
            found[peer] = json.loads(said[-1])
        return dict(found[peer])

    monkeypatch.setattr(gpu, "run", in_this_process)
    options = ["--config", "tiny", "--folder", str(tmp_path), "--peers", "trl,graft", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["gpu", *options, "--cases", "accumulated"])
    gpu.main()
    assert [found[peer]["tokens"] for peer in ("trl", "graft")] == [3 * 16 * 512] * 2
    assert gpu.apart(found) < 0.01
    monkeypatch.setattr(sys, "argv", ["gpu", *options, "--cases", "packed"])
    gpu.main()
    assert [found[peer]["tokens"] for peer in ("trl", "graft")] == [3 * 512] * 2
    printed = capsys.readouterr().out
    assert "6.9 GB" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert [line[:2] for line in lines if line[0] == "packed"] == [["packed", "trl"], ["packed", "graft"]]
    assert all(float(line[2]) > 0 for line in lines if line[0] == "packed")


def test_a_trainer_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = gpu.asked(gpu.CASES["qlora"], "trl", 1, tmp_path / "nowhere", tmp_path)
    slow = gpu.run("trl", asked, 0)
    assert slow == {"error": "more than 0 s"}
    assert "more than 0 s" in gpu.line("qlora", "trl", slow, None, 1)
    (tmp_path / "output").rmdir()
    monkeypatch.setitem(gpu.PEERS, "unsloth", "bench.not_installed")
    assert "not_installed" in gpu.run("unsloth", asked, 60)["error"]
