"""Stages: what condense, init and train share, from settings to a trained artifact, and models read from disk.

`condense`, `train`   the two stages that train one model: settings and `run`
`build`, `run`        settings -> the engine's program -> an artifact
`sources`, `load`     any source, of ours or another project's, as an artifact, as a model
`targets`             targets made, written and read
`estimates`, `memory`, `preflight`   what a stage will need, said before it starts
`scale`, `parts`, `scaling`   what a step takes on many processes, predicted from its parts on one
"""

from fine_dist.stages.config import PRELOAD, Blueprint, LossConfig, StageConfig
from fine_dist.stages.load import find_artifact, load_model

__all__ = ["PRELOAD", "Blueprint", "LossConfig", "StageConfig", "find_artifact", "load_model"]
