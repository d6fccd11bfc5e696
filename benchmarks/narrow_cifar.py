"""What narrowing keeps before any training: top-1 of two CIFAR ResNets on the 10,000 test images of CIFAR-10.

    DYCONVERT_DATA=DIR python benchmarks/narrow_cifar.py [--seeds 3] [--images 1000] [--json table.json]

DIR holds cifar10/ and cifar10_resnets/, as the tests on real data take them. Of each network: widths 0.5 and 0.75,
weights by least squares (mean and range over calibration images drawn with different seeds), by merging, and by
plain L1 pruning.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import dyconvert
from dyconvert import models
from dyconvert.analysis.flops import macs

NETWORKS = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(data: Path, name: str) -> tuple[Tensor, Tensor]:
    """`[10000, 3, 32, 32]`, normalised, and labels."""
    Image.MAX_IMAGE_PIXELS = None
    pixels = np.asarray(Image.open(data / "cifar10" / f"{name}.png")).reshape(-1, 32, 32, 3)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    x = (torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float().div(255) - mean) / std
    return x, torch.from_numpy(np.load(data / "cifar10" / f"{name}_labels.npy").astype(np.int64))


@torch.inference_mode()
def top1(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum((model(a).argmax(1) == b).sum().item() for a, b in zip(x.split(500), labels.split(500), strict=True))
    return 100 * right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--widths", nargs="*", type=float, default=[0.5, 0.75])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not os.environ.get("DYCONVERT_DATA"):
        sys.exit("Set DYCONVERT_DATA to the folder that holds cifar10/ and cifar10_resnets/.")
    data = Path(os.environ["DYCONVERT_DATA"])
    train, _ = images(data, "train_1")
    test = images(data, "test")
    results = []
    print(f"{'network':10}{'width':>6}{'MACs':>7}{'original':>10}{'least-squares':>22}{'merge':>8}{'l1':>8}")
    for network in arguments.networks:
        model, _ = models.create(f"cifar-{network}", str(data / "cifar10_resnets" / NETWORKS[network]))
        original = top1(model, *test)
        for width in arguments.widths:
            scores = []
            for seed in range(arguments.seeds):
                drawn = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))]
                narrow = dyconvert.narrow(
                    model, width=width, data=drawn, calibration_images=arguments.images, static=True, seed=seed
                )
                scores.append(top1(narrow, *test))
            others = {
                init: top1(dyconvert.narrow(model, width=width, init=init, static=True), *test)
                for init in ("merge", "l1")
            }
            share = macs(narrow, test[0][:1]) / macs(model, test[0][:1])
            results.append(
                {"network": network, "width": width, "macs": share, "original": original, "least-squares": scores}
                | others
            )
            found = f"{sum(scores) / len(scores):.1f} ({min(scores):.1f} .. {max(scores):.1f})"
            print(
                f"{network:10}{width:6}{share:7.1%}{original:10.2f}{found:>22}{others['merge']:8.1f}{others['l1']:8.1f}",
                flush=True,
            )
    if arguments.json:
        about = {"torch": torch.__version__, "images": arguments.images}
        arguments.json.write_text(json.dumps(about | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
