"""Train the tiny language model, which sees the tiny world through the tiny CLIP, from a seed.

`python -m tools.language` writes `data/tiny/llava`, a LLaVA folder of float16 with a Llama of about a million weights
and its own vocabulary of whole words, and `record.json`. `diva-lab llava train` makes it in three phases: the language
model learns from text alone to find a word among options; it says captions of random scenes that name every detail; and
it talks about them. There every detail is asked for in an open question, as two options, and as yes or no, in the words
in which MMVP and NaturalBench ask. It says what it sees before it decides, as in `red (a)` or `blue No`: a model of
this size learns no other way in minutes. `python -m tools.language questions` writes questions about minimal pairs in
the layouts of these two, as `diva-lab llava evaluate` reads them.
"""

import argparse
import csv
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diva_lab.llava.folders import assemble, load_llava
from diva_lab.llava.mmvp import COLUMNS, IMAGES
from diva_lab.llava.naturalbench import ASK
from diva_lab.llava.questions import LETTER
from diva_lab.llava.tuning import LlavaSettings, train_llava
from diva_lab.paths import DATA, RUNS
from diva_lab.world import ATTRIBUTES, CLASSES, DETAILS, World, caption, draw_pairs, draw_scenes
from tools.pretrain import write_record

ASKED = {  # attribute -> the open question
    "class": "What is it?",
    "orientation": "Which way does it face?",
    "presence": "Is it with or without a tail?",
    "state": "Is it lit or unlit?",
    "quantity": "How many dots are there?",
    "position": "Where is the ball?",
    "colour": "What colour is it?",
    "structure": "Is it plain, striped or checked?",
    "text": "Which letter is on the sign?",
    "viewpoint": "Is it seen from high or low?",
}
MARK = "<image>\n"  # where the image stands in a conversation's first turn
TURNS = 8  # of a training image's conversation
SIZES = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
    "initializer_range": 128**-0.5,  # with transformers' .02 a layer this narrow attends to all tokens alike for long
}  # fmt: skip
LONGEST = 512  # tokens of a conversation
PHASES: dict[str, dict] = {  # file of conversations -> how language model and projector are trained on it
    "words": {"steps": 300, "batch": 32},
    "captions": {"dialogue": "plain", "steps": 500, "batch": 64},
    "conversations": {"steps": 600, "batch": 32},
}


# --- what is asked ----------------------------------------------------------------------------------------------


def open_question(scene: np.void, name: str, rng: np.random.Generator) -> tuple[str, str]:
    """The open question about an attribute, and its answer."""
    return ASKED[name], ATTRIBUTES[name][scene[name]]


def option_question(scene: np.void, name: str, rng: np.random.Generator) -> tuple[str, str]:
    """The question as MMVP asks it: the true value and another one, in any order."""
    values = ATTRIBUTES[name]
    true = int(scene[name])
    pair = [true, (true + 1 + int(rng.integers(len(values) - 1))) % len(values)]
    rng.shuffle(pair)
    options = list_options(*(values[i] for i in pair))
    return f"{ASKED[name]} {options}{LETTER}", f"{values[true]} {'(a)' if pair[0] == true else '(b)'}"


def yes_question(scene: np.void, name: str, rng: np.random.Generator) -> tuple[str, str]:
    """The question as NaturalBench asks it: whether a statement that names the attribute is true; half of them are."""
    said = scene.copy()
    if false := rng.random() < 0.5:
        count = len(ATTRIBUTES[name])
        said[name] = (said[name] + 1 + rng.integers(count - 1)) % count
    return statement_question(said, name) + ASK["yes_no"], f"{ATTRIBUTES[name][scene[name]]} {'No' if false else 'Yes'}"


def list_options(one: str, other: str) -> str:
    return f"(a) {one} (b) {other}"


def statement_question(scene: np.void, name: str) -> str:
    """As `Is this a red flower?`: the class, and a detail."""
    return f"Is this {caption(scene, () if name == 'class' else (name,)).removeprefix('a photo of ')}?"


KINDS = (open_question, option_question, yes_question)


def _turns(scene: np.void, rng: np.random.Generator, kinds: Sequence[Callable], ask: Callable[[str, str], str]) -> list:
    """Turns about a scene in LLaVA's format, of any of `kinds` and about any attribute; `ask` makes what is asked."""
    said = []
    for _ in range(TURNS):
        kind, name = kinds[rng.integers(len(kinds))], list(ASKED)[rng.integers(len(ASKED))]
        question, answer = kind(scene, name, rng)
        mark = "" if said else MARK
        said += [{"from": "human", "value": mark + ask(question, answer)}, {"from": "gpt", "value": answer}]
    return said


def conversation(scene: np.void, rng: np.random.Generator) -> list[dict[str, str]]:
    """Questions of every kind, as they are."""
    return _turns(scene, rng, KINDS, lambda question, answer: question)


def word_game(scene: np.void, rng: np.random.Generator) -> list[dict[str, str]]:
    """Questions to decide with the answer before each, so that no image is needed, in short."""

    def ask(question: str, answer: str) -> str:
        return f"{answer.split()[0]}. {question.removesuffix(LETTER).removesuffix(ASK['yes_no'])}"

    return _turns(scene, rng, KINDS[1:], ask)


def description(scene: np.void) -> list[dict[str, str]]:
    """A caption that names every detail, in LLaVA's format."""
    return [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption(scene, tuple(DETAILS))}]


def write_conversations(folder: Path, world: World, n: int, seed: int) -> dict[str, Path]:
    """`n` images, and a file for each of `PHASES`, by its name."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    scenes, rng = draw_scenes(n, (seed, 7)), np.random.default_rng((seed, 8))
    for k, pixels in enumerate(world.render(scenes)):
        Image.fromarray(pixels).save(folder / "images" / f"{k}.png")
    said = {
        "words": (word_game(scene, rng) for scene in scenes),
        "captions": map(description, scenes),
        "conversations": (conversation(scene, rng) for scene in scenes),
    }
    files = {}
    for name, each in said.items():
        records = [{"id": str(k), "image": f"{k}.png", "conversations": turns} for k, turns in enumerate(each)]
        for k, record in enumerate(records):
            if name == "words" and k % 4:  # the rest shows what an image is: nothing that these questions need
                del record["image"]
                record["conversations"][0]["value"] = record["conversations"][0]["value"].removeprefix(MARK)
        files[name] = folder / f"{name}.json"
        files[name].write_text(json.dumps(records), encoding="utf-8")
    return files


# --- what it is asked about minimal pairs -----------------------------------------------------------------------


def _pairs(world: World, each: int, seed: int) -> Iterator[tuple[str, np.ndarray, list[Image.Image]]]:
    """Detail, the two scenes [2], and their images, for each of the nine details."""
    for number, name in enumerate(DETAILS):
        for scenes in draw_pairs(name, each, (seed, 9, number)):
            yield name, scenes, [Image.fromarray(pixels) for pixels in world.render(scenes)]


def write_questions(folder: str | Path, world: World, each: int = 15, seed: int = 0) -> Path:
    """Questions about `each` minimal pairs of every detail: folders `MMVP` and `NaturalBench` in their own layouts.

    Both ask about the images in `MMVP`. There the two options are the pair's values, in an order that is drawn for each
    pair; both rows have it.
    """
    folder, rng = Path(folder), np.random.default_rng((seed, 10))
    images, cells = folder / "MMVP" / IMAGES[0], []
    images.mkdir(parents=True, exist_ok=True)
    (folder / "NaturalBench").mkdir(exist_ok=True)
    rows = [COLUMNS]
    for k, (name, scenes, pictures) in enumerate(_pairs(world, each, seed)):
        values = [DETAILS[name][scene[name]] for scene in scenes]
        order = [int(i) for i in rng.permutation(2)]
        options = list_options(*(values[i] for i in order))
        for i, picture in enumerate(pictures):
            picture.save(images / f"{2 * k + i + 1}.png")
            rows.append((2 * k + i + 1, ASKED[name], options, "(a)" if order[0] == i else "(b)"))
        answers = {f"Image_{i}_Question_{j}": "Yes" if i == j else "No" for i in (0, 1) for j in (0, 1)}
        asked = {f"Question_{j}": statement_question(scenes[j], name) for j in (0, 1)}
        named = {f"Image_{i}": f"../MMVP/{IMAGES[0]}/{2 * k + i + 1}.png" for i in (0, 1)}
        cells.append({"Index": k, **named, **asked, **answers, "Question_Type": "yes_no", "Source": name})
    with open(folder / "MMVP" / "Questions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    (folder / "NaturalBench" / "test.json").write_text(json.dumps(cells, indent=0), encoding="utf-8")
    return folder


# --- the language model -----------------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """Every word and mark of the questions, the answers and LLaVA's chat template, sorted."""
    rng, texts = np.random.default_rng(0), ["USER: ASSISTANT: Yes No (a) (b)", LETTER, *ASK.values()]
    for scene in draw_scenes(400, 0):
        for name in ASKED:
            texts += [text for kind in KINDS for text in kind(scene, name, rng)] + ["."]
        texts.append(description(scene)[1]["value"])
    texts += [value for values in ATTRIBUTES.values() for value in values] + list(CLASSES)
    splitter = _splitter()
    return sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})


def _splitter() -> pre_tokenizers.PreTokenizer:
    """Splits a text into words, letters in brackets, and marks."""
    parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\([a-zA-Z]\)|\w+|[^\w\s]"), "isolated")]
    return pre_tokenizers.Sequence(parts)


def write_language(folder: Path, seed: int = 0) -> Path:
    """A folder with a Llama of random weights and a tokenizer whose tokens are the words of `vocabulary`."""
    words = dict.fromkeys(["<unk>", "<s>", "</s>", *vocabulary()])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = _splitter()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "model_max_length": LONGEST}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    config = {"vocab_size": len(words), "max_position_embeddings": LONGEST, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **SIZES, **config)).save_pretrained(folder)
    return folder


def pretrain_language(
    out: Path,
    world: World,
    seed: int,
    records: int = 12_000,
    encoder: str = "tiny",
    phases: Mapping[str, dict] = PHASES,
) -> None:
    """Train language model and projector from random weights, with the frozen tower of `encoder`; write `out`.

    Stopped, it goes on where it was.
    """
    work = RUNS / "pretrain" / f"language-{world.seed}-{seed}-{records}"
    folder = work / "llava"
    if not (folder / "processor_config.json").is_file():
        shutil.rmtree(work, ignore_errors=True)
        assemble(encoder, write_language(work / "language", seed), folder, seed)
    for name, file in write_conversations(work, world, records, seed).items():
        settings = LlavaSettings(
            llava=str(folder), data=str(file), images=str(work / "images"), trained="all", seed=seed, lr=2e-3,
            weight_decay=0.01, max_tokens=LONGEST, **phases[name],
        )  # fmt: skip
        folder = train_llava(settings, RUNS).folder / "llava"
    trained = load_llava(folder)
    trained.model.half()
    trained.record.update(rung="pretrained with this tower", encoder=encoder)
    for name in ("language", "llava"):
        trained.record.pop(name, None)
    shutil.rmtree(out, ignore_errors=True)
    trained.save(out)
    write_record(out, seed=seed, world=world.seed, records=records, phases=phases, run=folder.parent.name)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.language", description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", choices=("train", "questions"), default="train")
    parser.add_argument("out", nargs="?", type=Path, help="folder to write (data/tiny/llava, data/world/questions)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=int, default=0, help="seed of the world")
    parser.add_argument("--records", type=int, default=12_000, help="images with conversations to train on")
    parser.add_argument("--each", type=int, default=15, help="questions: minimal pairs of every detail")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.what == "questions":
        out = args.out or DATA / "world" / "questions"
        write_record(write_questions(out, World(args.world), args.each, args.seed), seed=args.seed, world=args.world)
    else:
        out = args.out or DATA / "tiny" / "llava"
        pretrain_language(out, World(args.world), args.seed, args.records)


if __name__ == "__main__":
    main()
