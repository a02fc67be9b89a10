"""Where the demo's data come from: two lung CTs of a public Python package, or synthetic chest phantoms."""
import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np

HU_MIN, HU_MAX = -1024, 3071  # what 12-bit scanners store

# The two CTs stand in the source distribution of pyradiomics, each with a mask of one tumour.
PACKAGE, VERSION = "pyradiomics", "3.0.1"
SHA256 = "47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5"
PATIENTS = ("lung1", "lung2")
IMAGES = {patient: f"{PACKAGE}-{VERSION}/data/{patient}_image.nrrd" for patient in PATIENTS}
LABELS = {patient: f"{PACKAGE}-{VERSION}/data/{patient}_label.nrrd" for patient in PATIENTS}


# ----------------------------------------------------------------------- fetching a source distribution with pip


class FetchError(Exception):
    """A distribution could not be fetched, or is not the one expected; the message is one line."""


# pip asks every source distribution for its metadata, which would run its setup.py: foreign code,
# and this one fails on Python 3.12. This stand-in for setuptools answers instead.
BUILD_BACKEND = '''
from pathlib import Path

class Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        folder = Path(metadata_directory, "{name}-{version}.dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return folder.name

__legacy__ = Backend()
'''


def fetch_sdist(folder, name=PACKAGE, version=VERSION, sha256=SHA256, timeout=900):
    """Download the source distribution of `name` with pip and verify it; nothing of it is run.

    pip's own configuration (index, proxy, certificates, links) applies.

    Args:
        folder: an existing empty folder, which receives the archive.
        sha256: hexadecimal digest, checked by pip and once more here.
        timeout: seconds after which pip is ended.
    Returns the path of the archive. Raises FetchError.
    """
    folder = Path(folder).resolve()
    stand_in = folder / "stand_in"
    (stand_in / "setuptools").mkdir(parents=True)
    (stand_in / "setuptools" / "__init__.py").touch()
    (stand_in / "setuptools" / "build_meta.py").write_text(BUILD_BACKEND.format(name=name, version=version))
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    downloads = folder / "downloads"

    # First on the path, so that it hides an installed setuptools. A relative entry would make
    # Python import from the unpacked distribution, in which pip runs the backend.
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(stand_in), *inherited]), "NO_COLOR": "1"}
    # --use-pep517: without it an older pip runs setup.py wherever setuptools and wheel are installed
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check",
               "--no-deps", "--no-build-isolation", "--use-pep517", "--no-binary", ":all:",
               "--dest", str(downloads), "--requirement", str(requirements)]
    try:
        pip = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                             text=True, errors="replace", timeout=timeout)
    except subprocess.TimeoutExpired:
        raise FetchError(f"pip did not finish within {timeout:g} s") from None
    if pip.returncode != 0:
        raise FetchError(last_error_line(pip.stderr) or f"pip ended with exit code {pip.returncode}")

    archives = sorted(downloads.glob("*")) if downloads.is_dir() else []
    if len(archives) != 1:
        raise FetchError(f"pip downloaded {len(archives)} files for {name}=={version} instead of one")
    verify_sha256(archives[0], sha256)
    return archives[0]


def last_error_line(text):
    """The last line that pip marked as an error, without the mark; else the last line; else ""."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error:")]
    return errors[-1].partition(":")[2].strip() if errors else "".join(lines[-1:])


def verify_sha256(path, sha256):
    """Raise FetchError unless the file has this digest."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise FetchError(f"{Path(path).name} has sha256 {found}, expected {sha256}")


def read_members(archive, names):
    """Read the named regular files of a tar archive into memory: dict of name to bytes.

    Nothing is unpacked. Raises FetchError where a name is missing or is no regular file.
    """
    contents = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name in names and member.isfile():
                    contents[member.name] = tar.extractfile(member).read()
    except tarfile.TarError as error:
        raise FetchError(f"{Path(archive).name}: {error}") from None
    missing = [name for name in names if name not in contents]
    if missing:
        raise FetchError(f"{Path(archive).name} does not hold {', '.join(missing)}")
    return contents


# --------------------------------------------------------------------------------------------------------------- phantom


def chest_phantom(seed, shape=(320, 256, 96), spacing=(1.0, 1.0, 3.0)):
    """The volume and affine of `labelled_phantom`, without its nodules."""
    return labelled_phantom(seed, shape, spacing)[:2]


def labelled_phantom(seed, shape=(320, 256, 96), spacing=(1.0, 1.0, 3.0)):
    """A synthetic chest CT: body, lungs with vessels, heart, spine, ribs, table, nodules, noise.

    The anatomy fills the field of view whatever its size. It is not symmetric: the heart and the
    smaller lung lie on the patient's left (low x), the spine and the table behind (low y), the
    domes of the diaphragm below (low z).

    Args:
        seed: integer; the same seed gives the same volume.
        shape: voxels (X, Y, Z).
        spacing: millimetres per voxel (x, y, z).
    Returns the volume, int16 (X, Y, Z) in RAS order, in HU; its affine, float64 (4, 4); and its nodules, uint8
    (X, Y, Z), numbered from 1, and 0 elsewhere.
    """
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    shape, spacing = tuple(int(n) for n in shape), np.array(spacing, dtype=np.float64)
    extent = np.array(shape) * spacing  # mm
    scale = (extent / (320, 256, 288)).min()  # of everything given in mm below
    # x from left to right, y from back to front, z from feet to head, each from -1 to 1
    x, y, z = np.meshgrid(*((2 * np.arange(n, dtype=np.float32) + 1) / n - 1 for n in shape),
                          indexing="ij", sparse=True)
    hu = np.full(shape, -1000, dtype=np.float32)

    def paint(mask, value):
        hu[np.broadcast_to(mask, shape)] = value

    def ellipse(centre, radii):
        """Squared distance from the centre in the axial plane, 1 on the outline: (X, Y, 1)."""
        return ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2

    # Trunk: fat, muscle; the table below it is a shallow trough
    size = rng.uniform(0.93, 1.0)
    trunk = ellipse((0, 0.1), (0.9 * size, 0.72 * size))
    table = -0.70 + 0.06 * x ** 2
    paint((y < table) & (y > table - 0.07) & (abs(x) < 0.8), -150)
    paint(trunk < 1, -100)
    paint(trunk < 0.9, 40)

    # Lungs: between the diaphragm, which stands higher on the right, the mediastinum and the ribs
    heart_radius = rng.uniform(0.9, 1.1)
    heart = ellipse((-0.15, 0.2), (0.33 * heart_radius, 0.33)) + ((z + 0.3) / (0.38 * heart_radius)) ** 2
    aorta = ellipse((-0.18, -0.28), (0.07, 0.085))
    lungs = np.zeros(shape, dtype=bool)
    for side, dome in ((-1, rng.uniform(-0.75, -0.65)), (1, rng.uniform(-0.6, -0.5))):
        lung = ellipse((side * 0.41, 0.06), (0.33, 0.54))
        lungs |= (lung < 1 - np.clip((z + 0.1) / 1.02, 0, 1) ** 2.5) & (z > dome - 0.35 * lung)
    lungs &= (abs(x) > 0.09) & (trunk < 0.68) & (heart > 1) & (aorta > 1)
    paint(lungs, rng.uniform(-870, -830))

    # Vessels: random trees from each hilum, thinner at every fork
    def stamp(mask, position, radius):
        """Set an ellipsoid in the mask: position and radius in mm, at least one voxel thick."""
        radii = np.maximum(radius, 0.5 * spacing)
        first = np.maximum(np.floor((position - radii) / spacing), 0).astype(int)
        last = np.minimum(np.ceil((position + radii) / spacing), shape).astype(int)
        if (first >= last).any():
            return
        a, b, c = (((np.arange(first[k], last[k]) + 0.5) * spacing[k] - position[k]) / radii[k] for k in range(3))
        inside = (a ** 2)[:, None, None] + (b ** 2)[:, None] + c ** 2 <= 1
        mask[first[0]:last[0], first[1]:last[1], first[2]:last[2]] |= inside

    def grow(position, heading, radius, length, forks):
        """Grow a branch that wanders and tapers, then the branches it forks into."""
        step = max(0.8 * radius, 0.8 * scale)
        steps = max(int(length / step), 1)
        for k in range(steps):
            heading = heading + rng.normal(0, 0.12, 3)
            heading /= np.linalg.norm(heading)
            position = position + step * heading
            stamp(vessels, position, radius * (1 - 0.35 * k / steps))
        for _ in range(2 if forks else 0):
            grow(position, heading + rng.normal(0, 0.5, 3), 0.65 * radius, 0.75 * length, forks - 1)

    vessels = np.zeros(shape, dtype=bool)
    for side in (-1, 1):
        hilum = 0.5 * (np.array([side * 0.13, 0.0, 0.0]) + 1) * extent
        for _ in range(12):
            heading = rng.normal(0, 1, 3) * (0.4, 1, 1) + (side * 0.9, 0, 0)
            grow(hilum, heading / np.linalg.norm(heading), 4.5 * scale, 42 * scale, forks=3)
    paint(vessels & lungs, 40)

    # Nodules: solid, the last one of ground glass
    places = np.argwhere(lungs)
    radii = rng.uniform(3, 10, size=rng.integers(3, 6)) * scale  # mm
    nodules = np.zeros(shape, dtype=np.uint8)
    for k, radius in enumerate(radii if len(places) else ()):
        nodule = np.zeros(shape, dtype=bool)
        stamp(nodule, (places[rng.integers(len(places))] + 0.5) * spacing, radius)
        paint(nodule & lungs, -600 if k == len(radii) - 1 else 30)
        nodules[nodule & lungs] = k + 1

    # Mediastinum, airway and bones
    paint(heart < 1, 45)
    paint((aorta < 1) & (z < 0.4), 45)
    paint((ellipse((0, 0.0), (0.055, 0.07)) < 1) & (z > 0.1), -980)
    paint((trunk > 0.72) & (trunk < 0.82) & ((z + 0.35 * y) % 0.2 < 0.08), 400)
    paint((abs(x) < 0.09) & (trunk > 0.7) & (trunk < 0.82) & (y > 0) & (z > -0.4), 350)
    vertebrae = ellipse((0, -0.36), (0.11, 0.13)) < 1
    paint(vertebrae, 380)
    paint(vertebrae & (z % 0.22 > 0.17), 90)  # discs
    paint((abs(x) < 0.035) & (y > -0.58) & (y < -0.45), 400)
    paint(ellipse((0, -0.5), (0.05, 0.05)) < 1, 20)

    hu = gaussian_filter(hu, (0.6, 0.6, 0.3))  # partial volume, in voxels
    hu += 18 * rng.standard_normal(shape, dtype=np.float32)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -0.5 * (np.array(shape) - 1) * spacing  # the origin is the centre
    return np.clip(np.rint(hu), HU_MIN, HU_MAX).astype(np.int16), affine, nodules
