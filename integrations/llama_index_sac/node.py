"""SACNode: a node that shows the LLM a marker instead of its text."""

from __future__ import annotations

from llama_index.core.bridge.pydantic import Field
from llama_index.core.schema import BaseNode, Document, MetadataMode, Node, TextNode

from llama_index_sac.markers import escape
from sac_rag import Chunk


class SACNode(TextNode):
    r"""A retrieved node whose content for the LLM is its metadata and a marker.

    In every other mode, and when stored, it equals the node that was retrieved.

    >>> from llama_index.core.schema import MetadataMode
    >>> node = SACNode(text="Seven ships.", metadata={"page": 4}, marker="<|sac:1|>")
    >>> node.get_content(MetadataMode.LLM)
    'page: 4\n\n<|sac:1|>'
    >>> node.text, node.get_content(MetadataMode.EMBED)
    ('Seven ships.', 'page: 4\n\nSeven ships.')

    Attributes:
        marker: Stands for the text in a prompt. Not stored with the node, so that a node read from
            a store shows its text.
    """

    marker: str = Field(default="", exclude=True, repr=False)

    @classmethod
    def class_name(cls) -> str:
        """The name under which it is stored; read back as a TextNode."""
        return "SACNode"

    def get_content(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> str:
        """The text (in LLM mode the marker), behind the metadata of the mode."""
        if metadata_mode != MetadataMode.LLM or not self.marker:
            return super().get_content(metadata_mode)
        metadata = escape(self.get_metadata_str(mode=metadata_mode).strip())
        if not metadata:
            return self.marker
        template = escape(self.text_template)
        return template.format(content=self.marker, metadata_str=metadata).strip()


def can_be_compressed(node: BaseNode) -> bool:
    """Whether a node has only text: no image, no reference to another index."""
    if type(node) in (Node, Document):
        media = ("image_resource", "audio_resource", "video_resource")
        return all(getattr(node, name, None) is None for name in media)
    return type(node) in (TextNode, SACNode)


def chunk_of(node: BaseNode) -> Chunk:
    """The text of a node as a chunk of its document."""
    return Chunk(
        node.get_content(MetadataMode.NONE),
        id=node.ref_doc_id or node.node_id,
        metadata={"node_id": node.node_id},
    )


def marked(node: BaseNode, marker: str) -> SACNode:
    """A copy of a node that shows the LLM a marker."""
    fields = {name: getattr(node, name) for name in TextNode.model_fields if hasattr(node, name)}
    return SACNode(**{**fields, "text": node.get_content(MetadataMode.NONE), "marker": marker})
