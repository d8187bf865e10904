"""Stages: condense, initialize, train: from settings to a program for the engine to an artifact."""
