"""What learning makes a model forget: `python benchmarks/forgetting_bench.py --data TASKS.json` (minutes on a GPU).

One adapter learns five text-classification tasks one after the other (`forgetting_data.py` prepares them). The answer
is a letter, and means something else in every task, so each task pulls at what those before it have taught. Average
forgetting (Chaudhry et al., arXiv 1801.10112) is the mean over earlier tasks of the best accuracy there was less that
at the end; learning accuracy is the mean over tasks of that right after learning. EWC++ is the plugin's own, with
Fisher information that knows directions of ΔW (`ruvllm_sona.curvature`) or single numbers of it
(`ruvllm_sona.consolidate`). Against it are nothing at all, the same penalty with every number alike (L2), EWC++ of the
factors instead of their product, and replay of kept texts, which takes twice the computing. Every way chooses its λ on
seed 0, and is measured on others.

Prints tables and one JSON line; `--small` is a trial run that says nothing about forgetting.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from forgetting import arms
from forgetting.lockstep import Training
from forgetting.run import Plan, run

_SMALL = {"tasks": 2, "each": 8, "longest": 12, "orders": 1, "seeds": 1, "steps": 2, "batch": 2, "columns": 4,
          "damped": "100", "directions": "100", "ewc": "100", "l2": "100", "factors": "100", "replay": "2",
          "least": 0.0}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a file that forgetting_data.py wrote")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--each", type=int, default=200, help="texts of a task to learn from, and as many to test on")
    parser.add_argument("--longest", type=int, default=48, help="tokens of a text")
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3, help="to measure on, besides seed 0")
    parser.add_argument("--steps", type=int, default=60, help="of Adam for a task")
    parser.add_argument("--batch", type=int, default=8, help="texts to a step")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--average", type=float, default=0.0, help="weight of a new task in EWC++; 0 is the mean")
    parser.add_argument("--columns", type=int, default=32, help="of the sketches of directions")
    parser.add_argument("--looked", type=int, default=100, help="texts of a task that its Fisher information is from")
    parser.add_argument("--damping", type=float, default=1.0, help="identity mixed into directions that are damped")
    parser.add_argument("--damped", default="10,30,100,300,1000", help="λ to choose from; empty leaves it out")
    parser.add_argument("--directions", default="10,30,100,300,1000", help="the same")
    parser.add_argument("--ewc", default="300,1000,3000,10000", help="the same")
    parser.add_argument("--l2", default="100,300,1000,3000", help="the same")
    parser.add_argument("--factors", default="100,1000", help="the same")
    parser.add_argument("--replay", default="10,200", help="texts that are kept of a task; empty leaves it out")
    parser.add_argument("--least", type=float, default=0.96, help="share of learning accuracy that a λ must leave")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of products with weights: auto, float32 or bfloat16")
    parser.add_argument("--at-once", type=int, default=64, help="cells that learn together")
    parser.add_argument("--rows", type=int, default=4096, help="rows of a batch that is only answered")
    parser.add_argument("--out", type=Path, help="write the JSON here, too, with a row for every cell")
    parser.add_argument("--small", action="store_true", help="a trial run of a minute on two cores")
    args = parser.parse_args()
    if args.small:
        for name, value in _SMALL.items():
            setattr(args, name, value)
    plan = Plan(
        model=args.model,
        data=args.data,
        tasks=args.tasks,
        each=args.each,
        longest=args.longest,
        orders=args.orders,
        seeds=args.seeds,
        grids={
            way: tuple(float(part) for part in given.split(","))
            for way, given in (
                (arms.DAMPED, args.damped),
                (arms.DIRECTIONS, args.directions),
                (arms.EWC, args.ewc),
                (arms.L2, args.l2),
                (arms.FACTORS, args.factors),
            )
            if given
        },
        replay=tuple(int(part) for part in args.replay.split(",") if part),
        least=args.least,
        device=args.device,
        dtype=args.dtype,
        at_once=args.at_once,
        training=Training(
            rank=args.rank,
            learning_rate=args.learning_rate,
            steps=args.steps,
            batch=args.batch,
            average=args.average,
            columns=args.columns,
            damping=args.damping,
            looked=args.looked,
            rows=args.rows,
        ),
    )
    began = time.perf_counter()
    report = run(plan, lambda line: print(f"{time.perf_counter() - began:7.1f} s  {line}", file=sys.stderr, flush=True))
    report["seconds"] = round(time.perf_counter() - began, 1)
    if args.out is not None:
        args.out.write_text(json.dumps(report), encoding="utf-8")
    report.pop("rows")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
