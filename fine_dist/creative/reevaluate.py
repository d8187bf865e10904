"""Measure a trained token again from the settings in its folder; with images, their CLIP score as well."""

from __future__ import annotations

from pathlib import Path

from fine_dist.core.errors import ArtifactError
from fine_dist.core.files import write_atomic
from fine_dist.creative.clip_scores import PROMPTS, clip_scores
from fine_dist.creative.config import Template
from fine_dist.creative.encoder_sources import load_encoders
from fine_dist.creative.evaluate import measure, report
from fine_dist.creative.saving import plain_prompt, read_token
from fine_dist.creative.training import LEARNED, SHUFFLED


def evaluate_again(folder: str | Path, images: str | None = None, clip: str | None = None) -> str:
    """Measure a token again on its held-out pairs and write report.md next to its folder; returns the report.

    Args:
        folder: The directory of a run, or the `token/` in it.
        images: Folder of images to score. None: no CLIP score.
        clip: Local folder of the CLIP model that scores them.

    Raises:
        ArtifactError: The encoders are not those that the token was trained on.
    """
    saved = read_token(folder)
    facts = saved.manifest
    encoders = load_encoders(facts["encoders"], saved.token)
    for encoder in encoders:
        if encoder.hash() != facts["encoder_sha256"].get(encoder.key):
            raise ArtifactError(
                f"{saved.folder}: {encoder.key} of {', '.join(facts['encoders'])} is not what the token was trained on "
                "(other weights); put the same encoders there"
            )
    template = Template.model_validate(facts["template"])
    rows = {LEARNED: saved.rows, **({SHUFFLED: saved.control} if saved.control else {})}
    measured = measure(
        encoders,
        template,
        [(first, second) for first, second in facts["held_out"]],
        token=saved.token,
        start=facts["start"],
        rows={what: {key: row[0] for key, row in own.items()} for what, own in rows.items()},
    )
    text = report(f"CreTok, {saved.folder.parent.name}", facts, measured)
    if images and clip:
        prompt = plain_prompt(template.adaptive.format(token=saved.token, t1="", t2=""), saved.token)
        scores = clip_scores(images, clip, prompt)
        own = f"the prompts in {PROMPTS}" if (Path(images) / PROMPTS).is_file() else f'"{prompt}"'
        text += f"\nCLIP score of {scores.num_images} images against {own}: {scores.mean:.2f} of 100.\n"
    write_atomic(saved.folder.parent / "report.md", text)
    return text
