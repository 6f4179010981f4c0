"""Whether a picture is unsafe, by an image classifier of transformers in a local folder.

Knows pixels and labels; knows nothing about stages, columns and tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from builder import machine
from builder.errors import StageError, check_packages
from builder.models.pictures import Pixels

#: Labels that mean unsafe, in lower case, if the options name none.
UNSAFE = ("nsfw", "unsafe", "porn", "sexy", "hentai", "explicit")


def check_installed(folder: str) -> Path:
    """Raises StageError for packages and files that the classifier would miss; loads nothing. Returns its folder."""
    check_packages("torch", "transformers", extra="images", needed_by="nsfw_model")
    place = Path(folder).expanduser()
    if not (place / "config.json").is_file():
        raise StageError(
            f"there is no model in '{folder}'",
            where={"looked for": place / "config.json"},
            fix="set nsfw_model to a folder with an image classifier, as save_pretrained writes it",
        )
    return place


class SafetyModel:
    """An image classifier one or more of whose labels mean unsafe.

    Where a picture may have several labels, or there is one alone, the most probable unsafe one counts; else their sum.

    Args:
        folder: a model and its image processor, as `save_pretrained` writes them.
        labels: those that mean unsafe; `UNSAFE` where none is named.
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        StageError: torch or transformers is not installed, the folder has no such model, no label is unsafe, or there
            is no such device.
    """

    def __init__(self, folder: str, labels: Sequence[str] = (), *, device: str = "cpu") -> None:
        place = check_installed(folder)
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        if device.startswith("cuda") and not torch.cuda.is_available():
            raise StageError(f"torch finds no CUDA for device '{device}'", fix='set devices = ["cpu"]')
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(place, local_files_only=True, backend="pil")
            self._model: Any = AutoModelForImageClassification.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError, ImportError, KeyError) as error:
            if machine.is_of_the_machine(error):
                raise
            raise StageError(
                f"the image classifier cannot be loaded: {' '.join(str(error).split())}",
                where={"folder": folder},
                fix="set nsfw_model to a folder with an image classifier and its preprocessor_config.json",
            ) from error
        self._torch, self._device = torch, device
        config = self._model.config
        self._each_by_itself = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        self._model = self._model.to(device).eval()
        names = {number: str(name) for number, name in self._model.config.id2label.items()}
        wanted = {label.lower() for label in labels or UNSAFE}
        self._unsafe = [number for number, name in names.items() if name.lower() in wanted]
        missing = wanted - {name.lower() for name in names.values()} if labels else set()
        if not self._unsafe or missing:
            raise StageError(
                f"the image classifier has no label '{min(missing)}'"
                if missing
                else "no label of the image classifier means unsafe",
                where={"folder": folder, "its labels": ", ".join(names.values())},
                fix='name those that do: nsfw_labels = ["..."]',
            )

    def look(self, image: Pixels) -> npt.NDArray[np.float32]:
        """What the classifier takes of a picture, uint8 (H, W, 3) RGB; in any thread."""
        values = self._processor(images=Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        return np.asarray(values, np.float32)

    def score(self, looked: npt.NDArray[np.float32]) -> float:
        """The probability, 0..1, that a picture is unsafe: alone in its call, so that no neighbour moves it."""
        with self._torch.inference_mode():
            logits = self._model(pixel_values=self._torch.from_numpy(looked)[None].to(self._device)).logits[0].double()
            if self._each_by_itself:
                return float(self._torch.sigmoid(logits)[self._unsafe].max())
            return float(self._torch.softmax(logits, 0)[self._unsafe].sum())
