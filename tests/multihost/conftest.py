"""Two machines for all tests of a file, or one visible reason why there are none."""

import contextlib

import hosts
import psutil
import pytest


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Hosts `red` and `blue`. They share all of the disk but the path `apart`, which is a folder of its own on each."""
    if reason := hosts.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "apart").mkdir()
    with hosts.Cluster(folder / "cluster", 2, private=(folder / "apart",)) as found:
        found.shared, found.apart = folder, folder / "apart"
        yield found


@pytest.fixture(autouse=True)
def nothing_stays(cluster):
    """A test that fails leaves no processes to the next one."""
    yield
    for process in (process for host in cluster.hosts for process in host.processes()):
        with contextlib.suppress(psutil.Error):
            process.kill()
