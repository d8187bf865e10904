"""Latent shards: encoding images, reading and checking tars, and a stream whose order is fixed by the seed."""
