"""What the router is measured beside: a stream of a hundred chunks that does nothing else."""

from __future__ import annotations

import json

from bench import bare_stream


async def test_it_is_a_hundred_chunks_and_the_mark_of_the_end():
    events = [event async for event in bare_stream.frames()]
    assert len(events) == bare_stream.FRAMES + 1
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["delta"] == {"content": " word"}
    assert all(event.endswith("\n\n") for event in events)
    assert events[-1] == "data: [DONE]\n\n"


async def test_at_a_pace_it_is_the_same_stream_to_the_byte():
    assert [event async for event in bare_stream.frames(0.001)] == [event async for event in bare_stream.frames()]
