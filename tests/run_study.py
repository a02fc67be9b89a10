"""study.py with small scripts in place of those that train: run_study.py STAGE_SCRIPTS [flags of study.py]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import study
from dino3d.command_line import exit_status
from dino3d.study import jobs

# What each of the four is: its result depends on its flags, its seed and, as the real ones, on nothing else
STUB = """
import argparse, json, os, signal, sys, time
import numpy as np
from pathlib import Path

NAME = Path(__file__).stem

class Parser(argparse.ArgumentParser):
    def error(self, message):
        print("error:", message, file=sys.stderr)
        sys.exit(2)

def get_args_parser():
    parser = Parser(allow_abbrev=False)
    for flag in ("data_dir", "data_list", "output_dir", "pretrained_weights", "weights", "input", "output",
                 "cache_dir", "freeze_encoder"):
        parser.add_argument("--" + flag)
    for flag in ("rotation", "scale", "flip", "elastic", "gaussian", "histogram"):
        parser.add_argument("--use_" + flag)
    for flag in ("seed", "max_steps", "num_workers", "keep_last", "saveckp_freq", "fail", "silent",
                 "k_fold", "num_test"):
        parser.add_argument("--" + flag, type=int)
    parser.add_argument("--epochs", type=int, default=3)
    for flag in ("lr", "min_lr", "layer_decay", "label_fraction"):
        parser.add_argument("--" + flag, type=float)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--pause", type=float, default=0.0)
    return parser

def main():
    args = get_args_parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("threads", os.environ.get("OMP_NUM_THREADS"), "gpus", os.environ.get("CUDA_VISIBLE_DEVICES"))
    if args.fail is not None and (args.fail == args.seed or args.fail < 0):
        print("something else")
        print("error: this one fails", file=sys.stderr)
        sys.exit(1)
    if args.silent is not None:
        return
    runs = {"main_dino": pretrain, "main_lnc_luna16": classify, "main_lts_msd": segment, "extract_features": extract}
    runs[NAME](args)

def pretrain(args):
    out = Path(args.output_dir)
    state = {"epoch": 0, "sum": 0.0}
    if (out / "state.json").exists():
        state = json.loads((out / "state.json").read_text())
    print("12 volumes, 20 steps of 4 samples per epoch")
    on = sum(args.__dict__["use_" + name] == "true" for name in
             ("rotation", "scale", "flip", "elastic", "gaussian", "histogram"))
    while state["epoch"] < args.epochs:
        time.sleep(args.pause)
        draw = np.random.default_rng([args.seed, state["epoch"], on]).normal()
        state = {"epoch": state["epoch"] + 1, "sum": state["sum"] + 0.1 * draw}
        (out / "part").write_text(json.dumps(state))
        os.replace(out / "part", out / "state.json")
        with open(out / "log.txt", "a") as file:
            file.write(json.dumps({"epoch": state["epoch"], "step": 20 * state["epoch"], "seconds": 0.5}) + "\\n")
    level = 0.0 if args.max_steps == 1 else args.strength + 0.3 * on
    (out / "checkpoint.pth").write_text(json.dumps({"level": level + state["sum"], "seed": args.seed}))

def judge(args, weights):
    known = json.loads(Path(weights).read_text()) if weights else {"level": 0.0, "seed": 0}
    rng = np.random.default_rng([known["seed"], 7])
    labels = np.arange(40) % 2
    return labels, labels * known["level"] + rng.normal(size=40)

def classify(args):
    out = Path(args.output_dir)
    time.sleep(args.pause)
    labels, scores = judge(args, args.pretrained_weights)
    with open(out / "predictions.csv", "w") as file:
        file.write("case,patient,fold,label,probability,uncalibrated\\n")
        for i, (y, p) in enumerate(zip(labels, 1 / (1 + np.exp(-scores)))):
            file.write(f"c{i},p{i // 2},{i % 4 // 2},{y},{float(p)!r},{float(p)!r}\\n")
    (out / "metrics.json").write_text(json.dumps({"classes": 2}))

def segment(args):
    out = Path(args.output_dir)
    labels, scores = judge(args, args.pretrained_weights)
    if (out / "splits.json").exists():
        with open(out / "cases.csv", "w") as file:
            file.write("case,fold,class,dice,surface_dice\\n")
            for i, fold in enumerate(json.loads((out / "splits.json").read_text())["splits"]):
                dice = float(1 / (1 + np.exp(-scores[i])))
                file.write(f"{fold['test'][0]},{i},1,{dice!r},{dice / 2!r}\\n")
        (out / "metrics.json").write_text(json.dumps({"classes": 2}))
        return
    with open(out / "cases.csv", "w") as file:
        file.write("case,fold,class,dice\\n")
        for i in range(4):
            file.write(f"c{i},0,1,{float(1 / (1 + np.exp(-scores[i])))!r}\\n")
    (out / "metrics.json").write_text(json.dumps({"classes": 2}))

def extract(args):
    labels, scores = judge(args, args.weights)
    with open(args.output, "w") as file:
        file.write("name,patient,feature_0,feature_1\\n")
        for i, (score, other) in enumerate(zip(scores, np.random.default_rng(3).normal(size=40))):
            file.write(f"c{i},p{i // 2},{float(score)!r},{float(other)!r}\\n")

if __name__ == "__main__":
    main()
"""


def write_stubs(folder):
    """The four scripts, in a folder."""
    folder.mkdir(exist_ok=True)
    for name in jobs.STAGE_SCRIPTS.values():
        (folder / name).write_text(STUB)
    return folder


if __name__ == "__main__":
    jobs.ROOT = Path(sys.argv[1])
    sys.exit(exit_status(lambda: study.main(sys.argv[2:]))[0])
