"""Metrics of images: FID, sFID, Inception Score, precision, recall, KID, FDD and their kin.

    network = load_features("inception", path)               # or dinov2, efflite, classifier: `features.NAMES`
    real = reference(network, "VIRTUAL_imagenet256_labeled.npz")           # statistics, or a folder, tar, npz of images
    fake = measure_path(network, "samples.npz")              # or `measure(network, batches, num_images=...)`
    scores = compare(fake, real, ["fid", "sfid", "is", "precision", "recall"])
    notes = cautions(fake, real, ...)                        # too few samples, say

`networks(metrics)` says which networks a list of metrics needs. With several processes, each gives its own batches
(`rank`, `world_size`) and all get the same statistics. `Moments` and `frechet_distance` do for features of one's own.
Names are loaded when they are asked for, so that importing this room costs nothing.
"""
