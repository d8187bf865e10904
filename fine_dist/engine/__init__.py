"""The training loop, its backends (plain, DeepSpeed ZeRO, FSDP2), checkpoints, EMA, callbacks and trackers."""
