"""With the extra "redis" there is a store on a server, which need not be there to be made."""

from sac_rag import RedisStore

store = RedisStore("redis://127.0.0.1:1/0")
try:
    store["ab"]
except OSError as error:
    assert "Redis server" in str(error)
else:
    raise AssertionError("something answered at port 1")
