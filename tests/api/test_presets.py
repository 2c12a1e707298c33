"""The list of presets."""

import pytest

from core.ml.training.spec import presets
from tests.api.conftest import Api, only_sqlite, refused

pytestmark = only_sqlite


def test_presets_are_listed_by_pages(api: Api) -> None:
    known = [f"{preset.name}@{preset.version}" for preset in presets.known()]
    found: list[str] = []
    query = {"limit": "4"}
    while True:
        page = api.client.get("/presets", params=query).json()
        found += [preset["id"] for preset in page["data"]]
        if not page["has_more"]:
            break
        assert len(page["data"]) == 4
        query["after"] = found[-1]
    assert found == known
    assert len(found) > 4


@pytest.mark.parametrize("after", ["nobody@1", "12", "quick_cpu"])
def test_a_page_after_no_preset_is_refused(api: Api, after: str) -> None:
    answer = api.client.get("/presets", params={"after": after})
    assert refused(answer, 422, "invalid_request")["param"] == "after"
