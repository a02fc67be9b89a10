"""Makes the modules of the repository root importable, and finds the real CT where it is at hand."""
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU")


@pytest.fixture(scope="session")
def shared_data():
    """Folder with real thorax CT beside the checkout; tests that can do without generate a phantom instead."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return folder
