"""Networks by name, and the pool of pre-trained ones."""

from histodd_bench.models.pool import ModelPool, PoolRecipe
from histodd_bench.models.registry import MODELS, ModelEntry, build, paramcount

__all__ = ["MODELS", "ModelEntry", "ModelPool", "PoolRecipe", "build", "paramcount"]
