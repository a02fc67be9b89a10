"""The probe of a pre-training run: what its teacher's features are worth on labelled crops, as it trains.

Every few epochs the crops are embedded and judged by kNN and logistic regression, folds by patient, beside two things
that stay as they are: the encoder before training, and trivial figures of the crops. In fp32, in evaluation mode and
without gradients, whatever the run trains in; nothing random is drawn from where training draws, so that the run is the
same with and without it.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from augmentations import scale_intensity
from dino3d.command_line import UserError
from dino3d.data.conventions import DataError
from dino3d.evaluation.protocols import PATHS, count_by_patient, nested_splits, one_hot, out_of_fold
from dino3d.evaluation.statistics import BOOTSTRAP_ROUNDS, Bootstrap, bootstrap_weights, format_metric, with_interval
from dino3d.evaluation.weighted_metrics import weighted_auc
from dino3d.features.pooling import POOLS, embed
from dino3d.features.probe_crops import ProbeCrops
from dino3d.files import read_json, write_json
from dino3d.training.checkpoint import ALONE, load_checkpoint, save_checkpoint, to_cpu
from dino3d.training.monitor import ProbeResult
from utils import Processes
from vision_transformer import Encoder

PROBE_FOLDS = 5
PROBE_POOL = "cls+centre"  # the middle of a crop holds what it is labelled for
OLDER_POOL = "cls+mean"  # of runs whose files name none, which keep it; cls where there are no class tokens
BEST_PROBE, COMPARED = "best_probe.pth", "probe.json"
TRIVIAL_CURVE = "trivial-"  # before the names of curves
PROBE_AUCS = ("logistic_auc", "knn_auc")
LOGISTIC, MINUS_START = "logistic_auc", "logistic_auc_minus_start"  # the first chooses the best epoch


class Probe:
    """Embeds labelled crops with the teacher every `every` epochs and after the last one, and judges the features.

    folder: in the layout of `find_crops`; epochs: of the run
    encoder: the teacher's before training, of which a copy is kept until `begin`
    config: of the run, as its checkpoints have it
    """

    def __init__(
        self,
        folder: str,
        every: int,
        epochs: int,
        output_dir: Path,
        processes: Processes,
        encoder: Encoder,
        config: dict[str, Any],
    ) -> None:
        self.every, self.epochs, self.output_dir, self.processes = every, epochs, output_dir, processes
        self.config, self._start, self._seconds = config, copy.deepcopy(encoder).to("cpu"), 0.0  # since the last record
        self.crops = ProbeCrops(folder, config["input_size"], config["spacing"], processes)

    def begin(self, step: int) -> None:
        """Read the crops, and measure what the curves are compared with, unless an earlier start did.

        step: that the run resumes from. Raises UserError, on all ranks, for crops that can't be used, and for others
        than the run was probed on before.
        """
        began, main = time.perf_counter(), self.processes.run_on_main
        self.reference = main(lambda: self._load_reference() if step else None)
        self.pool = PROBE_POOL if self.reference is None else self.reference.get("pool", OLDER_POOL)
        lines, trivial = self.crops.read(trivial=self.reference is None)
        if self.reference is None:
            if step:
                lines.append(
                    f"note: no {self.output_dir / COMPARED} yet: the encoder before training is made anew from --seed "
                    "and --pretrained_weights"
                )
            start, problem = self._features(self._start.to(self.processes.device))
            if problem:
                raise UserError(f"--probe_dir: {problem}", everywhere=True)
            self.reference = self._judge_reference(start, trivial)
            main(lambda: write_json(self.output_dir / COMPARED, self.reference))
        self._require_same(self.reference["crops"], self.output_dir / COMPARED)
        self.best = main(lambda: self._load_best() if step else None)
        if self.best and self.best["step"] > step:
            lines.append(
                f"note: {self.output_dir / BEST_PROBE} is of step {self.best['step']}, later than step {step} that is "
                "resumed from: it stays until a better one comes"
            )
        self._start = None
        if self.processes.is_main:
            tqdm.write("\n".join([*lines, self._describe()]))
        self._seconds += time.perf_counter() - began

    def measure(self, teacher: nn.Module, epoch: int, step: int) -> ProbeResult | None:
        """What the teacher's features are worth after an epoch, where it is time; keeps the best one's weights.

        Features that can't be had, where storage fails or weights are not finite, are told and end nothing, and so are
        weights of a probe that can't be written: the run's own checkpoint is what its training needs.
        """
        if epoch % self.every and epoch != self.epochs:
            return None
        began = time.perf_counter()
        features, problem = self._features(teacher.backbone)
        record, line, curves = {}, f"warning: no probe after epoch {epoch}: {problem}", {}
        if not problem:
            figures, _ = self._judge(features, self.reference["start_values"])
            figures["best_epoch"] = self.processes.run_on_main(lambda: self._keep_best(figures, teacher, epoch, step))
            curves = {"": figures, **self.reference["curves"]}
            record = {
                f"probe_{curve.replace('-', '_')}{'_' * bool(curve)}{name}": value
                for curve, of_curve in curves.items()
                for name, value in of_curve.items()
                if not curve or name in PROBE_AUCS
            }
            line = self._tell(epoch, figures)
            curves = {
                curve: {f"probe/{name}": of_curve[name] for name in PROBE_AUCS if of_curve[name] is not None}
                for curve, of_curve in curves.items()
            }
        seconds = time.perf_counter() - began
        record["probe_seconds"] = round(self._seconds + seconds, 2)
        self._seconds = 0.0
        return ProbeResult(record, line, curves, seconds)

    # -------------------------------------------------------------------------------------------------------- features

    def _features(self, encoder: Encoder) -> tuple[np.ndarray | None, str]:
        """((N, F) of all crops on every rank, "") or (None, why there are none)."""
        mine, problem = {}, ""
        try:
            with in_evaluation(encoder, eager=self.config["compile"]):
                for number in self.crops.mine():
                    windows = torch.from_numpy(self.crops.windows(number)).to(self.processes.device)  # (B, x, y, z)
                    volumes = scale_intensity(windows, *self.config["clip_range"])[:, None]  # (B, 1, x, y, z)
                    pool = "cls" if self.pool == OLDER_POOL and not encoder.has_class_token else self.pool
                    mine[number] = embed(encoder, volumes, pool).float().cpu().numpy()  # (B, F)
        except DataError as error:
            problem = str(error)
        found = self.processes.all_gather((mine, problem))
        problem = next((problem for _, problem in found if problem), "")
        if problem:
            return None, problem
        batches = {number: features for part, _ in found for number, features in part.items()}
        features = np.concatenate([batches[number] for number in sorted(batches)])[: len(self.crops.labels)]
        return (features, "") if np.isfinite(features).all() else (None, "the teacher's features are not finite")

    def _judge(self, features: np.ndarray, start_values: Any = None) -> tuple[dict[str, Any], np.ndarray]:
        return judge(features, self.crops.labels, self.crops.patients, start_values, self.processes)

    def _judge_reference(self, start: np.ndarray, trivial: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """What the teacher is compared with, as the file has it. start, trivial: (N, F) features, {name: (N, F)}"""
        features = {"start": start} | {TRIVIAL_CURVE + name: figures for name, figures in trivial.items()}
        judged = {curve: self._judge(of_curve) for curve, of_curve in features.items()}
        return {
            "crops": self.crops.identity,
            "pool": self.pool,
            "curves": {curve: figures for curve, (figures, _) in judged.items()},
            "start_values": judged["start"][1].tolist(),
        }

    # --------------------------------------------------------------------------------------------- on the main process

    def _keep_best(self, figures: dict[str, Any], teacher: nn.Module, epoch: int, step: int) -> int | None:
        """Save the teacher's weights if they are the best so far; returns the epoch of the best ones in the file."""
        score = figures[LOGISTIC]
        if score is not None and (self.best is None or score > self.best[LOGISTIC]):
            best = {"epoch": epoch, "step": step, "crops": self.crops.identity, "pool": self.pool, **figures}
            state = {"teacher": to_cpu(teacher.state_dict()), "config": self.config, "epoch": epoch, "step": step}
            try:
                save_checkpoint(self.output_dir / BEST_PROBE, state | {"probe": best})
                self.best = best
            except UserError as error:
                tqdm.write(f"warning: {error.args[0]}; the best teacher so far, after epoch {epoch}, is not kept")
        return self.best["epoch"] if self.best else None

    def _load_reference(self) -> dict[str, Any] | None:
        """What an earlier start of the run has measured, or None. Raises UserError."""
        path = self.output_dir / COMPARED
        if not path.is_file():
            return None
        try:
            reference = read_json(path)
            values = np.array(reference["start_values"], float)
            whole = (
                len(values) == reference["crops"]["crops"]
                and reference.get("pool", OLDER_POOL) in POOLS
                and values.ndim == 2
                and all(
                    figures[name] is None or isinstance(figures[name], float)
                    for figures in [reference["curves"]["start"], *reference["curves"].values()]
                    for name in PROBE_AUCS
                )
            )
            if not whole:
                raise ValueError("not what a probe writes")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: can't be read ({error}); move it away to measure anew") from error
        return reference

    def _load_best(self) -> dict[str, Any] | None:
        """What the best weights' file says of them; None without one, or if it can't be read. Raises UserError."""
        path = self.output_dir / BEST_PROBE
        if not path.exists():
            return None
        try:
            found = load_checkpoint(path).get("probe")
        except UserError as error:
            tqdm.write(f"warning: {error.args[0].partition(';')[0]}; the next probe's weights take its place")
            return None
        if (
            not isinstance(found, dict)
            or not isinstance(found.get(LOGISTIC), float)
            or {"epoch", "step"} - found.keys()
        ):
            raise UserError(f"{path}: has no figures of a probe; move it away to go on without it")
        self._require_same(found.get("crops"), path)
        if (pool := found.get("pool", OLDER_POOL)) != self.pool:
            raise UserError(
                f"{path}: its figures are of features by {pool}, those of {COMPARED} by {self.pool}: move it away to "
                "go on without it"
            )
        return found

    def _require_same(self, crops: Any, path: Path) -> None:
        """Raise UserError, which all ranks raise alike, where a file of the run tells of other crops."""
        if crops != self.crops.identity:
            raise UserError(
                f"{path}: is of other crops ({crops}) than --probe_dir {self.crops.folder} ({self.crops.identity}): "
                f"give the folder that the run was probed on, or move {COMPARED} and {BEST_PROBE} away to measure anew",
                everywhere=True,
            )

    def _describe(self) -> str:
        """What is probed, and what it is compared with, in one line."""
        counts = ", ".join(f"{n} of label{k}" for k, n in enumerate(np.bincount(self.crops.labels)))
        start = self.reference["curves"]["start"]
        trivial = ", ".join(f"{name} {format_metric(value)}" for name, value in self._trivial().items())
        return (
            f"probe every {self.every} epochs on {len(self.crops.labels)} crops ({counts}) of "
            f"{len(set(self.crops.patients))} patients, read by {self.pool} in fp32; AUC by logistic regression before "
            f"training {with_interval(start[LOGISTIC], start[LOGISTIC + '_interval'])}, of trivial figures: {trivial}"
        )

    def _tell(self, epoch: int, figures: Mapping[str, Any]) -> str:
        """What a probe found, in one line."""
        auc, minus_start = (
            with_interval(figures[name], figures[name + "_interval"]) for name in (LOGISTIC, MINUS_START)
        )
        trivial = self._trivial()
        best = max(trivial, key=lambda name: trivial[name] or 0)
        return (
            f"probe after epoch {epoch}: AUC by logistic regression {auc}, minus that before training {minus_start}; "
            f"by kNN {format_metric(figures['knn_auc'])}; of trivial figures at best {format_metric(trivial[best])} "
            f"({best}); "
            + (f"best probe after epoch {figures['best_epoch']}" if figures["best_epoch"] else f"no {BEST_PROBE} yet")
        )

    def _trivial(self) -> dict[str, float | None]:
        """{name: AUC by logistic regression} of trivial figures."""
        curves = self.reference["curves"].items()
        return {curve.removeprefix(TRIVIAL_CURVE): one[LOGISTIC] for curve, one in curves if curve != "start"}


@contextlib.contextmanager
def in_evaluation(encoder: nn.Module, eager: bool) -> Iterator[None]:
    """Context in which an encoder neither trains, nor keeps gradients, nor is changed; it is left as it was.

    eager: pass torch.compile by, which would compile its blocks anew for the shape of a probe's batches
    """
    training = {module: module.training for module in encoder.modules()}
    try:
        encoder.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
            yield
    finally:
        for module, was in training.items():
            module.training = was


def judge(
    features: np.ndarray,
    labels: np.ndarray,
    patients: Sequence[str],
    start_values: Any = None,
    processes: Processes = ALONE,
) -> tuple[dict[str, Any], np.ndarray]:
    """({name: figure}, (N, classes) probabilities by logistic regression) of features (N, F), in PROBE_FOLDS folds by
    patient, or as many as the rarest label has patients; each rank takes its share of them.

    AUCs are over the pairs of crops of one fold, with more than two classes each against the rest; None where no fold
    has such a pair. Intervals are of 95 % (BCa), by bootstrap over patients.
    start_values: (N, classes) probabilities of the encoder before training, for the difference to it
    """
    targets = one_hot(labels, labels.max() + 1)
    _, counts = count_by_patient(patients, labels)  # (P, classes)
    folds_at_most = min(PROBE_FOLDS, (counts > 0).sum(0).min())  # so that each one tests all labels
    (splits,) = nested_splits(patients, labels, folds_at_most, repeats=1, seed=0)
    mine = splits[processes.rank :: processes.world_size]
    found = {}
    for name, path in PATHS["classification"].items():
        found[name], folds = np.full(targets.shape, np.nan), np.full(len(labels), -1)
        parts = processes.all_gather([out_of_fold(path, features, targets, [split]).values for split in mine])
        for fold, split in enumerate(splits):
            rank, place = fold % processes.world_size, fold // processes.world_size
            found[name][split.test], folds[split.test] = parts[rank][place][split.test], fold
    values, weights = found["logistic"], bootstrap_weights(patients, BOOTSTRAP_ROUNDS, seed=0)

    def with_interval_of(name: str, metric: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
        estimate, draws, left_out = map(metric, weights)
        interval = Bootstrap(estimate[0], draws, left_out).interval()
        return {name: None if np.isnan(estimate[0]) else float(estimate[0]), f"{name}_interval": interval}

    def auc(values: Any, weights: np.ndarray) -> np.ndarray:
        return weighted_auc(labels, np.asarray(values), weights, folds)

    figures = with_interval_of(LOGISTIC, lambda weights: auc(values, weights))
    if start_values is not None:
        figures |= with_interval_of(MINUS_START, lambda weights: auc(values, weights) - auc(start_values, weights))
    knn = float(auc(found["knn"], np.ones(len(labels))))
    return figures | {"knn_auc": None if np.isnan(knn) else knn}, values
