from __future__ import annotations

import pytest

from splitserve.protocol.states import Role
from splitserve.telemetry.metrics import Metrics
from support.promtool import complaints


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("role", list(Role))
def test_promtool_has_nothing_to_say_of_a_page(role: Role, legacy: bool) -> None:
    metrics = Metrics(role, model_name="m", engine="x-0", max_model_len=2048, legacy=legacy)
    assert complaints(metrics.answer("")[0]) == []


def test_promtool_complains_of_a_page_that_is_wrong() -> None:
    assert complaints(b"# TYPE bad_total gauge\nbad_total 1\n")
