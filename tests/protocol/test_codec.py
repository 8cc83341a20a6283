from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.errors import BadMessage, UnknownMessage
from splitserve.protocol.codec import decode, encode
from splitserve.protocol.handle import GroupBlocks, KvAddress, KvHandle, KvSource
from splitserve.protocol.messages import (
    MESSAGES,
    Cancel,
    DecodeDurations,
    DecodeJob,
    Digest,
    DigestRow,
    FinAck,
    FirstRow,
    KvReady,
    Message,
    PrefillDurations,
    TokenFrame,
    TokenRow,
)
from splitserve.protocol.params import SamplingParams, TokenLogprob
from splitserve.protocol.states import FinishReason

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)

HANDLE = KvHandle(
    id="h1",
    rid="r1",
    pa=1,
    owner="prefill-0",
    incarnation=2**64 - 1,
    fingerprint="f",
    kv_tokens=17,
    groups=(GroupBlocks(0, (3, 1), (9, 2**63)),),
    chain_hash="ab",
    token="00" * 16,
    ttl_s=15.0,
    addresses=(KvAddress("shm", "/run/x.sock", "boot"), KvAddress("tcp", "127.0.0.1:1")),
)


def job(ids: tuple[int, ...] = (1, 2, 3), outputs: tuple[tuple[int, ...], ...] = ((),)) -> DecodeJob:
    source = KvSource("prefill-0", 7, HANDLE.addresses)
    params = SamplingParams(max_tokens=5, logit_bias=((3, -1.5),), stop_token_ids=(2,))
    return DecodeJob("r1", "router-a", 7, 1, 12, 1, source, ids, outputs, params, (2**64 - 1,), "f", 600.0)


def test_the_table_holds_every_message_of_the_union() -> None:
    assert set(MESSAGES.values()) == set(get_args(Message))


def test_every_message_is_frozen() -> None:
    for kind in MESSAGES.values():
        params: Any = getattr(kind, "__dataclass_params__")  # noqa: B009  # a dataclass's own, not in the stubs
        assert params.frozen, kind


@given(ids=st.lists(U32, max_size=50), outputs=st.lists(st.lists(U32, max_size=5), min_size=1, max_size=4))
def test_a_job_comes_back_as_it_was_sent(ids: list[int], outputs: list[list[int]]) -> None:
    sent = job(tuple(ids), tuple(map(tuple, outputs)))
    assert decode(encode(sent)) == sent


@given(
    rows=st.lists(
        st.builds(
            TokenRow,
            slot=U32,
            da=st.integers(0, 65535),
            first_index=U32,
            ids=st.lists(U32, max_size=4).map(tuple),
            finish=st.sampled_from(FinishReason),
            first=st.none(),
            logprobs=st.just(()),
        ),
        max_size=6,
    ),
    seq=U64,
)
def test_a_frame_gives_its_rows_back(rows: list[TokenRow], seq: int) -> None:
    frame = decode(encode(TokenFrame.of("decode-0", 1, seq, rows)))
    assert isinstance(frame, TokenFrame)
    assert list(frame.rows()) == rows
    assert frame.stream_seq == seq


def test_what_only_some_rows_have_stays_with_its_row() -> None:
    first = FirstRow(1, 32, DecodeDurations(0.1, 0.2, 0.3))
    logprobs = (TokenLogprob(-0.5, 1, ((5, -0.5), (6, -1.0))),)
    rows = [TokenRow(1, 1, 0, (9,)), TokenRow(2, 1, 0, (5,), first=first, logprobs=logprobs)]
    frame = decode(encode(TokenFrame.of("d", 1, 1, rows)))
    assert isinstance(frame, TokenFrame)
    assert list(frame.rows()) == rows


def test_a_handle_and_its_nested_parts_survive_the_wire() -> None:
    sent = KvReady(HANDLE, 17, True, 0, (5,), (TokenLogprob(-1.25, 2),), 16, PrefillDurations(0.5, 0.25), (0,))
    assert decode(encode(sent)) == sent


def test_a_digest_survives_the_wire() -> None:
    sent = Digest("d", "decode", 1, 5, (DigestRow("r", 1, "running", (3, 4), 7),))
    assert decode(encode(sent)) == sent


def test_two_hundred_thousand_ids_fit_the_default_limit_of_nats() -> None:
    data = encode(job(tuple(range(200_000))))
    assert len(data) < 1 << 20


def test_minus_infinity_survives_the_wire() -> None:
    sent = KvReady(HANDLE, 17, True, 0, (5,), (TokenLogprob(float("-inf"), 9),), 0, PrefillDurations(0, 0))
    assert decode(encode(sent)) == sent


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "at least 4 bytes"),
        (b"\xff\xff\xff\x7f{}", "the head ends"),
        (b"\x02\x00\x00\x00{}", "not readable"),
        (b"\x02\x00\x00\x00[]", "not readable"),
        (b"\x03\x00\x00\x00{{{", "not readable"),
        (b"\x04\x00\x00\x00null", "not readable"),
    ],
)
def test_bytes_that_are_no_envelope_are_a_bad_message(data: bytes, says: str) -> None:
    with pytest.raises(BadMessage, match=says):
        decode(data)


def tampered(message: Message, old: bytes, new: bytes) -> bytes:
    data = encode(message)
    size = int.from_bytes(data[:4], "little")
    head = data[4 : 4 + size].replace(old, new)
    assert head != data[4 : 4 + size]
    return len(head).to_bytes(4, "little") + head + data[4 + size :]


def test_another_version_or_kind_is_an_unknown_message() -> None:
    cancel = Cancel("r", 1, 1, 1, "client")
    with pytest.raises(UnknownMessage, match="version 99"):
        decode(tampered(cancel, b'"v":1', b'"v":99'))
    with pytest.raises(UnknownMessage, match="Cancelled"):
        decode(tampered(cancel, b'"Cancel"', b'"Cancelled"'))


def test_a_field_of_the_wrong_type_is_a_bad_message_that_names_it() -> None:
    with pytest.raises(BadMessage, match="rid"):
        decode(tampered(Cancel("r", 1, 1, 1, "c"), b'"rid":"r"', b'"rid":[1]'))


def test_a_tail_of_the_wrong_size_is_a_bad_message() -> None:
    data = encode(FinAck("r", 1, (1, 2, 3)))
    with pytest.raises(BadMessage, match="tail"):
        decode(data[:-1])
    with pytest.raises(BadMessage, match="left behind"):
        decode(data + b"x")
    with pytest.raises(BadMessage):
        decode(tampered(FinAck("r", 1, (1, 2, 3)), b'"slots":3', b'"slots":-3'))


@given(st.binary(max_size=200))
def test_no_bytes_make_the_decoder_raise_anything_else(data: bytes) -> None:
    for raw in (data, len(data).to_bytes(4, "little") + data):
        try:
            decode(raw)
        except (BadMessage, UnknownMessage):
            continue


def test_a_value_outside_its_column_is_a_bad_message_that_names_the_field() -> None:
    with pytest.raises(BadMessage, match="slots"):
        encode(FinAck("r", 1, (2**32,)))
    with pytest.raises(BadMessage, match="seeds"):
        encode(dataclasses.replace(job(), seeds=(-1,)))
