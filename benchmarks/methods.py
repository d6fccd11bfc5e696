"""What one method's mixtures cost over another's, by default DyNet's over CondConv's: times of one dynamic conv.

python benchmarks/methods.py [--method dynet] [--than condconv] [--train] [--batch 1,8,32] [--repeats 21]
    [--threads 1 --cpu-time]
"""

import argparse
import statistics

import torch
from rich.progress import track

from dyconvert.analysis.bench_layer import LAYERS, layer_calls
from dyconvert.analysis.timing import in_turns
from dyconvert.methods import METHODS, get_method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="dynet", choices=METHODS)
    parser.add_argument("--than", default="condconv", choices=METHODS)
    parser.add_argument("--train", action="store_true", help="a forward and a backward")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time: for a busy machine, with --threads 1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batches = [int(batch) for batch in options.batch.split(",")]
    rows, all_ratios = [], []
    for layer in track(LAYERS, "timing", transient=True):
        ratios = []
        for batch in batches:
            calls = {
                name: layer_calls(layer, batch, get_method(name, g=6), options.train, only="dynamic")["dynamic"]
                for name in (options.than, options.method)
            }
            found = in_turns(calls, options.repeats, cpu=options.cpu_time)
            ratios.append(found[options.method].median / found[options.than].median)
        rows.append(f"| {layer.label} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
        all_ratios += ratios
    print("| layer | " + " | ".join(f"batch {batch}" for batch in batches) + " |")
    print("|---" * (1 + len(batches)) + "|")
    print(*rows, sep="\n")
    print(f"geometric mean {statistics.geometric_mean(all_ratios):.3f}, at most {max(all_ratios):.2f}")


if __name__ == "__main__":
    main()
