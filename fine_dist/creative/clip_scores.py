"""CLIP scores of images (Hessel et al., arXiv 2104.08718, without its factor 2.5): 100 max(cos(image, prompt), 0).

Shapes: B images of a batch, H, W pixels, E width of the projection.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from fine_dist.core.errors import ArtifactError, DataError
from fine_dist.core.json_files import Record, as_record, read_json
from fine_dist.core.regular_files import read_text
from fine_dist.creative.encoders import first_line

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PROMPTS = "prompts.csv"
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's default normalization, for folders without a preprocessor_config.json."""
_BATCH = 32


class Scores(NamedTuple):
    """The mean CLIP score over images, 0 to 100, and the number of images."""

    mean: float
    num_images: int


def clip_scores(images: str | Path, clip: str | Path, prompt: str, device: torch.device | None = None) -> Scores:
    """The mean CLIP score of a folder of images.

    Args:
        images: Folder of images; `prompts.csv` in it (columns file and prompt) lists the prompt of each image.
        clip: Local folder of a `CLIPModel` with its tokenizer.
        prompt: Prompt of the images that `prompts.csv` does not list.
        device: Where to compute. Default: the CPU.

    Raises:
        DataError: The folder has no images, or `prompts.csv` names a missing file.
        ArtifactError: The CLIP model cannot be read.
    """
    from transformers import CLIPModel, CLIPTokenizer

    paths = sorted(path for path in Path(images).glob("*") if path.suffix.lower() in ENDINGS)
    if not paths:
        raise DataError(f"images: {images} has no images; legal endings: {', '.join(ENDINGS)}")
    prompts = _prompts(Path(images), prompt)
    try:
        model = CLIPModel.from_pretrained(str(clip), use_safetensors=True, local_files_only=True).eval()
        tokenizer = CLIPTokenizer.from_pretrained(str(clip), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"clip: {clip} is no local folder of a CLIP model with its tokenizer ({first_line(error)})"
        ) from None
    model = model.to(device or "cpu")
    prepare = _Prepare(Path(clip), int(model.config.vision_config.image_size))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(paths), _BATCH):
            part = paths[start : start + _BATCH]
            pixels = torch.stack([prepare(path) for path in part]).to(model.device)  # [B, 3, H, W]
            tokens = tokenizer([prompts.get(path.name, prompt) for path in part], padding=True, truncation=True,
                              return_tensors="pt").to(model.device)  # fmt: skip
            image_features = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)  # [B, E]
            text_features = model.text_projection(model.text_model(**tokens).pooler_output)  # [B, E]
            total += float(F.cosine_similarity(image_features, text_features).clamp_min(0).sum())
    return Scores(100 * total / len(paths), len(paths))


def _prompts(folder: Path, default: str) -> dict[str, str]:
    path = folder / PROMPTS
    if not path.is_file():
        return {}
    try:
        reader = csv.DictReader(io.StringIO(read_text(path).removeprefix("\ufeff"), newline=""))
        if not {"file", "prompt"} <= set(reader.fieldnames or ()):
            raise DataError(f"{path}: columns file and prompt are needed, and it has {reader.fieldnames}")
        rows = {str(row["file"]): row["prompt"] or default for row in reader}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a table: {error}; give columns file and prompt") from None
    missing = [name for name in rows if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{path}: there is no file {missing[0]!r} in {folder}; add it or remove the line")
    return rows


class Preprocessor(Record):
    """preprocessor_config.json of a CLIP model."""

    image_mean: tuple[float, float, float] = _MEAN
    """Mean of red, green and blue, 0 to 1."""
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = _STD
    """Standard deviation of red, green and blue."""


class _Prepare:
    """CLIP's preprocessing: resize the shorter edge bicubically to `size`, crop the center square, normalize."""

    def __init__(self, clip: Path, size: int) -> None:
        about = Preprocessor()
        if (clip / "preprocessor_config.json").is_file():
            path, remedy = clip / "preprocessor_config.json", "copy the model again"
            about = as_record(Preprocessor, read_json(path, ArtifactError, remedy), path, ArtifactError, remedy)
        self.size = size
        self.mean, self.std = np.asarray(about.image_mean, np.float32), np.asarray(about.image_std, np.float32)

    def __call__(self, path: Path) -> Tensor:
        """float32 [3, H, W]."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{path} cannot be read as an image ({error}); remove it, or save it again") from None
        scale = self.size / min(image.size)
        width, height = (max(self.size, round(edge * scale)) for edge in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = (np.asarray(image, np.float32) / 255 - self.mean) / self.std
        return torch.from_numpy(pixels).permute(2, 0, 1)
