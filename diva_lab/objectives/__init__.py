"""OBJECTIVES: what the encoder is asked for. DIVA, contrastive, their naive sum, DCR, guided DCR, GenHancer.

The mathematics are functions of tensors. An objective is a function of a `Step` that returns its terms by name, each
[b], one value an image, weights applied; the loss is the sum of the terms' means. Another objective is one function
and one line in `OBJECTIVES`.
"""

from collections.abc import Callable

from torch import Tensor

from diva_lab.objectives.contrastive import contrastive, naive
from diva_lab.objectives.dcr import dcr
from diva_lab.objectives.diva import diva, genhancer
from diva_lab.objectives.guidance import dcr_guidance
from diva_lab.objectives.step import Step

OBJECTIVES: dict[str, Callable[[Step], dict[str, Tensor]]] = {
    "diva": diva,
    "contrastive": contrastive,
    "naive": naive,
    "dcr": dcr,
    "dcr-guidance": dcr_guidance,
    "genhancer": genhancer,
}
COMPARED = ("diva", "contrastive", "naive", "dcr")  # in the shipped results: those that share one denoiser
