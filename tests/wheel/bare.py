"""Without extras the package answers, and names the extra of what it cannot do."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import sac_rag

packages = Path(sac_rag.__file__).parent.parent
assert packages.name == "site-packages", packages
assert importlib.util.find_spec("integrations") is None
for name in ("sac_rag", "langchain_sac", "llama_index_sac"):
    assert (packages / name / "py.typed").is_file(), name

for module, extra in {
    "langchain_sac": "langchain",
    "llama_index_sac": "llama-index",
    "sac_rag.training.trainer": "train",
    "sac_rag.stores.cipher": "encrypt",
    "sac_rag.server.app": "serve",
    "sac_rag.stores.redis": "redis",
}.items():
    try:
        importlib.import_module(module)
    except ImportError as error:
        assert f"sac-rag[{extra}]" in str(error), error
    else:
        raise AssertionError(f"{module} was imported without its extra")

rag = sac_rag.SacRAG.from_pretrained("smollm2-135m")
chunks = ["Owls hunt at night.", "The kiosk at the pier sells blue paint."]
answer = rag.answer("What does the kiosk sell?", chunks)
assert "paint" in answer.text, answer
assert [chunk.status for chunk in rag.answer("What?", chunks).chunks] == ["hit", "hit"]

command = Path(sys.executable).with_name("sac-rag")
told = subprocess.run([command, "--help"], check=True, capture_output=True, text=True)
assert "precompress" in told.stdout
fitted = sac_rag.fit("smollm2-135m", "mine", passages=2)
rag = sac_rag.SacRAG.from_pretrained("smollm2-135m", compressor="mine")
assert rag.compressor.fingerprint == fitted.compressor.fingerprint
