"""Prompts for training and validation.

Users have their own prompts: a chat in the template of the model, the default prompt of a
framework, a plain completion. A compressor trained in one prompt answers badly in others, so that
training asks in many: with and without system prompt, passages in the system prompt or in the turn
of the user, the question before or after them, various headings and separators. Their structure
follows the default prompts of LangChain and LlamaIndex; the wording does not.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from sac_rag.prompts.format import SPANS, PromptFormat

# Placeholder for a draft of the answer in a prompt that refines it.
DRAFT = "{draft}"


def _chat(
    user: str, *, system: str = "", chunk: str = "{chunk}", between: str = "\n\n"
) -> PromptFormat:
    return PromptFormat(system=system, user=user, chunk=chunk, separator=between)


TRAINED = MappingProxyType(
    {
        "spans": SPANS,
        "passages": PromptFormat(),
        "completion": PromptFormat(
            chat=False,
            chunk="{chunk}",
            user="Context:\n{chunks}\n\nQuestion: {question}\nAnswer:",
            stop=("\n",),
        ),
        "stuff": _chat(
            "Answer the question at the end from these pieces of context. If they do not say, say "
            "that you don't know.\n\n{chunks}\n\nQuestion: {question}\nHelpful answer:"
        ),
        "question-first": _chat(
            "You answer questions for a search tool. Find the answer in the retrieved context and "
            "keep it short.\nQuestion: {question}\nContext: {chunks}\nAnswer:"
        ),
        "context-in-system": _chat(
            "{question}",
            system="You are an assistant that answers questions. Use the retrieved context below, "
            "and answer as briefly as you can.\n\nContext: {chunks}",
        ),
        "query": _chat(
            "Below is some context information.\n----------\n{chunks}\n----------\nWith this "
            "context and without prior knowledge, answer the query.\nQuery: {question}\nAnswer: "
        ),
        "refine": _chat(
            "The query was: {question}\nSo far the answer is: {draft}\nImprove it, only if needed, "
            "with this further context.\n----------\n{chunks}\n----------\nIf the context does not "
            "help, repeat the answer so far.\nImproved answer: "
        ),
        "several-sources": _chat(
            "Here is context from several sources.\n==========\n{chunks}\n==========\nFrom these "
            "sources and nothing else, answer the query.\nQuery: {question}\nAnswer: "
        ),
        "documents-in-system": _chat(
            "{question}",
            system="This is a conversation between a user and a helpful assistant who knows the "
            "following documents.\n\n{chunks}\n\nThe assistant answers from these documents, and "
            "says so if they do not have the answer.",
        ),
        "numbered": _chat(
            "{chunks}\n\nQuestion: {question}",
            system="You are a careful assistant for a company's staff.",
            chunk="[{number}] {title}\n{chunk}",
        ),
        "bare": _chat("{chunks}\n\n{question}"),
        "question-on-top": _chat(
            "{question}\n\nSources:\n{chunks}\n\nAnswer in a few words.",
            chunk="- {chunk}",
            between="\n",
        ),
        "tagged": _chat(
            "<documents>\n{chunks}\n</documents>\n\n{question}",
            system="Answer with the exact words of the documents where you can.",
            chunk="<document index={number}>\n{chunk}\n</document>",
            between="\n",
        ),
        "short-answer": _chat(
            "Read the text and answer the question in a few words.\n\n{chunks}\n\nQuestion: "
            "{question}\nShort answer:"
        ),
        "based-on": _chat("{chunks}\n\nBased on the text above: {question}", between="\n---\n"),
    }
)

HELD_OUT = MappingProxyType(
    {
        "excerpts": _chat(
            "{chunks}\n\nWhat I would like to know: {question}",
            system="Reply from the excerpts that the user shows you, in as few words as possible.",
            chunk="Excerpt {number}:\n{chunk}",
        ),
        "ask-then-show": _chat(
            "I have a question: {question}\nThis is what a search found.\n\n{chunks}\n\nWhat is "
            "the answer, in short?",
            between="\n\n***\n\n",
        ),
        "knowledge-in-system": _chat(
            "Question: {question}",
            system="Knowledge base:\n{chunks}\n\nAnswer what the user asks from the knowledge base "
            "alone. Short answers are best.",
            chunk="* {chunk}",
            between="\n",
        ),
        "given-context": _chat(
            "We are given this context.\n~~~~~\n{chunks}\n~~~~~\nUse it to answer.\n"
            "Q: {question}\nA: "
        ),
    }
)

# Prompts that leave the length of an answer open, so that an instruction can replace the question.
OPEN = ("bare", "numbered", "documents-in-system", "query", "several-sources", "based-on")


def named_prompt(name: str) -> PromptFormat:
    """The prompt with a name, or in a JSON file of `PromptFormat.to_json`.

    Raises:
        ValueError: if there is neither, or the file holds no prompt format.
    """
    for prompts in (TRAINED, HELD_OUT):
        if name in prompts:
            return prompts[name]
    if not Path(name).is_file():
        raise ValueError(
            f"prompts must be the name of one ({', '.join((*TRAINED, *HELD_OUT))}) or a JSON file "
            f"of a prompt format, was: {name!r}"
        )
    return PromptFormat.from_json(Path(name).read_text(encoding="utf-8"))
