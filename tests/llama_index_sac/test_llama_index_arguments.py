"""No argument is swallowed: it is honoured, or refused by name; copies share, pickles explain."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import llama_index_sac
import pytest
from llama_index.core import SummaryIndex
from llama_index.core.bridge.pydantic import ValidationError
from llama_index_sac import (
    SACLLM,
    SACCitationQueryEngine,
    SACNode,
    SACPostprocessor,
    SACPrecompress,
    UnanswerableError,
    context_template,
    escape,
    refine_template,
    sync,
    text_qa_template,
    unmark,
)
from tiny_index import (  # noqa: F401
    QUESTION,
    home_of_module,
    make_nodes,
    make_rag,
    no_loop_is_left,
    query_engine,
)

from sac_rag import DiskStore, PromptFormat, SacRAG
from sac_rag.lm.generator import Generator

Call = Callable[..., Any]

# Every public name, called as it should be, with further arguments.
CALLS: dict[str, Callable[[SacRAG], Call]] = {
    "SACCitationQueryEngine": lambda rag: (
        lambda **more: (
            SACCitationQueryEngine.from_args(
                SummaryIndex([]), llm=SACLLM(rag), retriever=SummaryIndex([]).as_retriever(), **more
            )
            if not more
            else SACCitationQueryEngine(SummaryIndex([]).as_retriever(), llm=SACLLM(rag), **more)
        )
    ),
    "SACLLM": lambda rag: lambda **more: SACLLM(rag, **more),
    "SACNode": lambda rag: lambda **more: SACNode(text="", **more),
    "SACPostprocessor": lambda rag: lambda **more: SACPostprocessor(rag, **more),
    "SACPrecompress": lambda rag: lambda **more: SACPrecompress(rag, **more),
    "context_template": lambda rag: lambda **more: context_template(rag, **more),
    "escape": lambda rag: lambda **more: escape("", **more),
    "refine_template": lambda rag: lambda **more: refine_template(rag, **more),
    "sync": lambda rag: lambda **more: sync(rag, make_nodes(1), **more),
    "text_qa_template": lambda rag: lambda **more: text_qa_template(rag, **more),
    "unmark": lambda rag: lambda **more: unmark("", **more),
}


def test_every_public_name_is_called() -> None:
    assert CALLS.keys() == set(llama_index_sac.__all__) - {"UnanswerableError"}
    assert not issubclass(UnanswerableError, (ValueError, RuntimeError))


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_argument_is_refused_by_name(
    llama: Generator, disk: DiskStore, name: str
) -> None:
    call = CALLS[name](make_rag(llama, store=disk))
    call()
    for unknown in ("top_nn", "max_tokenss"):
        with pytest.raises(TypeError, match=unknown):
            call(**{unknown: 1})


@pytest.mark.parametrize(
    "call",
    [
        lambda rag: SACPostprocessor(rag).postprocess_nodes("Hello."),
        lambda rag: SACPrecompress(rag)("Hello."),
        lambda rag: sync(rag, "Hello."),
        lambda rag: unmark("Hello.", "Hello."),
    ],
)
def test_one_str_in_place_of_several_things_is_refused(llama: Generator, call: Call) -> None:
    with pytest.raises(TypeError, match=r"must be a list, was one str: 'Hello.'"):
        call(make_rag(llama))


def test_one_str_is_no_conversation(llama: Generator) -> None:
    for plain in (False, True):
        with pytest.raises(ValidationError, match=r"messages\s+Input should be a valid list"):
            SACLLM(make_rag(llama), plain=plain).chat("Hello.")  # type: ignore[arg-type]


def test_a_models_own_settings_change_how_it_answers(llama: Generator) -> None:
    rag = make_rag(llama)
    default = SACLLM(rag)
    short = SACLLM(rag, max_tokens=3, temperature=0.9, seed=1)
    expected = default.complete(QUESTION, max_new_tokens=3, temperature=0.9, seed=1)
    assert short.complete(QUESTION).text == expected.text
    assert short.metadata.num_output == 3
    whole = default.complete(QUESTION).text
    assert SACLLM(rag, stop=[whole[2]]).complete(QUESTION).text == whole.split(whole[2])[0]
    assert rag.decoding.max_new_tokens == 6


def test_a_loaded_models_settings_are_split_from_those_of_its_loading(
    llama: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: dict[str, Any] = {}

    def load(model: str, **options: Any) -> SacRAG:
        loaded.update(options)
        return make_rag(llama)

    monkeypatch.setattr(SacRAG, "from_pretrained", load)
    llm = SACLLM.from_pretrained(
        "m", max_tokens=3, system_prompt="Be brief.", ratio=5, device="cpu"
    )
    assert loaded == {"ratio": 5, "device": "cpu"}
    assert (llm.metadata.num_output, llm.system_prompt) == (3, "Be brief.")


def test_a_precompression_is_opened_with_all_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "stored_dtype": "int8",
        "prompt_format": PromptFormat(system="Answer."),
        "ratio": 7,
        "namespace": "hers",
        "device": "cpu",
    }
    transform = SACPrecompress(model="m", store="anchors/", **settings)
    sent = pickle.loads(pickle.dumps(transform))
    assert sent == transform
    assert sent.options == settings
    assert "hers" not in repr(transform)


def test_settings_of_a_loaded_pipeline_are_refused(llama: Generator) -> None:
    with pytest.raises(TypeError, match="ratio, stored_dtype of a loaded SacRAG cannot be changed"):
        SACPrecompress(make_rag(llama), stored_dtype="int8", ratio=3)


# --- copies and pickles


def test_deep_copies_share_the_pipeline(llama: Generator) -> None:
    rag = make_rag(llama)
    for component in (SACLLM(rag), SACPostprocessor(rag), SACPrecompress(rag)):
        assert deepcopy(component)._rag is rag
    engine = query_engine(rag, make_nodes(1))
    assert deepcopy(engine).query(QUESTION).response == engine.query(QUESTION).response


@pytest.mark.parametrize("make", [SACLLM, SACPostprocessor, SACPrecompress])
def test_what_holds_a_model_says_how_to_send_it(llama: Generator, make: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot be pickled.*(process|there)"):
        pickle.dumps(make(make_rag(llama)))


@pytest.mark.parametrize("make", [text_qa_template, refine_template, context_template])
def test_templates_are_pickled_and_copied(llama: Generator, make: Any) -> None:
    template = make(make_rag(llama))
    names = ("context_str", "context_msg", "existing_answer", "query_str")
    values = {name: f"the {name}" for name in names if name in template.template_vars}
    assert len(values) >= 1
    for copy in (pickle.loads(pickle.dumps(template)), deepcopy(template)):
        assert copy.format(**values) == template.format(**values)
