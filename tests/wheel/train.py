"""With the extra "train" there is a trainer."""

from sac_rag.training.config import TrainConfig
from sac_rag.training.trainer import train

assert callable(train)
assert TrainConfig(data=("questions.json",)).model == "smollm2-135m"
