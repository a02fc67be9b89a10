"""The pre-trained encoder: what to build it with, from a checkpoint and flags."""

from typing import Any, NamedTuple

from dino3d.command_line import UserError, format_values
from dino3d.weights import config_of, crc32_of_tensors, find_network, fit_network, load_file
from vision_transformer import ARCHITECTURES, Encoder

# Where neither a flag nor the checkpoint's config says
ENCODER = {
    "arch": "vit_small",
    "patch_size": [12, 12, 6],
    "input_size": [96, 96, 48],
    "clip_range": [-1000.0, 1000.0],
    "spacing": None,
}


class PretrainedEncoder(NamedTuple):
    """A pre-trained encoder: what to build it with, its weights (None: from scratch), and what to tell of them.

    crc32: of the weights in their file; "" without
    """

    arch: str
    patch_size: list[int]
    input_size: list[int]
    clip_range: list[float]
    spacing: list[float] | None
    state: dict[str, Any] | None = None
    notices: tuple[str, ...] = ()
    crc32: str = ""

    def build(self, drop_path_rate: float = 0.0) -> Encoder:
        """A new one with these weights, or random ones."""
        encoder = ARCHITECTURES[self.arch](
            img_size=self.input_size, patch_size=self.patch_size, drop_path_rate=drop_path_rate
        )
        if self.state is not None:
            encoder.load_state_dict(self.state)
        return encoder

    def settings(self) -> dict[str, Any]:
        """{name: value} of all but the weights."""
        return {name: getattr(self, name) for name in ENCODER}


def load_encoder(path: str, checkpoint_key: str = "teacher", given: dict[str, Any] | None = None) -> PretrainedEncoder:
    """The PretrainedEncoder of a checkpoint; without `path` one with random weights.

    checkpoint_key: see `weights.find_network`
    given: {name: value or None} for the names of ENCODER, from flags; None: as the checkpoint's config says. With
    another input_size the position embedding is interpolated.
    Raises UserError for a file that is missing, broken or of another architecture, and for other flags that contradict
    it.
    """
    config, given = {}, given or dict.fromkeys(ENCODER)
    if path:
        try:
            checkpoint = load_file(path)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"--pretrained_weights {error}", everywhere=True) from error
        config = encoder_config(checkpoint, path)
    chosen = {}
    for name, default in ENCODER.items():
        trained = config.get(name)
        trained = list(trained) if isinstance(trained, tuple) else trained
        if None not in (trained, given[name]) and trained != given[name] and name != "input_size":
            raise UserError(
                f"--{name} {format_values(given[name])} contradicts --pretrained_weights {path}, which has "
                f"{format_values(trained)}: leave --{name} out",
                everywhere=True,
            )
        chosen[name] = next((value for value in (given[name], trained) if value is not None), default)
    if any(n % p for n, p in zip(chosen["input_size"], chosen["patch_size"])):
        source = f"--pretrained_weights {path}: " if path else ""
        raise UserError(
            f"{source}an input of {format_values(chosen['input_size'])} voxels is not a multiple of the patch size "
            f"{format_values(chosen['patch_size'])} along each axis: give other --input_size or --patch_size",
            everywhere=True,
        )
    encoder = PretrainedEncoder(**chosen)
    if not path:
        return encoder
    model = encoder.build()
    try:
        network = find_network(model, checkpoint, path, checkpoint_key)
        notices = fit_network(model, network, checkpoint, path)
    except ValueError as error:
        arch = f"; is --arch {encoder.arch} right?" if "does not fit" in str(error) else ""
        raise UserError(f"--pretrained_weights {error}{arch}", everywhere=True) from error
    notices = (f"weights of {path}: {network.origin}", *notices)
    crc32 = crc32_of_tensors({name: network.tensors[name] for name in model.state_dict()})
    return encoder._replace(state=model.state_dict(), notices=notices, crc32=crc32)


def encoder_config(checkpoint: dict[str, Any], path: str) -> dict[str, Any]:
    """What the config in a checkpoint says, or older code's args. Raises UserError for what no encoder can have."""
    config = config_of(checkpoint)
    if not isinstance(config, dict):
        raise UserError(
            f"--pretrained_weights {path}: its config is a {type(config).__name__}, expected a dict", everywhere=True
        )

    def numbers(value: Any, count: int, low: float, high: float, kinds: tuple[type, ...] = (int, float)) -> bool:
        return (
            isinstance(value, (list, tuple))
            and len(value) == count
            and all(type(number) in kinds and low <= number <= high for number in value)
        )

    sound = {
        "arch": lambda value: isinstance(value, str) and value in ARCHITECTURES,
        "patch_size": lambda value: numbers(value, 3, 1, 4096, (int,)),
        "input_size": lambda value: numbers(value, 3, 1, 4096, (int,)),
        "clip_range": lambda value: numbers(value, 2, -1e6, 1e6) and value[0] < value[1],
        "spacing": lambda value: numbers(value, 3, 1e-6, 1e6),
    }
    for name, fits in sound.items():
        if config.get(name) is not None and not fits(config[name]):
            found = " ".join(repr(config[name]).split())[:100]
            raise UserError(
                f"--pretrained_weights {path}: its config has {name} {found}, which no encoder here can have",
                everywhere=True,
            )
    return config
