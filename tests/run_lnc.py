"""main_lnc_luna16.py with a small vit_tiny and resnet18, for tests with several processes: torchrun run_lnc.py FLAGS.

With DOUBLE=1 in the environment it computes in double precision, and every rank leaves its weights after training as
weights<rank>.pth in the fold's folder.
"""

import functools
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_lnc_luna16  # noqa: E402
import utils  # noqa: E402
from dino3d.evaluation import statistics  # noqa: E402
from dino3d.finetune import fold_loop  # noqa: E402
from resnet3d import BasicBlock, ResNet  # noqa: E402
from vision_transformer import ARCHITECTURES, VisionTransformer  # noqa: E402

train_fold = fold_loop.train_fold


def train_and_keep(state, *rest):
    train_fold(state, *rest)
    torch.save(state.model.state_dict(), state.fold.folder / f"weights{os.environ.get('RANK', 0)}.pth")


ARCHITECTURES["vit_tiny"] = functools.partial(VisionTransformer, embed_dim=48, depth=2, num_heads=3)
ARCHITECTURES["resnet18"] = functools.partial(ResNet, BasicBlock, (1, 1, 1, 1), width=4)
statistics.BOOTSTRAP_ROUNDS = 50
if os.environ.get("DOUBLE"):
    fold_loop.train_fold = train_and_keep
    torch.set_default_dtype(torch.float64)
if __name__ == "__main__":  # and not where a worker process reads this file
    utils.run_script(main_lnc_luna16.main)
