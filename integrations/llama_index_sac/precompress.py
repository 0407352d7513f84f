"""SACPrecompress: texts of an ingestion pipeline into a store. Knows nothing of questions."""

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
    from sac_rag.pipeline import SacRAG


class SACPrecompress(TransformComponent):
    """Compresses the texts of nodes into a store, and hands the nodes on as they are.

    It stands behind the splitter. It is a convenience and no guarantee: an IngestionPipeline that
    has seen the same nodes before takes them from its cache and skips every transformation. What
    is missing then is compressed when it is retrieved.

    Give it a SacRAG or, for `num_workers` above 1, what each process is to open for itself: the
    names and folders that `SacRAG.from_pretrained` takes.

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
        compressor: A compressor's name or folder; see `SacRAG.from_pretrained`.
        ratio: Source tokens per anchor; see there. That of a SacRAG that was given.
        namespace: See there. Part of this component's hash and pickle, not of its repr.
        fingerprint: Of a SacRAG that was given: another compressor is another hash.

    Raises:
        TypeError: if neither or both of a SacRAG and a store are given.
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
            # Where one compression serves several ratios, it is no part of the fingerprint.
            settings["ratio"] = rag.compressor.compressor.config.ratio
        super().__init__(**settings)
        self._rag = rag

    @classmethod
    def class_name(cls) -> str:
        """The name in events and traces."""
        return "SACPrecompress"

    def __call__(self, nodes: Sequence[BaseNode], **options: Any) -> Sequence[BaseNode]:
        """Compresses what the store does not have.

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
        """What another process gets.

        Raises:
            TypeError: if it holds a SacRAG.
        """
        if self._rag is not None:
            raise TypeError(
                "a SACPrecompress over a loaded SacRAG cannot go to another process; give what "
                "each is to open, as in SACPrecompress(model='smollm2-135m', store='anchors/')"
            )
        return super().__getstate__()


@cache
def _opened(
    model: str, store: str, compressor: str | None, ratio: int | None, namespace: str
) -> SacRAG:
    """Opened once in a process, and kept."""
    from sac_rag import DiskStore, SacRAG

    return SacRAG.from_pretrained(
        model, store=DiskStore(store), compressor=compressor, ratio=ratio, namespace=namespace
    )
