"""Settings of the latent stream: where latents are read from, and how. Read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fine_dist.core.config import Config


class DataConfig(Config):
    """Where latents are read from, and how (see `fine_dist.data.stream`)."""

    shards: str | None = None
    """Folder, URL or brace pattern of webdataset latent shards with their manifest.json."""
    held_out: str | None = None
    """Shards that are never trained on; the held-out loss is measured on them."""
    held_out_samples: int = Field(2048, ge=1)
    """Samples of them, at most, that are measured each time while a model trains, at one to four timesteps each."""
    streams: int = Field(64, ge=1)
    """Canonical streams C: the order of samples depends on it, never on the number of processes."""
    window: int = Field(1024, ge=1)
    """Shuffle window of one stream, in samples (rounded up to whole shards)."""
    workers: int = Field(0, ge=0)
    """Reader threads of each training process, which read ahead; 0 reads when a batch is asked for."""
    max_bad_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    """Fraction of damaged samples that is skipped before it becomes an error."""
    verify: Literal["size", "sha256", "none"] = "size"
    """What is checked when a shard is opened: its size, its sha256 as well, or nothing."""
    cache_dir: str | None = None
    """Local folder in which remote shards are kept; none by default."""
    cache_bytes: int = Field(50 * 2**30, ge=0)
    """Size cap of the cache, in bytes."""
    retries: int = Field(5, ge=0)
    """Attempts after the first to open or read a remote shard."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds without a byte after which a remote read is tried again."""
