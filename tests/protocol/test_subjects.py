from __future__ import annotations

import pytest

from splitserve.errors import ConfigError
from splitserve.protocol.subjects import Subjects, subject_token


def test_subjects_of_two_clusters_never_meet() -> None:
    assert Subjects("a").worker_in("w") != Subjects("b").worker_in("w")
    assert Subjects("a").all_beats == "ss1.a.hb.>"


def test_every_subject_of_a_cluster_is_its_own() -> None:
    s = Subjects("c")
    names = [
        s.worker_in("x"),
        s.worker_kv("x"),
        s.worker_lease("x"),
        s.router_events("x"),
        s.beat("decode", "x"),
        s.metrics("x"),
    ]
    assert len(set(names)) == len(names)


def test_dots_in_a_name_become_dashes() -> None:
    assert subject_token("decode-host.example-7") == "decode-host-example-7"


@pytest.mark.parametrize("name", ["", "a b", "a>", "*", "ä"])
def test_a_name_that_would_break_a_subject_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="only letters"):
        subject_token(name)
