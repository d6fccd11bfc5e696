"""What the checks of random programs find, kind by kind, and in random mixtures: a table for the terminal.

    python tests/report_programs.py             # every pattern and style by itself, for all methods
    python tests/report_programs.py --mixed 500 # and random programs

It runs on any version of dyconvert that can be imported.
"""

import argparse
from collections import Counter, defaultdict

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from program_checks import Outcome, examine
from program_patterns import PATTERNS, STYLES
from random_programs import Program, alone, programs

import dyconvert

METHODS = tuple(dyconvert.METHODS)


def kinds() -> list[str]:
    return [*PATTERNS, *(f"style: {style}" for style in STYLES)]


def word(outcome: Outcome) -> str:
    if outcome.faults:
        return "; ".join(sorted(set(outcome.faults)))
    if outcome.refused:
        return f"refused: {outcome.refused}"
    return f"exact ({outcome.shared} shared, {outcome.own} own, {outcome.static} static)"


def singly() -> None:
    found: Counter[str] = Counter()
    for kind in kinds():
        outcomes = {method: examine(alone(kind, method)) for method in METHODS}
        for method, outcome in outcomes.items():
            found["faulty" if outcome.faults else "refused" if outcome.refused else "exact"] += 1
            if outcome.faults or outcome.refused or method == "dynet":
                print(f"{kind:42} {method:9} {word(outcome)[:260]}", flush=True)
        found["faulty kinds"] += any(outcome.faults for outcome in outcomes.values())
    print(dict(found), "of", len(kinds()), "kinds and", 3 * len(kinds()), "programs")


def mixed(count: int) -> None:
    outcomes: list[tuple[Program, Outcome]] = []

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs(st.sampled_from(METHODS), list(PATTERNS), list(STYLES)))
    def run(program: Program) -> None:
        outcomes.append((program, examine(program)))

    run()
    totals: Counter[str] = Counter()
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for program, outcome in outcomes:
        totals["faulty" if outcome.faults else "refused" if outcome.refused else "exact"] += 1
        totals.update(f"with {kind} at fault" for kind in outcome.kinds)
        totals.update(shared=outcome.shared, own=outcome.own, static=outcome.static)
        for kind in program.kinds:
            by_kind[kind].append(bool(outcome.faults))
    print(len(outcomes), "random programs:", dict(totals))
    for kind, wrong in sorted(by_kind.items(), key=lambda each: -sum(each[1]) / len(each[1])):
        print(f"  {sum(wrong):4} of {len(wrong):4} programs with {kind!r} are faulty")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixed", type=int, default=0, metavar="COUNT")
    options = parser.parse_args()
    torch.set_num_threads(1)
    singly()
    if options.mixed:
        mixed(options.mixed)


if __name__ == "__main__":
    main()
