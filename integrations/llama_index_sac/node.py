"""SACNode: a node that shows the LLM a marker instead of its text."""

from __future__ import annotations

import re
from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.instrumentation.span import active_span_id
from llama_index.core.schema import BaseNode, Document, MetadataMode, Node, TextNode

from llama_index_sac.markers import Marked, escape, require_known, show
from sac_rag import Chunk

# Spans of LlamaIndex in which the content for the LLM is shown to people, split or changed, rather
# than put into a prompt as it is.
_READS_TEXT = re.compile(
    r"(ContextOnly|RetrieverTool|\w*CitationQueryEngine)\.|\w+\._?a?postprocess_nodes-"
)


class SACNode(TextNode):
    r"""A retrieved node whose content for the LLM is its metadata and a marker.

    In every other mode, and when stored or sent to another process, it equals the node that was
    retrieved. A new text voids the marker. A SACPostprocessor makes it.

    >>> from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
    >>> from llama_index_sac import SACPostprocessor
    >>> plain = TextNode(text="Seven ships.", metadata={"page": 4})
    >>> (scored,) = SACPostprocessor(rag).postprocess_nodes([NodeWithScore(node=plain)])
    >>> node = scored.node
    >>> node.get_content(MetadataMode.LLM) == f"page: 4\n\n{node.marker}"
    True
    >>> node.text, node.get_content(MetadataMode.EMBED)
    ('Seven ships.', 'page: 4\n\nSeven ships.')
    >>> node.set_content("Eight ships.")
    >>> node.get_content(MetadataMode.LLM)
    'page: 4\n\nEight ships.'
    """

    _marked: Marked | None = PrivateAttr(default=None)
    # What the text has before and behind the chunk, and the prompt before and behind the marker.
    _around: tuple[str, str] = PrivateAttr(default=("", ""))

    def __init__(self, **fields: Any) -> None:
        known = {*TextNode.model_fields, *_aliases(), "text_resource", "class_name"}
        require_known(fields, known, "SACNode", "")
        super().__init__(**fields)

    @classmethod
    def class_name(cls) -> str:
        """The name under which it is stored; read back as a TextNode."""
        return "SACNode"

    @property
    def marked(self) -> Marked | None:
        """The chunk that its marker stands for; None without one, or if the text is another now."""
        marked = self._marked
        if marked is None or not marked.marker:
            return None
        return marked if marked.chunk.text.join(self._around) == self.text else None

    @property
    def marker(self) -> str:
        """What stands for the text in a prompt; "" if the LLM is shown the text."""
        return "" if self.marked is None else self.marked.marker

    @property
    def sac(self) -> dict[str, Any]:
        """How the latest answer read the text, as in `additional_kwargs["sac"]["chunks"]`.

        "read_as" is "nothing" until a SACLLM has read it; "text" if it is too long for a marker.
        """
        return {} if self._marked is None else dict(self._marked.chunk.metadata["report"])

    def get_content(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> str:
        """The text (in LLM mode the marker), behind the metadata of the mode."""
        marked, span = self.marked, active_span_id.get() or ""
        if (
            metadata_mode != MetadataMode.LLM
            or marked is None
            or _READS_TEXT.match(span)
            or marked.is_void
        ):
            return super().get_content(metadata_mode)
        one_prompt = span if span.startswith("SimpleSummarize.") else ""
        marker = show(marked, one_prompt).join(self._around)
        metadata = escape(self.get_metadata_str(mode=metadata_mode).strip())
        if not metadata:
            return marker
        template = escape(self.text_template)
        return template.format(content=marker, metadata_str=metadata).strip()


def _aliases() -> set[str]:
    return {str(field.alias) for field in TextNode.model_fields.values() if field.alias}


def can_be_compressed(node: BaseNode) -> bool:
    """Whether a node has only text: no image, no reference to another index."""
    if type(node) in (Node, Document):
        media = ("image_resource", "audio_resource", "video_resource")
        return all(getattr(node, name, None) is None for name in media)
    return type(node) in (TextNode, SACNode)


def chunk_of(node: BaseNode, text_key: str | None = None) -> Chunk:
    """The text of a node, or of its metadata under a key if it has one, as a chunk."""
    replaced = node.metadata.get(text_key) if text_key is not None else None
    return Chunk(
        replaced if isinstance(replaced, str) else node.get_content(MetadataMode.NONE),
        id=node.ref_doc_id or node.node_id,
        metadata={"node_id": node.node_id},
    )


def marked_copy(node: BaseNode, marked: Marked, around: tuple[str, str] = ("", "")) -> SACNode:
    """A copy of a node that shows the LLM a marker, if the chunk has one.

    Args:
        node: With the text of the chunk.
        marked: The chunk.
        around: Text before and behind it.
    """
    fields = {name: getattr(node, name) for name in TextNode.model_fields if hasattr(node, name)}
    copy = SACNode(**{**fields, "text": node.get_content(MetadataMode.NONE).join(around)})
    copy._marked, copy._around = marked, around
    return copy
