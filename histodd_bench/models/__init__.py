"""Networks by name, and the pool of pre-trained ones."""

from histodd_bench.models.pool import ModelPool, PoolRecipe
from histodd_bench.models.registry import MODELS, PRETRAINED, ModelEntry, build, model_entry, paramcount

__all__ = ["MODELS", "PRETRAINED", "ModelEntry", "ModelPool", "PoolRecipe", "build", "model_entry", "paramcount"]
