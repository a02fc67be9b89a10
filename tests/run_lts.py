"""main_lts_msd.py with a small vit_tiny, for tests with several processes: torchrun run_lts.py FLAGS.

With DOUBLE=1 in the environment it computes in double precision.
"""

import functools
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_lts_msd  # noqa: E402
import utils  # noqa: E402
from dino3d.evaluation import statistics  # noqa: E402
from dino3d.finetune import heads  # noqa: E402
from vision_transformer import ARCHITECTURES, VisionTransformer  # noqa: E402

ARCHITECTURES["vit_tiny"] = functools.partial(VisionTransformer, embed_dim=48, depth=3, num_heads=3)
heads.DECODERS["unetr"] = functools.partial(heads.UnetrDecoder, feature_size=4)
statistics.BOOTSTRAP_ROUNDS = 50
if os.environ.get("DOUBLE"):
    torch.set_default_dtype(torch.float64)
if __name__ == "__main__":  # and not where a worker process reads this file
    utils.run_script(main_lts_msd.main)
