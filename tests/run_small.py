"""main_dino.py with a model of 0.1 million weights, for tests that start several processes.

FLOAT64=1: in double precision. PLANT="nan RANK FIRST LAST": from step FIRST to LAST the first sample of RANK's batches
has NaN in a view; PLANT="nothing FIRST LAST": those steps do nothing.
"""

import functools
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_dino  # noqa: E402
import utils  # noqa: E402
from dino3d.training.collapse import TeacherOutputs  # noqa: E402
from resnet3d import BasicBlock, ResNet  # noqa: E402
from vision_transformer import ARCHITECTURES, DINOHead, VisionTransformer  # noqa: E402

ARCHITECTURES["resnet18"] = functools.partial(ResNet, BasicBlock, (1, 1, 1, 1), width=8)
ARCHITECTURES["vit_tiny"] = functools.partial(VisionTransformer, embed_dim=48, depth=2, num_heads=3)
main_dino.DINOHead = lambda *args, **more: DINOHead(*args, **(more | {"hidden_dim": 64}))
if "FLOAT64" in os.environ:
    torch.set_default_dtype(torch.float64)
kind, *where, first, last = os.environ.get("PLANT", "no 0 0").split()
steps, chosen = range(int(first), int(last) + 1), where == [os.environ.get("RANK", "0")]
step = 0
render, train_step = main_dino.TrainState.render, main_dino.train_step


def planted_render(run, batch):
    views = render(run, batch)
    if kind == "nan" and chosen and step in steps:
        views[0][0, 0, 3, 3, 3] = torch.nan
    return views


def planted_step(run, micro_batches, scheduled, frozen, *masks):
    global step
    step += 1
    if kind == "nothing" and step in steps:
        names = ("loss", "kl", "teacher_entropy", "grad_norm", "air_views")
        return main_dino.Step(
            finite=torch.tensor(False),
            metrics=dict.fromkeys(names, torch.tensor(0.0)),
            teacher=TeacherOutputs(
                torch.zeros(2, dtype=torch.int64),
                torch.zeros(run.dino_loss.center.shape[1]),
                torch.zeros(2, run.student.backbone.embed_dim),
            ),
        )
    return train_step(run, micro_batches, scheduled, frozen, *masks)


main_dino.TrainState.render, main_dino.train_step = planted_render, planted_step
utils.run_script(main_dino.main)
