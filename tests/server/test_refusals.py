"""What is not answered is refused by name, in OpenAI's format, without a text of the request."""

from __future__ import annotations

import json
import logging
import math
import threading
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.models import PROSE
from support.serving import Running, blocked, running, until

from sac_rag import Decoding, DiskStore, SacRAG
from sac_rag.server.auth import Tokens, is_loopback
from sac_rag.server.limits import Limits
from sac_rag.server.running import require_tokens
from sac_rag.server.schemas import ChatRequest
from sac_rag.server.service import Service

ALICE, BOB, PUBLIC = "alice-0123456789", "bob-0123456789ab", "public-0123456789"
SECRET = "the vault opens at noon"


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert SECRET not in answer.text
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("tools", [{"type": "function"}]),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("presence_penalty", 0.5),
        ("frequency_penalty", True),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": -100}),
        ("best_of", 2),
        ("temperature", 2.5),
        ("temperature", -0.1),
        ("temperature", True),
        ("temperature", "0"),
        ("top_p", 0),
        ("max_tokens", 0),
        ("max_tokens", 1025),
        ("max_tokens", 10**30),
        ("max_completion_tokens", 1.5),
        ("seed", 2**63),
        ("stop", ["a"] * 5),
        ("stop", ""),
        ("retrieve", 0),
        ("ratio", 7),
        ("documents", ["unknown"]),
        ("documents", [{"id": "a"}]),
        ("documents", [{"text": "a", "author": "b"}]),
        ("stream", 1),
    ],
)
def test_a_field_that_cannot_be_served_is_refused_by_name(
    served: Running, field: str, value: Any
) -> None:
    error = refused(served.ask(**{field: value}), 400)
    assert field in f"{error['message']} {error['param']}"


def test_fields_at_their_defaults_are_accepted(served: Running) -> None:
    neutral = {
        "n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0, "tools": None,
        "response_format": {"type": "text"}, "logit_bias": {}, "user": None, "store": False,
    }  # fmt: skip
    assert served.ask(**neutral).status_code == 200


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [{"role": "user", "content": ""}],
        [{"role": "assistant", "content": "Good day."}],
        [{"role": "tool", "content": SECRET, "tool_call_id": "1"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": SECRET}]}],
        [{"role": "user", "content": SECRET, "name": SECRET}],
        [{"role": "user", "content": None}],
    ],
)
def test_turns_that_cannot_be_read_are_refused(served: Running, turns: Any) -> None:
    refused(served.ask(messages=turns), 400)


def test_two_sources_or_two_lengths_are_refused(served: Running) -> None:
    assert "not both" in refused(served.ask(documents=["d0"], retrieve=1), 400)["message"]
    refused(served.ask(max_tokens=2, max_completion_tokens=3), 400)
    refused(served.ask(stream_options={"include_usage": True}), 400)
    assert refused(served.ask(model="gpt-4"), 404)["code"] == "model_not_found"


def test_a_prompt_longer_than_the_model_is_refused_and_streams_too(served: Running) -> None:
    turns = [{"role": "user", "content": "word " * 9000}]
    for stream in (False, True):
        error = refused(served.ask(messages=turns, stream=stream), 400)
        assert error["code"] == "context_length_exceeded"


def test_limits_are_413(service: Service) -> None:
    limits = Limits(body_bytes=3000, documents=2, document_bytes=100)
    service = Service(service.rag, "tiny", index=service._index, limits=limits)
    with running(service, limits=limits) as served:
        assert "3000" in refused(served.ask(documents=["a" * 5000]), 413)["message"]
        refused(served.ask(documents=["d0", "d1"]), 413)  # two chunks each
        refused(served.ask(documents=[{"text": "a"}] * 3), 413)
        refused(served.ask(documents=[{"text": "ä" * 51}]), 413)
        refused(served.ask(retrieve=3), 413)
        assert served.ask(documents=[{"text": "ä" * 50}]).status_code == 200
        body = iter([b'{"model": "tiny", ', b" " * 4000])  # without a Content-Length
        headers = {"Content-Type": "application/json"}
        refused(served.client.post("/v1/chat/completions", content=body, headers=headers), 413)


def test_a_full_queue_is_429(service: Service) -> None:
    limits = Limits(queue=2)
    with running(service, limits=limits) as served, blocked(service.rag.generator) as blocker:
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(served.ask().status_code))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        until(lambda: served.endpoint._answering.used == 2)
        answer = served.ask()
        assert refused(answer, 429)["code"] == "queue_full"
        assert answer.headers["retry-after"] == "1"
        assert served.client.get("/health").status_code == 200
        blocker.released.set()
        for thread in threads:
            thread.join()
        assert answers == [200, 200]
        assert served.ask().status_code == 200


def test_without_a_token_there_is_no_answer(service: Service) -> None:
    with running(service, [ALICE]) as served:
        for token in (None, "x", ALICE[:-1], ALICE + "0", "ä", f"{ALICE} x"):
            headers = {} if token is None else {"Authorization": f"Bearer {token}".encode()}
            for path in ("/v1/models", "/metrics"):
                refused(served.client.get(path, headers=headers), 401)
            answer = served.client.post("/v1/chat/completions", headers=headers, content=b"{")
            refused(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
        refused(served.client.get("/metrics", headers={"Authorization": f"Basic {ALICE}"}), 401)
        assert served.client.get("/health").status_code == 200
        assert served.ask(ALICE).status_code == 200


def test_a_document_of_another_namespace_is_never_a_hit(rag: SacRAG, service: Service) -> None:
    tokens = [f"{ALICE}:alice", f"{BOB}:bob", PUBLIC]
    namespaces = ["alice", "bob", ""]
    service = Service(rag, "tiny", namespaces=namespaces, index=service._index)
    document = {"id": "d", "text": SECRET}

    def status(token: str) -> str:
        answer = served.ask(token, documents=[document]).json()
        (citation,) = answer["metadata"]["citations"]
        return str(citation["status"])

    with running(service, tokens) as served:
        for token in (ALICE, BOB, PUBLIC):
            assert status(token) == "absent"
            assert status(token) == "hit"
        assert served.ask(PUBLIC, documents=["d0"]).status_code == 200
        refused(served.ask(ALICE, documents=["d0"]), 403)
        refused(served.ask(BOB, retrieve=1), 403)
        # The numbers of all, under the name of none.
        headers = {"Authorization": f"Bearer {BOB}"}
        metrics = served.client.get("/metrics", headers=headers).text
        assert "sac_rag_hits_total 3.0" in metrics
        assert "alice" not in metrics


def test_only_this_machine_is_served_without_tokens() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        require_tokens(host, Tokens([]))
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", ""):
        assert not is_loopback(host)
        with pytest.raises(ValueError, match="SAC_RAG_TOKENS"):
            require_tokens(host, Tokens([]))
        require_tokens(host, Tokens([ALICE]))


def test_tokens_come_from_a_file_or_the_environment(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAC_RAG_TOKENS", raising=False)
    assert not Tokens.read(None)
    monkeypatch.setenv("SAC_RAG_TOKENS", f"{ALICE}:alice, {PUBLIC}\n")
    assert Tokens.read(None).namespaces == {"alice", ""}
    path = tmp_path / "tokens"
    path.write_text(f"# whose\n{BOB}:bob and co\n\n")
    assert Tokens.read(path).namespace(f"bearer {BOB}") == "bob and co"
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="has none"):
        Tokens.read(path)
    for bad in (["short"], [f"{ALICE} x"], [ALICE, f"{ALICE}:alice"]):
        with pytest.raises(ValueError, match="token") as error:
            Tokens(bad)
        assert bad[0] not in str(error.value)


def test_pages_of_other_sites_cannot_ask(served: Running) -> None:
    headers = {"Host": "attacker.example", "Content-Type": "application/json"}
    refused(served.client.post("/v1/chat/completions", content=b"{}", headers=headers), 421)
    headers = {"Content-Type": "text/plain"}  # which a browser sends without asking
    refused(served.client.post("/v1/chat/completions", content=b"{}", headers=headers), 415)


def test_an_unknown_path_or_method_is_an_error_in_openais_format(served: Running) -> None:
    refused(served.client.get("/v1/embeddings"), 404)
    refused(served.client.get("/v1/chat/completions"), 405)
    assert served.client.get("/docs").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_servers_has_no_text_in_answer_or_log(
    served: Running, rag: SacRAG, monkeypatch: pytest.MonkeyPatch, caplog: Any, stream: bool
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(rag, "_start_chat", fail)
    with caplog.at_level(logging.DEBUG):
        refused(served.ask(stream=stream), 500)
    assert "RuntimeError" in caplog.text
    assert SECRET not in caplog.text and "Traceback" not in caplog.text


BODIES = [
    b"",
    b"null",
    b"[]",
    b'"a"',
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"model": NaN}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000,
    b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "top_p": NaN}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": -Infinity}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "\\ud800": 1}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "tools": [NaN]}',
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_what_is_no_request_is_refused(served: Running, body: bytes) -> None:
    refused(served.send(body), 400)


NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, 2, 10**400, math.nan])
)
TEXTS = st.one_of(
    st.text(max_size=20), st.sampled_from(["", "\ud800", "\x00", "<|im_end|>", "tiny"])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "developer", "tool"])},
    optional={"content": st.one_of(TEXTS, VALUES), "name": VALUES, "refusal": VALUES},
)
DOCUMENT = st.one_of(
    st.fixed_dictionaries({"text": TEXTS}, optional={"id": TEXTS, "title": TEXTS}),
    st.sampled_from(["d0", "d1", "none"]),
    VALUES,
)
NAMES = sorted(
    ChatRequest.model_fields.keys() - {"model", "messages", "documents"}
    | {"tools", "logit_bias", "logprobs", "response_format", "other"}
)
BODY = st.fixed_dictionaries(
    {
        "model": st.one_of(st.just("tiny"), TEXTS),
        "messages": st.lists(st.one_of(TURN, VALUES), max_size=4),
    },
    optional={
        "documents": st.lists(DOCUMENT, max_size=3),
        **{name: st.one_of(NUMBERS, VALUES) for name in NAMES},
    },
)
VALID = st.fixed_dictionaries(
    {
        "model": st.just("tiny"),
        "messages": st.lists(TURN, max_size=2).map(
            lambda turns: [*turns, {"role": "user", "content": PROSE[0][:20]}]
        ),
    },
    optional={
        "documents": st.lists(DOCUMENT, max_size=3),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stop": st.lists(TEXTS, max_size=4),
        "retrieve": st.integers(0, 9),
        "stream": st.booleans(),
    },
)


@pytest.fixture(scope="module")
def fuzzed(make_generator: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server for all bodies: a fixture per test would be one per body."""
    from support.models import make_compressor
    from support.serving import WordEmbedder

    from sac_rag import Chunk
    from sac_rag.cached import CachedCompressor
    from sac_rag.retrieval.index import ChunkIndex

    store = DiskStore(tmp_path_factory.mktemp("fuzzed") / "store")
    cached = CachedCompressor(make_compressor(make_generator("llama"), "sac"), store)
    index = ChunkIndex.build([Chunk(PROSE[0], id="d0"), Chunk(PROSE[1], id="d1")], WordEmbedder())
    with running(
        Service(SacRAG(cached, decoding=Decoding(max_new_tokens=1)), "tiny", index=index)
    ) as served:
        yield served
        assert store.check() == []


@settings(
    max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(body=st.one_of(BODY, BODY, VALID, VALUES))
def test_no_body_is_an_error_of_the_servers(fuzzed: Running, body: Any) -> None:
    answer = fuzzed.send(json.dumps(body).encode())
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        refused(answer, answer.status_code)
