"""What a pre-training run says of itself: progress bar, log.txt, TensorBoard, pictures, and a word when it
collapses."""

import contextlib
import math
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm

from augmentations import MultiCropAugmentation
from dino3d.command_line import UserError
from dino3d.files import TEXT, append_json, read_log, read_table, write_table
from dino3d.training.collapse import CollapseWatch, TeacherOutputs, TeacherStatistics
from dino3d.training.events import EventWriter
from dino3d.training.pictures import EVEN, NO_TISSUE, example_views, montage, planes, save_picture, scan_name, view_rows
from utils import Processes, Silent


def air_share(views: Sequence[Tensor]) -> Tensor:
    """() share of the views that hold no tissue. views: [global (2 B, 1, x, y, z), local (L B, 1, x, y, z)]."""
    return torch.cat([(view.flatten(1).amax(1) < NO_TISSUE).float() for view in views]).mean()


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # what getrusage says counts the process that started this one too
        status = Path("/proc/self/status").read_text(**TEXT)
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
    except (OSError, TypeError):  # another system than Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class BadFiles:
    """The unreadable files that the ranks meet in an epoch, whose place other samples take.

    path: of the CSV that lists those of all epochs; volumes: how many there are; most: how many of them may be bad
    """

    def __init__(self, path: Path, processes: Processes, volumes: int, most: int) -> None:
        self.path, self.processes, self.volumes, self.most = path, processes, volumes, most
        # {file: reason} of all ranks; of this one since they last met
        self.epoch, self.reasons, self._new = None, {}, {}

    def start_epoch(self, epoch: int | None) -> None:
        if epoch != self.epoch:
            self.epoch, self.reasons, self._new = epoch, {}, {}

    def record(self, batch: Any) -> None:
        """Take note of what a pretraining.Batch met on this rank. Raises UserError where it met so many that it gave
        up."""
        self._new.update(batch.bad)
        if batch.fatal and len(self.reasons | self._new) > self.most:
            self.reasons |= self._new
            self.write()
            raise UserError(self._too_many())

    def gather(self) -> None:
        """Bring together what the ranks met. Raises UserError, on all of them, where that is too much."""
        new, self._new = {file: reason for file, reason in self._new.items() if file not in self.reasons}, {}
        if self.processes.sum(torch.tensor(float(len(new)), device=self.processes.device)) > 0:
            for part in self.processes.all_gather(new):
                self.reasons |= part
        if len(self.reasons) > self.most:
            if self.processes.is_main:
                self.write()
            raise UserError(self._too_many(), everywhere=True)

    def _example(self) -> str:
        file, reason = next(iter(self.reasons.items()))
        return f"such as {file}: {reason}; all of them are in {self.path}"

    def _too_many(self) -> str:
        bad = len(self.reasons)
        return (
            f"{bad} of {self.volumes} volumes ({bad / self.volumes:.0%}) are unreadable in epoch {self.epoch}, "
            f"--max_bad_files allows {self.most}, {self._example()}. Repair or remove them, or raise --max_bad_files"
        )

    def report(self, print_line: Callable[[str], None]) -> None:
        """At an epoch's end: one line for the console, and all of them in the CSV."""
        if self.reasons:
            self.write()
            print_line(
                f"epoch {self.epoch}: {len(self.reasons)} unreadable files, whose place other samples took, "
                f"{self._example()}"
            )

    def write(self) -> None:
        """Add what is new to the CSV; a file that was bad before keeps its row."""
        header, rows = ["path", "reason", "first_epoch"], {}
        if self.path.is_file():
            with contextlib.suppress(UserError):  # no table any more
                rows = {
                    row["path"]: list(row.values())
                    for row in read_table(self.path)
                    if list(row) == header and None not in row.values()
                }
        for file, reason in self.reasons.items():
            rows.setdefault(file, [file, reason, self.epoch])
        write_table(self.path, header, rows.values())


class ProbeResult(NamedTuple):
    """What a probe of the features found at an epoch's end.

    record: {name: value} for log.txt, "probe_seconds" among them: all that the probe has taken since the last one
    line: for the console; seconds: that it took after the epoch
    curves: {curve: {tag: value}} for TensorBoard; "": the run's own, others are drawn beside it under the same tags
    """

    record: dict[str, Any]
    line: str
    curves: dict[str, dict[str, float]]
    seconds: float


class Monitor:
    """Collects on the device what each step tells, fetches it every `log_every` steps, and shows it from rank 0.

    output_dir; processes: utils.Processes; out_dim: prototypes
    total_steps, done_steps: of the whole run, for the bar and its ETA
    volumes, max_bad: how many there are, and how many of them may be unreadable in an epoch
    sinkhorn: instead of a centre, by which a collapse is told otherwise
    """

    def __init__(
        self,
        output_dir: Path | str,
        processes: Processes,
        out_dim: int,
        log_every: int,
        total_steps: int,
        done_steps: int,
        global_batch: int,
        volumes: int,
        max_bad: int,
        sinkhorn: bool = False,
    ) -> None:
        self.output_dir, self.processes, self.out_dim = Path(output_dir), processes, out_dim
        self.log_every, self.global_batch = log_every, global_batch
        self.bad_files = BadFiles(self.output_dir / "bad_files.csv", processes, volumes, max_bad)
        self._missing = None  # (path, reason) of the first patch that was not drawn where it should
        records = read_log(self.output_dir / "log.txt") if processes.is_main else ()
        self._names, self._watch = None, CollapseWatch(out_dim, records, sinkhorn)
        self.writer, self.bar, self._curves, self._done_steps = Silent(), Silent(), {}, done_steps
        if processes.is_main:
            self.writer = EventWriter(self.output_dir / "tensorboard", done_steps)
            # In a file or a batch job's log one line a minute is enough
            self.bar = tqdm(
                total=total_steps,
                initial=done_steps,
                unit="step",
                dynamic_ncols=True,
                file=sys.stderr,
                mininterval=0.5 if sys.stderr.isatty() else 60,
            )
        self._teacher = TeacherStatistics(out_dim, processes)
        self._reset_window()
        self.start_epoch(None)

    def start_epoch(self, epoch: int | None) -> None:
        self.bad_files.start_epoch(epoch)
        self._epoch = []  # (steps, steps that were taken, {metric: mean}, seconds without data) of each entry
        self._epoch_began = time.perf_counter()
        self._epoch_wins = torch.zeros(self.out_dim, device=self.processes.device)

    def _reset_window(self) -> None:
        self._sums = 0.0  # (names + 1,) of the metrics, in the order of the first step's, and of the steps taken
        self._teacher.reset()
        self._steps, self._waited, self._began = 0, 0.0, time.perf_counter()

    def print(self, message: str) -> None:
        tqdm.write(message, file=sys.stderr)

    def record(self, batch: Any) -> None:
        """Take note of what a pretraining.Batch met on this rank; tell the first patch that was not drawn where it
        should. Raises UserError, see `BadFiles.record`."""
        self.bad_files.record(batch)
        if batch.missing and not self._missing:
            self._missing = batch.missing[0]
            self._tell_missing()

    def _tell_missing(self) -> None:
        if self.processes.is_main:
            path, reason = self._missing
            self.print(f"--foreground: {path}: {reason}, and so in others like it")

    def step(self, finite: Tensor, metrics: Mapping[str, Tensor], teacher: TeacherOutputs, waited: float) -> None:
        """Take note of one step; of one that was skipped, only that.

        finite: () bool; metrics: {name: ()} the same names in each step, "kl" and "teacher_entropy" among them
        waited: seconds without data
        """
        self._names = self._names or tuple(metrics)
        values = torch.stack([metrics[name].to(metrics["kl"].dtype) for name in self._names])
        self._sums = self._sums + torch.where(finite, torch.cat([values, torch.ones_like(values[:1])]), 0)
        self._teacher.add(teacher, finite)
        self._steps, self._waited = self._steps + 1, self._waited + waited
        self.bar.update()

    def flush(self, step: int, schedules: Mapping[str, float], center_norm: Tensor) -> None:
        """Fetch what was collected since the last entry and show it. Raises UserError for too many unreadable files.

        schedules: {name: value}
        """
        self.bad_files.gather()
        *sums, finite = self.processes.mean(self._sums).tolist()
        finite, values = (
            round(finite),
            {name: value / finite for name, value in zip(self._names, sums)} if finite else {},
        )
        teacher = self._teacher.gather()
        if finite:
            values |= {
                "effective_rank": teacher.effective_rank,
                "mutual_information": teacher.marginal_entropy - values["teacher_entropy"],
            }
        seconds, winners = time.perf_counter() - self._began, int((teacher.wins > 0).sum())
        rate, waiting = self._steps * self.global_batch / seconds, self._waited / seconds
        self._epoch.append((self._steps, finite, values, self._waited))
        self._epoch_wins += teacher.wins
        if self.processes.is_main:
            shown = {"dino/" + name: value for name, value in values.items()}
            if finite:
                shown |= {
                    "dino/teacher_entropy_share": values["teacher_entropy"] / math.log(self.out_dim),
                    "dino/winning_prototypes": winners,
                }
            shown |= {
                "dino/center_norm": center_norm.item(),
                "dino/skipped_steps": self._steps - finite,
                "speed/volumes_per_second": rate,  # samples, by its first name
                "speed/waiting_for_data": waiting,
            } | {"schedule/" + name: value for name, value in schedules.items()}
            for name, value in shown.items():
                self.writer.add_scalar(name, value, step)
            self.bar.set_postfix_str(
                f"KL {values.get('kl', math.nan):.3f}, rank {teacher.effective_rank:.1f}, {rate:.1f} samples/s, "
                f"{waiting:.0%} waiting for data",
                refresh=False,
            )
            if finite < self._steps:
                self.print(
                    f"{self._steps - finite} of the {self._steps} steps up to step {step} were skipped and changed "
                    "nothing: their loss or gradient was not finite"
                )
            if finite and (warning := self._watch.look(values, winners, teacher)):
                self.print(f"warning: {warning}")
        self._reset_window()

    def log_epoch(self, epoch: int, step: int, schedules: dict[str, float], probed: ProbeResult | None = None) -> None:
        """One more line of log.txt: means over the epoch's steps that were taken (`epoch`, `step`: how many are
        done), and what a probe found after them, whose time is not the epoch's."""
        seconds = time.perf_counter() - self._epoch_began - (probed.seconds if probed else 0)
        met = self.processes.all_gather(self._missing)  # rank 0 may have had none of what other ranks had
        if not self._missing and any(met):
            self._missing = next(filter(None, met))
            self._tell_missing()
        steps = sum(count for count, *_ in self._epoch)
        entries = [(finite, values) for _, finite, values, _ in self._epoch if finite]
        finite = sum(count for count, _ in entries)
        means = {
            name: sum(count * values[name] for count, values in entries) / finite if finite else None
            for name in (*self._names, "effective_rank", "mutual_information")
        }
        if self.processes.is_main:
            self.bad_files.report(self.print)
            if finite:
                tqdm.write(
                    f"epoch {epoch}, step {step}/{self.bar.total}: KL divergence {means['kl']:.3f}, teacher entropy "
                    f"{means['teacher_entropy'] / math.log(self.out_dim):.2f} of ln(out_dim), effective rank "
                    f"{means['effective_rank']:.1f}, mutual information {means['mutual_information']:.2f} nats, "
                    f"{seconds:.1f} s"
                )
            append_json(
                self.output_dir / "log.txt",
                {"epoch": epoch, "step": step}
                | means
                | {
                    "teacher_entropy_share": means["teacher_entropy"] / math.log(self.out_dim) if finite else None,
                    "winning_prototypes": int((self._epoch_wins > 0).sum()),
                    # of this epoch, or of it since the run was resumed
                    "kl_first_steps": entries[0][1]["kl"] if finite else None,
                    "effective_rank_first_steps": entries[0][1]["effective_rank"] if finite else None,
                    "skipped_steps": steps - finite,
                    "seconds": round(seconds, 2),
                    # samples: older logs and what reads them have this name
                    "volumes_per_second": round(steps * self.global_batch / seconds, 2),
                    "waiting_for_data": round(sum(waited for *_, waited in self._epoch) / seconds, 4),
                    "peak_memory_gib": round(peak_memory(self.processes.device) / 2**30, 2),
                    "bad_files": len(self.bad_files.reasons),
                }
                | schedules
                | (probed.record if probed else {}),
            )
            if probed:
                share = probe_share(read_log(self.output_dir / "log.txt"))
                tqdm.write(f"{probed.line}; {probed.seconds:.1f} s, probes took {share:.1%} of the run so far")
                self._show_curves(probed.curves, step)
        self.writer.flush()
        self._began = time.perf_counter()  # the next entry's rate is that of its steps

    def _show_curves(self, curves: Mapping[str, Mapping[str, float]], step: int) -> None:
        for curve, values in curves.items():
            if curve and curve not in self._curves:
                self._curves[curve] = EventWriter(self.output_dir / "tensorboard" / curve, self._done_steps)
            writer = self._curves[curve] if curve else self.writer
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
            writer.flush()

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Save a uint8 picture as a PNG in the output folder and show it in TensorBoard."""
        save_picture(self.output_dir / f"{name}.png", image)
        self.writer.add_image(name, image, step, dataformats="HW")

    def show_views(
        self,
        views: Sequence[Tensor],
        paths: Sequence[Path | str],
        spacings: Sequence[ArrayLike],
        step: int,
        most: int = 4,
        local_stretch: ArrayLike = 1.0,
    ) -> None:
        """Picture of the current views: per sample two global ones (axial and coronal) and its local ones (axial).

        paths, spacings: of each sample's scan, (3,) mm per voxel of its views; local_stretch: see `view_rows`
        """
        if self.processes.is_main:
            rows, labels = view_rows(views, [scan_name(path) for path in paths], spacings, most, local_stretch)
            self.picture("views", montage(rows, labels, f"what the networks see at step {step}; {EVEN}"), step)

    def show_augmentations(
        self, batch: Any, crops: MultiCropAugmentation, clip_range: tuple[float, float], step: int
    ) -> None:
        """Picture of each augmentation alone, four draws each, on that one of a pretraining.Batch's patches that
        varies most."""
        if self.processes.is_main:
            middles = [
                patch[tuple(slice(max(0, (n - m) // 2), (n + m) // 2) for n, m in zip(patch.shape, crops.global_size))]
                for patch in batch.patches[:16]
            ]
            shown = max(range(len(middles)), key=lambda i: middles[i].float().clamp(*clip_range).std().item())
            of_patch = batch.spacings[shown]
            patch = batch.patches[shown].to(self.processes.device)
            examples = example_views(patch, crops, clip_range, patch_spacing=of_patch)
            mm = of_patch if crops.spacing is None else crops.spacing
            rows = [[tile for view in views for tile in planes(view[0], mm)] for views in examples.values()]
            labels = [f"{name}: four draws, axial and coronal" for name in examples]
            self.picture("augmentations", montage(rows, labels, f"{scan_name(batch.paths[shown])}; {EVEN}"), step)

    def close(self) -> None:
        for writer in (self.writer, *self._curves.values()):
            writer.close()
        self.bar.close()


def probe_share(records: Sequence[Mapping[str, Any]]) -> float:
    """Share of a run's time that its probes took. records: of log.txt"""
    probes = sum(record.get("probe_seconds", 0) for record in records)
    return probes / max(probes + sum(record.get("seconds", 0) for record in records), 1e-9)


def summary(output_dir: Path | str) -> str:
    """A few lines on how a run went and where its results are."""
    output_dir = Path(output_dir)
    records, lines = read_log(output_dir / "log.txt"), []
    skipped = sum(record.get("skipped_steps", 0) for record in records)
    records = [record for record in records if record["kl"] is not None]  # None: all steps of the epoch were skipped
    if records:
        first, last = records[0], records[-1]
        lines.append(
            f"epoch {last['epoch']}, step {last['step']}: KL divergence {first['kl_first_steps']:.3f} in the "
            f"first steps of epoch {first['epoch']}, {last['kl']:.3f} over the last epoch; teacher entropy "
            f"{last['teacher_entropy_share']:.2f} of ln(out_dim); {last['winning_prototypes']} prototypes win"
        )
        if "effective_rank" in last:  # which older logs don't have
            began = first.get("effective_rank_first_steps")
            lines.append(
                "effective rank of the features "
                + (f"{began:.1f} in the first steps, " if began else "")
                + f"{last['effective_rank']:.1f} over the last epoch; mutual information of view and prototype "
                f"{last['mutual_information']:.2f} nats"
            )
    if skipped:
        lines.append(f"{skipped} steps were skipped, see skipped_steps in log.txt")
    figures = ("probe_logistic_auc", "probe_start_logistic_auc", "probe_best_epoch")
    probed = [record for record in records if None not in map(record.get, figures)]
    if probed:
        last = probed[-1]
        lines.append(
            f"probe: AUC by logistic regression {last['probe_logistic_auc']:.3f} after epoch {last['epoch']}, "
            f"{last['probe_start_logistic_auc']:.3f} before training; best after epoch {last['probe_best_epoch']} "
            f"({output_dir / 'best_probe.pth'}); probes took {probe_share(records):.1%} of the run's time"
        )
    lines += [
        f"checkpoint   {output_dir / 'checkpoint.pth'}",
        f"log          {output_dir / 'log.txt'}",
        f"pictures     {output_dir / 'views.png'}, {output_dir / 'augmentations.png'}",
        f"TensorBoard  tensorboard --logdir {output_dir}",
    ]
    return "\n".join(lines)
