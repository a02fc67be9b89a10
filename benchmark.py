"""How fast the parts are, each against a baseline in the same run: what the README's speed table was made with.

    python benchmark.py augment                  ten views of a sample on one core, against MONAI's transforms in a chain
    python benchmark.py augment --device cuda    the same views on the GPU, the baseline still on one core
    python benchmark.py read                     a random patch of a scan, against gzip ITK files, NIfTI and others
    python benchmark.py convert                  a DICOM series into the layout, against SimpleITK reading and writing it

Seconds are wall-clock. Baseline and ours take turns, so that a machine that slows down slows both; reported are
medians over the repeats, with the lowest and highest. With --json the last line on standard output is one JSON object.

A further benchmark is a function that returns `comparison(...)`, and a sub-command with its flags.
"""
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from inspect import getsource
from pathlib import Path

# NumPy's linear algebra reads these when it is first imported; torch is told in main, by --threads
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import h5py
import numpy as np
import torch

import utils
from augmentations import MAX_BENT, MultiCropAugmentation, Policy
from data import FILTERS, LPS, Sample, Volume, collate, place_patch, write_volume
from utils import UserError, number

SCAN_SIZE = (479, 400, 198)  # voxels of a usual chest CT
SCAN = Path(__file__).resolve().parent.parent / "shared/data/ct/cptac_c3n_00247.nii.gz"
GLOBAL, LOCAL, LOCAL_NUMBER = (96, 96, 48), (24, 24, 12), 8  # voxels; two views are global
BASELINE_PATCH = (121, 121, 61)  # voxels that earlier implementations read, and augmented ten times
POLICY = Policy(rotation=30, scale=0.25, flip=1, elastic=MAX_BENT, gaussian=2, histogram=10, prob=0.5)
CLIP_RANGE = (-1000, 1000)       # HU
BATCH = {"cpu": 4, "cuda": 64}   # samples per call


def get_args_parser():
    parser = utils.ArgumentParser(prog="benchmark.py", description="Times a part of this repository against a baseline.")
    commands = parser.add_subparsers(dest="what", metavar="what", required=True)

    def command(benchmark, repeats, devices, threads=None):
        sub = commands.add_parser(benchmark.__name__, help=benchmark.__doc__.splitlines()[0])
        sub.set_defaults(benchmark=benchmark)
        sub.add_argument("--json", action="store_true", help="end with one line of JSON")
        sub.add_argument("--device", default="cpu", choices=devices, help="where ours runs; the baseline runs on the CPU")
        sub.add_argument("--threads", default=1, type=number(int, 1), choices=threads,
                         help="CPU threads, of the baseline as of ours")
        sub.add_argument("--repeats", default=repeats, type=number(int, 1), help="turns that each side takes")
        return sub

    sub = command(augment, 10, ["cpu", "cuda"])
    sub.add_argument("--samples", default=1, type=number(int, 1),
                     help="samples of the baseline per repeat, beside two batches of ours; more even out what is drawn")
    sub = command(read, 7, ["cpu"], [1])
    sub.add_argument("--reads", default=4, type=number(int, 1), help="patches per repeat, each from a file opened for it")
    sub.add_argument("--size", default=SCAN_SIZE, nargs=3, type=number(int, max(BASELINE_PATCH)),
                     metavar=("X", "Y", "Z"),
                     help="voxels of the scan that patches are read from; the default is a usual chest CT's")
    sub = command(convert, 5, ["cpu"], [1])
    sub.add_argument("--size", default=SCAN_SIZE, nargs=3, type=number(int, 16), metavar=("X", "Y", "Z"),
                     help="voxels of the scan, one DICOM file per z; the default is a usual chest CT's")
    return parser


def main():
    args = vars(get_args_parser().parse_args())
    what, benchmark, as_json, threads = (args.pop(name) for name in ("what", "benchmark", "json", "threads"))
    if args["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    torch.set_num_threads(threads)
    result = {"what": what, **benchmark(**args), "threads": threads, "device": args["device"],
              "device_name": device_name(args["device"]),
              "versions": {**utils.versions(), "SimpleITK": version("SimpleITK")}}
    print_report(result)
    if as_json:
        print(json.dumps(result))


# ----------------------------------------------------------------------------------------------------------- augment


def augment(device, repeats, samples):
    """Ten views of a sample, all six augmentations on: ours from int16 HU to views, against MONAI's one by one."""
    crops = MultiCropAugmentation(POLICY, GLOBAL, LOCAL, LOCAL_NUMBER)
    volume, _, origin = scan(SCAN_SIZE)
    rng, patches = np.random.RandomState(0), []
    for _ in range(BATCH[device]):
        start = place_patch(rng, np.array(volume.shape), np.array(crops.core), np.array(crops.patch_size))
        # A file's slowest axis is z: what is read from one lies in memory in that order
        patches.append(np.asfortranarray(cut(volume, start, crops.patch_size)))
    centred = (np.array(crops.patch_size) - BASELINE_PATCH) // 2
    inner = [np.ascontiguousarray(cut(patch, centred, BASELINE_PATCH)) for patch in patches]
    transforms = monai_transforms(GLOBAL, LOCAL, seed=0)
    batches = 2 * samples  # of ours per repeat: with fewer its time is too short to measure well
    preparing = []         # seconds of ours that fall to the loader's workers

    def baseline(turn):
        for i in range(turn * samples, (turn + 1) * samples):
            monai_views(inner[i % len(inner)], *transforms)

    def ours(turn):
        preparing.append(sum(our_views(patches, crops, (turn * batches + i) * len(patches), device)
                             for i in range(batches)) / (batches * len(patches)))

    times = take_turns({"baseline": (baseline, samples), "ours": (ours, batches * len(patches))}, repeats)
    times["of which draw and collate"] = preparing[1:]  # without the warm-up
    return comparison(
        20, "seconds per sample of ten views", times,
        {"baseline": f"MONAI's transforms one after the other, {by(BASELINE_PATCH)} voxels per view, then the crop; CPU",
         "ours": f"one resampling per view, at its own voxels, of {by(crops.patch_size)} voxels; {device}",
         "of which draw and collate": "the loader's part, on the CPU wherever views are rendered"},
        getsource(monai_transforms) + "\n\n" + getsource(monai_views),
        {"data": origin, "views": f"2 of {by(GLOBAL)} and {LOCAL_NUMBER} of {by(LOCAL)}", "policy": vars(POLICY),
         "baseline_patch": BASELINE_PATCH, "our_patch": crops.patch_size, "clip_range": CLIP_RANGE,
         "batch_size": BATCH[device], "repeats": repeats, "baseline_samples_per_repeat": samples,
         "our_samples_per_repeat": batches * len(patches)})


def our_views(patches, crops, first, device):
    """Draw, collate and render the views of a batch; returns the seconds until the batch is ready for the device."""
    start = time.perf_counter()
    batch = collate([Sample(patch, crops.draw(0, 0, first + i), []) for i, patch in enumerate(patches)])
    ready = time.perf_counter()
    batch = batch.to(device)
    crops.render(batch.patches, batch.groups, CLIP_RANGE)
    if device == "cuda":
        torch.cuda.synchronize()
    return ready - start


def monai_transforms(global_size, local_size, seed):
    """[scaling, what a global view goes through, what a local view goes through]."""
    from math import radians
    from monai import transforms as monai

    def chain(size, seed):
        return monai.Compose([
            monai.RandRotate(range_x=radians(30), range_y=radians(30), range_z=radians(30), prob=0.5),
            monai.RandAffine(scale_range=(0.25, 0.25, 0.25), prob=0.5),
            monai.RandAxisFlip(prob=0.5),
            monai.Rand3DElastic(sigma_range=(0, 7), magnitude_range=(0, 150), prob=0.5),
            monai.RandGaussianSmooth(sigma_x=(0.01, 2), sigma_y=(0.01, 2), sigma_z=(0.01, 2), prob=0.5),
            monai.RandHistogramShift(num_control_points=10, prob=0.5),
            monai.RandSpatialCrop(size, random_size=False),
        ]).set_random_state(seed)

    scaling = monai.ScaleIntensityRange(a_min=-1000, a_max=1000, b_min=0, b_max=1, clip=True)
    return scaling, chain(global_size, seed), chain(local_size, seed + 1)


def monai_views(patch, scaling, global_view, local_view):
    """Ten views of an (X, Y, Z) int16 patch, each augmented whole and then cropped."""
    scaled = scaling(torch.from_numpy(patch)[None])  # (1, X, Y, Z)
    return [global_view(scaled) for _ in range(2)] + [local_view(scaled) for _ in range(8)]


# -------------------------------------------------------------------------------------------------------------- read


def read(device, repeats, reads, size):
    """A random patch of a scan from a file that is opened for it: Blosc chunks against gzip slices, warm cache."""
    import nibabel
    volume, affine, origin = scan(size)
    starts = np.random.RandomState(0).randint(0, np.array(size) - BASELINE_PATCH + 1, (repeats + 1, reads, 3))
    larger = MultiCropAugmentation(POLICY, GLOBAL, LOCAL, LOCAL_NUMBER).patch_size
    margin = (np.array(larger) - BASELINE_PATCH) // 2
    with tempfile.TemporaryDirectory() as folder:
        layouts = {"baseline": "itk.hdf5", "ours": "blosc.hdf5", "gzip": "gzip.hdf5", "none": "none.hdf5",
                   "nii.gz": "scan.nii.gz", "nii": "scan.nii"}
        paths = {name: os.path.join(folder, file) for name, file in layouts.items()}
        write_itk(paths["baseline"], volume, affine)
        for name, compression in {"ours": "blosc", "gzip": "gzip", "none": "none"}.items():
            write_volume(paths[name], volume, affine, compression)
        for name in ("nii.gz", "nii"):
            nibabel.save(nibabel.Nifti1Image(volume, affine), paths[name])
        takes = {name: read_itk if name == "baseline" else read_volume for name in paths}
        for name, take in takes.items():
            for start in starts[0]:
                if not np.array_equal(take(paths[name], start, BASELINE_PATCH), cut(volume, start, BASELINE_PATCH)):
                    raise UserError(f"{layouts[name]}: the patch at {start.tolist()} has other voxels than the scan")

        def reading(name):
            def run(turn):
                for start in starts[turn]:
                    takes[name](paths[name], start, BASELINE_PATCH)
            return run

        def reading_larger(turn):
            for start in starts[turn]:
                read_volume(paths["ours"], start - margin, larger)
        times = take_turns({**{name: (reading(name), reads) for name in paths}, "larger": (reading_larger, reads)}, repeats)
        megabytes = {name: os.path.getsize(path) / 1e6 for name, path in paths.items()}

    notes = {"baseline": "ITK HDF5 written by SimpleITK, gzip, chunks of one slice; h5py opens, slices, closes",
             "ours": "ITK HDF5 written by data.write_volume, Blosc, chunks of 32 x 32 x 32; data.Volume",
             "gzip": "the same with gzip; data.Volume", "none": "the same without compression; data.Volume",
             "nii.gz": "written by nibabel; data.Volume", "nii": "written by nibabel; data.Volume",
             "larger": f"as ours, the {by(larger)} voxels that all six augmentations on a view look at"}
    result = comparison(20, f"seconds per patch of {by(BASELINE_PATCH)} voxels", times,
                        {name: f"{megabytes[name]:5.1f} MB: {note}" if name in paths else note
                         for name, note in notes.items()},
                        getsource(write_itk) + "\n\n" + getsource(read_itk),
                        {"data": origin, "patch": BASELINE_PATCH, "repeats": repeats, "reads_per_repeat": reads,
                         "megabytes": megabytes})
    result["nifti_ratio"] = result["rows"]["nii.gz"]["seconds"] / result["ours"]
    return result


def read_volume(path, start, size):
    with Volume(path) as volume:
        return volume.read(start, size)


def read_itk(path, start, size):
    with h5py.File(path, "r") as file:
        x, y, z = (slice(int(a), int(a + n)) for a, n in zip(start, size))
        return file["ITKImage/0/VoxelData"][z, y, x].T


def write_itk(path, volume, affine):
    import SimpleITK
    affine = LPS @ affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(volume.T)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    SimpleITK.WriteImage(image, path, useCompression=True)


# ----------------------------------------------------------------------------------------------------------- convert


def convert(device, repeats, size):
    """A DICOM series to HDF5, headers checked and voxels described, against SimpleITK reading and writing it."""
    import SimpleITK
    from prepare_data import Scan, ScanTask, convert_scans, look_into, place_scans
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    volume, affine, origin = scan(size)
    with tempfile.TemporaryDirectory() as folder:
        series, target = os.path.join(folder, "series"), os.path.join(folder, "out")
        write_dicom(series, volume, affine)
        paths = {kind: f"{target}.{kind}.hdf5" for kind in ("baseline", "ours", "gzip", "none")}

        def prepared(path, compression):
            def run(turn):
                found = look_into((series, sorted(os.listdir(series)))).series
                scans = [Scan(uid, files, header) for uid, header, files in found]
                task = ScanTask(series, scans, list(place_scans(scans).values()), False, 16, None, compression)
                for row, write in convert_scans(task):
                    if write is None:
                        raise UserError(f"the series that was written for this benchmark is refused: {row['reason']}")
                    write(path)
            return run
        times = take_turns({"baseline": (lambda turn: convert_itk(series, paths["baseline"]), 1),
                            "ours": (prepared(paths["ours"], "blosc"), 1),
                            **{kind: (prepared(paths[kind], kind), 1) for kind in ("gzip", "none")}}, repeats)
        megabytes = {name: os.path.getsize(path) / 1e6 for name, path in paths.items()}
        for name in ("ours", "gzip", "none"):
            if not np.array_equal(read_volume(paths[name], (0, 0, 0), size), np.maximum(volume, -1024)):
                raise UserError(f"{name}: other voxels than the scan's")
    notes = {"baseline": "SimpleITK: the series read and written as .hdf5 with gzip",
             "ours": "prepare_data.py nlst: headers read twice and checked, series read, RAS, quantiles, Blosc",
             "gzip": "the same with --compression gzip", "none": "the same with --compression none"}
    result = comparison(2, f"seconds per volume of {by(size)} voxels on one core", times,
                        {name: f"{megabytes[name]:5.1f} MB: {note}" for name, note in notes.items()}, getsource(convert_itk),
                        {"data": origin + ", written as DICOM", "repeats": repeats, "megabytes": megabytes})
    result["volumes_per_second_and_core"] = 1 / result["ours"]
    return result


def convert_itk(folder, path):
    import SimpleITK
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder))
    SimpleITK.WriteImage(SimpleITK.DICOMOrient(reader.Execute(), "RAS"), path, useCompression=True)


def write_dicom(folder, volume, affine):
    """Write an (X, Y, Z) volume in RAS as a series of CT slices, axial and head first as scanners write them."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    os.makedirs(folder)
    volume, affine = volume[::-1, ::-1], affine @ np.diag([-1, -1, 1, 1])  # columns to the left, rows to the back
    lps = LPS @ affine
    lps[:3, 3] += (LPS @ affine @ np.array([1 - volume.shape[0], 1 - volume.shape[1], 0, 0]))[:3]
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    study, series = generate_uid(), generate_uid()
    for z in range(volume.shape[2]):
        header = pydicom.Dataset()
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = pydicom.uid.CTImageStorage
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid()
        header.PatientID, header.Modality, header.ImageType = "benchmark", "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        header.StudyInstanceUID, header.SeriesInstanceUID, header.InstanceNumber = study, series, z + 1
        header.ImagePositionPatient = [f"{value:.6f}" for value in (lps @ [0, 0, z, 1])[:3]]
        header.ImageOrientationPatient = [f"{value:.6f}" for value in (lps[:3, :2] / spacing[:2]).T.ravel()]
        header.PixelSpacing, header.SliceThickness = [f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"], f"{spacing[2]:.6f}"
        header.Columns, header.Rows = volume.shape[:2]
        header.SamplesPerPixel, header.PhotometricInterpretation, header.PixelRepresentation = 1, "MONOCHROME2", 1
        header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
        header.RescaleIntercept, header.RescaleSlope = 0, 1
        header.PixelData = np.ascontiguousarray(volume[:, :, z].T).tobytes()
        header.save_as(os.path.join(folder, f"{z:04}.dcm"), enforce_file_format=True)


# ------------------------------------------------------------------------------------------------ what they all share


def scan(size):
    """((X, Y, Z) int16 HU in RAS, (4, 4) affine, where it is from): a real CT where it is at hand, or a phantom.

    A CT that is smaller than `size` goes on as its mirror image, which keeps its noise and so what it compresses to.
    """
    if not SCAN.is_file():
        from demo_data import chest_phantom
        return *chest_phantom(0, size, (0.7, 0.7, 1.5)), f"chest phantom of {by(size)} voxels (no {SCAN.name} here)"
    with Volume(SCAN) as file:
        volume, affine = file.read(), file.affine
    origin = f"real CT {SCAN.name} of {by(volume.shape)} voxels, mirrored or cut at its far ends to {by(size)}"
    volume = np.pad(volume, [(0, max(0, n - old)) for n, old in zip(size, volume.shape)], "symmetric")
    return np.ascontiguousarray(cut(volume, (0, 0, 0), size)), affine, origin


def cut(volume, start, size):
    return volume[tuple(slice(a, a + n) for a, n in zip(start, size))]


def by(size):
    return " x ".join(map(str, size))


def take_turns(tasks, repeats):
    """{name: [seconds per item, of each repeat]}: every task once to warm up, then all of them in turn, `repeats` times.

    tasks: {name: (function of the turn's number, items that it handles per call)}
    """
    times = {name: [] for name in tasks}
    for turn in range(repeats + 1):
        for name, (run, items) in tasks.items():
            start = time.perf_counter()
            run(turn)
            times[name].append((time.perf_counter() - start) / items)
    return {name: seconds[1:] for name, seconds in times.items()}


def comparison(goal, unit, times, notes, baseline_code, parameters):
    """What a benchmark found, as it goes into the report and the JSON.

    goal: least ratio wanted; unit: of the times; times: {"baseline": [seconds, ...], "ours": [...], further rows ...}
    notes: {row: what was timed}; baseline_code: source text; parameters: a dict
    """
    rows = {name: {"seconds": statistics.median(seconds), "spread": [min(seconds), max(seconds)], "note": notes.get(name, "")}
            for name, seconds in times.items()}
    ratios = [baseline / ours for baseline, ours in zip(times["baseline"], times["ours"])]
    return {"ratio": rows["baseline"]["seconds"] / rows["ours"]["seconds"], "goal": goal, "unit": unit,
            "baseline": rows["baseline"]["seconds"], "ours": rows["ours"]["seconds"],
            "spread": {"baseline": rows["baseline"]["spread"], "ours": rows["ours"]["spread"],
                       "ratio": [min(ratios), max(ratios)]},
            "rows": rows, "parameters": parameters, "baseline_code": baseline_code}


def print_report(result):
    rows = result["rows"]
    width = max(map(len, rows))
    print(f"{result['what']}: {result['unit']}; median (lowest to highest) of {result['parameters']['repeats']} repeats")
    for name, row in rows.items():
        low, high = row["spread"]
        print(f"  {name:{width}}  {row['seconds']:8.4f} ({low:.4f} to {high:.4f})  {row['note']}".rstrip())
    low, high = result["spread"]["ratio"]
    print(f"baseline / ours: {result['ratio']:.1f} ({low:.1f} to {high:.1f} within a repeat), goal {result['goal']}")
    if "nifti_ratio" in result:
        print(f"nii.gz / ours: {result['nifti_ratio']:.1f}")
    if "volumes_per_second_and_core" in result:
        print(f"ours: {result['volumes_per_second_and_core']:.2f} volumes per second and core")
    print(f"device {result['device']}: {result['device_name']}; CPU threads: {result['threads']}")
    print("versions: " + ", ".join(f"{name} {number}" for name, number in result["versions"].items()))
    print("parameters:")
    for name, value in result["parameters"].items():
        print(f"  {name}: {by(value) if isinstance(value, (tuple, list)) else value}")
    print("the baseline's code:\n")
    print("\n".join("    " + line if line else "" for line in result["baseline_code"].rstrip().splitlines()), flush=True)


def device_name(device):
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}; baseline: {device_name('cpu')}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # another system than Linux, or a processor that gives no name
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    utils.run_script(main)
