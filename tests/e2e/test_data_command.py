"""`graft data`: the report of a file and its coloured tokens, as processes that a user starts."""

import gzip
import json
import shlex
import subprocess
from pathlib import Path

import httpx
import pytest

from cli.tokens import CLOSED, OPENED
from graft_client.client import ApiError
from tests.service import GRAFT, Service, wait_until

pytestmark = pytest.mark.parametrize("service", ["sqlite and a folder"], indirect=True)

BROKEN = """\
{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "the first"}]}
{"messages": [{"role": "human", "content": "two"}, {"role": "gpt", "content": "the second"}]}

{'messages': [{'role': 'user', 'content': 'three'}, {'role': 'assistant', 'content': 'the third'}]}
{"messages": [{"role": "user", "content": "four"}]}
"""


def graft(service: Service, *words: str | bytes, **environment: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [str(GRAFT), "data", *words, "--url", service.url, "--home", str(service.home)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=service.environment | environment,
    )
    assert "Traceback" not in done.stderr
    return done


def kept(service: Service) -> int:
    with httpx.Client(base_url=service.url, headers={"authorization": f"Bearer {service.key}"}) as http:
        return len(http.get("/datasets").json()["data"])


def pairs(file: Path, *rows: tuple[str, str]) -> str:
    lines = (json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in rows)
    file.write_text("".join(f"{line}\n" for line in lines))
    return str(file)


def test_a_good_file_is_told_with_its_warnings_and_ends_with_0(service: Service, tmp_path: Path) -> None:
    file = pairs(tmp_path / "a.jsonl", ("q", "an answer"), ("q", "an answer"), ("q", "another one"))
    done = graft(service, "check", file)
    assert done.returncode == 0
    assert done.stdout.startswith(f"{file} can be trained.\n")
    assert "format    prompt_completion, certain" in done.stdout
    assert "rows      3\n" in done.stdout
    assert "the longest 12" in done.stdout
    assert "  Rows that repeat an earlier row: 1.  (line 2)\n" in done.stdout
    assert kept(service) == 0


def test_a_text_in_a_layout_is_told_with_what_else_it_could_be(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "<s>[INST] hello [/INST] good day </s>"}) + "\n")
    done = graft(service, "check", str(file))
    assert 'text in the layout "llama2", certain' in done.stdout
    assert "It could also be: text without layout." in done.stdout
    assert f"{OPENED}good day<|im_end|>↵{CLOSED}" in graft(service, "show", str(file)).stdout


def test_a_script_for_another_tool_names_the_command_that_gives_its_data(
    service: Service, tmp_path: Path
) -> None:
    file, script, data = (tmp_path / name for name in ("$(touch pwned).jsonl", "train.py", "data.jsonl"))
    pairs(file, ("how?", "like that"), ("why?", "so"))
    with service.client() as client:
        job = client.create_job({"dataset_id": client.upload(file)["id"], "training": {"max_steps": 1}})
        client.cancel(job["id"])
        asked = ["export", "job", job["id"], "--as", "trl", "-o", str(script), "--url", service.url]
        environment = service.environment | {"GRAFT_CLIENT_KEY": service.key}
        told = subprocess.run(
            [str(GRAFT), *asked], capture_output=True, text=True, env=environment, check=True
        )
        assert told.stdout == f"Written to {script}. The top of the file says how to get its data.\n"
        (command,) = [line for line in script.read_text().splitlines() if "graft data" in line]
        _sign, _graft, _data, *words = shlex.split(command)
        done = graft(service, *words[:-1], str(data))
        again = graft(service, *words[:-1], str(data))
        wait_until(lambda: client.job(job["id"])["status"] == "cancelled", "the job is cancelled")
        client.delete_dataset(job["dataset_id"])
    assert (done.returncode, done.stdout) == (0, f"Written to {data}.\n")
    (first, _) = map(json.loads, data.read_text().splitlines())
    assert [turn["content"] for turn in first["messages"]] == ["how?", "like that"]
    assert again.returncode == 2
    assert "is not overwritten" in again.stderr
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name or path.name == "pwned"] == []


def test_each_error_is_a_line_and_the_repair_is_shown_and_written(service: Service, tmp_path: Path) -> None:
    file, out = tmp_path / "broken.jsonl", tmp_path / "mended.jsonl"
    file.write_text(BROKEN)
    done = graft(service, "check", str(file), "--repair", str(out))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert f"{file} cannot be trained as it is." in lines
    (role,) = [line for line in lines if line.startswith("  line 2  messages[0].role  ")]
    assert '"human"; expected system, user, assistant, tool.  (Write "user"' in role
    assert [line[:8] for line in lines if line.startswith("  line ")] == ["  line 2", "  line 4", "  line 5"]
    assert '  -{"messages": [{"role": "human", "content": "two"}' in done.stdout
    assert '  +{"messages": [{"role": "user", "content": "two"}' in done.stdout
    assert "3 rows, 2 of them changed, 1 left out" in done.stdout
    assert len(out.read_text().splitlines()) == 3
    assert f"graft data check {out}" in done.stdout
    assert graft(service, "check", str(out)).returncode == 0


def test_more_errors_than_are_listed_are_counted(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text('{"prompt": "a", "completion": "b c"}\n' + '{"prompt": "a"}\n' * 60)
    done = graft(service, "check", str(file))
    assert "errors    60\n" in done.stdout
    assert "\n  and 10 more\n" in done.stdout


def test_the_mapping_to_use_can_be_copied(service: Service, tmp_path: Path) -> None:
    file, written = tmp_path / "table.csv", tmp_path / "mapping.json"
    file.write_text("question,answer\nwhat,that is it\nwho,that is him\n")
    done = graft(service, "check", str(file))
    assert done.returncode == 1
    (copied,) = [line for line in done.stdout.splitlines() if line.startswith("  --mapping ")]
    option, mapping = shlex.split(copied)
    assert graft(service, "check", str(file), option, mapping).returncode == 0
    written.write_text("\ufeff" + mapping)
    assert graft(service, "check", str(file), option, f"@{written}").returncode == 0


def test_rows_of_another_data_set_are_found(service: Service, tmp_path: Path) -> None:
    file = pairs(tmp_path / "train.jsonl", ("one", "the first"), ("two", "the second"))
    valid = pairs(tmp_path / "valid.jsonl", ("two", "the second"), ("three", "the third"))
    with service.client() as client:
        dataset = client.upload(Path(file))
        done = graft(service, "check", valid, "--against", dataset["id"])
        client.delete_dataset(dataset["id"])
    assert done.returncode == 0
    assert (
        "Rows that are also in the other data set: 1. A validation with them proves nothing.  (line 1)"
        in done.stdout
    )


def test_what_is_trained_stands_between_marks_where_there_is_no_colour(
    service: Service, tmp_path: Path
) -> None:
    file = pairs(tmp_path / "a.jsonl", ("how?", "like that"), ("why?", "because"))
    done = graft(service, "show", file, "-n", "1")
    assert done.returncode == 0
    assert "\nmodel     tests/tiny\n" in done.stdout
    assert "\ntemplate  the model's own (sha256 " in done.stdout
    assert f"how?<|im_end|>\n<|im_start|>assistant\n{OPENED}like that<|im_end|>↵{CLOSED}\n" in done.stdout
    assert "why?" not in done.stdout
    assert f"Between {OPENED} and {CLOSED} is trained: " in done.stdout
    assert "The end is trained in 1 of 1 rows." in done.stdout
    assert kept(service) == 0


def test_on_a_terminal_it_is_green(service: Service, tmp_path: Path) -> None:
    file = pairs(tmp_path / "a.jsonl", ("how?", "like that"))
    done = graft(service, "show", file, FORCE_COLOR="1", TERM="xterm")
    assert "\x1b[1;32mlike that<|im_end|>\x1b[0m" in done.stdout
    assert "\x1b[2mhow?<|im_end|>\x1b[0m" in done.stdout
    assert OPENED not in done.stdout


def test_split_characters_are_shown_whole_and_nothing_commands_the_terminal(
    service: Service, tmp_path: Path
) -> None:
    """The tiny model's tokens are single bytes, so no character beyond ASCII has a token of its own."""
    file = pairs(tmp_path / "a.jsonl", ("東京 🎉", "naïve 🎉\x1b[31m\u202e été"))
    done = graft(service, "show", file)
    assert "東京 🎉<|im_end|>\n" in done.stdout
    assert f"{OPENED}naïve 🎉\\x1b[31m\\u202e été<|im_end|>↵{CLOSED}\n" in done.stdout
    ascii_only = graft(service, "show", file, PYTHONIOENCODING="ascii")
    assert ascii_only.returncode == 0
    assert "na\\xefve" in ascii_only.stdout


def test_a_kept_data_set_is_shown_by_its_id_with_its_own_mapping(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "table.csv.gz"
    file.write_bytes(gzip.compress(b"q,a\nwhat,that is it\n"))
    with service.client() as client:
        dataset = client.upload(file, mapping={"prompt": "{q}", "completion": "{a}"})
        done = graft(service, "show", dataset["id"], "--loss-on", "all")
        refused = graft(service, "show", dataset["id"], "--format", "text")
        client.delete_dataset(dataset["id"])
    assert "table.csv.gz: 1 rows, format mapping" in done.stdout
    assert "trained   every token" in done.stdout
    assert f"{OPENED}<|im_start|>user\nwhat<|im_end|>" in done.stdout
    assert refused.returncode == 2
    assert "are for files" in refused.stderr


def test_overlong_rows_are_cut_in_their_prompt_and_counted(service: Service, tmp_path: Path) -> None:
    file = pairs(tmp_path / "a.jsonl", ("x" * 99, "the end"), ("y", "z" * 99))
    done = graft(service, "show", file, "--max-length", "60")
    assert "line 1: 60 tokens, " in done.stdout
    assert "trained, truncated\n" in done.stdout
    assert "trained, too long even without its prompt\n" in done.stdout
    assert f"x<|im_end|>\n<|im_start|>assistant\n{OPENED}the end<|im_end|>↵{CLOSED}" in done.stdout
    assert "Too long (over 60): 2, truncated: 1." in done.stdout


def test_plain_texts_have_no_template_and_are_trained_whole(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "once upon a time"}\n')
    done = graft(service, "show", str(file), "--mapping", '{"text": "{body}"}')
    assert "template  none: the rows are plain texts\ntrained   the whole text, with its end\n" in done.stdout
    assert f"{OPENED}" in done.stdout
    assert f"once upon a time<|im_end|>{CLOSED}" in done.stdout


def test_a_file_is_not_kept_when_its_preview_fails(service: Service, tmp_path: Path) -> None:
    file = pairs(tmp_path / "a.jsonl", ("how?", "like that"))
    done = graft(service, "show", file, "--model", "none/such")
    assert done.returncode == 1
    assert 'There is no base model "none/such".' in done.stderr
    assert kept(service) == 0
    broken = tmp_path / "broken.jsonl"
    broken.write_text(BROKEN)
    done = graft(service, "show", str(broken))
    assert done.returncode == 1
    assert 'Line 2: messages[0].role is "human"' in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "nothing.jsonl"], 'There is no file "nothing.jsonl".'),
        (["check", "/"], '"/" is not a file.'),
        (["check", b"\xff.jsonl"], 'There is no file "\\udcff.jsonl".'),
        (["show", "nothing"], 'There is no file or data set "nothing".'),
        (["check", "FILE", "--mapping", "{"], "--mapping: Not valid JSON"),
        (["check", "FILE", "--mapping", "[1]"], "--mapping must be a JSON object"),
        (
            ["check", "FILE", "--mapping", '{"text": "a", "text": "b"}'],
            '--mapping: The key "text" stands twice',
        ),
        (["check", "FILE", "--mapping", "@LATIN"], "is not UTF-8 (byte 13)."),
        (["show", "FILE", "--mapping", "@nothing.json"], 'There is no file "nothing.json".'),
        (["check", "FILE", "--repair", "FILE"], "is the file itself"),
        (["check", "FILE", "--repair", "/no/where"], 'there is no folder "/no".'),
    ],
)
def test_what_cannot_be_read_is_told_in_a_line(
    service: Service, tmp_path: Path, words: list[str | bytes], said: str
) -> None:
    file, latin = tmp_path / "a.jsonl", tmp_path / "latin.json"
    pairs(file, ("a", "b c"))
    latin.write_bytes('{"prompt": "é"}'.encode("latin-1"))
    named = {"FILE": str(file), "@LATIN": f"@{latin}"}
    done = graft(service, *[named.get(word, word) if isinstance(word, str) else word for word in words])
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""


def test_the_client_says_when_there_is_nothing_to_repair(service: Service, tmp_path: Path) -> None:
    file, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    pairs(file, ("a", "b c"))
    done = graft(service, "check", str(file), "--repair", str(out))
    assert done.returncode == 0
    assert f"The file is right as it is; {out} is not written." in done.stdout
    with service.client() as client, pytest.raises(ApiError) as caught:
        client.repaired(file, out)
    assert caught.value.code == "not_repairable"
    assert not out.exists()
