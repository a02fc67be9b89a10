"""Makes the modules of the repository root importable, and finds the real CT where it is at hand."""

import signal
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    # A shell that starts the tests in the background lets them, and all that they start, ignore Ctrl-C
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "gpu: needs a GPU")


@pytest.fixture(autouse=True)
def signals_as_before():
    """A script that has been run in this process leaves its handlers of signals, as it takes the process for ended."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared_data():
    """Folder with real thorax CT beside the checkout; tests that can do without generate a phantom instead."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return folder


@pytest.fixture(scope="session")
def volumes(tmp_path_factory):
    """Folder in the pre-training layout with eight volumes of 80 x 72 x 40 voxels: real CT, or a phantom without it."""
    import nibabel
    import numpy as np

    from dino3d.data.hdf5 import write_volume
    from dino3d.prepare.phantoms import chest_phantom

    folder = tmp_path_factory.mktemp("volumes")
    scan = ROOT.parent / "shared" / "data" / "ct" / "lungdx_a0001.nii.gz"
    if scan.is_file():
        image = nibabel.as_closest_canonical(nibabel.load(scan))
        volume, affine = np.asarray(image.dataobj).astype(np.int16), image.affine
    else:
        volume, affine = chest_phantom(0, shape=(320, 256, 64))
    for i in range(8):
        x, y = 40 + 90 * (i % 3), 20 + 60 * (i // 3)
        corner = affine @ [x, y, 12, 1]
        moved = np.column_stack([affine[:, :3], corner])
        write_volume(folder / f"patient{i}" / "t0" / "scan.hdf5", volume[x : x + 80, y : y + 72, 12:52], moved)
    return folder


@pytest.fixture
def silent(capfd):
    """What a library has to say of a file reaches nobody but as a reason: no text and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """The folder of small scripts that a study runs in place of those that train."""
    from run_study import write_stubs

    from dino3d.study import jobs

    folder = write_stubs(tmp_path / "scripts")
    monkeypatch.setattr(jobs, "ROOT", folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return folder
