"""Bring data sets, as they are downloaded, into the layouts that the training scripts read; one sub-command each.

    python prepare_data.py nlst   --input NLST --output data/nlst            DICOM series, NIfTI, MetaImage, NRRD
    python prepare_data.py luna16 --input LUNA16 --output data/luna16        crops around the points of a table
    python prepare_data.py msd    --input Task06_Lung --output data/msd      images and label masks
    python prepare_data.py check  data/luna16                                what the training scripts would say of it
    python prepare_data.py demo   --output demo/data                         small data in all three layouts

Everything is brought to RAS and int16 Hounsfield units. A run that was stopped in any way goes on where it was when it is
started again. What became of every input stands in manifest.csv.
"""
import collections
import csv
import json
import os
import re
import shutil
import stat
import sys
import unicodedata
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

import demo_data
import images
from convert import (FAILED, LEFT_OUT, MANIFEST, RECIPE, Job, Output, convert_all, in_processes, opened, progress,
                     report, stamp_of, standing, state_of)
from data import (FILTERS, DataError, Volume, find_crops, find_pairs, find_volumes, other_grid, read_pair, walk_files,
                  write_volume)
from demo_data import PATIENTS
from images import LeftOut, by
from utils import ArgumentParser, Processes, UserError, cores_per_process, number, run_script

HEADERS_PER_TASK = 500  # files that a worker looks into at a time
QUANTILES = {"hu_p1": 1, "hu_p50": 50, "hu_p99": 99}
IMAGE_COLUMNS = ["shape", "spacing", "hu_min", *QUANTILES, "hu_max", "bytes", "status", "reason", "stamp"]


def get_args_parser():
    parser = ArgumentParser(description="Bring data sets into the layouts that the training scripts read.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    spacing = {"type": number(float, above=0), "nargs": 3, "metavar": ("X", "Y", "Z")}

    def command(name, convert, summary, source):
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=convert)
        sub.add_argument("--input", type=Path, required=True, metavar="DIR", help=source + "; nothing in it is changed")
        sub.add_argument("--output", type=Path, required=True, metavar="DIR",
                         help="folder to write to; start again with the same one to go on or to take in what changed")
        sub.add_argument("--workers", type=number(int, 1), default=cores_per_process(Processes()),
                         help="processes, each with one volume in memory (0.3 to 1 GB); the result is the same for any number")
        return sub

    sub = command("nlst", nlst, "CT scans into <patient>/t<k>/<series>.hdf5, for pre-training",
                  "folder with DICOM series, NIfTI, MetaImage, NRRD or HDF5 volumes at any depth")
    sub.add_argument("--min_slices", type=number(int, 1), default=16, help="series with fewer slices are left out")
    sub.add_argument("--one_per_study", action="store_true",
                     help="keep one DICOM series of each study: that of the thinnest slices, then of the softest kernel, then "
                          "of the most slices; the next one where it can't be used")
    sub.add_argument("--crop_to_body", type=number(float, 0), metavar="MM",
                     help="cut away the air and table around the body, leaving this margin in mm; for scans of which much is "
                          "air (not given: whole scans)")
    sub.add_argument("--compression", choices=sorted(FILTERS), default="blosc",
                     help="blosc: fastest to read here; gzip: for files that ITK opens too; none: largest")

    sub = command("luna16", luna16, "crops around nodules and others into subset*/label<k>/<patient>/<name>.nii.gz",
                  "folder with subset*/<seriesuid>.mhd (other volumes named by series do too) and the tables")
    sub.add_argument("--size", type=number(int, 1), nargs=3, default=[96, 96, 48], metavar=("X", "Y", "Z"),
                     help="voxels of a crop; larger than the ViT's input gives augmentations real tissue to turn into view")
    sub.add_argument("--spacing", **{**spacing, "type": number(float, 0)}, default=[0.7, 0.7, 1.4],
                     help="mm per voxel of a crop; 0 0 0 keeps each scan's own voxels")
    sub.add_argument("--negatives_per_scan", type=number(int, 0), metavar="N",
                     help="candidates of label 0 drawn from each scan (default: 20 of candidates*.csv, all of a --table); all "
                          "others are taken")
    sub.add_argument("--seed", type=number(int, 0), default=0, help="of that draw")
    sub.add_argument("--table", type=Path, metavar="CSV",
                     help="points of your own instead of candidates*.csv and annotations.csv: columns seriesuid, coordX, "
                          "coordY, coordZ (LPS mm, as LUNA16) and the label")
    sub.add_argument("--label_column", default="class", metavar="NAME",
                     help="column of --table with the label, a whole number from 0 on")
    sub.add_argument("--patients", type=Path, metavar="CSV",
                     help="table with columns seriesuid and patient, where patients have several scans (default: the series "
                          "stands for the patient)")

    sub = command("msd", msd, "images and label masks into images/ and labels/, for segmentation",
                  "a Medical Segmentation Decathlon task: imagesTr, labelsTr and dataset.json")
    sub.add_argument("--spacing", **spacing, help="resample to these mm per voxel, labels to the nearest (not given: as it is)")
    sub.add_argument("--crop", choices=["none", "body", "label"], default="none",
                     help="body: cut away the air around it; label: keep the labelled part, which a scan without label can't be "
                          "brought to")
    sub.add_argument("--margin", type=number(float, 0), default=20, help="mm that --crop leaves on all sides")

    sub = commands.add_parser("check", help="read a prepared folder and tell what the training scripts would refuse")
    sub.set_defaults(run=check)
    sub.add_argument("folder", type=Path, help="a folder in one of the three layouts")
    sub.add_argument("--workers", type=number(int, 1), default=cores_per_process(Processes()), help="processes that read")

    sub = commands.add_parser("demo", help="two public lung CTs and synthetic phantoms, in all three layouts")
    sub.set_defaults(run=demo)
    sub.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    sub.add_argument("--phantom", action="store_true",
                     help="synthetic chest phantoms only, and fetch nothing; without it, only where the fetch fails")
    return parser


def main():
    parser = get_args_parser()
    args = vars(parser.parse_args())
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    command, run = args.pop("command"), args.pop("run")
    if "input" in args:
        source, target = (Path(os.path.realpath(args[name])) for name in ("input", "output"))
        if target in (source, *source.parents):
            what = "is the --input itself" if target == source else f"holds the --input {args['input']}"
            parser.error(f"--output {args['output']} {what}: give another folder")
        if not args["input"].is_dir():
            raise UserError(f"--input {args['input']}: " + ("is no folder" if args["input"].exists() else "no such folder"))
    if command == "luna16":
        if any(args["spacing"]) and not all(args["spacing"]):
            parser.error(f"--spacing {by(args['spacing'])}: expected three lengths above 0, or 0 0 0")
        if args["label_column"] != "class" and args["table"] is None:
            parser.error("--label_column is for a --table of your own")
    try:
        run(**args)
    except DataError as error:
        raise UserError(str(error)) from error


def safe_name(text, otherwise):
    """A name from a table or header made fit for one file or folder: no separators, not hidden, not long, none of ours.

    Where something has to be changed, a hash keeps different names different. Empty ones become `otherwise`.
    """
    text = unicodedata.normalize("NFC", text).strip()
    if not text:
        return otherwise
    name = re.sub(r"[^\w.+=-]", "_", text).lstrip(".")
    name = name.encode()[:100].decode(errors="ignore")  # file systems count bytes, 255 at most
    if name == text and name.lower() not in (MANIFEST, RECIPE):
        return name
    return f"{name or otherwise}-{zlib.crc32(text.encode(errors='surrogatepass')):08x}"


def path_in(folder, name):
    """Path of an input file. Raises DataError for a name that isn't in UTF-8, which SimpleITK can't take."""
    try:
        return os.path.join(folder, name).encode().decode()
    except UnicodeEncodeError:
        raise DataError(name, "can't be read: its name is not in UTF-8, rename it") from None


def described(image):
    """What the manifest says of an image: shape, spacing in mm, quantiles of HU (of every fourth voxel)."""
    voxels = images.voxels_of(image)
    sample = np.percentile(voxels[::2, ::2], list(QUANTILES.values()))
    return {"shape": by(image.GetSize()), "spacing": by(np.round(image.GetSpacing(), 4)), "hu_min": voxels.min(),
            **{name: f"{value:g}" for name, value in zip(QUANTILES, sample)}, "hu_max": voxels.max()}


# ---------------------------------------------------------------------------------------------------------------- nlst


NLST_COLUMNS = ["source", "output", "patient", "study_date", "slice_thickness", "kernel", *IMAGE_COLUMNS]


class File(NamedTuple):
    """A file of the input: path relative to it, and what changes when the file does."""
    path: str
    size: int
    time: int


class Scan(NamedTuple):
    """A series or a volume file: what the manifest calls it, its Files, a DICOM header or None, and what is wrong with it."""
    source: str
    files: list
    header: images.Slice = None
    problem: str = ""


class ScanTask(NamedTuple):
    """Scans to be converted, or of which the first that can be used is (one_of_them), with the outputs' paths."""
    input: str
    scans: list
    outputs: list
    one_of_them: bool
    min_slices: int
    crop_to_body: float
    compression: str


def nlst(input, output, workers, one_per_study, **options):
    """Every CT series and volume below a folder into the pre-training layout."""
    with opened(output, {"command": "nlst", "one_per_study": one_per_study, **options}) as records:
        scans, others = search(input, output, workers)
        print(f"{len(scans)} DICOM series and volumes below {input}, {others} other files", flush=True)
        if not scans:
            raise UserError(f"--input {input}: holds no DICOM files and no {', '.join(images.VOLUME_SUFFIXES)}")
        places, groups = place_scans(scans), collections.defaultdict(list)
        for scan in sorted(scans, key=preference):
            study = one_per_study and scan.header and scan.header.study  # which badly anonymised patients may share
            groups[(patient_of(scan.header), study) if study else scan.source].append(scan)
        tasks = [ScanTask(str(input), group, [places[scan.source] for scan in group], len(group) > 1, **options)
                 for group in groups.values()]
        jobs = [Job(tuple(scan.source for scan in task.scans), stamp_of(task.scans, task.outputs), task) for task in tasks]
        outcome = convert_all(convert_scans, jobs, records, NLST_COLUMNS, workers, "scan")
    report(outcome)


def search(folder, output, workers):
    """(Scans below a folder, number of other files), looking into every file that may be DICOM."""
    problems, names = [], []

    def fail(error):
        where = os.path.relpath(error.filename, folder)
        problems.append(Scan(where, [], problem=f"can't be listed: {error.strerror}"))
    for here, files in walk_files(folder, fail):
        if Path(output).resolve() not in (Path(here).resolve(), *Path(here).resolve().parents):
            names += [os.path.normpath(os.path.join(os.path.relpath(here, folder), name)) for name in files]
    tasks = [(str(folder), names[at:at + HEADERS_PER_TASK]) for at in range(0, len(names), HEADERS_PER_TASK)]
    series, scans, others = collections.defaultdict(list), problems, 0
    with progress(len(names), "header") as bar:
        for (_, chunk), result in in_processes(look_into, tasks, workers):
            if result is None:
                raise UserError(f"a process died while it read the headers of {chunk[0]} to {chunk[-1]}")
            for uid, header, files in result.series:
                series[uid].append((header, files))
            scans, others = scans + result.scans, others + result.others
            bar.update(len(chunk))
    for uid, parts in series.items():
        files = sorted(file for _, files in parts for file in files)
        header = min((header for header, _ in parts), key=lambda header: header.path)
        scans.append(Scan(f"{os.path.dirname(header.path) or '.'}#{uid}", files, header))
    return sorted(scans, key=lambda scan: scan.source), others


class Found(NamedTuple):
    """series: [(UID, header of the first file, Files)]; scans: volumes and what can't be read; others: how many."""
    series: list
    scans: list
    others: int


def look_into(task):
    """What the files (relative paths) below a folder are: a Found."""
    root, names = task
    headers, scans, others = collections.defaultdict(list), [], 0
    for name in names:
        path = os.path.join(root, name)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for without end
                others += 1
            elif name.lower().endswith(images.VOLUME_SUFFIXES):
                scans.append(Scan(name, [file_at(root, name), *companions(root, name)]))
            elif images.is_dicom(path) and (header := images.read_header(path)):
                uid = header.series or f"no UID in {os.path.dirname(name)}"
                headers[uid].append((header._replace(path=name), file_at(root, name)))
            else:
                others += 1
        except OSError as error:
            scans.append(Scan(name, [file_at(root, name)], problem=f"can't be read: {error.strerror}"))
        except DataError as error:
            scans.append(Scan(name, [file_at(root, name)], problem=error.reason))
    series = [(uid, min(found)[0], [file for _, file in found]) for uid, found in headers.items()]
    return Found(series, scans, others)


def file_at(root, name):
    return File(name, *state_of(os.path.join(root, name)))


def companions(root, name):
    """The Files with the voxels of a MetaImage or NRRD header that says where they are."""
    if not name.lower().endswith((".mhd", ".nhdr")):
        return []
    with open(os.path.join(root, name), errors="replace") as file:
        found = re.search(r"^(?:ElementDataFile\s*=|data file\s*:)\s*(\S.*?)\s*$", file.read(10000), re.M | re.I)
    return [file_at(root, os.path.join(os.path.dirname(name), found[1]))] if found else []


def preference(scan):
    """Sort key of --one_per_study: thinnest slices, softest kernel, most slices, then by name."""
    header = scan.header
    return (header.thickness or np.inf, images.sharpness(header.kernel), -len(scan.files), scan.source) if header else (
        np.inf, 0, 0, scan.source)


def place_scans(scans):
    """{source: relative path of its output}, `<patient>/t<k>/<series>.hdf5`.

    DICOM: k counts the dates of a patient's studies; studies without a date follow, each with its own k, in the order of
    their paths. Volume files: t<k> is a folder of that name on their path, or t0; the patient is what stands before it
    or, without it, the folder that holds no other volume, or the file's own name.
    """
    studies = collections.defaultdict(dict)  # patient -> {study or its date: sort key}
    for scan in (scan for scan in scans if scan.header):
        key = scan.header.date or scan.header.study
        order = (not scan.header.date, scan.header.date, scan.source)
        studies[patient_of(scan.header)][key] = min(order, studies[patient_of(scan.header)].get(key, order))
    visits = {patient: sorted(keys, key=keys.get) for patient, keys in studies.items()}
    beside = collections.Counter(os.path.dirname(scan.source) for scan in scans if not scan.header and not scan.problem)

    places = {}
    for scan in scans:
        if scan.header:
            patient = patient_of(scan.header)
            visit = f"t{visits[patient].index(scan.header.date or scan.header.study)}"
            parts = [safe_name(patient, "unknown"), visit, safe_name(scan.header.series, "series")]
        else:
            *folders, name = scan.source.split(os.sep)
            at = next((i for i, folder in enumerate(folders) if re.fullmatch(r"t\d+", folder, re.I)), None)
            name = images.stem(name)
            if at is not None:
                patient, visit, name = folders[:at] or [name], folders[at].lower(), "_".join([*folders[at + 1:], name])
            else:
                patient, visit = (folders if folders and beside[os.path.dirname(scan.source)] == 1 else [*folders, name]), "t0"
            parts = [safe_name("_".join(patient), "unknown"), visit, safe_name(name, "scan")]
        places[scan.source] = "/".join(parts) + ".hdf5"
    taken = collections.Counter(places.values())
    return {source: place if taken[place] == 1 else f"{place[:-5]}-{zlib.crc32(os.fsencode(source)):08x}.hdf5"
            for source, place in places.items()}


def patient_of(header):
    return header.patient or header.study or header.series


def convert_scans(task):
    """Outputs of a ScanTask; one for each scan, with a file or with the reason why not."""
    kept = None
    for scan, output in zip(task.scans, task.outputs):
        row = {"source": scan.source}
        if scan.header:
            row |= {"patient": scan.header.patient, "study_date": scan.header.date, "kernel": scan.header.kernel,
                    "slice_thickness": f"{scan.header.thickness:g}"}
        if kept:
            yield Output({**row, "reason": f"another series of the study is preferred: {kept}"}, None)
            continue
        try:
            image = read_scan(task, scan)
        except DataError as error:
            status = LEFT_OUT if isinstance(error, LeftOut) else FAILED
            yield Output({**row, "status": status, "reason": error.reason}, None)
            continue
        kept = scan.source if task.one_of_them else None
        folder = output.split("/")[0]
        if scan.header and folder != scan.header.patient:
            row["reason"] = f"the patient's name is no folder's: {scan.header.patient!r} stands as {folder}"
        voxels, affine = images.voxels_of(image), images.affine_of(image)
        yield Output({**row, "output": output, **described(image)},
                     lambda path, voxels=voxels, affine=affine: write_volume(path, voxels, affine, task.compression))


def read_scan(task, scan):
    """The image of a Scan, or a DataError that says why there is none."""
    if scan.problem:
        raise DataError(scan.source, scan.problem)
    paths = [path_in(task.input, file.path) for file in scan.files]
    if scan.header:
        slices = images.sort_slices([images.read_header(path) for path in paths], task.min_slices, scan.source)
        image = images.read_series(slices)
    else:
        image = images.read_image(paths[0])
        if image.GetSize()[2] < task.min_slices:
            raise LeftOut(scan.source, f"too few slices: {image.GetSize()[2]}, expected at least {task.min_slices} "
                                       "(--min_slices)")
    images.require_ct(image, scan.source)
    if task.crop_to_body is not None:
        image = images.cut(image, images.body_box(image, task.crop_to_body))
    return image


# -------------------------------------------------------------------------------------------------------------- luna16


LUNA16_COLUMNS = ["source", "output", "patient", "label", "x", "y", "z", "diameter_mm", *IMAGE_COLUMNS]
NEGATIVES_PER_SCAN = 20  # of LUNA16's 850 candidates
LABELS = 1000            # more classes than anyone has; what is beyond is no label
VOLUME_OF_SERIES = (".mhd", ".mha", ".nii", ".nii.gz", ".nrrd")


class Point(NamedTuple):
    """A row of a table: its line there, LPS mm, its label, a nodule's diameter in mm or "", and what is wrong with it."""
    table: str
    line: int
    position: tuple
    label: int
    diameter: str = ""
    problem: str = ""


class CropTask(NamedTuple):
    """A scan and the Points to crop around, with their outputs' paths; or why there are none (status, reason)."""
    source: str
    files: list
    patient: str
    points: list
    outputs: list
    status: str = ""
    reason: str = ""


def luna16(input, output, workers, size, spacing, negatives_per_scan, seed, table, label_column, patients):
    """Crops around the points of LUNA16's tables, or of one's own, into the classification layout."""
    if negatives_per_scan is None and table is None:
        negatives_per_scan = NEGATIVES_PER_SCAN
    recipe = {"command": "luna16", "size": size, "spacing": spacing, "negatives_per_scan": negatives_per_scan, "seed": seed,
              "label_column": label_column}
    with opened(output, recipe) as records:
        points = read_points(table, label_column) if table else read_candidates(input)
        scans = scans_of_series(input, output)
        patient_of_series = read_patients(patients) if patients else {series: series for series in scans}
        subset_of_patient, tasks = {}, []
        for series in sorted({*points, *scans}):
            of_series, patient = scans.get(series, []), patient_of_series.get(series, "")
            chosen = draw(points.get(series, []), negatives_per_scan, seed, series)
            against = unusable(points.get(series, []), chosen, of_series, patient, patients)
            if against:
                tasks.append(CropTask(of_series[0] if of_series else series, [], patient, [], [], *against))
                continue
            # All scans of a patient go where the first of them lies: folds by subset must not share patients
            subset = subset_of_patient.setdefault(patient, subset_of(of_series[0]) or "subset0")
            outputs = [f"{subset}/label{point.label}/{safe_name(patient, 'unknown')}/{point.table}_{point.line:06d}.nii.gz"
                       for point in chosen]
            files = [file_at(input, of_series[0]), *companions(input, of_series[0])]
            tasks.append(CropTask(of_series[0], files, patient, chosen, outputs))
        jobs = [Job(tuple(f"{task.source}{where(point)}" for point in task.points) or (task.source,), stamp_of(task),
                    (str(input), size, spacing if any(spacing) else None, task)) for task in tasks]
        outcome = convert_all(convert_crops, jobs, records, LUNA16_COLUMNS, workers, "scan")
    report(outcome)


def unusable(points, chosen, scans, patient, patients):
    """(status, reason) where a series can't be cropped from; None where it can."""
    if not scans:
        return LEFT_OUT, f"no scan of this series below --input: {len(points)} points"
    if len(scans) > 1:
        return FAILED, f"two scans of one series: {scans[0]} and {scans[1]}"
    if not points:
        return LEFT_OUT, "no points: the table names none in this scan"
    if not chosen:
        return LEFT_OUT, f"no points: all {len(points)} are of label 0, of which --negatives_per_scan takes none"
    if not patient:
        return FAILED, f"no patient: {patients} does not name this series"
    return None


def subset_of(scan):
    """Name of the subset folder that a path leads through, "" without any."""
    return safe_name(next((part for part in scan.split(os.sep)[:-1] if part.startswith("subset")), ""), "")


def where(point):
    return f"#{point.table}:{point.line}"


def draw(points, negatives, seed, series):
    """All points but those of label 0, of which `negatives` are drawn (None: all), in the order of the table."""
    zeros = [point for point in points if point.label == 0 and not point.problem]
    if negatives is not None and len(zeros) > negatives:
        rng = np.random.default_rng([seed, zlib.crc32(series.encode(errors="surrogateescape"))])
        zeros = [zeros[i] for i in rng.choice(len(zeros), negatives, replace=False)]
    return sorted([point for point in points if point.label != 0 or point.problem] + zeros,
                  key=lambda point: (point.table, point.line))


def scans_of_series(folder, output):
    """{series: [paths relative to the folder]} of the volumes that are named by their series.

    Where there are subset folders, only what lies in them: LUNA16's lung masks bear the same names.
    """
    found = collections.defaultdict(list)

    def fail(error):
        raise UserError(f"{error.filename}: can't be listed ({error.strerror})") from error
    for here, names in walk_files(folder, fail):
        if Path(output).resolve() in (Path(here).resolve(), *Path(here).resolve().parents):
            continue
        for name in names:
            if name.lower().endswith(VOLUME_OF_SERIES):
                found[images.stem(name)].append(os.path.normpath(os.path.relpath(os.path.join(here, name), folder)))
    in_subsets = {series: [path for path in paths if subset_of(path)] for series, paths in found.items()}
    in_subsets = {series: paths for series, paths in in_subsets.items() if paths}
    return in_subsets or dict(found)


def read_table(path, columns):
    """(line, row) of a CSV file that has these columns, separated by commas or semicolons. Raises UserError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            table = csv.DictReader(file, delimiter=";" if ";" in header and "," not in header else ",")
            missing = [name for name in columns if name not in (table.fieldnames or [])]
            if missing:
                found = " ".join(", ".join(table.fieldnames or ["nothing"]).split())[:200]
                raise UserError(f"{path}: has no column {missing[0]}, only {found}")
            for row in table:
                yield table.line_num, {name: (row[name] or "").strip() for name in columns}
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: can't be read as a table ({error})") from error


def read_points(path, label_column, optional=False):
    """{series: [Points]} of a table with columns seriesuid, coordX, coordY, coordZ (LPS mm) and the label."""
    points, name = collections.defaultdict(list), safe_name(images.stem(Path(path).stem), "table")
    for line, row in read_table(path, ["seriesuid", "coordX", "coordY", "coordZ", label_column]):
        position, label, problem = (), None, ""
        try:
            position = tuple(float(row[name]) for name in ("coordX", "coordY", "coordZ"))
            if not np.isfinite(position).all():
                raise ValueError
        except ValueError:
            problem = f"not a point: {row['coordX']}, {row['coordY']}, {row['coordZ']}"
        try:
            if not 0 <= (value := float(row[label_column])) < LABELS or not value.is_integer():
                raise ValueError
            label = int(value)
        except ValueError:
            problem = (f"not a label: {label_column} is '{row[label_column][:50]}', expected a whole number from 0 to "
                       f"{LABELS - 1}")
        points[row["seriesuid"]].append(Point(name, line, position, label, problem=problem))
    return dict(points)


def read_candidates(folder):
    """{series: [Points]} of LUNA16: its candidates, with the diameter of the nodule that one lies in, and those nodules
    of annotations.csv in which none lies, as positives too."""
    def find(*names):
        places = [path for name in names for path in (folder / name, *sorted(folder.glob(f"*/{name}")))]
        return next((path for path in places if path.is_file()), None)
    candidates, annotations = find("candidates_V2.csv", "candidates.csv"), find("annotations.csv")
    if candidates is None:
        raise UserError(f"--input {folder}: has neither candidates_V2.csv nor candidates.csv; put LUNA16's table there, or "
                        "give a --table of your own")
    points = read_points(candidates, "class")
    if annotations is None:
        print(f"note: no annotations.csv in {folder}: nodules that no candidate lies in are not added, diameters not known")
        return points
    nodules = collections.defaultdict(list)
    for line, row in read_table(annotations, ["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"]):
        try:
            numbers = [float(row[name]) for name in ("coordX", "coordY", "coordZ", "diameter_mm")]
            if not np.isfinite(numbers).all():
                raise ValueError
        except ValueError:
            raise UserError(f"{annotations}: line {line} has no numbers in coordX, coordY, coordZ and diameter_mm") from None
        nodules[row["seriesuid"]].append(Point("annotations", line, tuple(numbers[:3]), 1, f"{numbers[3]:g}"))
    for series, found in nodules.items():
        positives = [i for i, point in enumerate(points.get(series, [])) if point.label == 1 and not point.problem]
        for nodule in found:
            inside = [i for i in positives if np.linalg.norm(np.subtract(points[series][i].position, nodule.position))
                      <= float(nodule.diameter) / 2]
            for i in inside:
                points[series][i] = points[series][i]._replace(diameter=nodule.diameter)
            if not inside:
                points.setdefault(series, []).append(nodule)
    return points


def read_patients(path):
    """{series: patient} of a table with these columns. Raises UserError where it names two patients of one series."""
    patients = {}
    for line, row in read_table(path, ["seriesuid", "patient"]):
        if patients.setdefault(row["seriesuid"], row["patient"]) != row["patient"]:
            raise UserError(f"{path}: line {line} names patient {row['patient']} for series {row['seriesuid']}, an earlier "
                            f"one {patients[row['seriesuid']]}; correct it")
    return patients


def convert_crops(task):
    """Outputs of a CropTask: a crop for each point, or the reason why not."""
    folder, size, spacing, task = task
    if task.status:
        yield Output({"source": task.source, "patient": task.patient, "status": task.status, "reason": task.reason}, None)
        return
    image = images.read_image(path_in(folder, task.source))
    for point, output in zip(task.points, task.outputs):
        row = {"source": task.source + where(point), "patient": task.patient, "diameter_mm": point.diameter,
               "label": "" if point.label is None else point.label, **dict(zip("xyz", point.position))}
        try:
            if point.problem:
                raise DataError(row["source"], point.problem)
            crop = images.crop_at(image, point.position, size, spacing, row["source"])
        except DataError as error:
            yield Output({**row, "status": FAILED, "reason": error.reason}, None)
            continue
        yield Output({**row, "output": output, **described(crop)}, lambda path, crop=crop: images.save_nifti(path, crop))


# ----------------------------------------------------------------------------------------------------------------- msd


MSD_COLUMNS = ["source", "output", "labels", "millilitres", *IMAGE_COLUMNS]


class PairTask(NamedTuple):
    """An image and its label, relative to the input ("" for one that is missing), and the classes that the label may have."""
    name: str
    files: list
    image: str
    label: str
    classes: list


def msd(input, output, workers, spacing, crop, margin):
    """Images and masks of a Decathlon task into the segmentation layout."""
    with opened(output, {"command": "msd", "spacing": spacing, "crop": crop, "margin": margin}) as records:
        pairs, classes = decathlon(input)
        tasks = [PairTask(name, [file_at(input, path) for path in (image, label) if path], image, label, classes)
                 for name, image, label in pairs]
        jobs = [Job(tuple(path for path in (task.image, task.label) if path), stamp_of(task),
                    (str(input), spacing, crop, margin, task)) for task in tasks]
        outcome = convert_all(convert_pair, jobs, records, MSD_COLUMNS, workers, "case")
    report(outcome)


def decathlon(folder):
    """([(name, image, label)], classes or None) of a task: by dataset.json where it is there, and by the folders.

    Paths are relative to the folder, "" for what is missing. Raises UserError.
    """
    listed, classes = [], None
    index = folder / "dataset.json"
    if index.is_file():
        try:
            content = json.loads(index.read_text(encoding="utf-8-sig"))
            classes = sorted(int(value) for value in content["labels"])
            listed = [(os.path.normpath(case["image"]), os.path.normpath(case["label"])) for case in content["training"]]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{index}: can't be read as a Decathlon's dataset.json ({type(error).__name__}: {error})") from error
    elif not (folder / "imagesTr").is_dir() or not (folder / "labelsTr").is_dir():
        raise UserError(f"--input {folder}: has no dataset.json and no imagesTr and labelsTr; give the folder that holds them")
    else:
        print(f"note: no dataset.json in {folder}: images and labels are paired by name, any class is taken")
    images_by_name, labels_by_name = {}, {}

    def name_of(path, taken):  # a second one of a name goes by its path
        return path if images.stem(path) in taken else images.stem(path)
    for image, label in listed:
        name = name_of(image, images_by_name)
        images_by_name[name], labels_by_name[name] = image, label
    known = {path for case in listed for path in case}
    for kind, found in (("imagesTr", images_by_name), ("labelsTr", labels_by_name)):
        for name in find_volumes(folder / kind) if (folder / kind).is_dir() else []:
            if (path := os.path.join(kind, name)) not in known:
                found[name_of(path, found)] = path
    names = sorted({*images_by_name, *labels_by_name})
    if not names:
        raise UserError(f"--input {folder}: holds no cases")
    return [(name, images_by_name.get(name, ""), labels_by_name.get(name, "")) for name in names], classes


def convert_pair(task):
    """Outputs of a PairTask: the image and its label, both or neither."""
    folder, spacing, crop, margin, task = task
    if not task.image or not task.label:
        raise DataError(task.image or task.label, "no label: for this image" if task.image else "no image: for this label")
    image, label = (images.to_ras(images.read_raw(path_in(folder, path))) for path in (task.image, task.label))
    reason = other_grid(label.GetSize(), images.affine_of(label), image.GetSize(), images.affine_of(image))
    if reason:
        raise DataError(task.label, reason)
    image, label = images.to_hu(image, task.image), images.to_classes(label, task.label, task.classes)
    if crop != "none":
        box = images.body_box(image, margin) if crop == "body" else images.box_of(label != 0, image, margin)
        image, label = images.cut(image, box), images.cut(label, box)
    if spacing:
        image, label = images.resample(image, spacing), images.resample(label, spacing, is_label=True)
    name = safe_name(task.name, "case") + ".nii.gz"
    voxels, (classes, counts) = np.prod(label.GetSpacing()), np.unique(images.voxels_of(label), return_counts=True)
    volumes = [f"{count * voxels / 1000:.3g}" for value, count in zip(classes, counts) if value]
    yield Output({"source": task.image, "output": f"images/{name}", **described(image)},
                 lambda path: images.save_nifti(path, image))
    yield Output({"source": task.label, "output": f"labels/{name}", "shape": by(label.GetSize()), "labels": by_comma(classes),
                  "spacing": by(np.round(label.GetSpacing(), 4)), "millilitres": by_comma(volumes),
                  "reason": "" if volumes else "note: no voxel is labelled"},
                 lambda path: images.save_nifti(path, label))


def by_comma(values):
    return " ".join(map(str, values))


# --------------------------------------------------------------------------------------------------------------- check


class Seen(NamedTuple):
    """What check reads of a volume, or the reason why it can't be used; classes: voxels of each in a case's label."""
    path: str
    problem: str = ""
    size: tuple = ()
    spacing: tuple = ()
    hu: tuple = ()       # least, 1 %, 50 %, 99 %, greatest
    classes: dict = {}


def check(folder, workers):
    """Print what a prepared folder holds and what the training scripts would refuse of it, and why."""
    if not folder.is_dir():
        raise UserError(f"{folder}: " + ("is no folder" if folder.exists() else "no such folder"))
    if (folder / "images").is_dir() or (folder / "labels").is_dir():
        missing = [kind for kind in ("images", "labels") if not (folder / kind).is_dir()]
        pairs, problems = ([], [DataError(folder / missing[0], "no such folder")]) if missing else find_pairs(folder)
        seen = look_at(see_pair, pairs, workers)
        print(f"segmentation layout: {len(pairs)} cases in {folder}")
        print_labels(seen)
        if seen and not any(value for one in seen for value in one.classes):
            problems.append(DataError(folder, "has no labelled voxel in any case"))
    elif any(path.is_dir() and path.name.startswith("subset") for path in folder.iterdir()):
        crops, problems = find_crops(folder)
        seen = look_at(see_volume, [crop.path for crop in crops], workers)
        print(f"classification layout: {len(crops)} crops of {len({crop.patient for crop in crops})} patients in {folder}")
        print_balance(crops)
        sizes = collections.Counter(one.size for one in seen if one.size)
        for size, _ in sizes.most_common()[1:]:
            other = next(one for one in seen if one.size == size)
            problems.append(DataError(other.path, f"has {by(size)} voxels, most crops have {by(sizes.most_common(1)[0][0])}"))
    else:
        paths = [str(folder / name) for name in find_volumes(folder)]
        seen, problems = look_at(see_volume, paths, workers), []
        patients = {path.relative_to(folder).parts[0] for path in map(Path, paths)}
        print(f"pre-training layout: {len(paths)} volumes of {len(patients)} patients in {folder}")
        if not paths:
            problems.append(DataError(folder, "holds none of the three layouts: no subset*, no images and labels, no volumes"))
    print_ranges(seen)
    problems += [DataError(one.path, one.problem) for one in seen if one.problem]
    for problem in problems:
        print(f"refused: {problem}")
    if problems:
        raise UserError(f"{folder}: {len(problems)} things would be refused, such as {problems[0]}")
    print("nothing would be refused")


def look_at(see, items, workers):
    """[Seen] of the items in their order."""
    found = {}
    with progress(len(items), "file") as bar:
        for item, seen in in_processes(see, items, workers):
            found[item] = seen or Seen(getattr(item, "image", item), "the process that read it died")
            bar.update()
    return [found[item] for item in items]


def see_volume(path):
    try:
        with Volume(path) as volume:
            return seen_voxels(path, volume.read(), volume.spacing)
    except DataError as error:
        return Seen(path, error.reason)


def see_pair(pair):
    try:
        image, label, affine = read_pair(pair)
    except DataError as error:
        return Seen(error.path, error.reason)
    values, counts = np.unique(label, return_counts=True)
    return seen_voxels(pair.image, image, np.linalg.norm(affine[:3, :3], axis=0))._replace(
        classes={int(value): int(count) for value, count in zip(values, counts) if value})


def seen_voxels(path, voxels, spacing):
    low, high = voxels.min(), voxels.max()
    if low == high:
        return Seen(path, f"has the same value in all voxels ({low})")
    quantiles = np.percentile(voxels[::2, ::2], list(QUANTILES.values()))
    return Seen(path, "", tuple(voxels.shape), tuple(spacing), (low, *quantiles, high))


def print_ranges(seen):
    """A table of the least, median and greatest size, spacing and HU."""
    good = [one for one in seen if not one.problem]
    if not good:
        return
    print(f"{'':24}{'least':>10}{'median':>10}{'greatest':>10}")
    for title, name, axes in (("voxels", "size", "xyz"), ("mm per voxel", "spacing", "xyz"),
                              ("HU", "hu", ("least", "1 %", "median", "99 %", "greatest"))):
        for i, axis in enumerate(axes):
            values = np.array([getattr(one, name)[i] for one in good])
            print(f"{title + ', ' + axis:24}" + "".join(f"{value:10.5g}" for value in (values.min(), np.median(values), values.max())))


def print_balance(crops):
    """A table of crops and patients by subset and label."""
    labels = sorted({crop.label for crop in crops})
    print(f"{'':24}{'patients':>10}" + "".join(f"{'label' + str(label):>10}" for label in labels))
    for subset in [*sorted({crop.subset for crop in crops}), "all"]:
        here = [crop for crop in crops if subset in (crop.subset, "all")]
        counts = collections.Counter(crop.label for crop in here)
        print(f"{subset:24}{len({crop.patient for crop in here}):10}" + "".join(f"{counts[label]:10}" for label in labels))


def print_labels(seen):
    """A line for each class: in how many cases, and of what share of their voxels."""
    good = [one for one in seen if not one.problem]
    for value in sorted({value for one in good for value in one.classes}):
        of = [one.classes[value] * np.prod(one.spacing) / 1000 for one in good if value in one.classes]
        print(f"class {value}: in {len(of)} cases, {min(of):.3g} to {max(of):.3g} ml, median {np.median(of):.3g} ml")
    empty = sum(not one.classes for one in good)
    if empty:
        print(f"no labelled voxel: {empty} cases")


# ---------------------------------------------------------------------------------------------------------------- demo


PHANTOMS = 8                                  # patients, beside the two CTs, that folds need
CT, PHANTOM = "CT", "synthetic phantom"
LAYOUTS = ("pretrain", "luna16", "msd")
ORIGINS = {
    CT: f"""a patient's CT and the mask of one tumour
    from data/{{patient}}_image.nrrd and data/{{patient}}_label.nrrd of the source distribution of
    {demo_data.PACKAGE} {demo_data.VERSION} (sha256 {demo_data.SHA256}),
    brought to RAS
    licence: BSD-3-Clause, Copyright 2017 Harvard Medical School; text in LICENSE.txt of that distribution""",
    PHANTOM: """synthetic
    a chest phantom computed by demo_data.py, no patient's data
    licence: that of this repository""",
}


def demo(output, phantom):
    """Two lung CTs and synthetic chest phantoms in all three layouts, made by the commands that users type.

    pretrain holds the CTs alone; luna16 and msd hold phantoms too, since two patients make no folds. What is complete
    stays. Raises UserError where the output can't be written to, or --phantom is given for a folder that holds CTs.
    """
    try:
        if output.exists() and not output.is_dir():
            raise UserError(f"{output}: is a file, expected a folder to write to")
        source = output / "SOURCE.txt"
        before = source.read_text() if source.is_file() else ""
        held = CT if before == demo_source(CT) else PHANTOM if before == demo_source(PHANTOM) else None
        if phantom and held == CT:
            raise UserError(f"{output} already holds CTs: give --phantom another --output, or delete it first")
        if held and all(standing(output / layout) for layout in LAYOUTS):
            print(f"{output} is complete, nothing to do: {' and '.join(PATIENTS)} ({held})")
            return
        output.mkdir(parents=True, exist_ok=True)
        raw = output / ".raw"
        shutil.rmtree(raw, ignore_errors=True)  # of a demo that was killed
        raw.mkdir()  # not writable: said now, not after the download
        origin = fetch_demo(raw, phantom or held == PHANTOM, held)
        (raw / "SOURCE.txt").write_text(demo_source(origin))
        os.replace(raw / "SOURCE.txt", source)
        lay_out_demo(raw, demo_cases(raw, origin), origin)
        workers = cores_per_process(Processes())
        nlst(raw / "nlst", output / "pretrain", workers, one_per_study=False, min_slices=16, crop_to_body=None,
             compression="blosc")
        luna16(raw / "luna16", output / "luna16", workers, size=[48, 48, 24], spacing=[1.0, 1.0, 2.0],
               negatives_per_scan=8, seed=0, table=None, label_column="class", patients=None)
        msd(raw / "msd", output / "msd", workers, spacing=None, crop="none", margin=0)
        shutil.rmtree(raw)
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror or error}") from error


def demo_source(origin):
    """Text that says where each patient of the demo comes from."""
    origins = {**dict.fromkeys(PATIENTS, origin), **dict.fromkeys(phantom_names(), PHANTOM)}
    return "Where the demo's patients come from\n\n" + "".join(
        f"{patient}: {ORIGINS[origin].format(patient=patient)}\n" for patient, origin in origins.items())


def phantom_names():
    return [f"phantom{i}" for i in range(1, PHANTOMS + 1)]


def fetch_demo(folder, phantom, held):
    """Fetch the CTs and masks as NRRD files into a folder, unless phantoms stand for them; returns CT or PHANTOM."""
    synthetic = f"{' and '.join(PATIENTS)} will be SYNTHETIC too: chest phantoms, which show that the code runs, no more"
    print(f"{PHANTOMS} of the patients for classification and segmentation are SYNTHETIC: chest phantoms, since folds need more "
          "patients than there are CTs", flush=True)
    if phantom:
        print(synthetic)
        return PHANTOM
    print(f"fetching {' and '.join(PATIENTS)} (34 MB) with pip", flush=True)
    try:
        names = [*demo_data.IMAGES.values(), *demo_data.LABELS.values()]
        contents = demo_data.read_members(demo_data.fetch_sdist(folder), names)
    except demo_data.FetchError as error:
        if held == CT:
            raise UserError(f"{folder.parent}: some of it is missing, and the CTs could not be fetched ({error}); try again "
                            "with a network, or delete it") from None
        print(f"note: the CTs could not be fetched ({error}); {synthetic}", file=sys.stderr, flush=True)
        return PHANTOM
    for name, content in contents.items():
        (folder / Path(name).name).write_bytes(content)
    return CT


def demo_cases(folder, origin):
    """(patient, image, mask that numbers its nodules from 1) of each patient of the demo, images as in images.py."""
    for i, patient in enumerate([*PATIENTS, *phantom_names()]):
        if origin == CT and patient in PATIENTS:
            mask = images.read_raw(str(folder / f"{patient}_label.nrrd"))
            yield patient, images.read_image(str(folder / f"{patient}_image.nrrd")), images.to_ras(sitk.ConnectedComponent(mask != 0))
        else:
            size = {} if patient in PATIENTS else {"shape": (192, 160, 64), "spacing": (1.7, 1.6, 4.5)}
            volume, affine, nodules = demo_data.labelled_phantom(i, **size)
            yield patient, images.make_image(volume, affine), images.make_image(nodules, affine)


def lay_out_demo(folder, cases, origin):
    """Write the cases as NLST, LUNA16 and the Decathlon would be downloaded, into folders of these names."""
    candidates, annotations, listed = [], [], []
    for i, (patient, image, nodules) in enumerate(cases):
        if patient in PATIENTS:
            name = f"{patient}_image" if origin == CT else "phantom"
            save_raw(folder / "nlst" / patient / "t0" / f"{name}.mha", image)
        save_raw(folder / "luna16" / f"subset{i // 2}" / f"{patient}.mhd", image)
        save_raw(folder / "msd" / "imagesTr" / f"{patient}.nii", image)
        save_raw(folder / "msd" / "labelsTr" / f"{patient}.nii", sitk.Cast(nodules != 0, sitk.sitkUInt8))
        listed.append({"image": f"imagesTr/{patient}.nii", "label": f"labelsTr/{patient}.nii"})
        shapes = sitk.LabelShapeStatisticsImageFilter()
        shapes.Execute(sitk.Cast(nodules, sitk.sitkUInt32))
        centres = {label: shapes.GetCentroid(label) for label in shapes.GetLabels()}
        annotations += [(patient, *centre, 2 * shapes.GetEquivalentSphericalRadius(label)) for label, centre in centres.items()]
        candidates += [(patient, *centre, 1) for centre in centres.values()]
        candidates += [(patient, *place, 0) for place in lung_places(image, list(centres.values()), 12, seed=i)]
    for name, header, rows in (("candidates_V2", "class", candidates), ("annotations", "diameter_mm", annotations)):
        with open(folder / "luna16" / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["seriesuid", "coordX", "coordY", "coordZ", header], *rows])
    (folder / "msd" / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "nodule"}, "training": listed}))


def save_raw(path, image):
    """Write an image with a fixed time of change, so that a rerun finds the same input."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    for file in path.parent.glob(f"{path.stem}.*"):
        os.utime(file, (0, 0))


def lung_places(image, centres, count, seed):
    """LPS mm of random places inside the lungs, more than 20 mm away from any nodule."""
    from scipy.ndimage import uniform_filter
    smooth = uniform_filter(images.voxels_of(image).astype(np.float32), np.maximum(10 / np.array(image.GetSpacing()), 1).astype(int))
    inside = np.argwhere((smooth > -930) & (smooth < -650))
    rng, places = np.random.default_rng(seed), []
    for index in inside[rng.permutation(len(inside))]:
        place = image.TransformIndexToPhysicalPoint([int(i) for i in index])
        if all(np.linalg.norm(np.subtract(place, centre)) > 20 for centre in centres):
            places.append(place)
        if len(places) == count:
            break
    return places


if __name__ == "__main__":
    run_script(main)
