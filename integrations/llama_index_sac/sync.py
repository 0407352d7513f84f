"""sync: what a store has of documents made equal to what a docstore has of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from llama_index.core.schema import BaseNode, Document
from llama_index.core.storage.docstore.types import BaseDocumentStore

from llama_index_sac.markers import require_rag, require_several
from llama_index_sac.precompress import chunks_of, log_bad
from sac_rag.precompress.sync import sync as sync_chunks

if TYPE_CHECKING:
    from sac_rag import PrecompressReport, SacRAG


def sync(
    rag: SacRAG, docstore: BaseDocumentStore | Iterable[BaseNode], *, text_key: str | None = None
) -> PrecompressReport:
    """Deletes what is stored of texts that are gone, and compresses what is new.

    For use after `delete_ref_doc`, `refresh_ref_docs`, or an IngestionPipeline with UPSERTS or
    UPSERTS_AND_DELETE. Texts longer than the model's context are logged and skipped.

    >>> from llama_index.core.schema import TextNode
    >>> from llama_index.core.storage.docstore import SimpleDocumentStore
    >>> docstore = SimpleDocumentStore()
    >>> docstore.add_documents([TextNode(text="The tower is red.", id_="a")])
    >>> sync(disk_rag, docstore).computed
    1
    >>> docstore.delete_document("a")
    >>> docstore.add_documents([TextNode(text="The tower is white.", id_="b")])
    >>> sync(disk_rag, docstore).deleted
    1

    Args:
        rag: Over a store that records documents, such as a DiskStore.
        docstore: All documents of the SacRAG's namespace. Of a document that is in it uncut, as an
            IngestionPipeline keeps them, nothing is compressed or deleted: use
            `SACPrecompress(whole_documents=True)` for its former versions. Or all nodes, where a
            vector store keeps them: `vector_store.get_nodes()`.
        text_key: As for SACPrecompress.

    Returns:
        The counts.

    Raises:
        TypeError: if the store does not record documents.
        ValueError: if the docstore is empty, because a vector store keeps its nodes.
        OSError: if the store cannot be read or written.
    """
    require_rag(rag)
    require_several(docstore, "docstore")
    nodes = list(docstore.docs.values() if isinstance(docstore, BaseDocumentStore) else docstore)
    if not nodes:
        raise ValueError(
            "the docstore has no nodes, so that everything stored would be deleted; if a vector "
            "store keeps them, give sync(rag, vector_store.get_nodes()), and to delete a document "
            "use rag.forget(document_id)"
        )
    uncut = {node.node_id for node in nodes if isinstance(node, Document)}
    cut = [node for node in nodes if node.node_id not in uncut]
    return sync_chunks(rag.compressor, chunks_of(cut, text_key), on_bad=log_bad, keep=uncut)
