"""Trains tiny-reward in two stages.

`python train_reward.py scenes` learns to read: logistic loss on drawn scenes with one true caption and its near miss
(exchanged positions, attributes, counts). Relation words ("left of") come only after 40 % of the time, because absolute places
("on the left") are learned first and carry over; what still fails is drawn more often. `python train_reward.py preferences`
goes on from there with the Bradley-Terry loss of assets/preferences, images of tiny-sd labelled by noisy annotators, mixed
with drawn scenes.
"""

from __future__ import annotations

import io
import json
import re
import sys

import pyarrow.parquet as parquet
import torch
from common import ASSETS, SIZE, WORK, Run, arguments, autocast
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from train_unet import tokenize
from transformers import CLIPTokenizer

sys.path.insert(0, str(ASSETS.parent))
from rewards.crossencoder import Network
from rewards.shapes import PLACES, RELATIONS

NETWORK = dict(size=SIZE, width=128, heads=4, image_layers=2, text_layers=3)
RELATIVE = re.compile("left of|right of|above|below")
PLACED = re.compile("|".join([*PLACES, *RELATIONS]))
LAYOUT = set(" ".join([*PLACES, *RELATIONS, "a an one single of photo picture image drawing and"]).split())


def content(caption: str) -> list[str]:
    """The words of a caption that name things, sorted."""
    return sorted(word for word in caption.split() if word not in LAYOUT)


class Scenes:
    """Drawn scenes: images, and per image true captions and their near misses."""

    def __init__(self, tokenizer: CLIPTokenizer, name: str):
        data = torch.load(WORK / f"{name}.pt", weights_only=False)
        self.images = data["images"]
        n, each = len(data["true"]), len(data["true"][0])
        flat = {key: [text for row in data[key] for text in row] for key in ("true", "false")}
        self.true, self.false = (tokenize(tokenizer, flat[key]).short().view(n, each, -1) for key in ("true", "false"))
        self.relative = torch.tensor([bool(RELATIVE.search(text)) for text in flat["true"]]).view(n, each)
        same = [content(true) == content(false) for true, false in zip(flat["true"], flat["false"], strict=True)]
        self.layout = torch.tensor(same).view(n, each)  # the near miss names the same things, elsewhere
        names = [" ".join(PLACED.findall(text)) * alike for text, alike in zip(flat["true"], same, strict=True)]
        index = {name: i for i, name in enumerate(sorted(set(names)))}
        self.kind = torch.tensor([index[name] for name in names]).view(n, each)
        self.error = torch.full((len(index),), 0.5)

    def batch(self, size: int, relations: float, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Images, true ids, false ids and kinds of near miss.

        Relations are heard `relations` times as often as the rest, layouts five times, and what still fails more often.
        """
        rows = torch.randint(len(self.images), (2 * size,), generator=generator)
        weights = (1 + 4 * self.layout[rows]) * (1 - self.relative[rows] * (1 - relations))
        weights = weights * (0.1 + self.error[self.kind[rows]])
        chosen = torch.multinomial(weights.flatten(), size, generator=generator)
        rows, pick = rows[chosen // weights.shape[1]], chosen % weights.shape[1]
        kinds = self.kind[rows, pick]
        return self.images[rows].float() / 255, self.true[rows, pick].long(), self.false[rows, pick].long(), kinds

    def learn(self, kinds: torch.Tensor, wrong: torch.Tensor) -> None:
        """Updates the running error of each kind of near miss."""
        count, failed = (kinds.bincount(w, minlength=len(self.error)) for w in (None, wrong.float()))
        self.error[count > 0] = torch.lerp(self.error, failed / count, 0.05)[count > 0]


def roughen(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur and noise of random strength, as a generator's images have."""
    strength = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    images = torch.lerp(images, F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), strength[0])
    return (images + 0.05 * strength[1] * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def preferences(split: str, tokenizer: CLIPTokenizer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both images, caption ids and label_0 of the shipped preference rows, and of their mirror images."""
    rows = parquet.read_table(ASSETS / "preferences" / f"{split}.parquet").to_pydict()

    def decode(column: str) -> torch.Tensor:
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in rows[column]]
        flat = torch.frombuffer(bytearray(b"".join(image.tobytes() for image in images)), dtype=torch.uint8)
        return flat.view(-1, SIZE, SIZE, 3).permute(0, 3, 1, 2)

    swap = {"left": "right", "right": "left"}  # every shape is its own mirror image
    mirrored = [" ".join(swap.get(word, word) for word in caption.split()) for caption in rows["caption"]]
    first, second = (torch.cat([images, images.flip(-1)]) for images in map(decode, ("jpg_0", "jpg_1")))
    labels = torch.tensor(rows["label_0"] * 2, dtype=torch.float32)
    return first, second, tokenize(tokenizer, rows["caption"] + mirrored), labels


@torch.no_grad()
def export(network: Network, tokenizer: CLIPTokenizer, images: torch.Tensor, captions: torch.Tensor) -> None:
    """Writes assets/tiny-reward in half precision, with the mean and deviation of the scores of these images."""
    network.half().float()  # measure what is written
    ends = captions == tokenizer.eos_token_id
    mask = ends.cumsum(1) - ends.long() == 0  # up to and with the first end token
    chunks = zip(*(t.split(500) for t in (images, captions, mask)), strict=True)
    scores = torch.cat([network(i.float() / 255, c, m) for i, c, m in chunks])
    folder = ASSETS / "tiny-reward"
    tokenizer.save_pretrained(folder)
    config = {"network": dict(NETWORK, vocab=len(tokenizer), length=tokenizer.model_max_length)}
    config |= {"mean": scores.mean().item(), "std": scores.std().item()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {name: value.half().contiguous() for name, value in network.state_dict().items()}, folder / "model.safetensors"
    )


def main() -> None:
    args = arguments(__doc__, minutes=25, seed=31, batch=64, lr=1e-3, stages=("scenes", "preferences"))
    tokenizer = CLIPTokenizer.from_pretrained(WORK / "tokenizer")
    scenes = Scenes(tokenizer, "reward_scenes")
    network = Network(vocab=len(tokenizer), length=tokenizer.model_max_length, **NETWORK)
    network.stem.to(memory_format=torch.channels_last)
    if args.stage == "preferences":
        network.load_state_dict(torch.load(WORK / "reward_scenes_run.pt", weights_only=False)["network"])
        first, second, captions, labels = preferences("train", tokenizer)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    run = Run(f"reward_{args.stage}_run", args, optimizer, {"network": network})
    g, eos = run.generator, tokenizer.eos_token_id

    def read(images: torch.Tensor, *captions: torch.Tensor) -> torch.Tensor:
        """Raw scores of B roughened images, each under several captions: (captions, B)."""
        ids = torch.cat(captions)
        mask = ((ids == eos).cumsum(1) - (ids == eos).long()) == 0  # up to and with the first end token
        with autocast():
            seen = network.see(roughen(images, g)).repeat(len(captions), 1, 1)
            return network.read(seen, ids, mask).unflatten(0, (len(captions), -1))

    sums = torch.zeros(3)
    for step in run:
        relations = 0.05 if args.stage == "scenes" and run.progress < 0.4 else 1.0
        images, true, false, kinds = scenes.batch(args.batch, relations, g)
        good, bad, other = read(images, true, false, true.roll(1, 0))  # another scene's caption teaches the words
        loss = F.softplus(bad - good).mean() + 0.5 * (F.softplus(-good) + F.softplus(bad) + F.softplus(other)).mean()
        scenes.learn(kinds, good <= bad)
        agreed = torch.zeros(())
        if args.stage == "preferences":
            rows = torch.randint(len(labels), (args.batch // 2,), generator=g)
            pair = torch.cat([first[rows], second[rows]]).float() / 255
            left, right = read(pair, captions[rows].repeat(2, 1))[0].chunk(2)
            loss = loss + F.binary_cross_entropy_with_logits(left - right, labels[rows])
            agreed = ((left > right) == (labels[rows] > 0.5))[labels[rows] != 0.5].float().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums += torch.stack([loss.detach(), (good > bad).float().mean(), agreed])
        if (step + 1) % 100 == 0:
            loss, accuracy, agreement = (sums / 100).tolist()
            run.log(loss=loss, accuracy=accuracy, agreement=agreement, worst=scenes.error.max().item())
            sums.zero_()
    if args.stage == "preferences":
        export(network, tokenizer, torch.cat([first, second]), captions.repeat(2, 1))


if __name__ == "__main__":
    main()
