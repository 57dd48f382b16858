"""What is said to a LLaVA and by it, as tokens: one way for training, for answers and for likelihoods.

A dialogue is rendered by the folder's own chat template. Each image becomes as many image tokens as the tower gives,
and every token that the assistant says, the end of its turn included, is marked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from diva_lab.llava.folders import IMAGE, Llava

SILENT = -100  # label of a token that nobody is asked to say, as transformers has it
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """A text with its image tokens, and the parts [start, end) of it that are the assistant's."""

    text: str
    parts: tuple[tuple[int, int], ...]

    def narrow(self, words: str) -> "Prompt":
        """Only these words, and what stands before them, of the last part; the end of the turn is left out."""
        start, end = self.parts[-1]
        return Prompt(self.text, ((start, self.text.index(words, start, end) + len(words)),))


def render(llava: Llava, turns: Sequence[str], image: bool = True) -> Prompt:
    """Turns of user and assistant, one after the other, by the chat template; the image stands in the first one.

    After a turn of the user the assistant is called upon. Where the template ends an answer without the tokenizer's
    token of the end, as that of llava-hf, it is added: else a model would not learn to stop.
    """
    messages, pieces, rendered = [], [], ""
    end = llava.processor.tokenizer.eos_token or ""
    for k, turn in enumerate(turns):
        content = [{"type": "text", "text": turn}]
        messages.append({"role": ROLES[k % 2], "content": [{"type": "image"}] * (image and k == 0) + content})
        whole = llava.processor.apply_chat_template(messages, add_generation_prompt=k % 2 == 0)
        if not whole.startswith(rendered):
            raise ValueError("the chat template does not append turns to what was said before; expected one that does")
        said = whole[len(rendered) :]
        pieces.append(said if k % 2 == 0 or said.rstrip().endswith(end) else said.rstrip() + end)
        rendered = whole
    return _join(pieces, llava.image_tokens)


def render_plain(llava: Llava, caption: str) -> Prompt:
    """An image and its caption alone, as LLaVA-1.5 trains the projector."""
    return _join([IMAGE, f"{caption}\n"], llava.image_tokens)


def _join(pieces: Sequence[str], image_tokens: int) -> Prompt:
    """One text of pieces that are by turns the user's and the assistant's."""
    text, parts = "", []
    for k, piece in enumerate(pieces):
        start, text = len(text), text + (piece if k % 2 else piece.replace(IMAGE, IMAGE * image_tokens))
        parts += [(start, len(text))] if k % 2 else []
    return Prompt(text, tuple(parts))


def read_images(llava: Llava, images: Sequence[Image.Image]) -> Float[Tensor, "n 3 h w"]:
    """Images as the tower takes them, in the model's precision and on its device."""
    pixels = llava.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
    return pixels.to(llava.model.device, llava.model.dtype)


def tokenize(
    llava: Llava, prompts: Sequence[Prompt], longest: int = 0, left: bool = False
) -> dict[str, Int[Tensor, "n l"]]:
    """`input_ids`, `attention_mask` and `labels` of prompts; padded at the end, or `left`, to generate.

    Args:
        longest: tokens of a prompt, of which later ones are cut off; 0 for any number.

    Raises:
        ValueError: where nothing of an image, or only a part of it, would be left.
    """
    tokenizer, image = llava.processor.tokenizer, llava.model.config.image_token_id
    rows = []
    for prompt in prompts:
        encoded = tokenizer(prompt.text, return_offsets_mapping=True)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        said = [any(a < b and s <= a and b <= e for s, e in prompt.parts) for a, b in places]
        rows.append([(i, i if s else SILENT) for i, s in zip(ids, said, strict=True)])
        if longest and image in ids[longest:]:
            raise ValueError(f"an image takes {llava.image_tokens} tokens; expected max_tokens above, not {longest}")
    rows = [row[: longest or None] for row in rows]
    length, pad = max(map(len, rows)), tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    table = torch.tensor([_pad(row, (pad, SILENT), length, left) for row in rows])  # [n, l, 2]
    mask = torch.tensor([_pad([1] * len(row), 0, length, left) for row in rows])
    ids, labels = table.unbind(-1)
    device = llava.model.device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def _pad(row: list, filler: object, length: int, left: bool) -> list:
    rest = [filler] * (length - len(row))
    return rest + row if left else row + rest
