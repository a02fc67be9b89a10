"""Entry points of torch.hub: encoders of every architecture, random or from a checkpoint.

torch.hub.load(REPOSITORY, "encoder", source="local", weights="checkpoint.pth")
torch.hub.load(REPOSITORY, "vit_small", source="local", img_size=(96, 96, 48), patch_size=(12, 12, 6))
"""

import sys
import warnings
from collections.abc import Callable as _Callable  # torch.hub takes what has no underscore for an entry point
from collections.abc import Sequence as _Sequence
from pathlib import Path as _Path

import torch as _torch

dependencies = ["torch", "numpy"]

# Other repositories have a `vision_transformer` too, facebookresearch/dino among them, and a process has one module of
# that name: theirs is put aside while ours is imported, and ours makes way for whoever asks for it next
_ours = ("vision_transformer", "resnet3d")
_theirs = {name: sys.modules.pop(name) for name in _ours if name in sys.modules}
if str(_Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(_Path(__file__).parent))
try:
    import dino3d.features.encoder as _encoder
finally:
    for _name in _ours:
        sys.modules.pop(_name, None)
    sys.modules.update(_theirs)


def encoder(
    weights: _Path | str = "",
    checkpoint_key: str = "teacher",
    arch: str | None = None,
    img_size: _Sequence[int] | None = None,
    patch_size: _Sequence[int] | None = None,
    drop_path_rate: float = 0.0,
) -> "_encoder.Encoder":
    """A 3D vision transformer or ResNet in evaluation mode: (B, 1, X, Y, Z) with values in [0, 1] -> (B, D).

    weights: a checkpoint, or the output folder of a run, of which its architecture and sizes are; "": random ones
    checkpoint_key: which network of the file, where it holds several: teacher, student, ...
    arch, img_size (3,), patch_size (3,): where the checkpoint does not say; another img_size interpolates positions
    drop_path_rate: stochastic depth, for training on; like patch_size of a vision transformer alone
    Attributes clip_range (HU that become 0 and 1) and spacing (mm per voxel, or None) say what it was trained on. Of
    pre-trained ones the first call warns where its values are no such grey values.
    """
    given = {"arch": arch, "input_size": img_size and list(img_size), "patch_size": patch_size and list(patch_size)}
    given = dict.fromkeys(_encoder.ENCODER) | given
    found = _encoder.load_encoder(str(weights), checkpoint_key, given, flag="weights")
    for notice in found.notices:
        if not notice.startswith("weights of"):  # that it was loaded is no surprise
            warnings.warn(notice, stacklevel=2)
    model = found.build(drop_path_rate).eval()
    model.clip_range, model.spacing = found.clip_range, found.working_spacing
    if weights:
        model.values_seen = False
        model.register_forward_pre_hook(_look_at_values, with_kwargs=True)
    return model


def _look_at_values(
    model: "_encoder.Encoder", args: tuple[_torch.Tensor, ...], named: dict[str, _torch.Tensor]
) -> None:
    """Warn where the first call has other values than [0, 1], which noise and resampling may leave by a little: of HU
    that nobody scaled an encoder makes features that look as good as any."""
    if model.values_seen or _torch.compiler.is_compiling():  # what depends on values can't be compiled or exported
        return
    volume = next(iter((*args, *named.values())), None)
    if volume is None or not volume.numel():
        return
    try:
        low, high = (float(value) for value in volume.aminmax())
    except RuntimeError:  # those of vmap, meta and fake tensors can't be looked at
        return
    model.values_seen = True
    if low < -1 or high > 2:
        bottom, top = model.clip_range
        warnings.warn(
            f"values from {low:g} to {high:g}, where the encoder was trained on 0 to 1: scale HU by "
            f"((hu - ({bottom:g})) / {top - bottom:g}).clip(0, 1)",
            stacklevel=2,
        )


def _of_architecture(name: str) -> _Callable[..., "_encoder.Encoder"]:
    def build(
        weights: _Path | str = "",
        checkpoint_key: str = "teacher",
        img_size: _Sequence[int] | None = None,
        patch_size: _Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
    ) -> "_encoder.Encoder":
        return encoder(weights, checkpoint_key, name, img_size, patch_size, drop_path_rate)

    build.__name__, build.__doc__ = name, f"{name}, see `encoder`."
    return build


globals().update({name: _of_architecture(name) for name in _encoder.ARCHITECTURES})
