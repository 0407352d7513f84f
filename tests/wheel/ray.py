"""With the extra "ray" there is a job for a cluster, which sends nothing about its use."""

import os

from sac_rag.precompress.on_ray.job import RayJob

assert RayJob.__mro__[1].__name__ == "PrecompressJob"
assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
