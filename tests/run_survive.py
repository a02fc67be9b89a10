"""main_dino.py with a model of 0.8 million weights, for tests that start and kill it: python run_survive.py FLAGS.

PROGRESS=FILE in the environment: rank 0 writes there the step that it has just finished; SLOW_DISK=SECONDS: what a
checkpoint takes to be safely on disk.
"""

import functools
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_dino  # noqa: E402
import utils  # noqa: E402
from vision_transformer import ARCHITECTURES, DINOHead, VisionTransformer  # noqa: E402

ARCHITECTURES["vit_tiny"] = functools.partial(VisionTransformer, embed_dim=96, depth=2, num_heads=3)
main_dino.DINOHead = lambda *args, **more: DINOHead(*args, **(more | {"hidden_dim": 512}))
count_step = main_dino.Progress.count_step


def count_and_tell(done, samples):
    count_step(done, samples)
    if os.environ.get("PROGRESS") and os.environ.get("RANK", "0") == "0":
        Path(os.environ["PROGRESS"]).write_text(str(done.step))


main_dino.Progress.count_step = count_and_tell
if os.environ.get("SLOW_DISK"):
    os.fsync = lambda file: time.sleep(float(os.environ["SLOW_DISK"]))
utils.run_script(main_dino.main)
