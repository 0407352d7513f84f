"""SACPrecompress: compresses the texts of an ingestion pipeline into a store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, TransformComponent

from llama_index_sac.markers import markers_of
from llama_index_sac.node import can_be_compressed, chunk_of

if TYPE_CHECKING:
    from sac_rag import SacRAG


class SACPrecompress(TransformComponent):
    """Compresses the texts of nodes into a store, and returns the nodes unchanged.

    Stands behind the splitter. Does not guarantee that the store has every text: an
    IngestionPipeline takes nodes that it has seen before from its cache and skips all
    transformations. Missing texts are compressed when they are retrieved.

    Takes a SacRAG or, for `num_workers` above 1, the names and folders with which each process
    opens its own: arguments of `SacRAG.from_pretrained`.

    >>> from llama_index.core.ingestion import IngestionPipeline
    >>> from llama_index.core.node_parser import SentenceSplitter
    >>> from llama_index.core.schema import Document
    >>> pipeline = IngestionPipeline(transformations=[SentenceSplitter(), SACPrecompress(rag)])
    >>> nodes = pipeline.run(documents=[Document(text="The keeper counted seven ships.")])
    >>> nodes[0].text in rag.compressor
    True

    Attributes:
        model: A default model's name, a local folder or a hub id.
        store: The folder of a DiskStore.
        compressor: Name, folder or hub id of a compressor; see `SacRAG.from_pretrained`.
        ratio: Source tokens per anchor; see there. With a SacRAG, that of its compressor.
        namespace: See there. Part of the hash and pickle of this component, not of its repr.
        fingerprint: With a SacRAG, that of its compressor, so that another one changes the hash.

    Raises:
        TypeError: unless exactly one of SacRAG and store is given.
    """

    model: str = "smollm2-135m"
    store: str = ""
    compressor: str | None = None
    ratio: int | None = None
    namespace: str = Field(default="", repr=False)
    fingerprint: str = ""

    _rag: SacRAG | None = PrivateAttr(default=None)

    def __init__(self, rag: SacRAG | None = None, **settings: Any) -> None:
        if (rag is None) == (not settings.get("store")):
            raise TypeError(
                "SACPrecompress needs either a SacRAG or the folder of a store, as in "
                "SACPrecompress(model='smollm2-135m', store='anchors/')"
            )
        if rag is not None:
            markers_of(rag)
            settings["fingerprint"] = rag.compressor.fingerprint
            # Where ratios are nested, the fingerprint does not include the ratio.
            settings["ratio"] = rag.compressor.config.ratio
        super().__init__(**settings)
        self._rag = rag

    @classmethod
    def class_name(cls) -> str:
        """The name in events and traces."""
        return "SACPrecompress"

    def __call__(self, nodes: Sequence[BaseNode], **options: Any) -> Sequence[BaseNode]:
        """Compresses texts that the store does not have.

        Raises:
            PromptTooLongError: for a text longer than the model's context.
            OSError: if the store cannot be written.
        """
        rag = self._rag or _opened(
            self.model, self.store, self.compressor, self.ratio, self.namespace
        )
        rag.precompress(chunk_of(node) for node in nodes if can_be_compressed(node))
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **options: Any) -> Sequence[BaseNode]:
        """The same, in a thread."""
        return await asyncio.to_thread(self, nodes, **options)

    def __getstate__(self) -> dict[str, Any]:
        """State for another process.

        Raises:
            TypeError: if it holds a SacRAG.
        """
        if self._rag is not None:
            raise TypeError(
                "a SACPrecompress over a loaded SacRAG cannot be pickled for another process; "
                "give a model and a store to open there, as in "
                "SACPrecompress(model='smollm2-135m', store='anchors/')"
            )
        return super().__getstate__()


@cache
def _opened(
    model: str, store: str, compressor: str | None, ratio: int | None, namespace: str
) -> SacRAG:
    """A pipeline, opened once per process."""
    from sac_rag import DiskStore, SacRAG

    return SacRAG.from_pretrained(
        model, store=DiskStore(store), compressor=compressor, ratio=ratio, namespace=namespace
    )
