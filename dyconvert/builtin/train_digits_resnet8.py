"""Trains the digits ResNet-8 and writes its weights and test split into the package.

`python -m dyconvert.builtin.train_digits_resnet8` (needs scikit-learn; about half a minute on two cores).
The split and the seed are fixed; the last digit of the accuracy may still differ between machines.
"""

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dyconvert.builtin.digits_resnet8 import TEST_SPLIT, WEIGHTS, DigitsResNet8, accuracy

SEED = 0
EPOCHS = 60
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 0.01


def split_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images `[1437, 8, 8]`, test images `[360, 8, 8]` (uint8, 0 to 16), and both sets of labels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(digits.images, digits.target, test_size=0.2, random_state=SEED, stratify=digits.target)
    a, b, c, d = (torch.from_numpy(part).to(torch.uint8) for part in parts)
    return a, b, c, d


def shift(images: Tensor) -> Tensor:
    """Moves the images of a batch `[N, 1, 8, 8]`, together, by up to one pixel each way."""
    top, left = torch.randint(0, 3, (2,)).tolist()
    return F.pad(images, (1, 1, 1, 1))[:, :, top : top + 8, left : left + 8]


def train(images: Tensor, labels: Tensor) -> DigitsResNet8:
    """A trained model, from images `[N, 8, 8]` (uint8, 0 to 16) and labels `[N]`."""
    torch.manual_seed(SEED)
    images, labels = images.float().div(16).unsqueeze(1), labels.long()
    model = DigitsResNet8()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps_per_epoch = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, epochs=EPOCHS, steps_per_epoch=steps_per_epoch
    )
    for _ in range(EPOCHS):
        order = torch.randperm(len(images))
        for batch in order[: steps_per_epoch * BATCH_SIZE].split(BATCH_SIZE):
            loss = F.cross_entropy(model(shift(images[batch])), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    """Trains, saves, and prints the test accuracy of the saved weights."""
    train_images, test_images, train_labels, test_labels = split_digits()
    model = train(train_images, train_labels)
    save_file(model.state_dict(), WEIGHTS)
    save_file({"images": test_images.contiguous(), "labels": test_labels}, TEST_SPLIT)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, top-1 {accuracy(model):.2f} % on {len(test_labels)} test images")


if __name__ == "__main__":
    main()
