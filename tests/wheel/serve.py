"""With the extra "serve" the app can be made; a model is in none of these environments."""

from sac_rag.server.app import make_app
from sac_rag.server.auth import Tokens
from sac_rag.server.running import require_tokens

assert callable(make_app)
require_tokens("127.0.0.1", Tokens([]))
