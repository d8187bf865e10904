"""Numbers of models and of images: the held-out loss, FID, sFID, Inception Score, precision, recall, KID, FDD.

    evaluator = Evaluator(EvaluateConfig(...), world)        # `evaluator`: for commands, studies and training alike
    row = evaluator("runs/train/a")                          # a row of evaluate.json

    network = load_features("inception", path)               # `features.NAMES`: inception, dinov2, classifier
    real = reference(network, "VIRTUAL_imagenet256_labeled.npz")          # `image_statistics`: statistics, or images
    scores = compare(measure_path(network, "samples.npz"), real, ["fid"])  # `comparison`

With several processes each measures its share, and all get the same statistics.
"""
