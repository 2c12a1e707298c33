from hypothesis import given
from hypothesis import strategies as st

from core.ml.training.speed.packing import packed, packs


@given(st.lists(st.integers(1, 40), max_size=60))
def test_every_row_is_in_one_pack_and_no_pack_is_too_long(lengths: list[int]) -> None:
    made = packs(lengths, 40)
    assert sorted(place for pack in made for place in pack) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in pack) <= 40 for pack in made)
    # No two of them could be one.
    rooms = sorted(sum(lengths[place] for place in pack) for pack in made)
    assert len(rooms) < 2 or rooms[0] + rooms[1] > 40


def test_a_row_goes_where_the_least_room_is_left() -> None:
    assert packs([7, 6, 3, 4, 1], 10) == [[0, 2], [1, 3], [4]]


def test_documents_keep_their_labels_and_their_borders() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [4, 5], "labels": [-100, 5]},
        {"input_ids": [6, 7, 8, 9], "labels": [6, 7, 8, 9]},
    ]
    assert packed(rows, 6) == [
        {"input_ids": [6, 7, 8, 9, 4, 5], "labels": [6, 7, 8, 9, -100, 5], "seq_lengths": [4, 2]},
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "seq_lengths": [3]},
    ]
