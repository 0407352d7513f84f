"""SACPrecompress: compresses the texts of an ingestion pipeline into a store."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, TransformComponent

from llama_index_sac.markers import require_known, require_rag, require_several
from llama_index_sac.node import can_be_compressed, chunk_of
from sac_rag import DiskStore, SacRAG

if TYPE_CHECKING:
    from sac_rag import BadRecord, Chunk

log = logging.getLogger(__name__)

_OPTIONS = {
    name
    for name, parameter in inspect.signature(SacRAG.from_pretrained).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}


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
        options: Further arguments of `SacRAG.from_pretrained`, given by name: compressor, ratio,
            namespace, stored_dtype, prompt_format, device and others. Part of the hash and pickle
            of this component, not of its repr.
        text_key: Name of metadata whose text is compressed in place of the node's own where a node
            has it: "window" of a SentenceWindowNodeParser.
        whole_documents: Whether each call gets all nodes of each of its documents, as those of a
            pipeline over documents do: entries of their former versions are deleted.
        skip_bad: Whether a text longer than the model's context is logged and skipped, or raises.
        fingerprint: With a SacRAG, that of its compressor, so that another one changes the hash.

    Raises:
        TypeError: unless exactly one of SacRAG and store is given, and for an unknown setting.
    """

    model: str = "smollm2-135m"
    store: str = ""
    options: dict[str, Any] = Field(default_factory=dict, repr=False)
    text_key: str | None = None
    whole_documents: bool = False
    skip_bad: bool = True
    fingerprint: str = ""

    _rag: SacRAG | None = PrivateAttr(default=None)

    def __init__(self, rag: SacRAG | None = None, **settings: Any) -> None:
        if (rag is None) == (not settings.get("store")):
            raise TypeError(
                "SACPrecompress needs either a SacRAG or the folder of a store, as in "
                "SACPrecompress(model='smollm2-135m', store='anchors/')"
            )
        fields = type(self).model_fields.keys()
        require_known(settings, fields | _OPTIONS, type(self).__name__, "")
        options = {name: settings.pop(name) for name in settings.keys() - fields}
        if rag is not None:
            require_rag(rag)
            if options:
                raise TypeError(
                    f"{', '.join(sorted(options))} of a loaded SacRAG cannot be changed; "
                    "give them to SacRAG.from_pretrained"
                )
            settings["fingerprint"] = rag.compressor.fingerprint
            # Where ratios are nested, the fingerprint does not include the ratio.
            options = {"ratio": rag.compressor.config.ratio}
        super().__init__(**{"options": options, **settings})
        self._rag = rag

    @classmethod
    def class_name(cls) -> str:
        """The name in events and traces."""
        return "SACPrecompress"

    def __call__(self, nodes: Sequence[BaseNode], **options: Any) -> Sequence[BaseNode]:
        """Compresses texts that the store does not have.

        Raises:
            PromptTooLongError: for a text longer than the model's context, with skip_bad=False.
            TypeError: if nodes is a str.
            OSError: if the store cannot be written.
        """
        require_several(nodes, "nodes")
        rag = self._rag or _opened(self.model, self.store, self.options)
        rag.precompress(
            chunks_of(nodes, self.text_key),
            on_bad=log_bad if self.skip_bad else None,
            whole_documents=self.whole_documents,
        )
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


def chunks_of(nodes: Iterable[BaseNode], text_key: str | None = None) -> Iterator[Chunk]:
    """The texts of nodes that can be compressed, each with its document."""
    for node in nodes:
        if can_be_compressed(node):
            yield chunk_of(node, text_key)


def log_bad(record: BadRecord) -> None:
    """Logs a text that was skipped, without its content."""
    log.warning("not compressed: %s: %s", record.place, record.problem)


_pipelines: dict[str, SacRAG] = {}
_opening = threading.Lock()


def _opened(model: str, store: str, options: dict[str, Any]) -> SacRAG:
    """A pipeline, opened once per process."""
    name = repr((model, store, sorted(options.items())))
    with _opening:
        if name not in _pipelines:
            _pipelines[name] = SacRAG.from_pretrained(model, store=DiskStore(store), **options)
        return _pipelines[name]
