"""The server as a process: `sac-rag serve`, its signals, and its TLS."""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.models import PROSE, make_model, make_tokenizer
from support.serving import TIMEOUT, Running, blocked, running, until
from typer.testing import CliRunner

from sac_rag import DiskStore, SacRAG
from sac_rag.cli import app
from sac_rag.server.limits import Limits
from sac_rag.server.service import Service

BODY = {"model": "model", "messages": [{"role": "user", "content": "What is it?"}]}
DOCUMENT = {"id": "a", "text": PROSE[0]}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of one chunk, beside the model that it was compressed for."""
    folder = tmp_path_factory.mktemp("served")
    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    with DiskStore(folder / "store") as store:
        rag = SacRAG.from_pretrained(folder / "model", compressor="full", store=store)
        rag.precompress([(DOCUMENT["id"], DOCUMENT["text"])])
        rag.export(folder / "a.sacrag")
    return folder / "a.sacrag"


@contextmanager
def process(
    place: Path, *more: str, **variables: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`sac-rag serve` at a free port, and its URL."""
    command = [sys.executable, "-m", "sac_rag.cli", "serve", str(place), "--port", "0", *more]
    env = {**os.environ, "SAC_RAG_TOKENS": "", "COLUMNS": "200", **variables}
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    assert started.stderr is not None
    try:
        lines = []
        for line in started.stderr:
            lines.append(line)
            if match := re.search(r" at (https?://\S+)/v1,", line):
                break
        else:
            raise AssertionError("".join(lines))
        yield started, match[1]
    finally:
        started.kill()
        started.wait(TIMEOUT)
        started.stderr.close()


def of_model(archive: Path) -> Sequence[str]:
    return ("--model", str(archive.parent / "model"))


def test_an_archive_is_served_and_sigterm_ends_the_process_cleanly(archive: Path) -> None:
    with process(archive, *of_model(archive)) as (started, url):
        with httpx.Client(base_url=url, timeout=TIMEOUT, trust_env=False) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "model"
            more = {"id": "b", "text": PROSE[1]}
            body = {**BODY, "documents": [DOCUMENT, more], "max_tokens": 4}
            answer = client.post("/v1/chat/completions", json=body).json()
            read = [(c["status"], c["read_as"]) for c in answer["metadata"]["citations"]]
            assert read == [("hit", "anchors"), ("absent", "text")]
            for fields in ({"documents": ["a"]}, {"retrieve": 1}):
                refused = client.post("/v1/chat/completions", json={**BODY, **fields})
                assert refused.status_code == 400
                assert "archive" in refused.json()["error"]["message"]
        started.send_signal(signal.SIGTERM)
        assert started.wait(TIMEOUT) == 0
        assert started.stderr is not None
        rest = started.stderr.read()
        assert "ended" in rest and "Traceback" not in rest


def test_other_addresses_need_tokens_and_say_so(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAC_RAG_TOKENS", raising=False)
    done = CliRunner().invoke(app, ["serve", str(archive), "--host", "0.0.0.0"])
    assert isinstance(done.exception, ValueError)
    assert "SAC_RAG_TOKENS" in str(done.exception)


def certificate(folder: Path) -> Path:
    """A file with a key and a certificate of 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(encoding)
    )
    return path


def test_tls_and_tokens_of_the_environment(archive: Path, tmp_path: Path) -> None:
    path = certificate(tmp_path)
    token = "token-0123456789"
    more = (*of_model(archive), "--tls-cert", str(path))
    with process(archive, *more, SAC_RAG_TOKENS=token) as (_, url):
        assert url.startswith("https://")
        trusted = ssl.create_default_context(cafile=path)
        with httpx.Client(base_url=url, verify=trusted, trust_env=False) as client:
            assert client.get("/v1/models").status_code == 401
            headers = {"Authorization": f"Bearer {token}"}
            assert client.get("/v1/models", headers=headers).status_code == 200


def test_a_signal_answers_what_runs_and_refuses_what_comes(service: Service) -> None:
    with running(service) as served, blocked(service.rag.generator) as blocker:
        answers: list[httpx.Response] = []

        def ask(served: Running, **fields: Any) -> None:
            answers.append(served.ask(**fields))

        fields: list[dict[str, Any]] = [{}, {"stream": True}]
        threads = [threading.Thread(target=ask, args=(served,), kwargs=f) for f in fields]
        for thread in threads:
            thread.start()
        assert blocker.reached.wait(TIMEOUT)
        until(lambda: served.endpoint.running == 2)
        served.server.handle_exit(signal.SIGTERM, None)
        late = served.ask()
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "draining"
        assert served.client.get("/health").status_code == 503
        blocker.released.set()
        for thread in threads:
            thread.join(TIMEOUT)
        assert [answer.status_code for answer in answers] == [200, 200]
        assert any(answer.text.endswith("[DONE]\n\n") for answer in answers)
        served.thread.join(TIMEOUT)
        assert not served.thread.is_alive()


def test_the_end_waits_for_running_requests_only_so_long(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed: list[bool] = []
    answers: list[httpx.Response] = []
    monkeypatch.setattr(service, "close", lambda: closed.append(True))
    with (
        running(service, limits=Limits(drain_s=0.2)) as served,
        blocked(service.rag.generator) as blocker,
    ):

        def ask() -> None:
            answers.append(served.ask())

        thread = threading.Thread(target=ask)
        thread.start()
        assert blocker.reached.wait(TIMEOUT)
        served.server.handle_exit(signal.SIGTERM, None)
        served.thread.join(TIMEOUT)
        assert not served.thread.is_alive()
        thread.join(TIMEOUT)
        assert closed == [True]
        assert [answer.status_code for answer in answers] == [503]
        assert answers[0].json()["error"]["code"] == "ended"
        assert "Traceback" not in caplog.text


@pytest.mark.real_model
def test_a_collection_of_the_default_model_is_served(tmp_path: Path) -> None:
    text = "The harbour of Port Ellery was dredged in 1931 by the engineer Mabel Strand."
    (tmp_path / "town.txt").write_text(text)
    store = tmp_path / "library"
    arguments = ["precompress", str(tmp_path / "town.txt"), "--store", str(store), "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    (lines,) = (store / "index").glob("chunks-*.jsonl")
    (chunk,) = map(json.loads, lines.read_text().splitlines())
    body = {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": "Who dredged the harbour?"}],
    }
    with process(store) as (_, url):
        for source in ({"retrieve": 1}, {"documents": [chunk["id"]]}):
            answer = httpx.post(
                f"{url}/v1/chat/completions", json={**body, **source}, timeout=TIMEOUT
            ).json()
            assert "Mabel Strand" in answer["choices"][0]["message"]["content"]
            (citation,) = answer["metadata"]["citations"]
            assert (citation["document"], citation["status"]) == (chunk["id"], "hit")
