from __future__ import annotations

import inspect

import pytest

from splitserve import errors


def every_error() -> list[type[errors.SplitserveError]]:
    return [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.SplitserveError)]


def test_every_error_has_exactly_one_row() -> None:
    rows = [row.error for row in errors.TABLE]
    assert sorted(k.__name__ for k in rows) == sorted(k.__name__ for k in every_error())


def test_wire_codes_are_unique() -> None:
    codes = [row.code for row in errors.TABLE]
    assert len(codes) == len(set(codes))


def test_the_tree_in_the_docstring_names_every_error() -> None:
    doc = errors.__doc__ or ""
    missing = [kind.__name__ for kind in every_error() if kind.__name__ not in doc]
    assert not missing


@pytest.mark.parametrize("row", errors.TABLE, ids=lambda row: row.code)
def test_a_wire_code_comes_back_as_its_error(row: errors.ErrorRow) -> None:
    error = errors.error_from_code(row.code, "what happened")
    assert type(error) is row.error
    assert str(error) == "what happened"


def test_a_client_error_is_never_a_5xx_and_a_server_error_never_a_4xx_but_429() -> None:
    for row in errors.TABLE:
        if issubclass(row.error, errors.RequestError):
            assert 400 <= row.http_status < 500, row
        elif row.error not in (errors.Overloaded, errors.MessageTooLarge):
            assert row.http_status >= 500, row


def test_start_up_errors_have_exit_codes_of_their_own() -> None:
    codes = [row.exit_code for row in errors.TABLE if issubclass(row.error, errors.StartupError)]
    assert len(codes) == len(set(codes))
    assert 0 not in codes


def test_an_unknown_wire_code_of_a_newer_peer_gives_the_root() -> None:
    assert type(errors.error_from_code("invented_tomorrow", "x")) is errors.SplitserveError


def test_a_subclass_made_in_a_room_has_the_row_of_its_ancestor() -> None:
    class Local(errors.BusUnavailable):
        pass

    assert errors.row_of(Local("x")).code == "bus_unavailable"
