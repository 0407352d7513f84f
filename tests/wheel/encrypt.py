"""With the extra "encrypt" a store is not to be read without its key."""

import torch

from sac_rag import AnchorKV, DiskStore
from sac_rag.stores.cipher import Cipher

ones = torch.ones(2, 1, 3, 4)
kv = AnchorKV.uniform(ones, ones, torch.arange(3, dtype=torch.int32), num_tokens=3)
with DiskStore("store", cipher=Cipher(bytes(32))) as store:
    store["ab"] = kv
    assert torch.equal(store["ab"].keys, kv.keys)
try:
    DiskStore("store")
except ValueError as error:
    assert "encrypted" in str(error)
else:
    raise AssertionError("an encrypted store was opened without its key")
