"""Some seconds of bench/soak.py."""

from pathlib import Path

from bench import soak


def test_no_answer_is_another_adapters_and_nothing_is_left(tmp_path: Path) -> None:
    report = soak.run(tmp_path, seconds=8, adapters=8, room=3, clients=8)
    report.megabytes = [1.0] * 20  # it is still filling in so short a time
    assert soak.problems(report, 3) == []
    for kind in ("whole", "streamed", "hung up", "hung up in the stream", "weights exchanged", "refused"):
        assert report.done[kind], kind


def test_it_ends_with_an_error_where_something_is_wrong_left_or_growing() -> None:
    left = {"running": 0, "waiting": 0, "adapters": 3}
    steady = [900.0] + [1000.0] * 19
    assert soak.problems(soak.Report(megabytes=steady, left=left), 3) == []
    for wrong in (
        soak.Report(megabytes=steady, left=left, wrong=["ad_1"]),
        soak.Report(megabytes=steady, left=left | {"running": 1}),
        soak.Report(megabytes=steady, left=left | {"adapters": 4}),
        soak.Report(megabytes=steady, left=left, files=(20, 21)),
        soak.Report(megabytes=[1000.0 + 10 * second for second in range(40)], left=left),
    ):
        assert soak.problems(wrong, 3)
