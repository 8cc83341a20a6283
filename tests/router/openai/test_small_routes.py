"""Models, tokenising, stored requests, probes, the API's own description, and what the observer hears."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest

from splitserve.errors import NoWorkers, SplitserveError, StoreUnavailable
from splitserve.router.generation import Done, GenerationEvent, Tokens
from splitserve.router.observe import HttpAnswer, Progress, RequestEnd
from splitserve.router.observers import Observers
from splitserve.router.refusals import WaitedTooLong
from support.generation import MODEL, ScriptedGeneration, ScriptedGenerator, in_process, says, silent

MESSAGES = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


async def test_a_model_is_found_under_each_of_its_names_slashes_and_all():
    async with in_process(ScriptedGenerator(says("ok"))) as api:
        listed = (await api.get("/v1/models")).json()
        assert [card["id"] for card in listed["data"]] == [MODEL, "alias"]
        card = (await api.get(f"/v1/models/{MODEL}")).json()
        assert (card["id"], card["object"], card["max_model_len"]) == (MODEL, "model", 512)
        assert (await api.get("/v1/models/org/other")).status_code == 404


async def test_tokens_of_a_prompt_and_of_messages_and_back():
    async with in_process(ScriptedGenerator(says("ok"))) as api:
        body: dict[str, Any] = {"model": MODEL, "prompt": "hé", "return_token_strs": True}
        found = (await api.post("/tokenize", json=body)).json()
        assert found == {
            "count": 3, "max_model_len": 512, "tokens": list("hé".encode()), "token_strs": ["h", "\ufffd", "\ufffd"],
        }  # fmt: skip
        found = (await api.post("/tokenize", json={"messages": MESSAGES})).json()
        assert bytes(found["tokens"]).decode() == "<user>Hello<a>"
        text = (await api.post("/detokenize", json={"tokens": [*"hé".encode(), 256]})).json()
        assert text == {"prompt": "hé</s>"}


async def test_ids_that_become_text_in_parts_give_the_text_of_all():
    text = "é日𠮷a" * 3000
    async with in_process(ScriptedGenerator(says("ok"))) as api:
        shown = (await api.post("/detokenize", json={"tokens": list(text.encode())})).json()["prompt"]
    assert shown == text


async def test_a_text_longer_than_the_context_can_be_tokenised():
    async with in_process(ScriptedGenerator(says("ok"))) as api:
        assert (await api.post("/tokenize", json={"prompt": "x" * 20_000})).json()["count"] == 20_000
        assert (await api.post("/tokenize", json={"prompt": ""})).json()["tokens"] == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"model": "x", "prompt": "x"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [1, 258]}, "tokens.1"),
    ],
)
async def test_what_cannot_be_tokenised_is_refused_by_its_place(path: str, body: object, param: str):
    async with in_process(ScriptedGenerator(says("ok"))) as api:
        answer = await api.post(path, json=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


async def test_a_stored_request_is_shown_and_a_store_that_is_away_is_a_503():
    async def read(rid: str) -> Mapping[str, object] | None:
        if rid == "away":
            raise StoreUnavailable("Redis is away", retry_after_s=1)
        return {"state": "decoding", "workers": {"decode": "decode-0"}} if rid == "chatcmpl-1" else None

    async with in_process(ScriptedGenerator(says("ok")), read_request=read) as api:
        found = (await api.get("/v1/requests/chatcmpl-1")).json()
        assert found == {
            "id": "chatcmpl-1", "object": "request", "state": "decoding", "workers": {"decode": "decode-0"},
        }  # fmt: skip
        assert (await api.get("/v1/requests/other")).status_code == 404
        answer = await api.get("/v1/requests/away")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


async def test_a_router_that_is_not_ready_is_alive_and_says_why():
    async with in_process(ScriptedGenerator(says("ok")), why_not_ready=lambda: "no decode worker") as api:
        assert (await api.get("/health")).status_code == 200
        answer = await api.get("/ready")
        assert answer.status_code == 503
        assert "no decode worker" in answer.json()["error"]["message"]
    async with in_process(ScriptedGenerator(says("ok"))) as api:
        assert (await api.get("/ready")).status_code == 200
        assert set((await api.get("/version")).json()) == {"version"}


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + [ref for value in node.values() for ref in references(value)]
    return [ref for value in node for ref in references(value)] if isinstance(node, list) else []


async def test_the_description_of_the_api_holds_together():
    async with in_process(ScriptedGenerator(says("ok"))) as api:
        document = (await api.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.")
    for ref in references(document):
        node = document
        for part in ref.removeprefix("#/").split("/"):
            node = node[part]
    for path in (CHAT, "/v1/completions", "/tokenize", "/detokenize"):
        operation = document["paths"][path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert schema["$ref"].rpartition("/")[2] in document["components"]["schemas"]
        assert "422" not in operation["responses"]
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "max_completion_tokens", "stop", "logit_bias"} <= set(fields)
    names = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(set(names)) == len(names)
    for path, operations in document["paths"].items():
        parameters = operations[next(iter(operations))].get("parameters", [])
        assert [f"{{{parameter['name']}}}" for parameter in parameters] == (["{id}"] if "{id" in path else [])


class Ear:
    """An observer that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.answers: list[tuple[str, str, int]] = []
        self.had = Progress()

    def request(self, endpoint: str) -> Ear:
        self.heard.append(endpoint)
        return self

    def tokenised(self, seconds: float) -> None:
        self.heard.append("tokenised")

    def first_token(self, seconds: float) -> None:
        self.heard.append("first")

    def progressed(self, by: Progress) -> None:
        self.had = Progress(*map(sum, zip(self.had, by, strict=True)))

    def gaps(self, seconds: Sequence[float]) -> None:
        self.heard.extend(["gap"] * len(seconds))

    def end(self, end: RequestEnd) -> None:
        self.heard.append(end)

    def refused(self, error: SplitserveError) -> None:
        self.heard.append(error)

    def answered(self, answer: HttpAnswer) -> None:
        self.answers.append((answer.method, answer.path, answer.status))


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_observer_hears_of_tokenising_the_first_token_each_gap_and_the_end(streamed: bool):
    ear = Ear()
    async with in_process(ScriptedGenerator(says("abc")), observer=Observers(ear)) as api:
        await api.post(CHAT, json={"messages": MESSAGES, "n": 2, "stream": streamed})
        await api.get(f"/v1/models/{MODEL}")
        await api.get("/nowhere")
    *events, end = ear.heard
    assert events == [CHAT, "tokenised", "first", *["gap"] * 6]  # four tokens an answer, so three gaps
    assert (end.outcome, end.finish_reasons, end.prompt_tokens) == ("finished", ("stop", "stop"), (14,))
    assert (end.generation_tokens, end.cached_tokens, end.n, end.max_tokens) == ((4, 4), 4, 2, 498)
    assert ear.had == Progress(generated=8, prompt=14, cached=4)
    assert 0 < end.first_token_s <= end.last_token_s <= end.seconds
    assert end.stages == ({"prefill": 0.1},)
    assert ear.answers == [("POST", CHAT, 200), ("GET", "/v1/models/{id:path}", 200), ("GET", "", 404)]


async def second_fails(generation: ScriptedGeneration) -> AsyncIterator[GenerationEvent]:
    """The first prompt gets a token and goes on; the second waited too long for a worker."""
    if generation.submission.rid.endswith("-1"):
        await asyncio.sleep(0.05)
        yield Done(WaitedTooLong("no room", retry_after_s=1))
    else:
        yield Tokens(0, 0, (97,))
        await asyncio.Event().wait()


@pytest.mark.parametrize(("streamed", "refused"), [(False, "queue_timeout"), (True, "")])
async def test_one_prompt_that_fails_ends_the_others_with_it_and_only_what_was_read_is_counted(
    streamed: bool, refused: str
):
    ear, generator = Ear(), ScriptedGenerator(second_fails)
    async with in_process(generator, observer=Observers(ear)) as api:
        body = {"prompt": ["x" * 10, "y" * 20], "max_tokens": 5, "stream": streamed}
        answer = await api.post("/v1/completions", json=body)
    assert answer.status_code == (200 if streamed else 429)
    assert [type(generation.left_by) for generation in generator.submitted] == [WaitedTooLong] * 2
    end = ear.heard[-1]
    assert (end.outcome, end.code, end.refused) == ("failed", "overloaded", refused)
    assert ear.had == Progress(generated=1, prompt=10, cached=4)


async def worker_lost(generation: ScriptedGeneration) -> AsyncIterator[GenerationEvent]:
    yield Tokens(0, 0, (97, 98))
    await asyncio.sleep(0.05)
    yield Done(NoWorkers("all died", retry_after_s=1))


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_request_that_had_tokens_was_taken_and_is_lost_not_refused(streamed: bool):
    ear = Ear()
    async with in_process(ScriptedGenerator(worker_lost), observer=Observers(ear)) as api:
        await api.post("/v1/completions", json={"prompt": "x", "stream": streamed})
    end = ear.heard[-1]
    assert (end.outcome, end.code, end.refused) == ("failed", "no_workers", "")


async def test_the_observer_hears_of_a_request_that_never_got_to_run():
    ear = Ear()
    async with in_process(ScriptedGenerator(silent), observer=Observers(ear)) as api:
        await api.post("/v1/completions", json={"prompt": "x" * 600})
    assert ear.heard[0] == "/v1/completions"
    assert (ear.heard[1].outcome, ear.heard[1].code) == ("failed", "context_length_exceeded")
