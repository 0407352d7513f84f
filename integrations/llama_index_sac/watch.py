"""Warns where an LLM that cannot resolve markers is asked with them."""

from __future__ import annotations

import logging
from typing import Any

from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatStartEvent, LLMCompletionStartEvent

from llama_index_sac.markers import is_readable

log = logging.getLogger(__name__)

# Classes of LLMs that resolve markers, or hand the prompt on to one that may.
_RESOLVING = ("SACLLM", "structured_llm")


class OtherLLMs(BaseEventHandler):
    """Looks at the prompts of all LLMs, as LlamaIndex's events report them."""

    @classmethod
    def class_name(cls) -> str:
        """The name in events and traces."""
        return "OtherLLMs"

    def handle(self, event: Any, **_: Any) -> None:
        """Logs a warning for a prompt with markers that another LLM than a SACLLM gets."""
        if isinstance(event, LLMCompletionStartEvent):
            texts = [event.prompt]
        elif isinstance(event, LLMChatStartEvent):
            texts = [message.content or "" for message in event.messages]
        else:
            return
        name = event.model_dict.get("class_name", "another LLM")
        if name not in _RESOLVING and any(map(is_readable, texts)):
            log.warning(
                "%s was asked with markers of a SACPostprocessor, which only a SACLLM resolves; "
                "take the postprocessor out, or use llm=SACLLM(rag)",
                name,
            )


def watch_other_llms() -> None:
    """Registers the watch with LlamaIndex's root dispatcher, once."""
    root = get_dispatcher()
    if not any(isinstance(handler, OtherLLMs) for handler in root.event_handlers):
        root.add_event_handler(OtherLLMs())
