"""With the extra "eval" answers are scored."""

from sac_rag.evaluation.scores import f1

assert f1("in the night", ["the night"]) > 0.5
