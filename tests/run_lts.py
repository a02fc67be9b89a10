"""main_lts_msd.py with a small vit_tiny, for tests with several processes: torchrun run_lts.py FLAGS.

With DOUBLE=1 in the environment it computes in double precision.
"""
import functools
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import decoders  # noqa: E402
import finetune  # noqa: E402
import main_lts_msd  # noqa: E402
import utils  # noqa: E402
from vision_transformer import ARCHITECTURES, VisionTransformer  # noqa: E402

ARCHITECTURES["vit_tiny"] = functools.partial(VisionTransformer, embed_dim=48, depth=3, num_heads=3)
decoders.DECODERS["unetr"] = functools.partial(decoders.UnetrDecoder, feature_size=4)
finetune.BOOTSTRAP_ROUNDS = 50
if os.environ.get("DOUBLE"):
    torch.set_default_dtype(torch.float64)
utils.run_script(main_lts_msd.main)
