"""With the extra "parquet" documents are read from Parquet."""

import pyarrow
import pyarrow.parquet

from sac_rag.retrieval.readers import read_documents

pyarrow.parquet.write_table(pyarrow.table({"text": ["Owls hunt at night."]}), "owls.parquet")
(document,) = read_documents(["owls.parquet"])
assert document.text == "Owls hunt at night."
