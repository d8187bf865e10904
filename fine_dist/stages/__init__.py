"""Stages: what condense, init and train share, from a config to a trained artifact, and models read from disk."""

from fine_dist.stages.run import (
    PRELOAD,
    StageConfig,
    Start,
    find_artifact,
    load_model,
    make_program,
    sigma_histograms,
    sigma_tables,
    train_stage,
)

__all__ = [
    "PRELOAD",
    "StageConfig",
    "Start",
    "find_artifact",
    "load_model",
    "make_program",
    "sigma_histograms",
    "sigma_tables",
    "train_stage",
]
