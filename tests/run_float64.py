"""main_dino.py in double precision, for tests that compare runs to the last digits: torchrun run_float64.py FLAGS."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_dino  # noqa: E402
import utils  # noqa: E402

torch.set_default_dtype(torch.float64)
utils.run_script(main_dino.main)
