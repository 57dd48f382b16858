"""Records -> matplotlib figures: one function for each figure, one style for all, no torch.

A *report table* is a DataFrame with one row for each encoder, named by its index, and the columns of `world_report`
("pairs/colour", "pairs/colour/low", ..., "zeroshot", ...; fractions in 0..1). A *metrics table* has one row for each
step. Every figure takes `source`, printed small under it: the run, seed, git sha and versions behind what it shows.
A record without the columns that a figure needs raises a KeyError that names them.
"""
# ruff: noqa: F401  (these are the public names)

from diva_lab.figures.alt import describe
from diva_lab.figures.feedback import dose_curves, front, gain_by_readability, readability
from diva_lab.figures.gradients import (
    conflict_by_block,
    conflict_histogram,
    conflict_over_steps,
    cosine_by_timestep,
    parts_conflict,
    signal_by_timestep,
    term_norms,
)
from diva_lab.figures.png import save, to_png
from diva_lab.figures.samples import (
    answers,
    drawn_attributes,
    image_grid,
    minimal_pairs,
    own_image,
    patch_maps,
    patch_similarity,
)
from diva_lab.figures.scores import (
    benchmark_scores,
    claims,
    objective_differences,
    pair_scores,
    radar,
    runs_scatter,
    selection,
)
from diva_lab.figures.style import COLOURS, LABELS, MARKERS, MEASURES, STYLE, running_mean, trace
from diva_lab.figures.theory import affine_range, message_maps, theorem_bounds
from diva_lab.figures.training import loss_curves, recovered_fraction, trade_off
