"""What the endpoint answers is what the pipeline answers, with its account."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
from support.models import PROSE, make_compressor, passes_of
from support.serving import Running, running

from sac_rag import Chunk, Decoding, Message, PromptFormat, SacRAG
from sac_rag.cached import CachedCompressor
from sac_rag.gathering import Gatherer
from sac_rag.lm.generator import Generator
from sac_rag.prompts.chat import joined
from sac_rag.retrieval.index import ChunkIndex
from sac_rag.server.schemas import ChatRequest
from sac_rag.server.service import Service

DOCUMENTS = [{"id": f"d{i}", "title": f"T{i}", "text": text} for i, text in enumerate(PROSE[:2])]
CHUNKS = [Chunk(d["text"], id=d["id"], title=d["title"]) for d in DOCUMENTS]
PLAIN = PromptFormat(
    prefix="Answer from the text.\n\n", user="{chunks}\nQ: {question}\nA:", chat=False, stop=("\n",)
)
RAW = PromptFormat(prefix="<|im_start|>", user="{chunks}\nQ: {question}\nA:", chat=False, raw=True)


def content(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


@pytest.mark.parametrize("form", [PromptFormat(), replace(PromptFormat(), stop=("e",)), PLAIN, RAW])
def test_a_question_about_documents_is_asked_in_the_pipelines_own_prompt(
    llama: Generator, home: Any, form: PromptFormat
) -> None:
    rag = SacRAG(CachedCompressor(make_compressor(llama, "sac"), {}), prompt_format=form)
    expected = rag.answer("What is it?", CHUNKS, Decoding(max_new_tokens=12))
    with running(Service(rag, "tiny")) as served:
        answer = served.ask(documents=DOCUMENTS, max_tokens=12)
        assert content(answer) == expected.text
        usage = answer.json()["usage"]
        assert usage["prompt_tokens"] == expected.usage.positions_attended
        assert usage["completion_tokens"] == expected.usage.generated_tokens
        lines = served.ask(documents=DOCUMENTS, max_tokens=12, stream=True).text
    assert lines.endswith("data: [DONE]\n\n")


def test_citations_say_of_each_chunk_how_it_was_read(served: Running) -> None:
    first = served.ask(documents=[*DOCUMENTS, {"text": " "}]).json()["metadata"]
    again = served.ask(documents=DOCUMENTS).json()
    assert [c["document"] for c in first["citations"]] == ["d0", "d1", None]
    assert [c["status"] for c in first["citations"]] == ["absent", "absent", "empty"]
    assert [c["title"] for c in again["metadata"]["citations"]] == ["T0", "T1"]
    for citation in again["metadata"]["citations"]:
        assert (citation["status"], citation["read_as"]) == ("hit", "anchors")
        assert citation["tokens"] > citation["anchors"] > 0
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == sum(c["anchors"] for c in again["metadata"]["citations"])


def test_documents_of_a_conversation_stand_in_its_last_turn(served: Running, rag: SacRAG) -> None:
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Good day.", "refusal": None, "tool_calls": []},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "?"}],
        },
    ]
    passages = rag.prompt_format.passages(CHUNKS)
    messages = [
        Message("system", ("Be brief.",)),
        Message("user", ("Hello.",)),
        Message("assistant", ("Good day.",)),
        Message("user", joined((*passages, "\n\n", "And ?"))),
    ]
    assert content(served.ask(messages=turns, documents=DOCUMENTS)) == rag.chat([messages])[0].text


def test_a_question_without_documents_is_a_chat(served: Running, rag: SacRAG) -> None:
    expected = rag.chat([[Message("user", ("What is it?",))]])[0]
    assert content(served.ask()) == expected.text
    assert served.ask(documents=[]).json()["metadata"]["citations"] == []


def test_ids_name_all_chunks_of_documents_of_the_collection(served: Running, rag: SacRAG) -> None:
    chunks = [Chunk(text, id="d1", title="T") for text in PROSE[2:4]]
    answer = served.ask(documents=["d1"])
    assert content(answer) == rag.answer("What is it?", chunks).text
    assert [c["document"] for c in answer.json()["metadata"]["citations"]] == ["d1", "d1"]


def test_retrieved_chunks_stand_with_the_nearest_last(
    served: Running, rag: SacRAG, index: ChunkIndex
) -> None:
    question = "What does copper conduct better than iron?"
    hits = index.search(question, 2)
    assert hits[0].chunk.text == PROSE[1]
    expected = rag.answer(question, [hits[1].chunk, hits[0].chunk]).text
    turns = [{"role": "user", "content": question}]
    assert content(served.ask(messages=turns, retrieve=2)) == expected


def test_decoding_is_that_of_the_request(served: Running, rag: SacRAG) -> None:
    chat = [[Message("user", ("What is it?",))]]
    text = rag.chat(chat, Decoding(max_new_tokens=30))[0].text
    assert content(served.ask(max_completion_tokens=30)) == text
    short = served.ask(max_tokens=3).json()
    assert short["usage"]["completion_tokens"] == 3
    assert short["choices"][0]["finish_reason"] == "length"
    stopped = served.ask(max_tokens=30, stop=[text[5:7], "never"]).json()["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["message"]["content"] == text[: text.index(text[5:7])]
    sampled = Decoding(max_new_tokens=20, temperature=1.5, top_p=0.9, seed=7)
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "max_tokens": 20, "n": 1}
    assert content(served.ask(**settings)) == rag.chat(chat, sampled)[0].text


def test_concurrent_requests_are_answered_together(
    served: Running, rag: SacRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rag, "gatherer", Gatherer(rag.generator, window_s=1.0))
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.append(content(served.ask()))) for _ in range(4)
    ]
    with passes_of(rag.generator) as passes:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(passes) == 4
    assert len(texts) == 4 and len(set(texts)) == 1


def test_requests_of_two_namespaces_share_passes_and_no_entries(
    rag: SacRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = rag.answer("What is it?", CHUNKS[:1]).text
    monkeypatch.setattr(rag, "gatherer", Gatherer(rag.generator, window_s=1.0))
    service = Service(rag, "tiny", namespaces=["alice", "bob"])
    message = {"role": "user", "content": "What is it?"}
    request = ChatRequest(model="tiny", messages=[message], documents=DOCUMENTS[:1])
    asked = [service.prepare(request, namespace) for namespace in ("alice", "bob")]
    with passes_of(rag.generator) as passes:
        answers = [future.result(120) for future in [one.submit() for one in asked]]
    assert max(passes) == 2
    for answer in answers:
        assert answer.text == alone
        assert [chunk.status for chunk in answer.chunks] == ["absent"]


def test_the_model_is_listed(served: Running) -> None:
    (model,) = served.client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert served.client.get("/v1/models/tiny").json() == model
    assert served.client.get("/v1/models/other").status_code == 404
    assert served.client.get("/health").json() == {"status": "ok"}


def test_metrics_count_hits_misses_tokens_and_requests(served: Running) -> None:
    for _ in range(2):
        content(served.ask(documents=DOCUMENTS))
    served.ask(model="other")
    lines = served.client.get("/metrics").text.splitlines()
    numbers = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(numbers["sac_rag_hits_total"]) == 2
    assert float(numbers['sac_rag_misses_total{reason="absent"}']) == 2
    assert float(numbers["sac_rag_generated_tokens_total"]) > 2
    assert float(numbers['sac_rag_requests_total{status="200"}']) == 2
    assert float(numbers['sac_rag_requests_total{status="404"}']) == 1
    assert float(numbers["sac_rag_request_seconds_count"]) == 3
    assert float(numbers["sac_rag_queue"]) == 0
