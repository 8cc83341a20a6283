"""The parts of `make bench`, in the order in which all are run and shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """`script`: a file one folder up that prints its table; `model`: it is given the default model's folder as this flag,
    "" for a plain argument. Without a script the part is a module with a `main` of its own."""

    title: str
    about: str
    script: bool = True
    model: str | None = None


PARTS: Mapping[str, Part] = {
    "serving": Part(
        "Serving, beside vLLM on the same cores",
        "SmolLM2-135M-Instruct in bfloat16 on all of this machine's cores: `splitserve serve` with its defaults, vLLM 0.32 (CPU) in one process "
        "on all cores, and vLLM's own prefill/decode pair over NIXL, a core each. One system is up at a time: in a round each is started, "
        "warmed up, asked all workloads, and ended until none of its processes is left, in an order that rotates; what it burns idle is "
        "measured for three seconds after its warm-up. All are asked by vLLM's own `vllm bench serve`, which shares the cores with them, with "
        "seeds that are fresh in every round and the same for all. vLLM runs with `--enforce-eager`: compiled, its bfloat16 gave wrong text on "
        "AVX512_BF16. llama.cpp is beside them where one stream is asked for: its own server, bfloat16, all cores, one request at "
        "a time. 256/64 is prompt/answer in tokens, c requests at a time; a run has 52 of them at c=16, 64 at c=8. "
        "Goodput is the highest rate of Poisson arrivals, of a ladder of "
        "steps of about 1.4 from 0.25 on, at which 90 % of the requests keep a TTFT of 1 s (2 s for 1024/64) and a TPOT of 40 ms; who keeps "
        "none (0.00) is compared as if it kept the lowest. A rate is tried with 20 to 30 requests, more where those came within ten seconds.",
        script=False,
        model="--model",
    ),
    "engine_cpu": Part("The engine alone, on one core", "Steps of one thread; decodes at a context of 288.", model=""),
    "router": Part(
        "The router's cost",
        "Core-milliseconds of the router's process a streamed request, 200 tokens in and 100 out. **Mock workers**: they speak the "
        "protocol over a real NATS and compute nothing, so this says nothing of an engine.",
        model="--model",
    ),
    "split_grid": Part(
        "Where a split helps",
        "`--split auto` beside always and never, over prompt lengths and numbers of clients that ask again as soon as they are answered. "
        "`split pays` is the time of an answer read and written by decode workers alone over that with every prompt split: below 1 a split "
        "hurts. Auto is to be within 5 % of the better way.",
        model="--model",
    ),
    "lending": Part(
        "Cores that an idle worker lends",
        "`splitserve serve --split always` as it is (lent) and with `--no-lend-cores` (kept): what decode gains by the core of a prefill worker "
        "that has nothing to read, and what it costs to give it back. `alone`: one stream of 256/64 at a time; `arrivals`: 0.8 prompts a second "
        "at random moments, 256/96, so that the core passes to and fro all the time. A spike at that would show in the longest gaps between two "
        "tokens: the last hundredth of them is to be no longer with lending than without.",
        model="--model",
    ),
    "handover": Part(
        "The hand-over from prefill to decode",
        "The stages between a prompt's first token and decode's first step, milliseconds, as `splitserve serve --split always` tells them of each "
        "answer, over shared memory and over a socket of one host. `hand-over` is the first gap less decode's first step; `bytes aside` is "
        "it less the copy that decode waited for, and what the bar of 5 ms is for, under light load. Under a saturated load `gap_other` holds "
        "the rest of the step that the batch was in when the KV came: the engine hears of it between steps.",
        model="--model",
    ),
    "memory": Part(
        "Memory",
        "Resident memory of `splitserve serve --split always` before and while it answers short requests, in brackets what of it is the "
        "process's alone: neither shared pools nor mapped weights and libraries; decode's own pool is private. A worker's whole has its "
        "pool in it, decode's prefill's too.",
        model="--model",
    ),
    "kv_transfer": Part(
        "KV transfer", "A fetch from one process into another beside memcpy and a plain socket of the same sizes."
    ),
    "metrics_cost": Part("What metric calls cost", "Beside a real decode step of 64 sequences.", model="--model"),
    "fleet_page": Part("The fleet page", "`GET /metrics` of a router over fifty workers."),
}
