"""Two replicas on Ray Serve answer as one server does, and one of them may be killed."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from support.models import PROSE, make_model, make_tokenizer
from support.ray_cluster import IGNORED, ray_cluster
from support.serving import TIMEOUT, until

from sac_rag import Decoding, DiskStore, SacRAG

pytestmark = [pytest.mark.slow, *IGNORED]

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def rag(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SacRAG]:
    """What is served, and the folder of its model and its archive, as `place`."""
    folder = tmp_path_factory.mktemp("served")
    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    with DiskStore(folder / "store") as store:
        rag = SacRAG.from_pretrained(folder / "model", compressor="full", store=store)
        rag.precompress([("a", PROSE[0])])
        rag.export(folder / "a.sacrag")
        (folder / "tokens").write_text(f"{TOKEN}\n")
        yield rag


@pytest.fixture(scope="module")
def url(rag: SacRAG, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where two replicas are served."""
    folder = Path(rag.compressor.store.folder).parent
    with ray_cluster():
        from ray import serve

        from sac_rag.server.ray_serve import Options, app

        options = Options(
            place=folder / "a.sacrag",
            model=str(folder / "model"),
            tokens=folder / "tokens",
            replicas=2,
            cpus=0.5,
        )
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app(options), route_prefix="/")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()


def ask(url: str, **fields: object) -> openai.types.chat.ChatCompletion:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, timeout=TIMEOUT, max_retries=5)
    return client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": "What was painted?"}],
        max_tokens=4,
        extra_body={"documents": [{"id": "a", "text": PROSE[0]}]},
        **fields,
    )


def replicas() -> list[psutil.Process]:
    """Their processes, of which Ray writes the name."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or ())
        if title.startswith("ray::ServeReplica:") and "sac-rag" in title:
            found.append(process)
    return found


def seconds(url: str) -> float:
    """How long completions took in one of the replicas, in all."""
    header = {"Authorization": f"Bearer {TOKEN}"}
    text = httpx.get(f"{url}/metrics", headers=header, trust_env=False, timeout=TIMEOUT).text
    (found,) = re.findall(r"^sac_rag_request_seconds_sum (\S+)$", text, re.M)
    return float(found)


def test_two_replicas_answer_as_one_pipeline_does(rag: SacRAG, url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(url), range(16)))
    expected = rag.answer("What was painted?", [PROSE[0]], Decoding(max_new_tokens=4))
    assert {answer.choices[0].message.content for answer in answers} == {expected.text}
    seen: set[float] = set()
    until(lambda: seen.add(seconds(url)) or len(seen) == 2)
    assert 0 not in seen, "both have answered"
    assert {a.model_dump()["metadata"]["citations"][0]["status"] for a in answers} == {"hit"}
    events = ask(url, stream=True)
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == expected.text
    assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401


def test_a_replica_that_is_killed_is_replaced_and_nobody_goes_without_answer(url: str) -> None:
    killed = replicas()[0]
    killed.kill()
    assert all(ask(url).choices for _ in range(8))
    until(lambda: len({p.pid for p in replicas()} - {killed.pid}) == 2)
