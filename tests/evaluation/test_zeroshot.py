import pytest
import torch
import torch.nn.functional as F

from diva_lab.evaluation.zeroshot import class_embeddings, zeroshot_accuracy

NAMES = ("cat", "dog", "bird")


@pytest.fixture
def axes(make_encoder):
    """An encoder whose three class names lie on the axes."""
    return make_encoder(
        dim=3, texts={f"a photo of a {name}": row for name, row in zip(NAMES, torch.eye(3), strict=True)}
    )


def test_accuracy_by_hand(axes):
    images = F.normalize(torch.tensor([[2.0, 1, 0], [0, 3, 1], [1, 0, 2], [1, 2, 0]]), dim=-1)
    assert zeroshot_accuracy(axes, images, torch.tensor([0, 1, 2, 0]), NAMES) == 0.75


def test_accuracy_is_unchanged_by_renaming_classes_and_labels_alike(encoder):
    images = F.normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    labels = torch.arange(50) % 3
    turned = zeroshot_accuracy(encoder, images, (labels + 1) % 3, (NAMES[2], *NAMES[:2]))
    assert zeroshot_accuracy(encoder, images, labels, NAMES) == turned


def test_a_class_is_the_unit_mean_of_its_templates(encoder):
    templates = ("a photo of a {}", "a drawing of the {}")
    found = class_embeddings(encoder, NAMES, templates)
    for row, name in zip(found, NAMES, strict=True):
        texts = encoder.encode_text([template.format(name) for template in templates])
        torch.testing.assert_close(row, F.normalize(texts.mean(dim=0), dim=-1))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


def test_all_text_is_encoded_in_one_call(encoder):
    class_embeddings(encoder, NAMES, ("a {}", "the {}"))
    assert encoder.asked == [["a cat", "the cat", "a dog", "the dog", "a bird", "the bird"]]
