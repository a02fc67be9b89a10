"""Two lung CTs of a public Python package, fetched with pip; nothing of the package is run."""

import hashlib
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from dino3d.files import TEXT

# The two CTs stand in the source distribution of pyradiomics, each with a mask of one tumour.
PACKAGE, VERSION = "pyradiomics", "3.0.1"
SHA256 = "47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5"
PATIENTS = ("lung1", "lung2")
IMAGES = {patient: f"{PACKAGE}-{VERSION}/data/{patient}_image.nrrd" for patient in PATIENTS}
LABELS = {patient: f"{PACKAGE}-{VERSION}/data/{patient}_label.nrrd" for patient in PATIENTS}


class FetchError(Exception):
    """A distribution could not be fetched, or is not the one expected; the message is one line."""


# pip asks every source distribution for its metadata, which would run its setup.py: foreign code,
# and this one fails on Python 3.12. This stand-in for setuptools answers instead.
BUILD_BACKEND = """
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
"""


def fetch_sdist(
    folder: Path | str, name: str = PACKAGE, version: str = VERSION, sha256: str = SHA256, timeout: float = 900
) -> Path:
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
    (stand_in / "setuptools" / "build_meta.py").write_text(BUILD_BACKEND.format(name=name, version=version), **TEXT)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n", **TEXT)
    downloads = folder / "downloads"

    # First on the path, so that it hides an installed setuptools. A relative entry would make
    # Python import from the unpacked distribution, in which pip runs the backend.
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(stand_in), *inherited]), "NO_COLOR": "1"}
    # --use-pep517: without it an older pip runs setup.py wherever setuptools and wheel are installed
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-build-isolation",
        "--use-pep517",
        "--no-binary",
        ":all:",
        "--dest",
        str(downloads),
        "--requirement",
        str(requirements),
    ]
    try:
        pip = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise FetchError(f"pip did not finish within {timeout:g} s") from None
    if pip.returncode != 0:
        raise FetchError(last_error_line(pip.stderr) or f"pip ended with exit code {pip.returncode}")

    archives = sorted(downloads.glob("*")) if downloads.is_dir() else []
    if len(archives) != 1:
        raise FetchError(f"pip downloaded {len(archives)} files for {name}=={version} instead of one")
    verify_sha256(archives[0], sha256)
    return archives[0]


def last_error_line(text: str) -> str:
    """The last line that pip marked as an error, without the mark; else the last line; else ""."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error:")]
    return errors[-1].partition(":")[2].strip() if errors else "".join(lines[-1:])


def verify_sha256(path: Path | str, sha256: str) -> None:
    """Raise FetchError unless the file has this digest."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise FetchError(f"{Path(path).name} has sha256 {found}, expected {sha256}")


def read_members(archive: Path | str, names: Sequence[str]) -> dict[str, bytes]:
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
