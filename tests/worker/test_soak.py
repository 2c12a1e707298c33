"""Some seconds of bench/soak.py."""

from pathlib import Path

from bench import soak


def test_no_answer_is_another_adapters_and_nothing_is_left(tmp_path: Path) -> None:
    report = soak.run(tmp_path, seconds=8, adapters=8, room=3, clients=8)
    assert not report.wrong
    for kind in ("whole", "streamed", "hung up", "hung up in the stream", "weights exchanged", "refused"):
        assert report.done[kind], kind
    assert (report.left["running"], report.left["waiting"]) == (0, 0)
    assert report.left["adapters"] <= 3
    assert report.files[0] == report.files[1]
