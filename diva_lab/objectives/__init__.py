"""OBJECTIVES: the losses that tune the encoder. An objective is a function of a `Step`.

It returns its terms by name, each of shape [b], one value per image, with its weight applied; the loss is the sum of
the terms' means. To add one, write one function and one line in `OBJECTIVES`.
"""

from collections.abc import Callable

from torch import Tensor

from diva_lab.objectives.contrastive import caption_contrast, contrastive, naive
from diva_lab.objectives.dcr import dcr
from diva_lab.objectives.diva import diva, genhancer
from diva_lab.objectives.guidance import dcr_guidance
from diva_lab.objectives.kuea import kuea
from diva_lab.objectives.step import Step
from diva_lab.objectives.un2clip import un2clip

OBJECTIVES: dict[str, Callable[[Step], dict[str, Tensor]]] = {
    "diva": diva,
    "contrastive": contrastive,
    "naive": naive,
    "dcr": dcr,
    "dcr-guidance": dcr_guidance,
    "genhancer": genhancer,
    "caption-contrast": caption_contrast,
    "un2clip": un2clip,
    "kuea": kuea,
}
COMPARED = ("diva", "contrastive", "naive", "dcr")  # those of the shipped results that use the same denoiser
